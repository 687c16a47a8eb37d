"""What a destination holds, by its markers: the only thing that readers and the planner trust.

{dst}/{shard}.json          the shard is done, and names its data file
{dst}/{shard}.failed.json   why the last attempt failed
{dst}/_manifest.json        all done markers of some moment in one file

Reading 100,000 markers takes minutes on S3. So a marker is taken from `_manifest.json` where the
one listing that is needed anyway shows that it still holds: the marker is there and has the size it
had; of all data files of that shard there is exactly one, with the name and size the marker gives.
That is safe, because a marker that was replaced since names another data file: on S3 the names of
data files differ by attempt, on a local disk by fingerprint, and one fingerprint means the same
bytes (but for quarantined samples, whose rows have another size). A commit that is under way shows
as a second data file, and then the marker is read. What this cannot see is damage that keeps the
size; `verify` and `repair` look for that, and read every marker.

Other tools leave JSON beside shards, too (litdata's index.json, say), and file managers copies of
markers (`00000 (copy).json`). Such a file, of whose name there is no data file, is no marker: it is
left alone, which the log says.
"""

from __future__ import annotations

import gc
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import BinaryIO

from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.errors import storage_errors
from splatshard.pipeline.storage.fs import Stat
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    SourceError,
    UsageError,
)
from splatshard.schemas.manifest import MANIFEST_FILE, Entry, read_entries
from splatshard.schemas.shard import (
    FailedShard,
    ShardManifest,
    failed_from_json,
    is_foreign,
    manifest_from_json,
)

log = logging.getLogger(__name__)

Marker = ShardManifest | FailedShard | CorruptShardError

FAILED = ".failed.json"
DONE = ".json"

READERS = 32
"""Markers read at once from a remote store, which takes tens of milliseconds for each."""

DATA_FILE = re.compile(r"(.+?)-[0-9a-f]{8}(?:-[0-9a-f]{8}[0-9]+)?\.(?:parquet|tar)")
"""Shard, fingerprint and, on S3, attempt. Attempts have 9 characters or more and fingerprints have
8, so that this splits in one way, whatever the shard is called."""


class ForeignFile(CorruptShardError):
    """A JSON file where a marker would be, and is none; `original` is the shard whose marker it
    holds, if it does."""

    def __init__(self, message: str, original: str = "") -> None:
        super().__init__(message)
        self.original = original


_said: set[tuple[str, ...]] = set()


def read_markers(dst: str, *, trust_manifest: bool = True) -> dict[str, Marker]:
    """The marker of every shard in `dst`, sorted by shard name.

    A done marker hides a failed one beside it: the shard is whole, the failed attempt was to
    replace it. A marker that cannot be parsed comes back as its CorruptShardError. Without
    `trust_manifest` every marker is read. Raises FormatVersionError for a newer one, StorageError
    when `dst` cannot be read.
    """
    return markers_and_others(dst, trust_manifest=trust_manifest)[0]


def refuse_foreign(dst: str, names: Iterable[str], foreign: Iterable[str]) -> None:
    """Raises UsageError where one of the `foreign` files of `dst` stands in the place of a marker
    of the shards `names`."""
    taken = sorted({name + DONE for name in names} & set(foreign))
    if taken:
        raise UsageError(
            f"{dst}/{taken[0]} is not splatshard's, and the marker of shard "
            f"{taken[0].removesuffix(DONE)} would replace it: move it away, or choose another DST"
        )


def markers_and_others(
    dst: str, *, trust_manifest: bool = True
) -> tuple[dict[str, Marker], list[str]]:
    """`read_markers`, and the JSON files beside them that are none, sorted; the log names them once
    a process."""
    with storage_errors(dst, "read"), _no_garbage():
        listing = fs.list_folder(dst)
        files = [f for f in listing if f.endswith(DONE) and f[0] not in "_."]
        done = {f.removesuffix(DONE): f for f in files if not f.endswith(FAILED)}
        failed = {f.removesuffix(FAILED): f for f in files if f.endswith(FAILED)}
        known = _still_true(dst, listing) if trust_manifest and MANIFEST_FILE in listing else {}
        del listing
        wanted = {name: file for name, file in (failed | done).items() if name not in known}
        found = known | dict(_read_all(dst, wanted))
        foreign = {name: m for name, m in found.items() if isinstance(m, ForeignFile)}
        here = data_files_by_shard(fs.list_folder(dst)) if foreign else ()
    files = list[str]()
    for name, marker in sorted(foreign.items()):
        if name not in here and (not marker.original or marker.original in found):
            files.append(wanted[name])
            del found[name]
    if files and (dst, *files) not in _said:
        _said.add((dst, *files))
        log.warning(
            "%s: JSON that is no marker of a shard is left alone: %s%s",
            dst, ", ".join(files[:3]), ", ..." if len(files) > 3 else "",
        )  # fmt: skip
    return {name: found[name] for name in sorted(found)}, files


