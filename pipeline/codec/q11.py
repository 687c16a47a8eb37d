"""q11, the quantiser of format version 1, only read. schemas/FORMAT.md has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 4
BYTES = 11
STEPS_PER_OCTAVE = 64
MIN_OCTAVE = -5
SHEAR_STEPS = 384
SHEAR_UNIT = 2.0


def decode(payload: bytes, height: int, width: int) -> NDArray[np.float64]:
    """A payload to Gaussians [N, 8]: x, y, l11, l21, l22 in px, r, g, b."""
    planes = np.frombuffer(payload, np.uint8, -1, HEADER_BYTES).reshape(BYTES, -1)
    codes = np.ascontiguousarray(planes.T)
    with np.errstate(invalid="ignore"):  # a signalling NaN is one like others
        scale = np.frombuffer(payload, "<f4", 1).astype(np.float64)
    wide = codes.astype(int)
    steps = wide[:, 4:6] << 2 | np.stack((wide[:, 7] & 3, wide[:, 7] >> 2 & 3), 1)
    turns = (wide[:, 6] << 4 | wide[:, 7] >> 4) - 2048
    root = codes[:, 8:].view(np.int8).astype(np.float64) / 127
    diagonal = 2.0 ** (steps / STEPS_PER_OCTAVE + MIN_OCTAVE)
    shear = SHEAR_UNIT * np.sinh(turns / SHEAR_STEPS)
    position = wide[:, :4:2] | wide[:, 1:4:2] << 8
    values = np.empty((len(codes), 8))
    values[:, :2] = (position / 65535 * 2 - 0.5) * (width, height)
    values[:, [2, 4]] = diagonal
    values[:, 3] = shear * diagonal[:, 1]
    values[:, 5:] = root * np.abs(root) * scale
    return values
