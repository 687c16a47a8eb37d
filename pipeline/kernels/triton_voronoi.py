"""The Lloyd step of the adaptive start on the GPU; the twin is `voronoi.centroids`.

The same search radius and the same winner at equal distance (the lower index), so the result
differs by rounding only. First one program per tile finds the owner of each of its pixels among
the Gaussians whose square of search touches the tile (the lists of triton_lists.py, of circles
whose radius is the reach); then one warp per SHARED Gaussians sums density and offset over the
pixels that it owns. No atomics: the result does not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splatshard.pipeline.kernels.triton_launch import SIZES, WARP, cdiv, launch
from splatshard.pipeline.kernels.triton_lists import RATIO, TILE, candidates, listed, tile_lists
from splatshard.pipeline.kernels.voronoi import REACH
from splatshard.pipeline.splats import Splats

GROUP = 16
"""Centres compared at once by a tile's warp."""
SHARED, PIXELS = 4, 32
"""Centres per program of the second kernel, and pixels of each at once: as the backward kernel."""


def centroids(means: Tensor, rho: Tensor) -> Tensor:
    """`means` [B, N, 2] px moved to the centroids of their cells under `rho` [B, H, W] (per
    px^2)."""
    batch, n = means.shape[:2]
    height, width = rho.shape[1:]
    means, rho = means.contiguous(), rho.contiguous()
    moved = torch.empty_like(means)
    if not batch * n:
        return moved
    column = means[..., 0].long().clamp(0, width - 1)
    row = means[..., 1].long().clamp(0, height - 1)
    reach = float(REACH) / rho.flatten(1).gather(1, row * width + column).sqrt() + 1
    circles = torch.stack((reach + 1, torch.zeros_like(reach), reach + 1), -1)  # + 1: whole pixels
    mask = torch.ones_like(reach, dtype=torch.bool)
    lists = tile_lists(Splats(means, circles, circles, mask), height, width, 1.0)
    owner = torch.empty(rho.shape, dtype=torch.int32, device=rho.device)
    launch(
        owner_kernel, batch * lists.tiles,
        means, reach, owner, *lists.arguments, n, height, width,
        TILE=TILE, RATIO=RATIO, CAPACITY=lists.fine.shape[2], COARSE_CAPACITY=lists.coarse.shape[2],
        GROUP=GROUP, **WARP,
    )  # fmt: skip
    groups = cdiv(n, SHARED)
    launch(
        centroid_kernel, batch * groups,
        means, reach, owner, rho, moved, n, groups, height, width,
        SHARED=SHARED, PIXELS=PIXELS, **WARP,
    )  # fmt: skip
    return moved


@triton.jit(do_not_specialize=SIZES)
def owner_kernel(
    means, reach, owner,
    fine, fine_counts, coarse, coarse_counts, columns, tiles, coarse_columns, coarse_tiles,
    n, height, width,
    TILE: tl.constexpr, RATIO: tl.constexpr, CAPACITY: tl.constexpr,
    COARSE_CAPACITY: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`owner` [B, H, W] int32: the nearest centre within its reach, or -1."""
    program = tl.program_id(0)
    image, tile = (program // tiles).to(tl.int64), program % tiles
    start, count, whole = candidates(
        fine, fine_counts, coarse, coarse_counts, columns, tiles, coarse_columns, coarse_tiles,
        image, tile, n, RATIO, CAPACITY, COARSE_CAPACITY,
    )  # fmt: skip
    pixel = tl.arange(0, TILE * TILE)
    px, py = tile % columns * TILE + pixel % TILE, tile // columns * TILE + pixel // TILE
    x, y = px.to(tl.float32)[None, :], py.to(tl.float32)[None, :]
    nearest = tl.full([TILE * TILE], float("inf"), tl.float32)
    best = tl.full([TILE * TILE], -1, tl.int32)
    for first in range(0, count, GROUP):
        index, live = listed(start, first + tl.arange(0, GROUP), count, whole)
        i = image * n + index
        mx, my = tl.load(means + 2 * i, live, 0), tl.load(means + 2 * i + 1, live, 0)
        radius = tl.load(reach + i, live, -1)
        left, right = tl.floor(mx - radius)[:, None], tl.floor(mx + radius)[:, None]
        top, bottom = tl.floor(my - radius)[:, None], tl.floor(my + radius)[:, None]
        dx, dy = x + 0.5 - mx[:, None], y + 0.5 - my[:, None]
        within = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        distance = tl.where(within & live[:, None], dx * dx + dy * dy, float("inf"))
        least = tl.min(distance, 0)
        winner = tl.min(tl.where(distance == least[None, :], index[:, None], 2147483647), 0)
        best = tl.where(least < nearest, winner, best)
        nearest = tl.minimum(nearest, least)
    tl.store(owner + image * height * width + py * width + px, best, (px < width) & (py < height))


@triton.jit(do_not_specialize=SIZES)
def centroid_kernel(
    means, reach, owner, rho, moved, n, groups, height, width,
    SHARED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Centroids of the pixels owned, weighted by rho; where there are none, the old position."""
    program = tl.program_id(0)
    image = (program // groups).to(tl.int64)
    member = program % groups * SHARED + tl.arange(0, SHARED)
    exists = member < n
    i = image * n + member
    mx, my = tl.load(means + 2 * i, exists, 0), tl.load(means + 2 * i + 1, exists, 0)
    radius = tl.load(reach + i, exists, 0)
    left, top = tl.maximum(tl.floor(mx - radius), 0), tl.maximum(tl.floor(my - radius), 0)
    columns = tl.minimum(tl.floor(mx + radius), width - 1) - left + 1
    rows = tl.minimum(tl.floor(my + radius), height - 1) - top + 1
    columns = tl.maximum(columns, 1)
    count = tl.where(exists, rows * columns, 0)
    per_column = (1 / columns)[None, :]
    mass = tl.zeros([PIXELS, SHARED], tl.float32)
    sum_x = tl.zeros([PIXELS, SHARED], tl.float32)
    sum_y = tl.zeros([PIXELS, SHARED], tl.float32)
    lanes = tl.arange(0, PIXELS).to(tl.float32)[:, None]
    for first in range(0, tl.max(count, 0).to(tl.int32), PIXELS):
        k = lanes + first
        row = tl.floor((k + 0.5) * per_column)
        x, y = left[None, :] + (k - row * columns[None, :]), top[None, :] + row
        inside = (k < count[None, :]) & (x >= 0) & (x < width) & (y < height)
        at = image * height * width + y.to(tl.int32) * width + x.to(tl.int32)
        owned = inside & (tl.load(owner + at, inside, -1) == member[None, :])
        density = tl.load(rho + at, owned, 0)
        mass += density
        sum_x += density * (x + 0.5 - mx[None, :])
        sum_y += density * (y + 0.5 - my[None, :])
    total = tl.sum(mass, 0)
    share = tl.where(total > 0, 1 / tl.where(total > 0, total, 1), 0)
    tl.store(moved + 2 * i, mx + tl.sum(sum_x, 0) * share, exists)
    tl.store(moved + 2 * i + 1, my + tl.sum(sum_y, 0) * share, exists)
