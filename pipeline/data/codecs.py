"""Stand-in for pipeline.codec."""

from __future__ import annotations

try:
    from pipeline.codec import Plane, decode_rows
except ImportError:
    from typing import NamedTuple

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.pack import unpack
    from schemas.errors import CorruptShardError

    class Plane(NamedTuple):
        data: NDArray[np.uint8]
        offsets: NDArray[np.int64]

    def decode_rows(codec, planes, rows, counts, heights, widths, out, start):
        (plane,) = planes.values()
        for i, row in enumerate(rows):
            payload = plane.data[plane.offsets[row] : plane.offsets[row + 1]].tobytes()
            s = unpack([payload], int(heights[i]), int(widths[i]), codec)
            if int(s.num_gaussians[0]) != counts[i]:
                raise CorruptShardError(f"{int(s.num_gaussians[0])} Gaussians, not {counts[i]}")
            n = int(counts[i])
            out[i, start : start + n, :2] = s.means[0]
            out[i, start : start + n, 2:5] = s.cholesky[0]
            out[i, start : start + n, 5:] = s.colors[0]


def split_member(codec: str, data: bytes) -> dict[str, bytes]:
    return {"": data}


__all__ = ["Plane", "decode_rows", "split_member"]
