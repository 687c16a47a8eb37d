"""Markers, done, failed and broken; damage in a destination is found and named."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from splatshard.pipeline.shards.commit import (
    clean_staging,
    mark_failed,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    SourceError,
    StorageError,
)
from splatshard.schemas.shard import FailedShard, to_json
from splatshard.schemas.splats import FORMAT_VERSION
from tests.rows import FORMATS, config_of, make_ref
from tests.unit.committing import commit_shard, snapshot


def test_failed_markers(tmp_path: Path) -> None:
    mark_failed(str(tmp_path), make_ref(), config_of(), SourceError("cut at byte 5"))
    (marker,) = read_markers(str(tmp_path)).values()
    assert isinstance(marker, FailedShard)
    assert (marker.error, marker.message) == ("SourceError", "cut at byte 5")
    first = snapshot(tmp_path)
    mark_failed(str(tmp_path), make_ref(), config_of(), SourceError("cut at byte 5"))
    assert snapshot(tmp_path) == first
    manifest = commit_shard(tmp_path)
    assert read_markers(str(tmp_path)) == {"00000000": manifest}


def test_a_done_marker_hides_a_failed_replacement(tmp_path: Path) -> None:
    manifest = commit_shard(tmp_path)
    mark_failed(str(tmp_path), make_ref(), config_of("webdataset"), SourceError("cut"))
    assert read_markers(str(tmp_path)) == {"00000000": manifest}
    clean_staging(str(tmp_path))  # of another fingerprint, so it stays
    assert (tmp_path / "00000000.failed.json").exists()


def test_broken_markers_come_back_as_values(tmp_path: Path) -> None:
    manifest = commit_shard(tmp_path)
    (tmp_path / "a.json").write_bytes(b"\xff{")
    (tmp_path / "b.failed.json").write_text("{}")
    moved = dataclasses.replace(manifest, name="d")
    (tmp_path / "c.json").write_text(to_json(moved))  # of another shard, whose own is gone
    (tmp_path / "_run.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    markers = read_markers(str(tmp_path))
    assert list(markers) == ["00000000", "a", "b", "c"]
    for name, message in (("a", "not JSON"), ("b", "missing fields"), ("c", "of shard 'd'")):
        assert isinstance(markers[name], CorruptShardError)
        assert message in str(markers[name])
        assert f"{tmp_path}/{name}." in str(markers[name])


def test_newer_markers_raise(tmp_path: Path) -> None:
    manifest = commit_shard(tmp_path)
    document = json.loads(to_json(manifest)) | {
        "format_version": FORMAT_VERSION + 1,
        "new_field": 1,
    }
    (tmp_path / "00000000.json").write_text(json.dumps(document))
    with pytest.raises(FormatVersionError, match=r"00000000\.json has format version 3"):
        read_markers(str(tmp_path))


def test_no_folder_has_no_markers(tmp_path: Path) -> None:
    assert read_markers(str(tmp_path / "none")) == {}


# Verification of what lies in DST


@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_found_and_named(tmp_path: Path, format: str) -> None:
    manifest = commit_shard(tmp_path, config_of(format))
    path = tmp_path / manifest.data_file
    data = path.read_bytes()
    marker = tmp_path / "00000000.json"

    def problem() -> str:
        (text,) = verify_shard(f"{tmp_path}/", manifest)
        assert str(path) in text
        assert text.endswith(f"delete {marker} and run convert again")
        return text

    path.write_bytes(data[:-1])
    assert f"{len(data) - 1} bytes, its marker says {len(data)}" in problem()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "SHA-256" in problem()
    path.unlink()
    assert "No such file" in problem()


def test_a_shard_that_may_not_be_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To redo it would help nobody."""
    manifest = commit_shard(tmp_path)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(LocalFileSystem, "open", refused)
    with pytest.raises(StorageError, match=r"denied. check what this user may do there$"):
        verify_shard(str(tmp_path), manifest)


@pytest.mark.parametrize("format", FORMATS)
def test_a_marker_that_tells_other_things_is_found(tmp_path: Path, format: str) -> None:
    manifest = commit_shard(tmp_path, config_of(format))
    dst = str(tmp_path)

    def problems(**change: Any) -> list[str]:
        return verify_shard(dst, dataclasses.replace(manifest, **change))

    (text,) = problems(statistics={**manifest.statistics, "psnr_mean": 99.0})
    assert "statistics are" in text
    assert len(problems(samples=9, counts={"ok": 9})) == 2
    (text,) = problems(inputs={"recipe": {}, "source": {}})
    assert "another recipe" in text
    (text,) = problems(inputs={**manifest.inputs, "source": {}})
    assert "fingerprint" in text
    other = "webdataset" if format == "parquet" else "parquet"
    (text,) = problems(format=other)
    assert "cannot be read" in text
