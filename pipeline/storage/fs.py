"""All file access: reading sources and destinations, and writing small files, over fsspec URLs.

The only module that imports fsspec. Paths without a scheme are local. What drivers raise becomes
our errors here (errors.py says which); messages hold no secrets.

A process has one driver per kind of address, shared by its threads (`use_options` makes new ones).
s3fs would retry a request five times in under two seconds, and requests inside of requests; here
botocore alone retries requests, and retry.py what breaks while an answer is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from splatshard.pipeline.storage.errors import (
    as_error,
    driver_errors,
    is_absent,
    source_errors,
    storage_errors,
)
from splatshard.pipeline.storage.options import PACKAGES, options_of, redact, scheme_of, set_options
from splatshard.pipeline.storage.retry import RetryingStream, with_retries
from splatshard.pipeline.storage.s3 import is_s3, s3_listing
from splatshard.pipeline.storage.staging import scratch, staged
from splatshard.pipeline.storage.walk import walk
from splatshard.pipeline.storage.web import WebFile
from splatshard.schemas.errors import SourceError, UsageError

T = TypeVar("T")


class Digest(Protocol):
    """What bytes are put into as they are read: one of hashlib's, or what stands for it."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes and the store's etag (the modification time in µs on a local disk, that which a
    web server without etags gives), empty where the store tells neither."""

    size_bytes: int
    etag: str


# Drivers

_drivers: dict[tuple[object, ...], fsspec.AbstractFileSystem] = {}
_lock = threading.Lock()


def use_options(options: Mapping[str, Any]) -> None:
    """Options of remote URLs' drivers in this process, from now on (`--storage-options`).

    An object under the name of a scheme (`{"s3": {...}, "https": {...}}`) is for that scheme; all
    else is for every scheme but http(s).
    """
    with _lock:
        set_options(options)
        _drivers.clear()


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def driver(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The driver for `url` and its name there. Raises SourceError when there is none, UsageError
    when it does not take the options."""
    if is_local(url):
        return _local_driver(), LocalFileSystem._strip_protocol(url)
    scheme = scheme_of(url)
    try:
        cls = fsspec.get_filesystem_class(url.partition("://")[0])
        options = options_of(scheme)
    except ImportError as e:
        raise SourceError(
            f"{redact(url)}: {scheme}:// needs the package {PACKAGES.get(scheme, scheme)}: "
            "install it here and on every worker"
        ) from e
    except ValueError as e:
        raise SourceError(
            f"{redact(url)}: {scheme}:// is unknown; give a path, s3://, gs:// or https://, or "
            "install its fsspec driver"
        ) from e
    of_url = cls._get_kwargs_from_urls(url)
    key = (os.getpid(), scheme, repr(of_url))
    with _lock:
        if key not in _drivers:
            _drivers[key] = _connect(scheme, cls, options | of_url)
        return _drivers[key], cls._strip_protocol(url)


_local_driver = cache(LocalFileSystem)
"""To look for it in fsspec's own cache takes longer than to list a file."""


def _connect(scheme: str, cls: Any, options: dict[str, Any]) -> fsspec.AbstractFileSystem:
    try:
        fs = cls(**options, use_listings_cache=False, skip_instance_cache=True)
        if is_s3(fs):
            fs.retries = 1
            fs.connect()
    except (*driver_errors(), TypeError, ValueError, KeyError) as e:
        what = f"{scheme}:// cannot be used with these --storage-options and environment"
        raise as_error(e, what, UsageError) from e
    return fs


def _asked(fs: fsspec.AbstractFileSystem, path: str, call: Callable[[], T]) -> T:
    """`call()`, patiently. What S3 says to a HEAD that it refuses has no body, so a listing is
    asked for the reason."""
    try:
        return with_retries(call)
    except PermissionError:
        if is_s3(fs):
            next(s3_listing(fs, fs._parent(path)), None)
        raise


# Reading


@contextmanager
def open_read(url: str) -> Iterator[BinaryIO]:
    """A binary stream over `url`. It is not `seekable` where a web server sends no ranges: a way
    back then begins anew.

    Raises SourceError when it cannot be opened, and UnavailableError; so do a remote one's reads.
    """
    fs, path = driver(url)
    on_the_web = "http" in fs.protocol
    try:
        raw: Any = _asked(
            fs, path, lambda: WebFile(fs, path) if on_the_web else fs.open(path, "rb")
        )
    except driver_errors() as e:
        raise as_error(e, f"cannot open {url}", SourceError) from e
    with raw if is_local(url) else RetryingStream(url, raw) as stream:
        yield cast("BinaryIO", stream)


@contextmanager
def open_anywhere(url: str) -> Iterator[BinaryIO]:
    """As `open_read`, to read here and there: of a copy, where a web server sends no ranges."""
    with open_read(url) as stream:
        if stream.seekable():
            yield stream
            return
    with local_copy(url, hashlib.sha256()) as path, open_read(path) as stream:
        yield stream


