"""What tests of augmentation share: Gaussians, and the picture they make at any point."""

from __future__ import annotations

import torch
from torch import Tensor

from splatshard.pipeline.splats import Splats, covariances
from splatshard.schemas.train import AugmentConfig

HEIGHT, WIDTH = 20, 28
FULL = AugmentConfig(
    height=24,
    width=16,
    crop_scale=(0.2, 0.9),
    flip=0.5,
    rotation=30,
    shear=20,
    zoom=(0.7, 1.5),
    shift=0.2,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=40,
    grayscale=0.3,
    dropout=0.3,
)


def some_splats(batch: int = 3, n: int = 30, seed: int = 0, dtype=torch.float64) -> Splats:
    """Gaussians in, across and beyond the border, thin ones too; the last third of the entries of
    image 1 are padding that would show if it were rendered."""
    g = torch.Generator().manual_seed(seed)
    side = torch.tensor([WIDTH, HEIGHT])
    means = (torch.rand(batch, n, 2, generator=g, dtype=dtype) * 1.6 - 0.3) * side
    cholesky = torch.randn(batch, n, 3, generator=g, dtype=dtype)
    cholesky[..., ::2] = (cholesky[..., ::2] * 0.7).exp()
    colors = torch.randn(batch, n, 3, generator=g, dtype=dtype)
    mask = torch.ones(batch, n, dtype=torch.bool)
    mask[1 % batch, n - n // 3 :] = False
    return Splats(means, cholesky, colors, mask)


def picture(splats: Splats, points: Tensor, cutoff: float = 3.0) -> Tensor:
    """The oracle: I(p) [B, P, 3] at any points [B, P, 2], through the inverse covariance."""
    xx, xy, yy = covariances(splats.cholesky).unbind(-1)
    sigma = torch.stack((xx, xy, xy, yy), -1).unflatten(-1, (2, 2))
    d = points[:, None] - splats.means[:, :, None]  # [B, N, P, 2]
    q = (d * torch.linalg.solve(sigma[:, :, None], d[..., None])[..., 0]).sum(-1)
    weight = torch.exp(-q / 2) * ((q <= cutoff**2) & splats.mask[..., None])
    return torch.einsum("bnp,bnc->bpc", weight, splats.colors)


def some_points(batch: int = 3, number: int = 400, seed: int = 7) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    side = torch.tensor([WIDTH, HEIGHT])
    return (torch.rand(batch, number, 2, generator=g, dtype=torch.float64) * 2 - 0.5) * side


def centers(batch: int, height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack((x, y), -1).double() + 0.5).flatten(0, 1).expand(batch, -1, 2)


def as_image(values: Tensor, height: int, width: int) -> Tensor:
    return values.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def close(found: Tensor, wanted: Tensor, atol: float = 1e-9) -> None:
    assert wanted.abs().max() > 0.1, "nothing to see"
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-9)


def matrices(number: int = 3, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Maps that turn, mirror, stretch and shear, none of them nearly flat."""
    g = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(number, 2, 2, generator=g, dtype=torch.float64))
    slant = torch.randn(number, 2, 2, generator=g, dtype=torch.float64).triu(1)
    scale = torch.randn(number, 2, generator=g, dtype=torch.float64).mul(0.5).exp()
    offset = torch.randn(number, 2, generator=g, dtype=torch.float64) * 10
    return turn @ (slant + torch.diag_embed(scale)), offset


def _times(batch: int, factor: int) -> tuple[Tensor, Tensor]:
    matrix = torch.eye(2, dtype=torch.float64).mul(factor).expand(batch, 2, 2)
    return matrix, torch.zeros(batch, 2, dtype=torch.float64)


def same_splats(found: Splats, wanted: Splats) -> None:
    for name in ("means", "cholesky", "colors"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-7, atol=1e-7
        )
    assert torch.equal(found.mask, wanted.mask)
