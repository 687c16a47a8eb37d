"""Payload codecs, seen from a reader: columns of bytes to float32 Gaussians, a batch at a time.

    fp16                 16 bytes per Gaussian in one column: fp16.py
    balanced, compact    eight columns: layout.py (grid), planes.py (bytes), quantise.py (loss)
    q11                  format version 1 only: q11.py

kernel.py has the compiled decoders. `pipeline.codec.pack` is the writer's side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from splatshard.pipeline.codec import q11
from splatshard.pipeline.codec.layout import HEADER
from splatshard.pipeline.codec.planes import split
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.splats import PLANAR, PLANES


class Plane(NamedTuple):
    """A column of bytes: row i is data[offsets[i] : offsets[i + 1]].

    data uint8 [...], offsets int64 [rows + 1]
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]


def column(rows: list[bytes]) -> Plane:
    """A column from its rows."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return Plane(np.frombuffer(b"".join(rows), np.uint8), offsets)


def split_member(codec: str, data: bytes) -> dict[str, bytes]:
    """A tar's payload member as the rows of its columns, by name. Raises CorruptShardError."""
    return split(data) if codec in PLANAR else {"": data}


def decode_rows(
    codec: str,
    planes: dict[str, Plane],
    rows: NDArray[np.int64],
    counts: NDArray[np.int32],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    out: NDArray[np.float32],
    start: int = 0,
) -> None:
    """Gaussians of rows[i] of the columns into out[i, start : start + counts[i]], for B rows.

    planes     the columns by name: PLANES for `balanced` and `compact`, else the one named ""
    counts     Gaussians of each row, heights and widths: px of its image [B]
    out        float32 [B, N, 8], C order: x, y, l11, l21, l22 in px, r, g, b; the rest is kept

    Releases the interpreter's lock. Raises CorruptShardError for an unknown codec, and for payloads
    that are damaged or do not hold as many Gaussians as `counts` says.
    """
    if codec in PLANAR:
        columns = tuple(planes[name] for name in PLANES)
        sizes = [_lengths(one, rows) for one in columns]
        expected = [counts] * 7 + [np.where(counts > 0, np.maximum(sizes[7], HEADER.size), 0)]
    elif codec in ("fp16", "q11"):
        columns = (planes[""],)
        sizes = [_lengths(columns[0], rows)]
        expected = [counts * 16 if codec == "fp16" else counts * 11 + (counts > 0) * 4]
    else:
        raise CorruptShardError(f"unknown codec {codec!r}: upgrade splatshard")
    _expect(sizes, expected, rows, codec)
    if len(rows) and (counts.min() < 0 or start + counts.max() > out.shape[1]):
        raise CorruptShardError(f"{counts.max()} Gaussians do not fit into {out.shape[1]}")
    if codec == "q11":
        for i, row in enumerate(rows):
            payload = columns[0].data[columns[0].offsets[row] : columns[0].offsets[row + 1]]
            if counts[i]:
                values = q11.decode(payload.tobytes(), heights[i], widths[i])
                out[i, start : start + counts[i]] = values
        return
    from splatshard.pipeline.codec import kernel  # numba takes a second to import

    if codec == "fp16":
        data, offsets = columns[0]
        kernel.decode_fp16(data, offsets, rows, counts, heights, widths, start, out)
        return
    kernel.decode_batch(columns, rows, counts, heights, widths, out, start)


def _lengths(plane: Plane, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of `rows`; raises CorruptShardError where the offsets leave the data."""
    begin, end = plane.offsets[rows], plane.offsets[rows + 1]
    if len(rows) and (begin.min() < 0 or (end < begin).any() or end.max() > len(plane.data)):
        raise CorruptShardError("a column's offsets lie outside of its bytes")
    return end - begin


def _expect(
    sizes: list[NDArray], expected: list[NDArray], rows: NDArray[np.int64], codec: str
) -> None:
    for size, wanted in zip(sizes, expected, strict=True):
        wrong = np.flatnonzero(size != wanted)
        if len(wrong):
            i = wrong[0]
            raise CorruptShardError(
                f"the {codec} payload of row {rows[i]} has {size[i]} bytes where {wanted[i]} belong"
            )
