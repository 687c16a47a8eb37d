"""Warp instructions that the Triton kernels issue per image and step, counted without a GPU.

    python -m benchmarks.gpu_counts

The machine code for sm_90 gives the instructions of a program and of one round of its loop
(tests/compile_kernels.py); a fit of photographs on the CPU gives, step by step, the windows and
tiles, so how many rounds there are. What no count knows: stalls, special functions (4 of 32
evaluations' 57 instructions, at a quarter of the rate), caches.

Columns: million warp instructions per image and step, the mean of all steps. forward, backward,
lists (both levels, over the steps that one set serves) and Adam, as `FusedStep` runs them;
`as given` is the backward kernel with its Gaussians in the order of the start, `each step` with an
order from the same step's windows; then image-steps/s at 65 % of an H200's issue slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device_predictions import ISSUE, SLOTS_PER_S
from benchmarks.record import sample_images, save
from splatshard.pipeline.fitting.fit import TorchStep, fit
from splatshard.pipeline.kernels import triton_kernels, triton_lists
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.kernels.triton_backend import LISTS_EVERY, ORDER_EVERY, windows
from splatshard.pipeline.kernels.triton_lists import BLOCK, RATIO, STALE_GROW, STALE_PAD_PX, TILE
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig
from tests.compile_kernels import code

CUTOFF = 3.0


@dataclass(frozen=True)
class Moment:
    """What one step of a fit works on; `jumped`: they are not those of the last update."""

    splats: Splats
    jumped: bool


def moments_of(target: Tensor, n: int, steps: int) -> list[Moment]:
    """Every step of a fit of `target` [B, 3, H, W] on the CPU."""
    seen: list[Moment] = []
    backend = select_backend("cpu")

    class Recorded(TorchStep):
        def step(self, splats: Splats, moments: Any, phase: int, moved_far: bool, *rest) -> Splats:
            seen.append(Moment(splats, moved_far))
            return super().step(splats, moments, phase, moved_far, *rest)

    def make_step(target: Tensor, config: FitConfig, stride: int) -> Recorded:
        return Recorded(target, config, stride, backend)

    fit(target, FitConfig(num_gaussians=n, steps=steps), replace(backend, make_step=make_step))
    return seen


def served(
    moments: list[Moment], every: int, make: Callable[[Moment], Any]
) -> Iterator[tuple[Any, bool]]:
    """What `make` made at the latest moment at which it was due, for each moment; and whether it
    was made there."""
    kept, age = None, every
    for moment in moments:
        due = moment.jumped or age >= every
        if due:
            kept, age = make(moment), 0
        age += 1
        yield kept, due


def backward(sizes: list[Tensor], orders: list[Tensor | None]) -> float:
    """Warp instructions per image and step; windows [B, N] px and permutations of each step."""
    used, shared = code("backward, whitened"), triton_kernels.SHARED
    rounds = 0.0
    for size, order in zip(sizes, orders, strict=True):
        size = size if order is None else size.gather(1, order)
        longest = F.pad(size, (0, -size.shape[1] % shared)).unflatten(1, (-1, shared)).amax(2)
        rounds += (longest / triton_kernels.PIXELS).ceil().sum(1).mean().item()
    programs = -(-sizes[0].shape[1] // shared)
    return programs * (used.instructions - used.loop) + used.loop * rounds / len(sizes)


def tiles_hit(splats: Splats, height: int, width: int, side: int) -> Tensor:
    """Gaussians in each tile's list, with the margin of lists that serve several steps:
    [B, rows, columns]."""
    l11, l21, l22 = splats.cholesky.unbind(-1)
    half = CUTOFF * STALE_GROW * torch.stack((l11, torch.hypot(l21, l22)), -1) + STALE_PAD_PX
    low, high = splats.means - half, splats.means + half
    hits = []
    for axis, size in ((0, width), (1, height)):
        first = torch.arange(0, size, side) + 0.5
        hits.append((high[..., axis, None] >= first) & (low[..., axis, None] <= first + side - 1))
    columns, rows = hits
    rows = rows & splats.mask[..., None]
    return torch.einsum("bny,bnx->byx", rows.float(), columns.float())


def lists_and_forward(splats: Splats, height: int, width: int) -> tuple[float, float]:
    """Warp instructions per image of both levels of lists, and of a forward pass with them."""
    n = splats.mask.shape[1]
    fine, coarse = (tiles_hit(splats, height, width, side) for side in (TILE, TILE * RATIO))
    parents = coarse.repeat_interleave(RATIO, 1).repeat_interleave(RATIO, 2)
    parents = parents[:, : fine.shape[1], : fine.shape[2]]
    read = torch.where(fine > triton_lists.CAPACITY, parents, fine)

    def cost(name: str, counts: Tensor, together: int) -> float:
        used = code(name)
        rounds = (counts / together).ceil().flatten(1).sum(1).mean().item()
        return counts[0].numel() * (used.instructions - used.loop) + used.loop * rounds

    lists = cost("lists, coarse", torch.full_like(coarse, n), BLOCK)
    lists += cost("lists, fine", parents, BLOCK)
    return lists, cost("forward, residual", read, triton_kernels.GROUP)


def row(target: Tensor, n: int, steps: int) -> dict[str, float]:
    """The table's line for one N."""
    height, width = target.shape[2:]
    moments = moments_of(target, n, steps)
    sizes = [windows(one.splats, height, width, CUTOFF) for one in moments]

    def order(moment: Moment) -> Tensor:
        return windows(moment.splats, height, width, CUTOFF).argsort(1, descending=True)

    kept = [order for order, _ in served(moments, ORDER_EVERY, order)]
    made = served(moments, LISTS_EVERY, lambda m: lists_and_forward(m.splats, height, width))
    costs = [(lists * due, forward) for (lists, forward), due in made]
    adam = code("adam, whitened").instructions * (-(-n // triton_kernels.ADAM_BLOCK)) * 4
    found = {
        "num_gaussians": n,
        "window_px": torch.stack(sizes).mean().item(),
        "largest_window_px": torch.stack(sizes).max().item(),
        "forward": sum(forward for _, forward in costs) / len(costs),
        "backward": backward(sizes, kept),
        "backward_as_given": backward(sizes, [None] * len(sizes)),
        "backward_each_step": backward(sizes, [size.argsort(1, descending=True) for size in sizes]),
        "lists": sum(lists for lists, _ in costs) / len(costs),
        "adam": float(adam),
    }
    found["step"] = sum(found[name] for name in ("forward", "backward", "lists", "adam"))
    return found | {"image_steps_per_s": ISSUE * SLOTS_PER_S / found["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gaussians", type=int, nargs="+", default=[400, 900, 1600, 3136, 4900])
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    target = sample_images(args.images)
    print("    N   window  forward backward as given each step  lists   adam   step  image-steps/s")
    rows = []
    for n in args.gaussians:
        found = row(target, n, args.steps)
        rows.append(found)
        millions = [found[k] / 1e6 for k in ("forward", "backward", "backward_as_given")]
        millions += [found[k] / 1e6 for k in ("backward_each_step", "lists", "adam", "step")]
        print(
            f"{n:5} {found['window_px']:8.0f} {millions[0]:8.2f} {millions[1]:8.2f} "
            f"{millions[2]:8.2f} {millions[3]:9.2f} {millions[4]:6.2f} {millions[5]:6.3f} "
            f"{millions[6]:6.2f} {found['image_steps_per_s']:14,.0f}",
            flush=True,
        )
    save("gpu_counts", {"images": args.images, "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
