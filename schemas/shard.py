"""Shards as plain data: where one comes from (`ShardRef`), and the done or failed marker beside it.

A marker is the only thing readers trust. `{shard}.json` says a shard is done and names its data file;
`{shard}.failed.json` says the last attempt failed and why. Both are deterministic: no clock, no host,
so that two runs over the same input leave byte-identical folders.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import CorruptShardError, FormatVersionError
from schemas.splats import FORMAT_VERSION

OK = "ok"
SKIP_STATUSES = (
    "no_image",  # a key without an image member
    "duplicate_key",  # a second sample with a key already seen in this shard
    "unsafe_path",  # absolute or ../ member path
    "empty_image",  # zero bytes
    "not_an_image",  # no known image header
    "corrupt_image",  # header fine, pixels not
    "too_large",  # the header promises more pixels than allowed
    "animated_image",  # more than one frame
    "bad_metadata",  # .cls or .json that cannot be parsed
    "fit_diverged",  # non-finite splats
)


@dataclass(frozen=True, kw_only=True)
class ShardRef:
    """One unit of work: a source shard and how much of it to take.

    `name` is the output name (the source's base name without extension). `kind` is "tar", "parquet" or
    "folder". `urls` has one entry, except for a folder's shard: its files, sorted. `etag` is the
    store's, or the modification time on a local disk, or a digest of both over a folder's files.
    `labels` maps a folder's class directories to label numbers.
    """

    name: str
    kind: str
    urls: tuple[str, ...]
    size_bytes: int
    etag: str
    limit: int | None = None
    root: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """The done marker of one shard: what was committed, and everything needed to check it.

    `inputs` is what the fingerprint covers: recipe, format version and source identity. `counts` maps
    every status to a number of rows and sums to `samples`. `statistics` holds psnr_mean/min/max (dB),
    num_gaussians_mean, payload_bytes.
    """

    name: str
    data_file: str
    size_bytes: int
    sha256: str
    format: str
    samples: int
    counts: dict[str, int]
    statistics: dict[str, float]
    fingerprint: str
    inputs: dict[str, Any]
    source_url: str
    source_sha256: str
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if sum(self.counts.values()) != self.samples:
            raise CorruptShardError(
                f"shard {self.name}: {self.samples} samples came in but the rows add up to "
                f"{sum(self.counts.values())} ({self.counts}); nothing was committed"
            )


@dataclass(frozen=True, kw_only=True)
class FailedShard:
    """The failed marker of one shard: the last error, by class and message."""

    name: str
    source_url: str
    error: str
    message: str
    fingerprint: str
    format_version: int = field(default=FORMAT_VERSION)


def to_json(marker: ShardManifest | FailedShard) -> str:
    """Canonical JSON: sorted keys, two-space indent, closing newline."""
    return json.dumps(dataclasses.asdict(marker), sort_keys=True, indent=2) + "\n"


def manifest_from_json(text: str, name: str) -> ShardManifest:
    """Parse a done marker. `name` (a path or URL) goes into error messages.

    Raises `FormatVersionError` for a newer version and `CorruptShardError` for anything malformed.
    """
    return _from_json(ShardManifest, text, name)


def failed_from_json(text: str, name: str) -> FailedShard:
    """Parse a failed marker; raises as `manifest_from_json`."""
    return _from_json(FailedShard, text, name)


def _from_json(cls: type, text: str, name: str) -> Any:
    try:
        values = json.loads(text)
    except ValueError as e:
        raise CorruptShardError(
            f"marker {name} is not JSON ({e}); delete it to redo the shard"
        ) from e
    if not isinstance(values, dict):
        raise CorruptShardError(f"marker {name} is not a JSON object; delete it to redo the shard")
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"marker {name} has format version {version}; this build reads up to {FORMAT_VERSION}: "
            "upgrade splatshard or choose another DST"
        )
    expected = {f.name: f for f in dataclasses.fields(cls)}
    missing = sorted(expected.keys() - values.keys())
    unknown = sorted(values.keys() - expected.keys())
    if missing or unknown:
        raise CorruptShardError(
            f"marker {name}: missing fields {missing}, unknown fields {unknown}; delete it to redo the shard"
        )
    kinds = {
        "str": str,
        "int": int,
        "dict[str, int]": dict,
        "dict[str, float]": dict,
        "dict[str, Any]": dict,
    }
    for key, f in expected.items():
        if not isinstance(values[key], kinds[str(f.type)]):
            raise CorruptShardError(
                f"marker {name}: field {key} is {values[key]!r}, expected {f.type}"
            )
    return cls(**values)
