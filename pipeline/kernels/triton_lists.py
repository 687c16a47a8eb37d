"""Which Gaussians touch which tile of the picture, on the GPU.

Method. A tile's list holds the indices, ascending, of the Gaussians whose window (the exact
axis-aligned box of the cutoff ellipse, plus a margin) touches one of its pixel centres. One
program per tile goes through its candidates in blocks and compacts them with a cumulative sum:
always the same order, no atomics, no sort, and nothing that the host has to wait for.

Two levels. Testing all N Gaussians at every 8 x 8 px tile costs 784 N tests for a 224 x 224
picture, more than drawing it when N is in the thousands. So coarse tiles of 32 px are listed first
(49 N tests) and a fine tile looks only at its coarse tile's list.

No cap. Lists have a fixed capacity, so that memory is known beforehand, but counts are exact. Who
reads a fine list that overflowed reads the coarse one instead, and all N Gaussians if that
overflowed too: slower, never wrong (`candidates`). A fine list of 128 holds a density of two
Gaussians per pixel; a fit's mean is 10 to 25 per tile.

Left out: sorting (a sum needs no order) and key-value expansion as in alpha compositing (a global
radix sort per step costs more than both levels of tests).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from splatshard.pipeline.kernels.triton_launch import SIZES, WARP, cdiv, jit, launch
from splatshard.pipeline.splats import Splats

TILE = 8
"""Side in px. The windows of a fit are 8 to 28 px wide: at 16 px, two thirds to five sixths of the
pixels that a list makes a tile evaluate lie outside the ellipse; at 8 px, half to three
quarters."""
RATIO = 4
"""Fine tiles along the side of a coarse one."""
CAPACITY = 128
COARSE_CAPACITY = 2048
"""At most; 200 kB per 224 x 224 image each, uint16 indices. N > 2048 in one coarse tile of 32 px
happens only where nearly the whole picture is flat."""
BLOCK = 128
"""Candidates tested at once by one program of one warp: 4 per thread."""

PAD_PX, GROW = 1e-2, 1 + 1e-4
"""Margin of fresh lists: against rounding only."""
STALE_PAD_PX, STALE_GROW = 1.0, 1.15
"""Margin of lists that serve several steps: what a Gaussian may move and grow meanwhile. Steps that
look at other rows see it up to a row higher or lower, too."""


@dataclass(frozen=True)
class TileLists:
    """Indices of the Gaussians at each tile of B pictures.

    fine           [B, rows * columns, CAPACITY]      uint16; entries beyond the count are unset
    fine_counts    [B, rows * columns]                int32; may exceed the capacity: incomplete
    coarse, coarse_counts                             the same for tiles RATIO times as wide
    """

    columns: int
    rows: int
    coarse_columns: int
    fine: Tensor
    fine_counts: Tensor
    coarse: Tensor
    coarse_counts: Tensor

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    @property
    def arguments(self) -> tuple:
        """What `candidates` and its callers take, in order."""
        return (
            *(self.fine, self.fine_counts, self.coarse, self.coarse_counts),
            *(self.columns, self.tiles, self.coarse_columns, self.coarse_counts.shape[1]),
        )


def tile_lists(
    splats: Splats,
    height: int,
    width: int,
    cutoff: float,
    stale: bool = False,
    out: TileLists | None = None,
    stride: int = 1,
    phase: int = 0,
) -> TileLists:
    """Lists for contiguous `splats` [B, N] of images of `height` x `width` px, which are the rows
    `phase`, `phase` + `stride`, ... of larger ones; `stale` ones have a margin and may serve
    several steps.

    `out` is filled and returned instead of new lists, if given.
    """
    batch, n = splats.mask.shape
    lists = out or _empty(batch, n, height, width, splats.means.device)
    pad, grow = (STALE_PAD_PX, STALE_GROW) if stale else (PAD_PX, GROW)
    inputs = (splats.means, splats.cholesky, splats.mask)
    pad_y = pad if stride == 1 or not stale else pad / stride + 1
    squeeze = 1 / stride
    scalars = (n, cutoff, grow, pad, grow * squeeze, pad_y, squeeze, (phase + 0.5) * squeeze - 0.5)
    coarse_tiles = lists.coarse_counts.shape[1]
    for kept, counts, columns, tiles, ratio in (
        (lists.coarse, lists.coarse_counts, lists.coarse_columns, coarse_tiles, 0),
        (lists.fine, lists.fine_counts, lists.columns, lists.tiles, RATIO),
    ):
        launch(
            _list_kernel, batch * tiles,
            *inputs, lists.coarse, lists.coarse_counts, kept, counts, *scalars,
            columns, tiles, lists.coarse_columns, coarse_tiles,
            SIDE=TILE if ratio else TILE * RATIO, RATIO=ratio, CAPACITY=kept.shape[2],
            COARSE_CAPACITY=lists.coarse.shape[2], BLOCK=BLOCK, **WARP,
        )  # fmt: skip
    return lists


def _empty(batch: int, n: int, height: int, width: int, device: torch.device) -> TileLists:
    def empty(tiles: int, capacity: int) -> tuple[Tensor, Tensor]:
        index = torch.empty(batch, tiles, capacity, dtype=torch.uint16, device=device)
        return index, torch.empty(batch, tiles, dtype=torch.int32, device=device)

    columns, rows = cdiv(width, TILE), cdiv(height, TILE)
    coarse_columns, coarse_rows = cdiv(columns, RATIO), cdiv(rows, RATIO)
    # a power of two: the capacity is compiled in, and N varies
    wide = max(CAPACITY, min(COARSE_CAPACITY, 1 << (n - 1).bit_length()))
    fine, coarse = empty(rows * columns, CAPACITY), empty(coarse_columns * coarse_rows, wide)
    return TileLists(columns, rows, coarse_columns, *fine, *coarse)


@triton.jit(do_not_specialize=SIZES)
def _list_kernel(
    means, cholesky, mask, coarse, coarse_counts, lists, counts,
    n, cutoff, grow, pad, grow_y, pad_y, squeeze, shift,
    columns, tiles, coarse_columns, coarse_tiles,
    SIDE: tl.constexpr, RATIO: tl.constexpr, CAPACITY: tl.constexpr,
    COARSE_CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One list per program; RATIO 0: among all Gaussians, else among those of the coarse tile."""
    program = tl.program_id(0)
    image, tile = (program // tiles).to(tl.int64), program % tiles
    row, column = tile // columns, tile % columns
    start = coarse
    count = n
    whole = tl.full((), 1, tl.int1)
    if RATIO > 0:
        parent = image * coarse_tiles + (row // RATIO) * coarse_columns + column // RATIO
        start = coarse + parent * COARSE_CAPACITY
        count = tl.load(coarse_counts + parent)
        whole = count > COARSE_CAPACITY
        count = tl.where(whole, n, count)
    left, top = (column * SIDE).to(tl.float32) + 0.5, (row * SIDE).to(tl.float32) + 0.5
    right, bottom = left + (SIDE - 1), top + (SIDE - 1)
    place = lists + program.to(tl.int64) * CAPACITY
    kept = 0
    for first in range(0, count, BLOCK):
        index, live = listed(start, first + tl.arange(0, BLOCK), count, whole)
        i = image * n + index
        x, y = tl.load(means + 2 * i, live, 0), tl.load(means + 2 * i + 1, live, 0)
        l11 = tl.load(cholesky + 3 * i, live, 0)
        l21 = tl.load(cholesky + 3 * i + 1, live, 0)
        l22 = tl.load(cholesky + 3 * i + 2, live, 0)
        half_x = cutoff * l11 * grow + pad
        half_y = cutoff * tl.sqrt(l21 * l21 + l22 * l22) * grow_y + pad_y
        y = y * squeeze - shift  # in the picture that the rows make
        live &= tl.load(mask + i, live, 0) != 0
        # comparisons are false for NaN: such Gaussians are in no list
        live &= (l11 > 0) & (l22 > 0)
        live &= (x + half_x >= left) & (x - half_x <= right)
        live &= (y + half_y >= top) & (y - half_y <= bottom)
        rank = kept + tl.cumsum(live.to(tl.int32), 0) - 1
        tl.store(place + rank, index.to(tl.uint16), live & (rank < CAPACITY))
        kept += tl.sum(live.to(tl.int32), 0)
    tl.store(counts + program, kept)


@jit
def candidates(
    fine, fine_counts, coarse, coarse_counts, columns, tiles, coarse_columns, coarse_tiles,
    image, tile, n,
    RATIO: tl.constexpr, CAPACITY: tl.constexpr, COARSE_CAPACITY: tl.constexpr,
):  # fmt: skip
    """(start, count, whole) of the shortest complete list of a tile; `whole`: it is all n."""
    at = image * tiles + tile
    start = fine + at * CAPACITY
    count = tl.load(fine_counts + at)
    if count > CAPACITY:
        row, column = tile // columns // RATIO, tile % columns // RATIO
        at = image * coarse_tiles + row * coarse_columns + column
        start = coarse + at * COARSE_CAPACITY
        count = tl.load(coarse_counts + at)
    whole = count > COARSE_CAPACITY
    count = tl.where(whole, n, count)
    return start, count, whole


@jit
def listed(start, k, count, whole):
    """Indices of the Gaussians at places `k` of a list from `candidates`, and which exist."""
    live = k < count
    index = tl.load(start + k, k < tl.where(whole, 0, count), 0).to(tl.int32)
    return tl.where(whole, k, index), live
