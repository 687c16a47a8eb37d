"""Which rows of the picture a step of the fit looks at.

Neighbouring rows say nearly the same about a Gaussian that covers both, so a step takes one row in
`stride`, the next step others, and Adam's momentum averages over them. At equal cost that is worth
0.5 dB at 100 full steps of 224 px, for 400 to 4900 Gaussians, and 2 dB at 10
(benchmarks/notes/fit.md).

A picture of some rows is a picture: with y' = (y - 0.5 - phase) / stride + 0.5 and l21, l22 divided
by the stride, each Gaussian has there the values that it has on these rows, and the gradient in
whitened coordinates is the same. So any backend serves.
"""

from __future__ import annotations

import math

import torch

from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig

PHASES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 2, 1, 3)}
"""In which order the steps take the rows, by stride; 0 1 2 3 loses 0.05 dB against 0 2 1 3."""
ROOTS = 1.2
"""Stride over the square root of the Gaussians' spacing in px."""


def row_stride(config: FitConfig, height: int, width: int) -> int:
    """One row of `height` x `width` px in how many a step looks at: what `config` says, or what
    suits the spacing of its number of Gaussians; no more than there are rows."""
    spacing = math.sqrt(height * width / config.num_gaussians)
    suits = min(max(PHASES), max(1, round(ROOTS * math.sqrt(spacing))))
    return min(height, config.row_stride or suits)


def squeezed(splats: Splats, stride: int, phase: int) -> Splats:
    """`splats` [B, N] as they are in the picture that the rows `phase`, `phase` + `stride`, ...
    make."""
    x, y = splats.means.unbind(-1)
    means = torch.stack((x, (y - 0.5 - phase) / stride + 0.5), -1)
    cholesky = splats.cholesky / splats.cholesky.new_tensor([1, stride, stride])
    return Splats(means, cholesky, splats.colors, splats.mask)
