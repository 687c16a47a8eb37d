"""Remote shards for tests of their cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from splatshard.pipeline.data import cache as cache_module
from splatshard.pipeline.data.cache import ShardCache


class Remote:
    """Local files that count how often they are fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []

    def put(self, name: str, data: bytes) -> tuple[str, str, int, str]:
        """A file; the arguments of `ShardCache.open` for it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path), "", len(data), hashlib.sha256(data).hexdigest()


def remote_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """What is opened for reading is counted from now on."""
    found = Remote(folder)
    open_read = cache_module.fs.open_read

    @contextmanager
    def counted(url: str) -> Iterator[BinaryIO]:
        found.fetched.append(Path(url).name)
        with open_read(url) as stream:
            yield stream

    monkeypatch.setattr(cache_module.fs, "open_read", counted)
    return found


def read(cache: ShardCache, shard: tuple[str, str, int, str]) -> bytes:
    with cache.open(*shard) as stream:
        return stream.read()


def cached(folder: Path) -> list[int]:
    """Sizes of the files in the cache."""
    return sorted(path.stat().st_size for path in folder.iterdir() if path.is_file())
