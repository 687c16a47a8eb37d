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
    if codec not in (*PLANAR, "fp16", "q11"):
        raise CorruptShardError(f"unknown codec {codec!r}: upgrade splatshard")
    if len(rows) and (counts.min() < 0 or start + counts.max() > out.shape[1]):
        raise CorruptShardError(f"{counts.max()} Gaussians do not fit into {out.shape[1]}")
    if codec in PLANAR:
        from splatshard.pipeline.codec import kernel  # numba takes a second to import

        columns = tuple(planes[name] for name in PLANES)
        kernel.decode_batch(columns, rows, counts, heights, widths, out, start)
        return
    column = planes[""]
    size, header = (16, 0) if codec == "fp16" else (11, 4)
    _expect(column, rows, counts.astype(np.int64) * size + (counts > 0) * header, codec)
    if codec == "q11":
        for i, row in enumerate(rows):
            payload = column.data[column.offsets[row] : column.offsets[row + 1]]
            if counts[i]:
                values = q11.decode(payload.tobytes(), heights[i], widths[i])
                out[i, start : start + counts[i]] = values
        return
    from splatshard.pipeline.codec import kernel

    kernel.decode_halves(column, rows, counts, heights, widths, out, start)


def _expect(column: Plane, rows: NDArray[np.int64], wanted: NDArray[np.int64], codec: str) -> None:
    """Raises CorruptShardError where offsets leave the data, or `rows` have not the bytes that are
    wanted."""
    begin, end = column.offsets[rows], column.offsets[rows + 1]
    if len(rows) and (begin.min() < 0 or (end < begin).any() or end.max() > len(column.data)):
        raise CorruptShardError("a column's offsets lie outside of its bytes")
    wrong = np.flatnonzero(end - begin != wanted)
    if len(wrong):
        i = wrong[0]
        raise CorruptShardError(
            f"the {codec} payload of row {rows[i]} has {end[i] - begin[i]} bytes where {wanted[i]} "
            "belong"
        )
