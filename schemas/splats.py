"""The wire format: columns, dtypes, ranges and the Arrow schema of a splat shard.

FORMAT.md beside this file specifies the bytes; this module is its executable half.
One row per source sample, in source order, skipped samples included (`status` says why).
"""

# pyarrow ships no type information:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import pyarrow as pa

FORMAT_VERSION = 2

CodecName = Literal["fp16", "balanced", "compact"]
CODECS = get_args(CodecName)
"""Payload codecs that are written; format version 1 also has q11."""

PLANAR = ("balanced", "compact")
"""Codecs whose payloads are several columns, those of PLANES."""

PLANES = ("gap", "c0", "c1", "c2", "size", "ratio", "shear", "bits")

MAX_LOSS_DB = {"balanced": 0.2, "compact": 1.0}
"""dB that a codec may take from an image. fp16 is not steered: 0.01 of 400, 0.14 of 3136
Gaussians."""

MAX_PAYLOAD_GAUSSIANS = 1 << 20
"""That a reader takes from one payload; more is damage. Writers stay below MAX_FITTED_GAUSSIANS
(schemas/config.py)."""

FormatName = Literal["parquet", "webdataset"]
EXTENSIONS: dict[FormatName, str] = {"parquet": "parquet", "webdataset": "tar"}
"""Container formats and the extension of their data files."""

MAX_PSNR = 100.0
"""dB; the largest `psnr` stored, since an exact copy has an infinite one, no JSON number."""

TEACHER = "teacher"
"""The column with a teacher's embedding of each image, in shards that have one."""

MAX_TEACHER_DIM = 1 << 16

METADATA_KEY = b"splatshard"
"""Key in the Parquet schema metadata whose value is the JSON of `shard_metadata`."""

METADATA_MEMBER = "__splatshard__"
"""First member of a WebDataset shard, same JSON; readers skip names of this form as metadata."""

MEMBER = pa.struct([pa.field("name", pa.string()), pa.field("data", pa.binary())])

SCALAR_COLUMNS = [
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
]

MEMBER_COLUMNS = [
    pa.field("metadata", pa.string()),  # the sample's JSON member, as it came
    pa.field("members", pa.list_(MEMBER)),  # every further member of the sample, as it came
]


def columns(metadata: dict[str, Any]) -> pa.Schema:
    """The columns of a shard with these `shard_metadata`.

    Version 2 adds psnr_loss (dB that the codec took) and, for nested budgets, the PSNR of each
    smaller one; and the payloads are one column per budget, see `splat_columns`. Shards made with
    a teacher have its embeddings: binary, since a list of halves cannot be read everywhere.
    """
    budgets = tuple(metadata.get("budgets", ()))
    return _columns(metadata["format_version"], metadata["codec"], budgets, TEACHER in metadata)


@lru_cache(maxsize=16)
def _columns(version: int, codec: str, budgets: tuple[int, ...], taught: bool) -> pa.Schema:
    payload = pa.struct([pa.field(name, pa.binary()) for name in PLANES])
    kind = payload if codec in PLANAR else pa.binary()
    losses = ("psnr_loss",) if version > 1 else ()
    own = [pa.field(name, pa.float32()) for name in (*psnr_columns(budgets), *losses)]
    splats = [pa.field(name, kind) for name in splat_columns(budgets)]
    teacher = [pa.field(TEACHER, pa.binary())] if taught else []
    return pa.schema([*SCALAR_COLUMNS, *own, *MEMBER_COLUMNS, *splats, *teacher])


def splat_columns(budgets: Sequence[int]) -> tuple[str, ...]:
    """Columns of the payloads: one for each budget's own Gaussians; `splats` alone without any."""
    return ("splats", *(f"splats_{budget}" for budget in budgets[1:]))


def payload_columns(metadata: dict[str, Any]) -> tuple[str, ...]:
    """Columns that are members of their own in a tar: the payloads, and the teacher's."""
    taught = (TEACHER,) if TEACHER in metadata else ()
    return (*splat_columns(metadata.get("budgets", ())), *taught)


def splat_suffix(column: str) -> str:
    """Such a column's member in a tar: splat, splat_900, ..., teacher."""
    return column.replace("splats", "splat", 1)


def psnr_columns(budgets: Sequence[int]) -> tuple[str, ...]:
    """Columns of the PSNR of every budget but the last, whose PSNR is `psnr`."""
    return tuple(f"psnr_{budget}" for budget in budgets[:-1])


def scalars(metadata: dict[str, Any]) -> tuple[str, ...]:
    """The columns small enough for dictionaries, statistics and filters."""
    names = cast("list[str]", columns(metadata).names)  # pyright: ignore[reportUnknownMemberType]
    return tuple(names[: names.index("metadata")])


def payload_bytes(row: dict[str, Any]) -> int:
    """Bytes of a row's payloads before compression."""
    size = 0
    for name, payload in row.items():
        if name.startswith("splats") and payload is not None:
            planes = cast(
                "dict[str, bytes]", payload if isinstance(payload, dict) else {"": payload}
            )
            size += sum(map(len, planes.values()))
    return size


def shard_metadata(codec: str, cutoff: float, recipe: dict[str, Any]) -> dict[str, Any]:
    """The constants a reader needs: format version, codec, cutoff (standard deviations), nested
    budgets (none: empty), recipe; and whose embeddings it holds, if any."""
    nested: str = recipe.get("fit", {}).get("nested", "")
    taught = {TEACHER: recipe[TEACHER]} if TEACHER in recipe else {}
    return taught | {
        "format_version": recipe.get("format_version", FORMAT_VERSION),
        "codec": codec,
        "cutoff": cutoff,
        "budgets": [int(budget) for budget in nested.split(",") if budget],
        "recipe": recipe,
    }


def metadata_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """The `shard_metadata` of shards made by `recipe`, as their markers have it."""
    return shard_metadata(recipe["pack"]["codec"], recipe["fit"]["cutoff"], recipe)


def arrow_schema(metadata: dict[str, Any]) -> pa.Schema:
    """`columns` with `metadata` (see `shard_metadata`) as canonical JSON under `METADATA_KEY`."""
    return columns(metadata).with_metadata({METADATA_KEY: canonical_json(metadata).encode()})


def canonical_json(value: object) -> str:
    """Sorted keys, no spaces; raises ValueError for NaN and infinities, which are not JSON."""
    return _CANONICAL.encode(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
