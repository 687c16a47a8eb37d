"""From a staged file to a committed shard: all of it or nothing, whatever dies when.

    {dst}/_staging/{shard}-{host}-{pid}-{random}    being written; nobody else looks at it
    {dst}/{shard}-{fingerprint8}.parquet            data, moved here whole, verified and synced
    {dst}/{shard}.json                              marker, moved here last: readers trust only it
    {dst}/{shard}.failed.json                       why the last attempt failed

On a local disk os.replace is atomic, and two attempts at one fingerprint write the same bytes: a
late worker can only replace a file by its equal, so data names need no attempt id. S3 has no
rename; its data names will carry one and its markers will be created conditionally. That is a later
step, and the other branch of `_move_into_place`.

A kill between data file and marker leaves data that readers ignore; the next commit of that shard
replaces or deletes it. What a kill leaves otherwise (staged files, an older data file, an older
failed marker) is deleted by the next job on that host, see `clean_staging`.

Not fenced: two jobs of different configurations in one local DST at one time. The later marker
wins, and `verify` names a shard whose data the other job deleted.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import storage
from pipeline.markers import DONE, FAILED, read_marker
from pipeline.shards import survey
from pipeline.storage import storage_errors
from schemas.config import ConvertConfig, fingerprint, inputs
from schemas.errors import CorruptShardError, UsageError
from schemas.shard import (
    FailedShard,
    ShardManifest,
    ShardRef,
    to_json,
)
from schemas.splats import EXTENSIONS

STAGING = "_staging"
DATA_FILE = r"(.+)-[0-9a-f]{8}\.(?:parquet|tar)"
SHARD_NAME = r"[^_./\\\0][^/\\\0]*"
"""Names with a leading underscore or dot are not shards (`_plan.json`, `_staging`)."""


def check_destination(dst: str) -> None:
    """Create the folder `dst` where it is missing, and prove that it can be written.

    Raises UsageError for a file or a remote URL, StorageError when it cannot be created or written.
    """
    folder = _local(dst)
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        if os.path.lexists(place):
            raise UsageError(f"DST {dst}: {place} is not a folder; choose another")
    with storage_errors(dst):
        folder.mkdir(parents=True, exist_ok=True)
    with staged_file(dst, "check") as probe, storage_errors(dst):
        probe.write_bytes(b"splatshard")


def _local(dst: str) -> Path:
    if "://" in dst and not dst.startswith("file://"):
        raise UsageError(f"DST {dst}: only local folders can be written so far; choose one")
    return Path(dst.removeprefix("file://"))


@contextmanager
def staged_file(dst: str, shard_name: str) -> Iterator[Path]:
    """A new empty file in `dst`'s staging folder, deleted at the end unless it was moved away.

    Raises StorageError when it cannot be created, UsageError for a shard name that would clash with
    splatshard's own files.
    """
    if re.fullmatch(SHARD_NAME, shard_name) is None or shard_name.endswith(".failed"):
        raise UsageError(
            f"shard name {shard_name!r} would clash with splatshard's own files: rename the source"
        )
    with _staged(_local(dst), shard_name) as path:
        yield path


@contextmanager
def _staged(folder: Path, name: str) -> Iterator[Path]:
    unique = f"{name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    path = folder / STAGING / unique
    try:
        with storage_errors(path):
            _create(path)
        yield path
    finally:
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):  # others are still using it
            path.parent.rmdir()


def _create(path: Path) -> None:
    """An empty new file, and its folder, which another process may be deleting meanwhile."""
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("xb").close()
    raise FileNotFoundError(errno.ENOENT, "the folder vanishes again and again", str(path.parent))


def publish(
    dst: str,
    path: Path,
    ref: ShardRef,
    config: ConvertConfig,
    source_sha256: str,
    samples: int | None = None,
) -> ShardManifest:
    """Verify the staged file at `path`, move it into `dst` and write its marker, in this order.

    Counts and statistics are those of the file as it reads back. `samples` is the number that the
    source gave. Raises CorruptShardError when the file does not read back, or not to as many rows;
    StorageError when `dst` cannot be written. The shard is not committed then.
    """
    found = survey(str(path), config.pack.format)
    if found.problems:
        raise CorruptShardError(f"shard {ref.name} as written: {'; '.join(found.problems)}")
    if samples is not None and samples != found.samples:
        raise CorruptShardError(
            f"shard {ref.name}: {samples} samples came in, {found.samples} rows were written"
        )
    shard_inputs = inputs(config, ref)
    digest = fingerprint(shard_inputs)
    with storage_errors(path):
        _sync(path)
        size_bytes = path.stat().st_size
    manifest = ShardManifest(
        name=ref.name,
        data_file=f"{ref.name}-{digest[:8]}.{EXTENSIONS[config.pack.format]}",
        size_bytes=size_bytes,
        sha256=storage.sha256(str(path)),
        format=config.pack.format,
        samples=found.samples,
        counts=dict(found.counts),
        statistics=found.statistics,
        fingerprint=digest,
        inputs=shard_inputs,
        source_url=_source_url(ref),
        source_sha256=source_sha256,
    )
    _move_into_place(_local(dst), path, manifest)
    return manifest


def _move_into_place(folder: Path, path: Path, manifest: ShardManifest) -> None:
    """Data, then marker, then what both replace. The marker is staged first, so that
    `clean_staging` of another job can see a commit that is under way."""
    name = manifest.name
    with _staged(folder, name + DONE) as marker, storage_errors(folder):
        marker.write_text(to_json(manifest))
        _sync(marker)
        os.replace(path, folder / manifest.data_file)
        _sync(folder)
        os.replace(marker, folder / (name + DONE))
        _sync(folder)
        for file in _data_files(folder).get(name, ()):
            if file != manifest.data_file:
                (folder / file).unlink(missing_ok=True)
        (folder / (name + FAILED)).unlink(missing_ok=True)


def mark_failed(dst: str, ref: ShardRef, config: ConvertConfig, error: BaseException) -> None:
    """Write the failed marker of `ref`. Raises StorageError."""
    marker = FailedShard(
        name=ref.name,
        source_url=_source_url(ref),
        error=type(error).__name__,
        message=str(error),
        fingerprint=fingerprint(inputs(config, ref)),
    )
    folder = _local(dst)
    with _staged(folder, ref.name + FAILED) as path, storage_errors(folder):
        path.write_text(to_json(marker))
        _sync(path)
        os.replace(path, folder / (ref.name + FAILED))
        _sync(folder)


def clean_staging(dst: str) -> None:
    """Delete what processes that died on this host left behind; for the start of a job.

    Staged files of dead processes; then, for every shard that is done and that nobody is
    committing, data files its marker does not name and a failed marker of the same fingerprint.
    Files of live processes and of other hosts stay. A process id that was given to a new process
    keeps its leftovers until a later call. Raises StorageError.
    """
    folder = _local(dst)
    staging = folder / STAGING
    suffix = f"-{socket.gethostname()}"
    if not folder.is_dir():
        return
    with storage_errors(folder):
        staged = sorted(os.listdir(staging)) if staging.is_dir() else []
        for file in staged:
            name, _, pid = file.rpartition("-")[0].rpartition("-")
            if name.endswith(suffix) and pid.isdecimal() and not _is_alive(int(pid)):
                (staging / file).unlink(missing_ok=True)
        with suppress(OSError):  # others are still using it
            staging.rmdir()
        live = os.listdir(staging) if staging.is_dir() else []
        data = _data_files(folder)
        failed = {f.removesuffix(FAILED) for f in os.listdir(folder) if f.endswith(FAILED)}
        doubtful = failed | {name for name, files in data.items() if len(files) > 1}
        for name in sorted(doubtful):
            if not any(file.startswith(f"{name}{DONE}-") for file in live):
                _finish_commit(folder, name, data.get(name, []))


def _finish_commit(folder: Path, name: str, data_files: list[str]) -> None:
    """Delete what a commit killed after its marker had yet to delete."""
    try:
        done = read_marker(str(folder), name + DONE)
    except (FileNotFoundError, CorruptShardError):
        return
    assert isinstance(done, ShardManifest)
    for file in data_files:
        if file != done.data_file:
            (folder / file).unlink(missing_ok=True)
    path = folder / (name + FAILED)
    with suppress(FileNotFoundError, CorruptShardError):
        if read_marker(str(folder), path.name).fingerprint == done.fingerprint:
            path.unlink()


def _data_files(folder: Path) -> dict[str, list[str]]:
    """Names of data files by shard name, committed or not."""
    files: dict[str, list[str]] = {}
    for file in sorted(os.listdir(folder)):
        if match := re.fullmatch(DATA_FILE, file):
            files.setdefault(match[1], []).append(file)
    return files


def _source_url(ref: ShardRef) -> str:
    return ref.root or ref.urls[0]


def _sync(path: Path) -> None:
    """Wait until a file's bytes or a folder's entries are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
