"""What a destination holds, by its markers: the only thing that readers and the planner trust.

{dst}/{shard}.json          the shard is done, and names its data file
{dst}/{shard}.failed.json   why the last attempt failed
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pipeline import storage
from pipeline.storage import storage_errors
from schemas.errors import CorruptShardError
from schemas.shard import FailedShard, ShardManifest, failed_from_json, manifest_from_json

Marker = ShardManifest | FailedShard | CorruptShardError

FAILED = ".failed.json"
DONE = ".json"

READERS = 32
"""Markers read at once from a remote store, which takes tens of milliseconds for each."""


def read_markers(dst: str) -> dict[str, Marker]:
    """The marker of every shard in `dst`, by shard name: one listing, and the markers' bytes.

    A done marker hides a failed one beside it: the shard is whole, the failed attempt was to
    replace it. A marker that cannot be parsed comes back as its CorruptShardError. Raises
    FormatVersionError for a newer one, StorageError when `dst` cannot be read.
    """
    with storage_errors(dst, "read"):
        files = [f for f in storage.list_folder(dst) if f.endswith(DONE) and f[0] not in "_."]
        done = {f.removesuffix(DONE): f for f in files if not f.endswith(FAILED)}
        failed = {f.removesuffix(FAILED): f for f in files if f.endswith(FAILED)}
        wanted = dict(sorted((failed | done).items()))

        def parse(file: str) -> Marker:
            try:
                return read_marker(dst, file)
            except CorruptShardError as e:
                return e

        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(wanted, pool.map(parse, wanted.values()), strict=True))


def read_marker(dst: str, file: str) -> ShardManifest | FailedShard:
    """The marker in `dst` of that file name.

    Raises CorruptShardError, FormatVersionError, and FileNotFoundError and other OSErrors.
    """
    url = f"{dst}/{file}"
    parse, suffix = (
        (failed_from_json, FAILED) if file.endswith(FAILED) else (manifest_from_json, DONE)
    )
    marker = parse(storage.read_bytes(url), url)
    if marker.name != file.removesuffix(suffix):
        raise CorruptShardError(
            f"marker {url} is that of shard {marker.name!r}; delete it and run convert again"
        )
    return marker
