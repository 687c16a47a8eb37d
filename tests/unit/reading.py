"""What tests of reading share: a file as a shard, its samples, their statuses, a tar cut short."""

from __future__ import annotations

import hashlib
import tarfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from splatshard.pipeline.source.read import RawSample, read
from splatshard.schemas.shard import SKIP_STATUSES, ShardRef
from tests.make import datacomp_tar, jpeg, write_tar

IMAGE = jpeg()


def ref_of(path: Path, limit: int | None = None) -> ShardRef:
    kind = path.suffix[1:]
    size = path.stat().st_size
    return ShardRef(
        name=path.stem, kind=kind, urls=(str(path),), size_bytes=size, etag="", limit=limit
    )


def never() -> AbstractContextManager[BinaryIO]:
    """In place of what opens a tar again, where it has no links."""
    raise AssertionError("opened a second time")


def read_all(path: Path, limit: int | None = None) -> list[RawSample]:
    return list(read(ref_of(path, limit), hashlib.sha256()))


def read_members(tmp_path: Path, *members: tuple[str, bytes]) -> list[RawSample]:
    return read_all(write_tar(tmp_path / "a.tar", members))


def statuses(samples: list[RawSample]) -> list[str | None]:
    found = [s.error.status if s.error else None for s in samples]
    assert all(status is None or status in SKIP_STATUSES for status in found)
    return found


def cut(tmp_path: Path, size: int) -> Path:
    whole = datacomp_tar(tmp_path / "whole.tar").read_bytes()
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[:size])
    return path


def end_of_second_sample(tmp_path: Path) -> int:
    with tarfile.open(datacomp_tar(tmp_path / "whole.tar")) as archive:
        return archive.getmembers()[6].offset
