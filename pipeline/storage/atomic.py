"""Whole files into a destination, and the decision who is first.

                  local disk                      S3
    upload        os.replace                      PUT or multipart upload of the finished file
    put_if_match  os.replace, under `exclusive`   PUT with If-None-Match: * or If-Match: tag
    upload_if     the same with a finished file   the same
    exclusive     flock of _staging/{name}.lock   nothing: the conditions of `put_if_match` decide

Never through `fs.open(url, "wb")`: an error inside its block publishes what was written so far.

A PUT and the end of a multipart upload are atomic; a kill before leaves nothing that can be read
(parts of a broken multipart upload are invisible; a lifecycle rule of the bucket removes them).

Some S3 clones ignore conditions. The object `{dst}/_probe` is created twice to find that out, once
per process, and stays; where both succeed, `put_if_match` looks and then writes, so the later one
of two that race wins.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from splatshard.pipeline.storage.errors import (
    codes_of,
    driver_errors,
    is_refused_condition,
    storage_errors,
)
from splatshard.pipeline.storage.fs import Stat, driver, is_local, local_path
from splatshard.pipeline.storage.lock import lock
from splatshard.pipeline.storage.staging import STAGING, opened, staged
from splatshard.schemas.errors import StorageError, UnavailableError

log = logging.getLogger(__name__)

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
PARTS_AT_ONCE = 4
LOCK_WAIT_S = 60.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
PROBE = "_probe"

_conditional: dict[str, bool] = {}
_lock = threading.Lock()


def upload(path: Path, url: str) -> None:
    """Put the finished local file at `path` (which may be moved) to `url`.

    Raises StorageError and UnavailableError; what is at `url` then is not to be trusted.
    """
    if is_local(url):
        with storage_errors(url):
            os.replace(path, local_path(url))
            sync(local_path(url).parent)
        return
    size = path.stat().st_size
    part = max(PART_BYTES, -(-size // MAX_PARTS))
    fs, key = driver(url)
    with storage_errors(url):
        fs.put_file(str(path), key, chunksize=part, max_concurrency=PARTS_AT_ONCE)
    found = head(url)
    if found is None or found.size_bytes != size:
        there = f"{found.size_bytes} bytes" if found else "nothing"
        delete(url)
        raise UnavailableError(f"cannot write {url}: of {size} bytes {there} arrived")


def head(url: str) -> Stat | None:
    """Size and etag of the object at `url`, None when there is none. Raises as `upload`."""
    with storage_errors(url, "read"):
        if is_local(url):
            path = local_path(url)
            return Stat(path.stat().st_size, "") if path.exists() else None
        try:
            found = _call(url, "head_object")
        except FileNotFoundError:
            return None
        return Stat(found["ContentLength"], found["ETag"])


def put_if_match(url: str, data: bytes | BinaryIO, tag: str | None) -> bool:
    """Write a small file (to S3 also an open one) if what is at `url` still has the etag `tag`;
    None for nothing at all.

    Whether it did; on a local disk always, so hold `exclusive`. Where the answer to a write is lost
    the driver repeats it, and is then refused by its own success: look who it was. Raises as
    `upload`; whether the file was written is unknown then.
    """
    if is_local(url):
        assert isinstance(data, bytes)
        write(url, data)
        return True
    if keeps_conditions(url.rpartition("/")[0]):
        if tag is None:
            return _put(url, data, {"IfNoneMatch": "*"})
        # Ceph compares with the etag without quotes, and so refuses the form of the standard
        return any(_put(url, data, {"IfMatch": form}) for form in (tag, tag.strip('"')))
    now = head(url)
    return (now.etag if now else None) == tag and _put(url, data, {})


def upload_if(path: Path, url: str, tag: str | None) -> bool:
    """`put_if_match` of the finished local file at `path` (which may be moved), up to 5 GB on
    S3."""
    if is_local(url):
        upload(path, url)
        return True
    with path.open("rb") as file:
        return put_if_match(url, file, tag)


def keeps_conditions(dst: str) -> bool:
    """Whether the store behind `dst` refuses a write whose condition does not hold."""
    with _lock:
        if dst not in _conditional:
            url, text = f"{dst}/{PROBE}", b"can this be created twice?\n"
            try:
                twice = all(_put(url, text, {"IfNoneMatch": "*"}) for _ in range(2))
                _conditional[dst] = not twice and not _put(url, text, {"IfMatch": '"none"'})
            except StorageError as e:
                if "NotImplemented" not in codes_of(e):
                    raise
                _conditional[dst] = False
            if not _conditional[dst]:
                log.warning(
                    "%s ignores conditional writes (If-None-Match, If-Match): of two jobs that "
                    "write the same shard at one time the later wins; start only one at a time",
                    dst,
                )
        return _conditional[dst]


def _put(url: str, data: bytes | BinaryIO, condition: dict[str, str]) -> bool:
    with storage_errors(url):
        try:
            if not isinstance(data, bytes):
                data.seek(0)
            _call(url, "put_object", Body=data, ContentType="application/json", **condition)
        except driver_errors() as e:
            if is_refused_condition(e):
                return False
            raise
    return True


def _call(url: str, method: str, **arguments: Any) -> Any:
    fs, path = driver(url)
    s3 = cast(Any, fs)  # of s3fs, which only that driver imports
    bucket, key, _ = s3.split_path(path)
    return s3.call_s3(method, Bucket=bucket, Key=key, **arguments)


def write(url: str, data: bytes) -> None:
    """Write a small file, all or nothing, and to the disk before this returns. Raises as
    `upload`."""
    if not is_local(url):
        _put(url, data, {})
        return
    path = local_path(url)
    with staged(path.parent, path.name) as new, storage_errors(url):
        new.write_bytes(data)
        sync(new)
        os.replace(new, path)
        sync(path.parent)


def delete(url: str) -> None:
    """Delete what is at `url`, if anything. Raises as `upload`."""
    with storage_errors(url, "delete"):
        if is_local(url):
            local_path(url).unlink(missing_ok=True)
        else:
            _call(url, "delete_object")


@contextmanager
def exclusive(dst: str, name: str, wait_s: float = LOCK_WAIT_S) -> Iterator[bool]:
    """Nobody else commits shard `name` of a local `dst` during the block.

    Yields whether that is so: not on S3, nor on file systems without locks. Raises UnavailableError
    when another process holds the lock for longer than `wait_s`.
    """
    if not is_local(dst):
        yield False
        return
    path = local_path(dst) / STAGING / f"{name}.lock"
    with storage_errors(dst):
        number, locked = _locked(path, time.monotonic() + wait_s)
    try:
        yield locked
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(number)
        with suppress(OSError):  # others are still using it
            path.parent.rmdir()


def _locked(path: Path, end: float) -> tuple[int, bool]:
    """A descriptor of the locked file at `path`. Its last holder deletes it, so a lock is good only
    if the file is still the one at `path`."""
    while True:
        with suppress(FileExistsError):  # see staging
            path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder vanished
            with opened(path.parent):
                pass
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                lock(number, wait=False)
                if os.path.samestat(os.fstat(number), path.stat()):
                    return number, True
            except (BlockingIOError, FileNotFoundError):
                pass
            except OSError as e:
                if e.errno in NO_LOCKS:
                    log.warning("%s: no file locks here, start only one job at a time", path.parent)
                    return number, False
                os.close(number)
                raise
            os.close(number)
        if time.monotonic() > end:
            raise UnavailableError(f"{path} is held by another process")
        time.sleep(0.01)


def sync(path: Path) -> None:
    """Wait until a file's bytes or a folder's entries are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
