"""Data files of remote shards on a local disk: whole, checked, and never more than `max_bytes`.

    {folder}/{sha256 of these}           a file, by its full URL (a basename is not enough: two
                                         folders have shards of one name), etag, which some stores
                                         lack, and the digest that its marker names
    {folder}/_staging/                   files that are being fetched
    {folder}/_locks/                     for processes that use the folder together

What else lies there is not the cache's: it is neither counted nor deleted.

A file is renamed into place once its bytes have the digest of the shard's marker and are on the
disk. What a disk did to it since is found by its size, or when a process first opens it, by its
digest; then it is fetched again. The longest unused (by modification time, which a use
renews) go first. A file that is being read may go, too: whoever has it open keeps it, and its room
is free when it is closed. On Windows such a file stays until then.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.errors import storage_errors
from splatshard.pipeline.storage.lock import lock, unlock
from splatshard.pipeline.storage.staging import STAGING, is_from_here, staged, sweep
from splatshard.schemas.errors import CorruptShardError, StorageError, UsageError

log = logging.getLogger(__name__)

NAMES = {"": re.compile(r"[0-9a-f]{64}"), STAGING: re.compile(r"[0-9a-f]{64}@.+")}
"""The cache's files, by folder."""

LOCKS = "_locks"
WAIT_S = 0.05

REPORT_AFTER_S = 10.0
"""After so long a wait for room is said."""

IDLE_S = 600.0
"""After so long without a write a fetch is over. A live one writes every MiB; it may pause for as
long as remote reads are tried again, which is a minute."""


class ShardCache:
    """A folder of at most `max_bytes` that processes and threads may share."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._verified: dict[str, int] = {}
        """Inodes of files whose digest this process knows, by name."""

    def open(
        self, url: str, etag: str, size_bytes: int, sha256: str, *, checksum: bool = True
    ) -> BinaryIO:
        """The file at `url`, fetched unless it is here already; `checksum` says whether what
        another process fetched is hashed once more.

        Raises CorruptShardError when its bytes are not those of `sha256`, UsageError when it is
        larger than the cache may be, StorageError when there is no room on the disk, SourceError
        and UnavailableError.
        """
        if size_bytes > self.max_bytes:
            raise UsageError(
                f"cache_bytes is {self.max_bytes}, but {url} alone has {size_bytes}: give the "
                "shard cache more"
            )
        path = self.folder / hashlib.sha256(f"{url}\0{etag}\0{sha256}".encode()).hexdigest()
        while True:
            stream = None
            with suppress(FileNotFoundError):
                stream = path.open("rb")
                if self._is_whole(stream, path.name, size_bytes, sha256 if checksum else None):
                    with suppress(FileNotFoundError):  # it went meanwhile
                        os.utime(path)
                    return stream
            with self._locked(path.name[:2]):  # of all who want this file, one fetches it
                if stream:
                    self._drop(path, stream)
                if not path.exists():
                    self._fetch(url, path, size_bytes, sha256)

    def _is_whole(
        self, stream: BufferedReader, name: str, size_bytes: int, sha256: str | None
    ) -> bool:
        info = os.fstat(stream.fileno())
        if info.st_size != size_bytes:
            return False
        if sha256 and self._verified.get(name) != info.st_ino:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                return False
            stream.seek(0)
            self._verified[name] = info.st_ino
        return True

    def _drop(self, path: Path, damaged: BinaryIO) -> None:
        """Delete `path`, unless another did so and fetched it again."""
        with damaged:
            info = os.fstat(damaged.fileno())
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), info):
                log.warning("%s was damaged on this disk: it is fetched again", path)
                path.unlink()

    def _fetch(self, url: str, path: Path, size_bytes: int, sha256: str) -> None:
        with self._full_disk(), staged(self.folder, path.name) as new:
            self._take_room(new, size_bytes)
            digest, size = hashlib.sha256(), 0
            with fs.open_read(url) as stream, new.open("r+b") as file:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    size += len(block)
                    if size > size_bytes:
                        break
                    with storage_errors(new):
                        file.write(block)
                with storage_errors(new):  # else a power cut could leave its name and size alone
                    file.flush()
                    os.fsync(file.fileno())
                inode = os.fstat(file.fileno()).st_ino
            if digest.hexdigest() != sha256:
                raise CorruptShardError(
                    f"{url} is not what its marker says ({size} bytes with another SHA-256): run "
                    f"splatshard repair {url.rpartition('/')[0]}"
                )
            with (
                self._locked("room"),  # or who counts could miss it in both places
                suppress(FileNotFoundError),  # it was idle for too long: then again
            ):
                os.replace(new, path)
                self._verified[path.name] = inode

    def _take_room(self, new: Path, size_bytes: int) -> None:
        """Give `new` its size, by which it counts as being there, as soon as there is room.

        What others are fetching cannot be deleted; then wait until some of it has arrived.
        """
        begin, said = time.monotonic(), False
        while True:
            with self._locked("room"):
                if self._make_room(size_bytes):
                    os.truncate(new, size_bytes)
                    return
            if not said and time.monotonic() - begin > REPORT_AFTER_S:
                said = True
                log.warning(
                    "the shard cache %s has been full of files that are being fetched for %.0f s: "
                    "raise cache_bytes (now %d), or let fewer processes share it",
                    self.folder, REPORT_AFTER_S, self.max_bytes,
                )  # fmt: skip
            time.sleep(WAIT_S)

    def _make_room(self, size_bytes: int) -> bool:
        """Delete the longest unused files until `size_bytes` more fit; whether they do.

        First what killed fetches left, also in containers and on hosts that are no more: it counts
        with the size that the file was to have. One of no size yet waits for room itself.
        """
        with suppress(FileNotFoundError):
            sweep(self.folder)
        files, total = [], size_bytes
        for folder, names in NAMES.items():
            with suppress(FileNotFoundError), os.scandir(self.folder / folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        if names.fullmatch(entry.name) and entry.is_file():
                            info = entry.stat()
                            if folder == STAGING and info.st_size and _is_over(entry.name, info):
                                os.unlink(entry.path)
                                continue
                            total += info.st_size
                            if folder != STAGING:
                                files.append((info.st_mtime_ns, info.st_size, entry.path))
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            with suppress(FileNotFoundError):
                try:
                    os.unlink(path)
                except PermissionError:
                    if os.name != "nt":  # there it stays while somebody reads it
                        raise
                    continue
            total -= size
        return total <= self.max_bytes

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Held by one thread of one process at a time; freed by the system if that dies."""
        path = self.folder / LOCKS / name
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        with file:
            with storage_errors(path, "lock"):
                lock(file.fileno(), wait=True)
            try:
                yield
            finally:
                unlock(file.fileno())

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        try:
            yield
        except (StorageError, OSError) as e:
            cause = e if isinstance(e, OSError) else e.__cause__
            if getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageError(
                f"the shard cache {self.folder} finds no space left on its disk: lower "
                f"cache_bytes (now {self.max_bytes}), or choose another cache_dir"
            ) from e


def _is_over(name: str, info: os.stat_result) -> bool:
    """Whether the staged file `name` is of a fetch elsewhere that ended without deleting it."""
    return time.time() - info.st_mtime > IDLE_S and not is_from_here(name)
