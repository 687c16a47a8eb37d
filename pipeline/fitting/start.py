"""Where Gaussians start: random, the published grid, the adaptive start (the default), or what a
trained encoder predicts.

Adaptive. Gaussians should be dense where the picture changes, and every step that a good start
saves is saved for every image ever converted. (1) The structure tensor of the image, blurred,
gives an edge energy; a power of it plus a floor is the density rho. (2) N centres at equal steps
of the cumulated density along a Hilbert curve: a deterministic, low-discrepancy sample of rho. (3)
One Lloyd step (move to the weighted centroid of the Voronoi cell) evens them out. (4) Scale 0.42 /
sqrt(rho), stretched along edges by the tensor's coherence. (5) Colours are linear given the
geometry: a few conjugate-gradient steps on the normal equations.

The published structured start (arXiv 2509.22615) is `grid`: uniform cells, isotropic covariance of
the cell's inscribed circle, cell-mean colour. Constants were tuned on photographs other than those
of the published numbers (benchmarks/notes/fit.md).

Left out: saliency networks (a dependency for less than relocation gives), more Lloyd steps (no
gain), densities from a band-pass residual (equal).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.codec.layout import hilbert_curve
from splatshard.pipeline.fitting.rows import row_stride, squeezed
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.blur import blur
from splatshard.pipeline.kernels.solve_colors import solve_colors
from splatshard.pipeline.kernels.voronoi import centroids
from splatshard.pipeline.splats import Splats, cholesky_from_scales_and_angles
from splatshard.schemas.config import FitConfig

BLUR_PX = 1.3  # of the structure tensor
POWER = 0.83  # density ~ edge energy ** POWER
FLOOR = 0.08  # share of Gaussians that are spread evenly
SCALE = 0.42  # standard deviation in units of the local spacing 1 / sqrt(rho)
STRETCH, MAX_STRETCH = 4.0, 4.0  # axis ratio 1 + STRETCH * coherence, at most MAX_STRETCH
COLOR_STEPS = 3  # conjugate-gradient steps
KEPT_PIXELS = 1 << 21  # of a picture whose order is kept, 16 MB; that of 8 sizes is


def initial_splats(target: Tensor, config: FitConfig, backend: Backend) -> Splats:
    """Splats [B, config.num_gaussians] to start fitting `target` [B, 3, H, W] (0 to 1) from, by
    `config.init`; all of the mask set."""
    start = {"adaptive": adaptive, "grid": grid, "random": random}.get(config.init, predicted)
    return start(target, config, backend)


def adaptive(target: Tensor, config: FitConfig, backend: Backend) -> Splats:
    """The default start, [B, 3, H, W] to splats [B, N]; see the module's docstring."""
    n = config.num_gaussians
    batch, _, height, width = target.shape
    tensor = (backend.blur or blur)(structure_tensor(target), BLUR_PX)
    rho = density(tensor, n)
    means = (backend.centroids or centroids)(sample_density(rho, n), rho)
    spacing = values_at(rho[:, None], means)[..., 0].rsqrt()
    cholesky = cholesky_along_edges(values_at(tensor, means), SCALE * spacing)
    mask = torch.ones(batch, n, dtype=torch.bool, device=target.device)
    even = Splats(means, cholesky, torch.ones_like(cholesky), mask)
    cover = values_at(backend.render(even, height, width, config.cutoff), means).clamp(min=0.1)
    splats = replace(even, colors=values_at(target, means) / cover)
    return solved(splats, target, config, backend)


