"""All file access: reading sources and the few things a destination needs, over fsspec URLs.

The only module that imports fsspec. Paths without a scheme are local.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import SourceError, StorageError


@dataclass(frozen=True)
class Stat:
    """Size in bytes and the store's etag (the modification time in µs on a local disk)."""

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


@contextmanager
def storage_errors(path: Path | str, verb: str = "write") -> Iterator[None]:
    """OSErrors of the block as StorageError "cannot {verb} {path}", with the remedy."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            text = "no space left: free some"
        else:
            text = f"{e.strerror or e}: check permissions and the disk"
        raise StorageError(
            f"cannot {verb} {path}: {text}, then run the same command again (committed shards "
            "stay as they are)"
        ) from e


def absolute(url: str) -> str:
    """`url` as every process understands it: local paths absolute, others with their scheme."""
    fs, path = _filesystem(url)
    if isinstance(fs, LocalFileSystem) and ".." in path.split("/"):
        path = os.path.realpath(path)
    return _with_scheme(fs, url, path)


def stat(url: str) -> Stat:
    """Raises SourceError when there is nothing at `url`."""
    fs, path = _filesystem(url)
    try:
        info = fs.info(path)
    except OSError as e:
        raise SourceError(f"cannot read {url}: {e}") from e
    return _stat(info)


def stats(urls: Iterable[str]) -> dict[str, Stat]:
    """The files among `urls`, by URL; absent ones and folders are left out.

    Neighbours come from one listing of their folder: a brace pattern over 12,896 shards is then one
    request. HTTP has no listing that tells sizes, so there each file is asked for.
    """
    wanted: dict[str, list[str]] = {}
    for url in urls:
        wanted.setdefault(url.rpartition("/")[0], []).append(url)
    found: dict[str, Stat] = {}
    for siblings in wanted.values():
        fs, path = _filesystem(siblings[0])
        if len(siblings) < 8 or "http" in fs.protocol:
            with ThreadPoolExecutor(16) as pool:
                infos = list(pool.map(_info_or_none, siblings))
        else:
            with _reading(siblings[0]):
                infos = _list_or_nothing(fs, fs._parent(path))
            listing = {fs._strip_protocol(info["name"]): info for info in infos}
            infos = [_follow(listing.get(_filesystem(url)[1], {})) for url in siblings]
        found |= {
            url: _stat(info)
            for url, info in zip(siblings, infos, strict=True)
            if info and info["type"] == "file"
        }
    return found


def _list_or_nothing(fs: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    try:
        return fs.ls(path, detail=True)
    except FileNotFoundError:
        return []


def _info_or_none(url: str) -> dict[str, Any] | None:
    fs, path = _filesystem(url)
    try:
        with _reading(url):
            return fs.info(path)
    except FileNotFoundError:
        return None


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Permission and network errors as SourceError; what is absent stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as e:
        raise SourceError(f"cannot read {url}: {e}") from e


def _stat(info: dict[str, Any]) -> Stat:
    etag = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
    if isinstance(etag, float):
        etag = round(etag * 1e6)
    return Stat(int(info["size"] or 0), str(etag).strip('"'))


def is_dir(url: str) -> bool:
    fs, path = _filesystem(url)
    return fs.isdir(path)


def exists(url: str) -> bool:
    fs, path = _filesystem(url)
    return fs.exists(path)


def list_folder(url: str) -> dict[str, Stat]:
    """Names of the files in the folder `url` itself, sorted; empty when there is no such folder."""
    fs, path = _filesystem(url)
    infos = {fs._strip_protocol(info["name"]): info for info in _list_or_nothing(fs, path)}
    return {
        name.rpartition("/")[2]: _stat(info)
        for name, info in sorted(infos.items())
        if info["type"] == "file"
    }


def read_bytes(url: str) -> bytes:
    """All bytes of a small file. Raises FileNotFoundError and other OSErrors."""
    fs, path = _filesystem(url)
    return fs.cat_file(path)


def glob(pattern: str) -> dict[str, Stat]:
    """Files that match, in sorted order, each with the scheme of `pattern`."""
    fs, path = _filesystem(pattern)
    with _reading(pattern):
        return _files(fs, pattern, fs.glob(path, detail=True))


def find(url: str) -> dict[str, Stat]:
    """All files below the folder `url`, in sorted order, each with the scheme of `url`."""
    fs, path = _filesystem(url)
    with _reading(url):
        return _files(fs, url, fs.find(path, detail=True))


def _files(fs: fsspec.AbstractFileSystem, url: str, infos: dict[str, Any]) -> dict[str, Stat]:
    followed = {path: _follow(info) for path, info in sorted(infos.items())}
    return {
        _with_scheme(fs, url, path): _stat(info)
        for path, info in followed.items()
        if info and info["type"] == "file"
    }


def _follow(info: dict[str, Any]) -> dict[str, Any] | None:
    """What a local link leads to (Hugging Face's cache is made of links); None if broken."""
    return _info_or_none(info["name"]) if info.get("islink") else info


def _with_scheme(fs: fsspec.AbstractFileSystem, url: str, path: str) -> str:
    return fs.unstrip_protocol(path) if "://" in url else path


@contextmanager
def local_copy(url: str, digest: hashlib._Hash) -> Iterator[str]:
    """A local path with the bytes of `url`, which also went into `digest`.

    For formats that are not read front to back. A local file is read once for the digest and then
    again; a remote one is transferred once, into a temporary file. Raises SourceError.
    """
    fs, path = _filesystem(url)
    local = isinstance(fs, LocalFileSystem)
    with open_read(url) as stream, tempfile.NamedTemporaryFile(prefix="splatshard-") as copy:
        try:
            while block := stream.read(1 << 20):
                digest.update(block)
                if not local:
                    copy.write(block)
            copy.flush()
        except OSError as e:
            raise SourceError(f"cannot read {url}: {e}") from e
        yield path if local else copy.name


def sha256(url: str) -> str:
    """Hex digest of the whole object, streamed."""
    with open_read(url) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
