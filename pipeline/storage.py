"""All file access: reading sources and the few things a destination needs, over fsspec URLs.

The only module that imports fsspec. Paths without a scheme are local.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import fsspec
from fsspec.core import url_to_fs

from schemas.errors import SourceError


@dataclass(frozen=True)
class Stat:
    """Size in bytes and the store's etag (the modification time in ns on a local disk)."""

    size_bytes: int
    etag: str


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as e:
        raise SourceError(
            f"{url}: no driver for this kind of address ({e}); install its fsspec driver"
        ) from e


@contextmanager
def open_read(url: str) -> Iterator[BinaryIO]:
    """A buffered binary stream over `url`. Raises SourceError when it cannot be opened."""
    fs, path = _filesystem(url)
    try:
        stream = fs.open(path, "rb")
    except OSError as e:
        raise SourceError(f"cannot open {url}: {e}") from e
    with stream:
        yield stream


def stat(url: str) -> Stat:
    """Raises SourceError when there is nothing at `url`."""
    fs, path = _filesystem(url)
    try:
        info = fs.info(path)
    except OSError as e:
        raise SourceError(f"cannot read {url}: {e}") from e
    etag = info.get("ETag") or info.get("etag") or info.get("mtime")
    if isinstance(etag, float):
        etag = round(etag * 1e6)
    return Stat(int(info["size"]), str(etag).strip('"'))


def is_dir(url: str) -> bool:
    fs, path = _filesystem(url)
    return fs.isdir(path)


def exists(url: str) -> bool:
    fs, path = _filesystem(url)
    return fs.exists(path)


def glob(pattern: str) -> list[str]:
    """Files that match, sorted, each with the scheme of `pattern`."""
    fs, path = _filesystem(pattern)
    return sorted(_with_scheme(fs, pattern, p) for p in fs.glob(path) if not fs.isdir(p))


def find(url: str) -> list[str]:
    """All files below the folder `url`, sorted, each with the scheme of `url`."""
    fs, path = _filesystem(url)
    return sorted(_with_scheme(fs, url, p) for p in fs.find(path))


def _with_scheme(fs: fsspec.AbstractFileSystem, url: str, path: str) -> str:
    return fs.unstrip_protocol(path) if "://" in url else path


def sha256(url: str) -> str:
    """Hex digest of the whole object, streamed."""
    with open_read(url) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
