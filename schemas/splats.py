"""The wire format: columns, dtypes, ranges and the Arrow schema of a splat shard.

FORMAT.md beside this file specifies the bytes; this module is its executable half.
One row per source sample, in source order, skipped samples included (`status` says why).
"""

# pyarrow ships no type information:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

FORMAT_VERSION = 1

CODECS = {"fp16": 16, "q11": 11}
"""Payload codecs and their bytes per Gaussian (the compact codec will be a third)."""

HEADER_BYTES = {"fp16": 0, "q11": 4}
"""Bytes before the first Gaussian. A payload without Gaussians is empty in every codec."""

EXTENSIONS = {"parquet": "parquet", "webdataset": "tar"}
"""Container formats and the extension of their data files."""

MAX_PSNR = 100.0
"""dB; the largest `psnr` stored, since an exact copy has an infinite one, no JSON number."""

METADATA_KEY = b"splatshard"
"""Key in the Parquet schema metadata whose value is the JSON of `shard_metadata`."""

METADATA_MEMBER = "__splatshard__"
"""First member of a WebDataset shard, same JSON; readers skip names of this form as metadata."""

MEMBER = pa.struct([pa.field("name", pa.string()), pa.field("data", pa.binary())])

COLUMNS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # WebDataset __key__, as in the source
        pa.field("uid", pa.string()),  # DataComp's 32 hex digits, kept as given
        pa.field("caption", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("status", pa.string(), nullable=False),  # "ok" or one of SKIP_STATUSES
        pa.field("error", pa.string()),  # message for a skipped sample
        pa.field("width", pa.int32()),  # px, of the fitted image
        pa.field("height", pa.int32()),
        pa.field("original_width", pa.int32()),  # px, of the source image after EXIF orientation
        pa.field("original_height", pa.int32()),
        pa.field("num_gaussians", pa.int32(), nullable=False),  # 0 for skipped samples
        pa.field("psnr", pa.float32()),  # dB, unpacked payload against fitted image
        pa.field("steps", pa.int32()),  # optimisation steps this image took
        pa.field("metadata", pa.string()),  # the sample's JSON member, as it came
        pa.field("members", pa.list_(MEMBER)),  # every further member of the sample, as it came
        pa.field("splats", pa.binary()),  # the payload, layout by codec
    ]
)

BULKY = ("metadata", "members", "splats")
NAMES: tuple[str, ...] = tuple(COLUMNS.names)  # pyright: ignore[reportUnknownArgumentType]
SCALARS = tuple(name for name in NAMES if name not in BULKY)
"""The columns small enough for dictionaries, statistics and filters."""


def shard_metadata(codec: str, cutoff: float, recipe: dict[str, Any]) -> dict[str, object]:
    """The constants a reader needs: format version, codec, cutoff (standard deviations), recipe."""
    return {
        "format_version": FORMAT_VERSION,
        "codec": codec,
        "bytes_per_gaussian": CODECS[codec],
        "header_bytes": HEADER_BYTES[codec],
        "cutoff": cutoff,
        "recipe": recipe,
    }


def arrow_schema(metadata: dict[str, object]) -> pa.Schema:
    """`COLUMNS` with `metadata` (see `shard_metadata`) as canonical JSON under `METADATA_KEY`."""
    return COLUMNS.with_metadata({METADATA_KEY: canonical_json(metadata).encode()})


def canonical_json(value: object) -> str:
    """Sorted keys, no spaces; raises ValueError for NaN and infinities, which are not JSON."""
    return _CANONICAL.encode(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