def grid(target: Tensor, config: FitConfig, backend: Backend) -> Splats:
    """The published structured start, [B, 3, H, W] to splats [B, N]: cell centres, inscribed
    circles, cell means."""
    n = config.num_gaussians
    batch, _, height, width = target.shape
    columns = max(1, round(math.sqrt(n * width / height)))
    rows = -(-n // columns)
    i = torch.arange(n, device=target.device)
    x, y = (i % columns + 0.5) * width / columns, (i // columns + 0.5) * height / rows
    radius = min(width / columns, height / rows) / 2
    cholesky = circles(target, radius, batch, n)
    colors = F.adaptive_avg_pool2d(target, (rows, columns)).flatten(2)[:, :, :n].transpose(1, 2)
    means = torch.stack((x, y), -1).to(target).expand(batch, n, 2)
    mask = torch.ones(batch, n, dtype=torch.bool, device=target.device)
    return Splats(means.contiguous(), cholesky, colors.contiguous(), mask)


def random(target: Tensor, config: FitConfig, backend: Backend) -> Splats:
    """Uniform centres (the same for every image, from config.seed), mean spacing, colour at the
    centre: [B, 3, H, W] to splats [B, N]."""
    n = config.num_gaussians
    batch, _, height, width = target.shape
    generator = torch.Generator().manual_seed(config.seed)
    means = torch.rand(n, 2, generator=generator) * torch.tensor([width, height])
    means = means.to(target).expand(batch, n, 2).contiguous()
    sigma = math.sqrt(height * width / n) / 2
    cholesky = circles(target, sigma, batch, n)
    mask = torch.ones(batch, n, dtype=torch.bool, device=target.device)
    return Splats(means, cholesky, values_at(target, means) / 2, mask)


def predicted(target: Tensor, config: FitConfig, backend: Backend) -> Splats:
    """What a trained encoder says of [B, 3, H, W], as splats [B, N], its colours solved again;
    raises as `encoder_start.predict`."""
    from splatshard.pipeline.fitting.encoder_start import (
        predict,  # which knows models; few conversions do
    )

    splats = predict(target, config.init, config.num_gaussians)
    return solved(splats, target, config, backend)


def solved(splats: Splats, target: Tensor, config: FitConfig, backend: Backend) -> Splats:
    """`splats` [B, N] with the colours that suit `target` [B, 3, H, W] best, on the rows that a
    step looks at."""
    stride = row_stride(config, *target.shape[2:])
    rows = target[:, :, stride // 2 :: stride].contiguous()
    seen = squeezed(splats, stride, stride // 2)
    seen = solve_colors(seen, rows, COLOR_STEPS, config.cutoff, backend)
    return replace(splats, colors=seen.colors)


def circles(like: Tensor, sigma: float, batch: int, n: int) -> Tensor:
    """Factors [batch, n, 3] of circles of `sigma` px, on the device of `like` without a copy to
    it."""
    cholesky = like.new_full((batch, n, 3), sigma)
    cholesky[..., 1] = 0
    return cholesky


def structure_tensor(image: Tensor) -> Tensor:
    """[B, C, H, W] to [B, 3, H, W]: gxx, gxy, gyy of central differences, summed over channels."""
    p = F.pad(image, (1, 1, 1, 1), mode="replicate")
    gx = p[:, :, 1:-1, 2:] - p[:, :, 1:-1, :-2]
    gy = p[:, :, 2:, 1:-1] - p[:, :, :-2, 1:-1]
    return torch.stack(((gx * gx).sum(1), (gx * gy).sum(1), (gy * gy).sum(1)), 1)


def density(tensor: Tensor, n: int) -> Tensor:
    """Blurred structure tensor [B, 3, H, W] to Gaussians per px^2 [B, H, W], summing to n."""
    edges = (tensor[:, 0] + tensor[:, 2]).clamp(min=0) ** POWER
    mean = edges.mean((1, 2), keepdim=True)
    rho = torch.where(mean > 1e-9, (1 - FLOOR) * edges / mean.clamp(min=1e-9), 0) + FLOOR
    return rho * (n / rho.sum((1, 2), keepdim=True))


def sample_density(rho: Tensor, n: int) -> Tensor:
    """n pixel centres [B, n, 2] in px at equal steps of `rho` [B, H, W], cumulated along a Hilbert
    curve."""
    height, width = rho.shape[1:]
    order = hilbert_order(height, width, rho.device)
    mass = rho.flatten(1)[:, order].double().cumsum(1)
    steps = (torch.arange(n, dtype=torch.double, device=rho.device) + 0.5) / n
    pixel = order[torch.searchsorted(mass, steps * mass[:, -1:]).clamp(max=height * width - 1)]
    x, y = pixel % width, torch.div(pixel, width, rounding_mode="floor")
    return torch.stack((x, y), -1).to(rho.dtype) + 0.5


def hilbert_order(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Raster indices of an H x W picture's pixels in the order of Hilbert curves over it, int64
    [H * W]; kept, unless it is large."""
    keep = height * width <= KEPT_PIXELS
    return (_kept_order if keep else _hilbert_order)(height, width, device)


def _hilbert_order(height: int, width: int, device: torch.device | None) -> Tensor:
    """One curve over a square that holds the shorter side, beside it the next along the longer one:
    each begins where the one before ends. So memory follows the picture's area, however thin."""
    level = max(1, (min(height, width) - 1).bit_length())
    curve = hilbert_curve(level)
    across = -(-max(height, width) // len(curve))
    curves = torch.cat([curve + i * curve.numel() for i in range(across)], 1)
    places = (curves if width >= height else curves.T)[:height, :width]
    return torch.argsort(places.flatten(), stable=True).to(device)


_kept_order = lru_cache(maxsize=8)(_hilbert_order)


def cholesky_along_edges(tensor: Tensor, sigma: Tensor) -> Tensor:
    """Factors [B, N, 3] of area pi sigma^2, longer across the gradient; tensor [B, N, 3], sigma
    [B, N] px."""
    xx, xy, yy = tensor.unbind(-1)
    half, mean = (xx - yy) / 2, (xx + yy) / 2
    coherence = torch.hypot(half, xy) / (mean + 1e-6)
    root = (1 + STRETCH * coherence).clamp(max=MAX_STRETCH).sqrt()
    along = torch.atan2(xy, half) / 2 + math.pi / 2
    return cholesky_from_scales_and_angles(torch.stack((sigma * root, sigma / root), -1), along)


def values_at(field: Tensor, means: Tensor) -> Tensor:
    """Bilinear values [B, N, C] of `field` [B, C, H, W] at `means` [B, N, 2] px, border
    repeated."""
    x, y = means.unbind(-1)
    height, width = field.shape[2:]
    where = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), -1)[:, None]
    values = F.grid_sample(field, where, padding_mode="border", align_corners=False)
    return values[:, :, 0].transpose(1, 2)
