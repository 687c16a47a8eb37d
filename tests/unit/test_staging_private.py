"""Folders that somebody else made first: nothing is staged in them, nor deleted through them."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from splatshard.pipeline.shards.commit import clean_staging, staged_file
from splatshard.pipeline.storage import atomic, staging
from splatshard.pipeline.storage.fs import local_copy
from splatshard.schemas.errors import StorageError

REMOTE = "s3://bucket/splats"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's files are staged; nothing is there yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"splatshard-{os.geteuid()}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_it_is_this_users_alone(scratch: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with staged_file(REMOTE, "a") as path:
            assert path.parent.parent == scratch
            assert mode(scratch) == 0o700
    finally:
        os.umask(before)


def test_what_others_could_only_read_is_closed_to_them(scratch: Path) -> None:
    """An older version made it so."""
    scratch.mkdir(mode=0o755)
    with staged_file(REMOTE, "a"):
        assert mode(scratch) == 0o700


def by_another_user(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    scratch.with_name("splatshard-54321").mkdir(mode=0o700)


def open_to_all(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch.mkdir()
    scratch.chmod(0o777)


def a_link(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch.parent / "theirs").mkdir()
    scratch.symlink_to(scratch.parent / "theirs")


def a_file(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch.touch()


def a_link_in_it(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch.parent / "theirs").mkdir()
    scratch.mkdir(mode=0o700)
    (scratch / "_staging").symlink_to(scratch.parent / "theirs")


@pytest.mark.parametrize("made", [by_another_user, open_to_all, a_link, a_file, a_link_in_it])
def test_a_folder_that_may_be_anybodys_is_refused(
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    made(scratch, monkeypatch)
    for folder in scratch.parent.iterdir():
        if folder.is_dir():
            (folder / "old").touch()
            os.utime(folder / "old", (1, 1))
    before = sorted(scratch.parent.rglob("*"))
    with pytest.raises(StorageError, match="delete it"), staged_file(REMOTE, "a"):
        pass
    with pytest.raises(StorageError, match=r"splatshard-.*delete it"):
        staging.scratch()
    assert sorted(scratch.parent.rglob("*")) == before


def test_a_link_in_a_destination_leads_to_no_deletion(tmp_path: Path) -> None:
    """Who owns DST would otherwise have the old files of whoever converts into it deleted."""
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    os.utime(thesis, (1, 1))
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "_staging").symlink_to(thesis.parent)
    for use in (
        lambda: clean_staging(str(dst)),
        lambda: staged_file(str(dst), "a").__enter__(),
        lambda: atomic.exclusive(str(dst), "a").__enter__(),
    ):
        with pytest.raises(StorageError, match=r"_staging is a link, or no folder.*delete it"):
            use()
    assert list(thesis.parent.iterdir()) == [thesis]


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "_staging").mkdir()
    (tmp_path / "_staging" / "a.lock").symlink_to(tmp_path / "made")
    with pytest.raises(StorageError), atomic.exclusive(str(tmp_path), "a"):
        pass
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_tmpdir_that_cannot_be_written_is_said(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=f"cannot write {scratch}: "), staged_file(REMOTE, "a"):
        pass


def test_no_tmpdir_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose disk is read-only."""

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    for use in (
        lambda: staged_file(REMOTE, "a"),
        lambda: local_copy("memory://a.parquet", None).__enter__(),  # type: ignore[arg-type]
    ):
        with pytest.raises(StorageError, match=r"No usable .*'/tmp'.*set TMPDIR to one"):
            use()