def absolute(url: str) -> str:
    """`url` as every process understands it: local paths absolute, others with their scheme."""
    fs, path = driver(url)
    if isinstance(fs, LocalFileSystem):
        path = re.sub(r"(?<=.)/(\.?/)+", "/", path).removesuffix("/.")  # `find .` writes ./a.jpg
        path = os.path.realpath(path) if ".." in path.split("/") else path
    return _with_scheme(fs, url, path)


def stat(url: str) -> Stat:
    """Raises SourceError when there is nothing at `url`, and UnavailableError."""
    fs, path = driver(url)
    try:
        return _stat(_asked(fs, path, lambda: fs.info(path)))
    except driver_errors() as e:
        raise as_error(e, f"cannot read {url}", SourceError) from e


def stats(urls: Iterable[str]) -> dict[str, Stat]:
    """The files among `urls`, by URL; absent ones and folders are left out.

    Neighbours come from one listing of their folder: a brace pattern over 12,896 shards is then a
    few requests. HTTP has no listing that tells sizes, so there each file is asked for. Raises as
    `stat`.
    """
    wanted: dict[str, list[str]] = {}
    for url in urls:
        wanted.setdefault(url.rpartition("/")[0], []).append(url)
    found: dict[str, Stat] = {}
    for siblings in wanted.values():
        fs, path = driver(siblings[0])
        if len(siblings) < 8 or "http" in fs.protocol:
            with ThreadPoolExecutor(16) as pool:
                infos = list(pool.map(_info_or_none, siblings))
            found |= {
                url: _stat(info)
                for url, info in zip(siblings, infos, strict=True)
                if info and info["type"] == "file"
            }
        else:
            with source_errors(siblings[0]):
                listing = _listing(fs, fs._parent(path))
            names = ((url, url.rpartition("/")[2]) for url in siblings)
            found |= {url: listing[name] for url, name in names if name in listing}
    return found


def _listing(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, Stat]:
    """Names of the files in `folder` itself. Raises what the driver raises."""
    if isinstance(fs, LocalFileSystem):
        return _local_listing(folder)
    return {
        info["name"].rpartition("/")[2]: _stat(info)
        for info in _list_or_nothing(fs, folder)
        if info["type"] == "file"
    }


def _local_listing(folder: str) -> dict[str, Stat]:
    """As `_listing`; the driver takes five times as long and a kilobyte for each file."""
    found: dict[str, Stat] = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # a broken link, or deleted just now
                if entry.is_file():
                    found[entry.name] = _local_stat(entry.stat())
    return found


def _local_stat(info: os.stat_result) -> Stat:
    return Stat(info.st_size, str(round(info.st_mtime * 1e6)))


def _list_or_nothing(fs: fsspec.AbstractFileSystem, path: str) -> Iterable[dict[str, Any]]:
    """What lies in the folder `path` itself. Raises what the driver raises."""
    if is_s3(fs):
        return s3_listing(fs, path)
    try:
        return with_retries(lambda: fs.ls(path, detail=True))
    except FileNotFoundError as e:
        if is_absent(e):
            return []
        raise


def _info_or_none(url: str) -> dict[str, Any] | None:
    fs, path = driver(url)
    try:
        with source_errors(url):
            return _asked(fs, path, lambda: fs.info(path))
    except FileNotFoundError:
        return None


def _stat(info: dict[str, Any]) -> Stat:
    names = ("ETag", "etag", "mtime", "Last-Modified")
    etag = next((value for name in names if (value := info.get(name))), "")
    if isinstance(etag, float):
        etag = round(etag * 1e6)
    return Stat(int(info["size"] or 0), str(etag).strip('"'))


def is_dir(url: str) -> bool:
    """Raises SourceError and UnavailableError."""
    fs, path = driver(url)
    if is_s3(fs):  # the driver's `isdir` would list all of it
        return (_info_or_none(url) or {}).get("type") == "directory"
    with source_errors(url):
        return fs.isdir(path)


def exists(url: str) -> bool:
    """Raises SourceError when the store does not say, and UnavailableError."""
    return os.path.exists(driver(url)[1]) if is_local(url) else _info_or_none(url) is not None


def list_folder(url: str) -> dict[str, Stat]:
    """Names of the files in the folder `url` itself, sorted; empty when there is no such folder.
    Raises what the driver raises: use it within `storage_errors`."""
    return dict(sorted(_listing(*driver(url)).items()))


def read_bytes(url: str) -> bytes:
    """All bytes of a small file. Raises FileNotFoundError and what else the driver raises: use it
    within `storage_errors`."""
    fs, path = driver(url)
    return cast("bytes", with_retries(lambda: fs.cat_file(path)))


