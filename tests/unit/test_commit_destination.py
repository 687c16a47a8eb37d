"""Destinations: created, left clean, or refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from splatshard.pipeline.shards.commit import (
    check_destination,
    clean_staging,
    mark_failed,
    publish,
    staged_file,
)
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.storage import staging
from splatshard.schemas.errors import (
    SourceError,
    StorageError,
    UsageError,
)
from tests.rows import config_of, make_ref, make_rows, write_shard
from tests.unit.committing import DIGEST, snapshot


def test_a_destination_is_created_and_left_clean(tmp_path: Path) -> None:
    check_destination(str(tmp_path / "a" / "b"))
    check_destination(f"file://{tmp_path}/c")
    assert snapshot(tmp_path) == {"a": None, "a/b": None, "c": None}


def test_a_destination_may_be_a_file_url(tmp_path: Path) -> None:
    dst = f"file://{tmp_path}/splats/"
    check_destination(dst)
    with staged_file(dst, "00000000") as path:
        assert path.parent == tmp_path / "splats" / "_staging"
        write_shard(path, make_rows(4))
        manifest = publish(dst, path, make_ref(), config_of(), DIGEST)
    mark_failed(dst, make_ref("b"), config_of(), SourceError("cut"))
    clean_staging(dst)
    assert sorted(snapshot(tmp_path / "splats")) == [
        manifest.data_file,
        "00000000.json",
        "b.failed.json",
    ]
    assert verify_shard(dst, manifest) == []


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_destination_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is not a folder; choose another"):
        check_destination(str(tmp_path / "file" / below))


def test_an_unwritable_destination_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(staging, "_create", refuse)
    with pytest.raises(StorageError, match="Read-only file system: check permissions"):
        check_destination(str(tmp_path))


@pytest.mark.parametrize("dst", ["gs://b/x", "https://u:pw@example.org/x", "s3://"])
def test_other_destinations_are_refused(dst: str) -> None:
    with pytest.raises(UsageError, match=r"only local folders and s3://bucket") as caught:
        check_destination(dst)
    assert "pw" not in str(caught.value)


def test_a_destination_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    """Ray did not start, and was blamed."""
    with pytest.raises(UsageError, match=r"DST .*x\\udcff: that path is no UTF-8"):
        check_destination(f"{tmp_path}/x\udcff")


def test_a_destination_that_another_process_is_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears between two looks at it."""
    real = os.path.lexists

    def appears(path: str | Path) -> bool:
        Path(path).mkdir(exist_ok=True)
        return real(path)

    monkeypatch.setattr(os.path, "lexists", appears)
    check_destination(str(tmp_path / "out"))
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        check_destination(str(tmp_path / "file"))
