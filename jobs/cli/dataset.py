"""What commands that only read DST share: the way to it, and what to do about a damaged shard."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from splatshard.jobs.cli.options import DatasetOptions, use_storage_options
from splatshard.schemas.errors import CorruptShardError, StorageError, UsageError
from splatshard.schemas.shard import ShardManifest

UNFINISHED = (
    "holds no finished shard: wait for the first one where splatshard convert is running, "
    "else run it"
)
NOTHING = "holds neither shards nor a plan of any: give the DST of a splatshard convert"


def open_dataset(options: DatasetOptions) -> str:
    """DST as an absolute address. Raises UsageError when nothing is there."""
    use_storage_options(options.storage_options)
    return require_dataset(options.dst)


@contextmanager
def naming_repair(dst: str, manifest: ShardManifest) -> Iterator[None]:
    """Reading the shard `manifest` of `dst`, whose file must have the size that it says: a
    CorruptShardError says what to do about it, and is a StorageError where the store refused."""
    from splatshard.pipeline.shards.rows import reading
    from splatshard.pipeline.shards.verify import is_refused
    from splatshard.pipeline.storage.fs import stat

    url = f"{dst}/{manifest.data_file}"
    try:
        with reading(url):
            size = stat(url).size_bytes
        if size != manifest.size_bytes:
            raise CorruptShardError(f"{url}: {size} bytes, its marker says {manifest.size_bytes}")
        yield
    except CorruptShardError as e:
        if is_refused(url, e):
            raise StorageError(str(e)) from e
        text = str(e) if url in str(e) else f"{url}: {e}"
        raise CorruptShardError(f"{text}: run splatshard repair {dst}") from e


def check_output(path: str) -> None:
    """Raises UsageError where no file can be written to `path`, before there is work for it."""
    if "://" in path:
        raise UsageError(f"--output {path}: give a local file")
    if Path(path).is_dir():
        raise UsageError(f"--output {path}: is a folder; name a file in it")
    if not Path(path).parent.is_dir():
        raise UsageError(f"--output {path}: create the folder {Path(path).parent} first")


def require_shards(dst: str, shards: Collection[str], markers: Collection[str]) -> None:
    """Raises UsageError for a folder that has none of convert's files, its plan and markers."""
    if not shards and not markers:
        raise UsageError(f"{dst} {NOTHING}")


def require_dataset(dst: str) -> str:
    """`dst` without a closing slash. Raises UsageError when nothing is there, or a local file."""
    from splatshard.pipeline.storage.fs import absolute, exists, is_local, local_path

    if not dst.strip():
        raise UsageError("DST is empty: give the DST of a splatshard convert")
    dst = absolute(dst).rstrip("/") or "/"
    is_file = is_local(dst) and local_path(dst).is_file()
    if is_file or not exists(dst):
        found = "is a file" if is_file else "no such folder"
        raise UsageError(f"{dst}: {found}; give the DST of a splatshard convert")
    return dst
