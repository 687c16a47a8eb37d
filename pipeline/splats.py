"""Splats: a batch of 2D Gaussians per image, and the pure conversions between their
parametrisations.

    I(p) = sum_i c_i exp(-1/2 (p - mu_i)^T Sigma_i^-1 (p - mu_i)),   Sigma = L L^T,   |L^-1 (p -
    mu)| <= cutoff

Pixel units, x right, y down, pixel centres at +0.5. Colours are signed and unclamped; a sum needs
no opacity. The Cholesky factor follows GaussianImage (arXiv 2403.08551); sums and cutoff are ours
to fix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 4.0
"""Of the entries of L while fitting, in the image's longer side."""
MIN_SIGMA_PX = 0.3
"""Lower bound of the diagonal factors of the published parametrisation."""


@dataclass(frozen=True)
class Splats:
    """B images of up to N Gaussians each.

    means     [B, N, 2]  x, y in px
    cholesky  [B, N, 3]  l11 > 0, l21, l22 > 0 in px: L = [[l11, 0], [l21, l22]]
    colors    [B, N, 3]  RGB on the scale where white is 1; signed
    mask      [B, N]     bool; False entries are padding and render nothing
    """

    means: Tensor
    cholesky: Tensor
    colors: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def num_gaussians(self) -> Tensor:
        """Gaussians per image, int64 [B]."""
        return self.mask.sum(1)

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """means, cholesky, colors, mask."""
        return self.means, self.cholesky, self.colors, self.mask

    def map(self, change: Callable[[Tensor], Tensor]) -> Splats:
        """`change` of each of the four tensors."""
        return Splats(*map(change, self.fields))

    def to(self, device: torch.device) -> Splats:
        """The same splats on `device`."""
        return self.map(lambda x: x.to(device))

    def __getitem__(self, index: slice | Tensor) -> Splats:
        """Images of the batch; a slice or an index tensor, so that the batch dimension stays."""
        return self.map(lambda x: x[index])


def cat(parts: Sequence[Splats], dim: int = 0) -> Splats:
    """Batches [B, N] one after another (0), or the Gaussians of the same images (1)."""
    tensors = zip(*(part.fields for part in parts), strict=True)
    return Splats(*(torch.cat(same, dim) for same in tensors))


def first(splats: Splats, count: int) -> Splats:
    """The first `count` Gaussians of every image, [B, count]."""
    return splats.map(lambda x: x[:, :count].contiguous())


def covariances(cholesky: Tensor) -> Tensor:
    """[..., 3] factors in px to covariances [..., 3] = (xx, xy, yy) in px^2."""
    l11, l21, l22 = cholesky.unbind(-1)
    return torch.stack((l11 * l11, l11 * l21, l21 * l21 + l22 * l22), -1)


def conics(cholesky: Tensor) -> Tensor:
    """[..., 3] factors in px to inverse covariances [..., 3] = (xx, xy, yy) in 1/px^2."""
    l11, l21, l22 = cholesky.unbind(-1)
    a, c = 1 / l11, 1 / l22
    b = -l21 * a * c
    return torch.stack((a * a + b * b, b * c, c * c), -1)


def cholesky_from_covariances(covariance: Tensor) -> Tensor:
    """Covariances [..., 3] = (xx, xy, yy) in px^2, positive definite, to factors [..., 3] in px."""
    xx, xy, yy = covariance.unbind(-1)
    l11 = xx.sqrt()
    l21 = xy / l11
    return torch.stack((l11, l21, (yy - l21 * l21).sqrt()), -1)


def scales_and_angles(cholesky: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 3] factors in px to standard deviations [..., 2] in px, larger first, and the larger
    axis' angle [...] in (-pi/2, pi/2]."""
    xx, xy, yy = covariances(cholesky).unbind(-1)
    mean, half = (xx + yy) / 2, (xx - yy) / 2
    radius = torch.hypot(half, xy)
    major = mean + radius
    determinant = (cholesky[..., 0] * cholesky[..., 2]).square()
    scales = torch.stack((major, determinant / major), -1).sqrt()  # det/major: no cancellation
    return scales, torch.atan2(xy, half) / 2


def cholesky_from_scales_and_angles(scales: Tensor, angles: Tensor) -> Tensor:
    """Inverse of `scales_and_angles`: [..., 2] px and [...] radians to factors [..., 3] in px."""
    s1, s2 = scales.square().unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    xx = s1 * cos * cos + s2 * sin * sin
    l11 = xx.sqrt()
    l21 = (s1 - s2) * cos * sin / l11
    l22 = scales[..., 0] * scales[..., 1] / l11
    return torch.stack((l11, l21, l22), -1)


def ellipses(splats: Splats, points: int = 33) -> Tensor:
    """[B, N, points, 2] x, y in px: around each Gaussian at one standard deviation, mean + L (cos
    t, sin t); the last point is the first."""
    angle = torch.linspace(0, 2 * math.pi, points, device=splats.means.device)
    l11, l21, l22 = splats.cholesky[..., None].unbind(-2)
    x = l11 * angle.cos()
    y = l21 * angle.cos() + l22 * angle.sin()
    return splats.means[:, :, None] + torch.stack((x, y), -1)


def bounds(height: int, width: int) -> tuple[float, float, float, float, float]:
    """The least and the largest x, then y, of means while fitting, and the largest entry of L, px.

    Shards hold means in the square of twice the longer side about the image's middle
    (codec/layout.py). Left alone, Gaussians that have grown wide drift away, as far as 60,000
    images; what is stored of them is another picture.
    """
    side = max(height, width)
    x, y = width / 2, height / 2
    return x - side, x + side, y - side, y + side, LARGEST * side
