"""A shard's data file, opened for reading, after a check that it is what its marker says."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from splatshard.pipeline.data.cache import ShardCache
from splatshard.pipeline.data.catalog import Shard
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.errors import as_error
from splatshard.pipeline.storage.fs import Stat
from splatshard.schemas.errors import CorruptShardError, SourceError, SplatshardError


def default_cache_dir() -> Path:
    """`shards` in $SPLATSHARD_CACHE, else in $XDG_CACHE_HOME/splatshard or ~/.cache/splatshard."""
    own = os.environ.get("SPLATSHARD_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(own) if own else home / "splatshard") / "shards"


class ShardFiles:
    """Opens data files; remote ones by way of `cache`.

    The size is compared at every opening, SHA-256 once: when a remote file is fetched, and unless
    `checksum` is off when this process first opens a local file or one that another fetched.
    """

    def __init__(self, cache: ShardCache, checksum: bool) -> None:
        self.cache = cache
        self.checksum = checksum
        self._verified: set[tuple[str, int]] = set()

    def open(self, shard: Shard) -> BinaryIO:
        """Raises CorruptShardError for a file that is missing, truncated or another, naming it;
        UnavailableError, and what the cache raises."""
        found = look_for(shard)
        if not fs.is_local(shard.url):
            expected = shard.size_bytes, shard.sha256
            return self.cache.open(shard.url, found.etag, *expected, checksum=self.checksum)
        with ExitStack() as until_checked:
            stream = until_checked.enter_context(fs.local_path(shard.url).open("rb"))
            version = (shard.url, os.fstat(stream.fileno()).st_mtime_ns)
            if self.checksum and version not in self._verified:
                if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
                    raise CorruptShardError(
                        f"{shard.url} has another SHA-256 than its marker says: {shard.remedy}"
                    )
                stream.seek(0)
                self._verified.add(version)
            until_checked.pop_all()
            return stream


def look_for(shard: Shard) -> Stat:
    """Raises CorruptShardError when the file is missing or has another size; UnavailableError."""
    try:
        found = fs.stat(shard.url)
    except SourceError as e:
        if isinstance(e.__cause__, FileNotFoundError):
            raise CorruptShardError(
                f"{shard.url} is missing, though its marker names it: {shard.remedy}"
            ) from e
        raise
    if found.size_bytes != shard.size_bytes:
        raise CorruptShardError(
            f"{shard.url} has {found.size_bytes} bytes, its marker says {shard.size_bytes}: "
            f"{shard.remedy}"
        )
    return found


@contextmanager
def shard_errors(shard: Shard) -> Iterator[None]:
    """Whatever the block raises on bad bytes as a CorruptShardError that names the file.

    What the system refuses is no damage: SourceError or UnavailableError.
    """
    try:
        yield
    except SplatshardError:
        raise
    except (
        pa.ArrowException,
        tarfile.TarError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as e:
        # Arrow's OSErrors on bad bytes have no errno
        if isinstance(e, OSError) and e.errno and not isinstance(e, FileNotFoundError):
            raise as_error(e, f"cannot read {shard.url}", SourceError) from e
        reason = " ".join(f"{type(e).__name__}: {e}".split())  # Arrow's may have several lines
        raise CorruptShardError(f"{shard.url} cannot be read: {reason}: {shard.remedy}") from e