@contextmanager
def _no_garbage() -> Iterator[None]:
    """100,000 markers are two million objects, and no garbage: to look for some again and again
    while they are made would be a third of the work."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _still_true(dst: str, listing: Mapping[str, Stat]) -> dict[str, Marker]:
    """The entries of `_manifest.json` that `listing` confirms. A damaged one has none."""
    url = f"{dst}/{MANIFEST_FILE}"
    try:
        entries = read_manifest(url)
    except (CorruptShardError, SourceError):
        return {}
    data_files = data_files_by_shard(listing)

    def holds(manifest: ShardManifest, marker_bytes: int) -> bool:
        marker = listing.get(manifest.name + DONE)
        data = listing.get(manifest.data_file)
        return (
            marker is not None
            and marker.size_bytes == marker_bytes
            and data is not None
            and data.size_bytes == manifest.size_bytes
            and data_files[manifest.name] == 1
        )

    return {name: entry.manifest for name, entry in entries.items() if holds(*entry)}


def read_manifest(url: str) -> dict[str, Entry]:
    """The shards that the run-level manifest at `url` lists, whether or not they are still so.

    Raises CorruptShardError, FormatVersionError, SourceError and UnavailableError.
    """
    with fs.open_read(url) as stream:
        return read_entries(_lines(stream), url)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def data_files_by_shard(files: Iterable[str]) -> Counter[str]:
    """How many of `files` are data files of each shard, committed or not."""
    return Counter(shard for file in files if (shard := shard_of(file)))


def shard_of(file: str) -> str:
    """The shard whose data file has that name; empty for files that are none."""
    match = DATA_FILE.fullmatch(file)
    return match[1] if match else ""


def _read_all(dst: str, files: Mapping[str, str]) -> Iterator[tuple[str, Marker]]:
    """The markers in `files` (by shard), in any order; without those that are gone by now."""
    recipes: dict[str, dict[str, object]] = {}

    def read(shard: str) -> Marker | None:
        marker = _marker_or_none(dst, files[shard])
        if marker is None and files[shard].endswith(FAILED):  # a job beside us has just made it
            marker = _marker_or_none(dst, shard + DONE)
        if isinstance(marker, ShardManifest):  # 100,000 shards do not need 100,000 recipes
            recipe = marker.inputs["recipe"]
            marker.inputs["recipe"] = recipes.setdefault(repr(recipe), recipe)
        return marker

    names = list(files)
    if not fs.is_local(dst):
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(names), 10_000):  # futures of all would take 100 MB
                some = names[start : start + 10_000]
                yield from _found(zip(some, pool.map(read, some), strict=True))
    else:
        yield from _found(zip(names, map(read, names), strict=True))


def _found(markers: Iterable[tuple[str, Marker | None]]) -> Iterator[tuple[str, Marker]]:
    return ((name, marker) for name, marker in markers if marker is not None)


def _marker_or_none(dst: str, file: str) -> Marker | None:
    with suppress(FileNotFoundError):
        try:
            return read_marker(dst, file)
        except (CorruptShardError, FormatVersionError) as e:
            known = file.endswith(FAILED) or isinstance(e, ForeignFile)
            if not known and is_foreign(fs.read_bytes(f"{dst}/{file}")):
                return ForeignFile(str(e))
            if isinstance(e, FormatVersionError):
                raise
            return e
    return None


def read_marker(dst: str, file: str) -> ShardManifest | FailedShard:
    """The marker in `dst` of that file name.

    Raises CorruptShardError, FormatVersionError, and FileNotFoundError and other OSErrors.
    """
    url = f"{dst}/{file}"
    parse, suffix = (
        (failed_from_json, FAILED) if file.endswith(FAILED) else (manifest_from_json, DONE)
    )
    marker = parse(fs.read_bytes(url), url)
    if marker.name != file.removesuffix(suffix):
        raise ForeignFile(
            f"marker {url} is that of shard {marker.name!r}; delete it and run convert again",
            marker.name,
        )
    return marker
