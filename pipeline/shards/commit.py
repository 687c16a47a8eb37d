"""From a staged file to a committed shard: all of it or nothing, whatever dies when.

    {dst}/{shard}-{fingerprint8}.parquet             data, on a local disk
    {dst}/{shard}-{fingerprint8}-{attempt}.parquet   data, on S3
    {dst}/{shard}.json                               marker, comes last: readers trust only it
    {dst}/{shard}.failed.json                        why the last attempt failed
    _staging/{shard}@{host}-{space}-{pid}-{random}   being written: in DST, for S3 below TMPDIR

The file is written and verified on a local disk, then its data are put into DST under a name that
no marker has, then the marker is written on condition that it is still as it was when looked at
(atomic.py: a lock on a local disk, conditional PUTs on S3). What is there by then decides:

    nothing, or a damaged marker     ours goes in
    the marker we may replace        ours goes in, its data file is deleted
    a marker of our fingerprint      it stays, since it stands for the same rows: ours is deleted
    a marker of another fingerprint  it stays, and StorageError stops the job: two configurations
                                     write into one DST

So of two jobs on one DST, and of a job and its lost workers, one leaves a shard and the others
nothing. A data file is deleted only when no marker can name it any more: its own marker was refused
or replaced. A kill leaves data that no marker names. On a local disk a job deletes it at its start
or at its end, if its content is a shard's as well as its name; on S3 the job itself at its end
(`clean_attempts`). Another job's may belong to a commit that is under way: names of attempts say
whose they are.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

from splatshard.pipeline.shards.markers import DATA_FILE, DONE, FAILED, read_marker
from splatshard.pipeline.shards.names import is_shard_name, printable
from splatshard.pipeline.shards.rows import is_shard
from splatshard.pipeline.shards.verify import survey
from splatshard.pipeline.storage import atomic, fs
from splatshard.pipeline.storage.errors import storage_errors
from splatshard.pipeline.storage.fs import is_local, local_path
from splatshard.pipeline.storage.options import redact, redact_url
from splatshard.pipeline.storage.staging import ON_WINDOWS, STAGING, scratch, staged, sweep
from splatshard.schemas.config import ConvertConfig, describe_difference, fingerprint, inputs
from splatshard.schemas.errors import CorruptShardError, StorageError, UnavailableError, UsageError
from splatshard.schemas.shard import FailedShard, ShardManifest, ShardRef, marker_digest, to_json
from splatshard.schemas.splats import EXTENSIONS

DELETERS = 16
"""Shards deleted at once: each takes a few requests on S3."""

ROUNDS = 20
"""How often a marker may change while it is looked at."""


def check_destination(dst: str) -> None:
    """Create the folder `dst` where it is missing, and prove that it can be written.

    Raises UsageError for what is no folder and no s3:// address, StorageError when it cannot be
    created or written, UnavailableError.
    """
    check_scheme(dst)
    if not is_local(dst):
        atomic.keeps_conditions(dst.rstrip("/"))
        atomic.delete(f"{dst.rstrip('/')}/_check")
        with staged_file(dst, "check"):
            return
    folder = local_path(dst)
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        if os.path.lexists(place) and not place.is_dir():  # another process may just have made it
            raise UsageError(f"DST {dst}: {place} is not a folder; choose another")
    with storage_errors(dst):
        folder.mkdir(parents=True, exist_ok=True)
    with staged(folder, "check") as probe, storage_errors(dst):
        probe.write_bytes(b"splatshard")


def check_scheme(dst: str) -> None:
    """Raises UsageError for what is no folder and no s3:// address, and on Windows; loads no
    driver."""
    if not dst.strip():
        raise UsageError("DST is empty: give a folder, or s3://bucket/...")
    if dst != printable(dst):
        raise UsageError(
            f"DST {printable(dst)}: that path is no UTF-8, in which plans are written: choose "
            "another, or set LC_ALL=C.UTF-8 if it is"
        )
    if ON_WINDOWS:
        raise UsageError("on Windows shards are read, not written: run this on Linux, or in WSL")
    if not is_local(dst) and re.fullmatch(r"s3a?://[^/]+(/.*)?", dst) is None:
        raise UsageError(
            f"DST {redact(dst)}: only local folders and s3://bucket/... can be written; choose one"
        )


def staged_file(dst: str, shard_name: str) -> AbstractContextManager[Path]:
    """A new empty file on a local disk, deleted at the end unless it was moved away.

    Raises StorageError when it cannot be created, UsageError for a shard name that would clash with
    splatshard's own files.
    """
    if not is_shard_name(shard_name):
        raise UsageError(
            f"shard name {shard_name!r} would clash with splatshard's own files: rename the source"
        )
    return staged(local_path(dst) if is_local(dst) else scratch(), shard_name)


def publish(
    dst: str,
    path: Path,
    ref: ShardRef,
    config: ConvertConfig,
    source_sha256: str,
    samples: int | None = None,
    attempt: str = "",
    replaces: str = "",
) -> ShardManifest:
    """Verify the staged file at `path`, put it into `dst` and write its marker, in this order.

    Returns the manifest that is in `dst` by then: ours, or that of another attempt at the same
    fingerprint. Counts and statistics are those of the file as it reads back.

    `samples` is the number that the source gave. `attempt` (hex digits) must be new for each call;
    on a local disk it is of no use. `replaces` is the `marker_digest` of a marker that may be
    replaced. Raises CorruptShardError when the file does not read back, or not to as many rows;
    StorageError when `dst` cannot be written, or another job writes other data into it;
    UnavailableError when the store does not answer, and then the shard may be committed or not:
    try again with another attempt.
    """
    dst = dst.rstrip("/")
    ours = _verified(dst, path, ref, config, source_sha256, samples, attempt)
    with atomic.exclusive(dst, ref.name):
        winner = _commit(dst, path, ours, replaces)
        with suppress(UnavailableError):  # the shard is done; what stays is hidden by its marker
            atomic.delete(f"{dst}/{ref.name}{FAILED}")
    return winner


def _verified(
    dst: str,
    path: Path,
    ref: ShardRef,
    config: ConvertConfig,
    source_sha256: str,
    samples: int | None,
    attempt: str,
) -> ShardManifest:
    """The manifest of the staged file, which is whole and on the disk."""
    found = survey(str(path), config.pack.format)
    if found.problems:
        raise CorruptShardError(f"shard {ref.name} as written: {'; '.join(found.problems)}")
    if samples is not None and samples != found.samples:
        raise CorruptShardError(
            f"shard {ref.name}: {samples} samples came in, {found.samples} rows were written"
        )
    shard_inputs = inputs(config, ref)
    digest = fingerprint(shard_inputs)
    with storage_errors(dst if is_local(dst) else path):
        atomic.sync(path)
        size_bytes = path.stat().st_size
    unique = "" if is_local(dst) else f"-{attempt or secrets.token_hex(4) + '0'}"
    return ShardManifest(
        name=ref.name,
        data_file=f"{ref.name}-{digest[:8]}{unique}.{EXTENSIONS[config.pack.format]}",
        size_bytes=size_bytes,
        sha256=fs.sha256(str(path)),
        format=config.pack.format,
        samples=found.samples,
        counts=dict(found.counts),
        statistics=found.statistics,
        fingerprint=digest,
        inputs=shard_inputs,
        source_url=_source_url(ref),
        source_sha256=source_sha256,
    )


def _commit(dst: str, path: Path, ours: ShardManifest, replaces: str) -> ShardManifest:
    """Data, then marker, then the data that it replaces; the manifest that is in `dst` by then."""
    marker = f"{dst}/{ours.name}{DONE}"
    data, uploaded = "", False
    replaced: ShardManifest | None = None
    for _ in range(ROUNDS):
        tag, found = _current(dst, ours.name)
        if uploaded and found and found.data_file == ours.data_file:
            break  # the answer to our own write was lost, so it was repeated, and refused
        if found and marker_digest(found) != replaces:
            if uploaded:
                atomic.delete(data)
            if found.fingerprint == ours.fingerprint:
                return found
            raise StorageError(_other_job(marker, found, ours))
        if not uploaded:
            ours = _under_free_name(ours, found)
            data = f"{dst}/{ours.data_file}"
            atomic.upload(path, data)
            uploaded = True
        replaced = found
        if atomic.put_if_match(marker, to_json(ours).encode(), tag):
            break
    else:
        raise UnavailableError(f"{marker} changes again and again")
    if replaced and replaced.data_file != ours.data_file:
        with suppress(UnavailableError):
            atomic.delete(f"{dst}/{replaced.data_file}")
    return ours


def _under_free_name(ours: ShardManifest, found: ShardManifest | None) -> ShardManifest:
    """Ours with a data file that `found` does not name, unless both hold the same bytes.

    On a local disk one fingerprint is one name, but a quarantined or retried sample changes bytes.
    """
    if found is None or found.data_file != ours.data_file or found.sha256 == ours.sha256:
        return ours
    stem, dot, extension = ours.data_file.rpartition(".")
    return replace(ours, data_file=f"{stem}-{ours.sha256[:8]}0{dot}{extension}")


def _current(dst: str, name: str) -> tuple[str | None, ShardManifest | None]:
    """The etag of a done marker, None where there is none, and its content, None where damaged.

    The etag is asked for first: should the marker change in between, the write that is conditional
    on it fails.
    """
    head = atomic.head(f"{dst}/{name}{DONE}")
    if head is None:
        return None, None
    with storage_errors(f"{dst}/{name}{DONE}", "read"):
        try:
            found = read_marker(dst, name + DONE)
        except FileNotFoundError:
            return None, None
        except CorruptShardError:
            return head.etag, None
    assert isinstance(found, ShardManifest)
    return head.etag, found


def _other_job(marker: str, found: ShardManifest, ours: ShardManifest) -> str:
    differences = describe_difference(found.inputs, ours.inputs)
    return (
        f"{marker} is of another configuration or source than this job's "
        f"({'; '.join(differences[:1]) or 'fingerprint'}): another job writes into this DST; wait "
        "for its end, or choose another DST"
    )


def mark_failed(
    dst: str, ref: ShardRef, config: ConvertConfig, error: BaseException, kind: str = ""
) -> None:
    """Write the failed marker of `ref`, unless it is done by now (another attempt was faster).

    `kind`: the name of the error, where `error` only repeats what one in another process said.
    Raises StorageError and UnavailableError.
    """
    dst = dst.rstrip("/")
    failed = FailedShard(
        name=ref.name,
        source_url=_source_url(ref),
        error=kind or type(error).__name__,
        message=redact(str(error)),
        fingerprint=fingerprint(inputs(config, ref)),
    )
    with atomic.exclusive(dst, ref.name):
        _, done = _current(dst, ref.name)
        if done is None or done.fingerprint != failed.fingerprint:
            atomic.write(f"{dst}/{ref.name}{FAILED}", to_json(failed).encode())


def _source_url(ref: ShardRef) -> str:
    return redact_url(ref.root or ref.urls[0])


# Shards that are no longer wanted


def remove(dst: str, markers: Iterable[ShardManifest | FailedShard]) -> list[str]:
    """Delete shards whose markers are still these, marker first, then data; returns their names.

    A failed marker stands in for a done one meanwhile and goes last, so that the same call finishes
    what a kill has left. Raises StorageError and UnavailableError.
    """
    dst = dst.rstrip("/")
    with storage_errors(dst, "read"):
        files = _data_files(_names(dst))

    def removed(marker: ShardManifest | FailedShard) -> bool:
        name = marker.name
        with atomic.exclusive(dst, name):
            tag, done = _current(dst, name)
            if tag is not None and done != marker:
                return False  # another job has made it anew
            if done:
                failed = FailedShard(
                    name=name,
                    source_url=done.source_url,
                    error="Removed",
                    message="no longer in the source; run convert again to delete the rest",
                    fingerprint=done.fingerprint,
                )
                atomic.write(f"{dst}/{name}{FAILED}", to_json(failed).encode())
                atomic.delete(f"{dst}/{name}{DONE}")
            start = f"{name}-{marker.fingerprint[:8]}"
            for file in files.get(name, []):
                if file.startswith(start):
                    atomic.delete(f"{dst}/{file}")
            atomic.delete(f"{dst}/{name}{FAILED}")
        return True

    with ThreadPoolExecutor(DELETERS) as pool:
        markers = list(markers)
        return [m.name for m, gone in zip(markers, pool.map(removed, markers), strict=True) if gone]


# Leftovers


def clean_staging(dst: str) -> None:
    """Delete what killed jobs left in `dst`, as far as nobody can be using it.

    On a local disk: staged files of dead processes of this host, and for every done shard that
    nobody is committing the data files its marker does not name. Everywhere: failed markers of the
    fingerprint that is done. Raises StorageError and UnavailableError.
    """
    dst = dst.rstrip("/")
    with storage_errors(dst):
        if is_local(dst):
            sweep(local_path(dst))
        names = _names(dst)
        data = _data_files(names) if is_local(dst) else {}
        locks = {lock.removesuffix(".lock") for lock in _locks(dst)}
    failed = {f.removesuffix(FAILED) for f in names if f.endswith(FAILED) and f[0] not in "_."}
    doubtful = failed & {f.removesuffix(DONE) for f in names}
    doubtful |= locks | {name for name, files in data.items() if len(files) > 1}
    for name in sorted(doubtful):
        with suppress(UnavailableError), atomic.exclusive(dst, name, 0) as alone:
            _, done = _current(dst, name)
            if done and alone:
                _delete_leftovers(dst, done, data.get(name, []))
            if done and name in failed:
                _delete_failed(dst, done)


def _delete_leftovers(dst: str, done: ShardManifest, data_files: Iterable[str]) -> None:
    """Only what splatshard wrote: a name such as `train-00000001.tar` may be anybody's."""
    for file in data_files:
        if file != done.data_file and is_shard(f"{dst}/{file}"):
            atomic.delete(f"{dst}/{file}")