def glob(pattern: str, folders: set[str] | None = None) -> dict[str, Stat]:
    """Files that match, in sorted order, each with the scheme of `pattern`; folders that do are
    added to `folders`, unless the pattern has `**`.

    Only folders that the pattern leads through are looked into. Raises as `find`, and UsageError
    for a bad pattern.
    """
    fs, path = driver(pattern)
    parts = path.split("/")
    heads = [glob_regex("/".join(parts[: n + 1])) for n in range(len(parts))]
    fixed = re.split(r"[*?\[]", path)[0]
    folder = fixed[: fixed.rfind("/") + 1]

    def wanted(name: str) -> bool:
        n = name.count("/")
        if folders is not None and depth and n == len(parts) - 1 and heads[n].match(name):
            folders.add(_with_scheme(fs, pattern, name))
        return "**" in parts[: n + 1] or (n < len(parts) and bool(heads[n].match(name)))

    depth = None if "**" in parts else len(parts) - folder.count("/")
    walked = _walk(fs, folder, wanted, depth, fixed[len(folder) :])
    found = _by_url(fs, pattern, (file for file in walked if heads[-1].match(file[0])))
    if folders is not None:
        folders.difference_update(found)
    return found


def matches(pattern: str, url: str) -> bool:
    """Whether `glob(pattern)` would look at files in the folder `url`."""
    return glob_regex(place(pattern).rpartition("/")[0]).match(place(url)) is not None


def glob_regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(glob_translate(pattern))
    except ValueError as e:
        raise UsageError(f"{pattern}: {e}") from e


def find(url: str, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Stat]:
    """All files below the folder `url`, in sorted order, each with the scheme of `url`; none when
    there is no such folder. Local files and folders that are not `wanted` (by path) are left out.

    Links are followed. Raises SourceError when part of it cannot be read, be it a link that leads
    nowhere, and UnavailableError.
    """
    fs, path = driver(url)
    return _by_url(fs, url, _walk(fs, path, wanted))


def _by_url(
    fs: fsspec.AbstractFileSystem, url: str, files: Iterable[tuple[str, Stat]]
) -> dict[str, Stat]:
    found = dict(files)
    return {_with_scheme(fs, url, name): found[name] for name in sorted(found)}


def _walk(
    fs: fsspec.AbstractFileSystem,
    folder: str,
    wanted: Callable[[str], bool],
    depth: int | None = None,
    stem: str = "",
) -> Iterator[tuple[str, Stat]]:
    """Names of the files in `folder` and, where `depth` is not 1, in its `wanted` folders.

    fsspec's own walk takes what cannot be listed for empty. S3 lists all at once where there is no
    `depth`, and only what begins with `stem`.
    """
    if isinstance(fs, LocalFileSystem):
        yield from ((name, _local_stat(info)) for name, info in walk(folder, wanted, depth))
        return
    with source_errors(fs.unstrip_protocol(folder)):
        if is_s3(fs):
            infos = s3_listing(fs, folder, stem, "/" if depth else "")
        else:
            infos = _list_or_nothing(fs, folder)
        for info in infos:
            name = info["name"].rstrip("/")
            if name == folder.rstrip("/"):
                continue
            if info["type"] == "file":
                yield name, _stat(info)
            elif info["type"] != "directory" or not wanted(name) or depth == 1:
                continue
            elif depth or not is_s3(fs):
                yield from _walk(fs, info["name"], wanted, depth and depth - 1)


def place(url: str) -> str:
    """`url` as an address that all ways to name that place share: links are followed."""
    if is_local(url):
        return os.path.realpath(driver(url)[1])
    return absolute(url).rstrip("/")


def _with_scheme(fs: fsspec.AbstractFileSystem, url: str, path: str) -> str:
    return fs.unstrip_protocol(path) if "://" in url else path


@contextmanager
def local_copy(url: str, digest: Digest) -> Iterator[str]:
    """A local path with the bytes of `url`, which also went into `digest`.

    For formats that are not read front to back. A local file is read once for the digest and then
    again; a remote one is transferred once, into a temporary file. Raises SourceError,
    UnavailableError, and StorageError when there is no room for the copy.
    """
    if is_local(url):
        with open_read(url) as stream, source_errors(url):
            while block := stream.read(1 << 20):
                digest.update(block)
        yield driver(url)[1]
        return
    with staged(scratch(), "source") as copy:
        with open_read(url) as stream, storage_errors(copy), copy.open("wb") as file:
            while block := stream.read(1 << 20):
                digest.update(block)
                file.write(block)
        yield str(copy)


def sha256(url: str) -> str:
    """Hex digest of the whole object, streamed. Raises as `open_read`."""
    with open_read(url) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Writing


def write_bytes(url: str, data: bytes) -> None:
    """Write a small file: all of it or nothing. Raises StorageError and UnavailableError."""
    if is_local(url):
        path = local_path(url)
        with staged(path.parent, path.name.strip("_.")) as new, storage_errors(url):
            new.write_bytes(data)
            os.replace(new, path)
        return
    fs, key = driver(url)
    with storage_errors(url):
        fs.pipe_file(key, data)
