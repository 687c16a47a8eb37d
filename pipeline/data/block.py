"""Rows in memory, still packed, and how some of them become a batch.

A block holds rows of one data file: a row group of a Parquet file, a whole tar. Everything but the
payloads is an array with an entry per row, so that a batch costs a few gathers and one compiled
pass over its payloads, and next to nothing per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from splatshard.pipeline.codec import Plane, decode_rows
from splatshard.pipeline.data.batch import Position, TrainBatch, splats_from_values
from splatshard.pipeline.data.windows import Choice
from splatshard.schemas.errors import CorruptShardError

PADDING = np.array([0, 0, 1, 0, 1, 0, 0, 0], np.float32)
"""A unit Gaussian of no colour."""


class Part(NamedTuple):
    """The payloads of one column: Gaussians `begin` to `end` of each sample, if it has as many."""

    begin: int
    end: int
    planes: dict[str, Plane]


@dataclass(frozen=True)
class Block:
    """K samples of one file, `url`. `rows` int64 [K] are their rows in the planes of `parts`;
    counts, heights and widths are int32 [K], labels int64 [K] with -1 for none, keys and captions
    Arrow strings [K], teacher float16 [K, D] or None, further Arrow arrays [K] by column."""

    url: str
    codec: str
    parts: tuple[Part, ...]
    rows: NDArray[np.int64]
    counts: NDArray[np.int32]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    labels: NDArray[np.int64]
    keys: pa.StringArray
    captions: pa.StringArray
    teacher: NDArray[np.float16] | None = None
    further: dict[str, pa.Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


def assemble(
    chosen: Sequence[Choice[Block]],
    num_gaussians: int | None,
    valid: Tensor,
    position: Position | None,
) -> TrainBatch:
    """The B chosen samples as one batch, padded to `num_gaussians` or, if None, to the largest
    sample; `valid` (bool [B]) and `position` go into it as they are. Raises CorruptShardError for a
    payload that cannot be decoded."""
    counts = _gathered(chosen, "counts")
    width = int(counts.max()) if num_gaussians is None else num_gaussians
    values = torch.empty(len(counts), width, 8)
    heights, widths = _gathered(chosen, "heights"), _gathered(chosen, "widths")
    _decode(chosen, counts, heights, widths, values.numpy())
    mask = np.arange(width, dtype=np.int32) < counts[:, None]
    return TrainBatch(
        splats=splats_from_values(values, torch.from_numpy(mask)),
        heights=torch.from_numpy(heights),
        widths=torch.from_numpy(widths),
        keys=cast("list[str]", [x for block, places in chosen for x in texts(block.keys, places)]),
        captions=[text for block, places in chosen for text in texts(block.captions, places)],
        labels=torch.from_numpy(_gathered(chosen, "labels")),
        teacher=_teacher(chosen),
        valid=valid,
        position=position,
        columns={name: _column(chosen, name) for name in chosen[0][0].further},
    )


def _gathered(chosen: Sequence[Choice[Block]], name: str) -> NDArray:
    parts = [getattr(block, name)[places] for block, places in chosen]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _decode(
    chosen: Sequence[Choice[Block]],
    counts: NDArray[np.int32],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    out: NDArray[np.float32],
) -> None:
    short = np.flatnonzero(counts < out.shape[1])
    if len(short):
        out[short] = PADDING
    begin = 0
    for block, places in chosen:
        span = slice(begin, begin + len(places))
        begin = span.stop
        rows = block.rows[places]
        for part in block.parts:
            size = counts[span] if len(block.parts) == 1 else _within(part, counts[span])
            try:
                decode_rows(
                    block.codec, part.planes, rows, size, heights[span], widths[span], out[span],
                    part.begin,
                )  # fmt: skip
            except CorruptShardError as e:
                raise CorruptShardError(f"{block.url}: {e}: run splatshard repair") from e


def _within(part: Part, counts: NDArray[np.int32]) -> NDArray[np.int32]:
    """How many of each sample's Gaussians lie in `part`."""
    return (np.minimum(counts, part.end) - part.begin).clip(0).astype(np.int32)


def texts(column: pa.StringArray, places: NDArray[np.int64]) -> list[str | None]:
    """The entries of a string column at `places`, int64 [K]. By way of numpy, which makes strings
    four times as fast as Arrow's own `to_pylist` does."""
    return column.take(pa.array(places)).to_numpy(zero_copy_only=False).tolist()


def _column(chosen: Sequence[Choice[Block]], name: str) -> Tensor | list[Any]:
    """A further column of the B chosen samples: a tensor [B] of numbers, with NaN or -1 where
    there is none, or a list."""
    column = pa.concat_arrays([b.further[name].take(pa.array(places)) for b, places in chosen])
    if pa.types.is_floating(column.type):
        return torch.from_numpy(column.fill_null(np.nan).to_numpy().copy())
    if pa.types.is_integer(column.type):
        return torch.from_numpy(column.fill_null(-1).to_numpy().copy())
    if pa.types.is_list(column.type):
        return [members or [] for members in column.to_pylist()]
    return column.to_pylist()


def _teacher(chosen: Sequence[Choice[Block]]) -> Tensor | None:
    if any(block.teacher is None for block, _ in chosen):
        return None
    return torch.from_numpy(_gathered(chosen, "teacher").astype(np.float32))