def _delete_failed(dst: str, done: ShardManifest) -> None:
    """Delete the failed marker of what has been done since."""
    file = done.name + FAILED
    with storage_errors(f"{dst}/{file}", "read"), suppress(CorruptShardError, FileNotFoundError):
        if read_marker(dst, file).fingerprint == done.fingerprint:
            atomic.delete(f"{dst}/{file}")


def clean_attempts(
    dst: str,
    job: str,
    done: Iterable[ShardManifest],
    replaced: Iterable[ShardManifest] = (),
) -> None:
    """At the end of job `job` (its 8 hex digits): delete what its attempts left on S3.

    That is, of shards in `done`, data files of this job and those of `replaced` (the markers that
    the job was to replace) which the marker does not name. Raises StorageError, UnavailableError.
    """
    dst = dst.rstrip("/")
    if is_local(dst):
        return
    mine = re.compile(rf"(.+)-[0-9a-f]{{8}}-{job}[0-9]+\.(?:parquet|tar)")
    kept = {manifest.name: manifest.data_file for manifest in done}
    old = {manifest.data_file: manifest.name for manifest in replaced}
    with storage_errors(dst, "read"):
        files = _names(dst)
    for file in files:
        match = mine.fullmatch(file)
        name = match[1] if match else old.get(file)
        if name in kept and kept[name] != file:
            _, now = _current(dst, name)
            if now and now.data_file != file:
                atomic.delete(f"{dst}/{file}")


def _names(dst: str) -> list[str]:
    if not is_local(dst):
        return list(fs.list_folder(dst))
    return sorted(os.listdir(local_path(dst))) if local_path(dst).is_dir() else []


def _locks(dst: str) -> Iterator[str]:
    """Lock files of a local `dst`: whoever holds none of them any more was killed."""
    staging = local_path(dst) / STAGING
    if is_local(dst) and staging.is_dir():
        yield from (file for file in os.listdir(staging) if file.endswith(".lock"))


def _data_files(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of local data files by shard name, committed or not."""
    files: dict[str, list[str]] = {}
    for file in names:
        if match := DATA_FILE.fullmatch(file):
            files.setdefault(match[1], []).append(file)
    return files
