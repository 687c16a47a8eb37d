"""fp16: eight IEEE halves per Gaussian, as 16 byte planes. schemas/FORMAT.md specifies it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HALF_MAX = 65504.0
HALF_MIN_DIAGONAL = 2.0**-14
"""px; the smallest normal half, so that a stored diagonal is never zero."""


def to_halves(gaussians: NDArray[np.float64], height: int, width: int) -> NDArray[np.float16]:
    """Gaussians [N, 8] (x, y, l11, l21, l22 in px, r, g, b) to halves, clamped to their range."""
    values = gaussians.copy()
    values[:, :2] -= (width / 2, height / 2)
    values[:, [2, 4]] = np.maximum(values[:, [2, 4]], HALF_MIN_DIAGONAL)
    return values.clip(-HALF_MAX, HALF_MAX).astype(np.float16)


def decode(payload: bytes, height: int, width: int) -> NDArray[np.float64]:
    """A payload to Gaussians [N, 8]; the twin of `kernel.decode_fp16`."""
    planes = np.frombuffer(payload, np.uint8).reshape(16, -1)
    values = np.ascontiguousarray(planes.T).view("<f2").astype(np.float64)
    values[:, :2] += (width / 2, height / 2)
    return values
