"""Warp instructions of the step on tensor cores (tile_step.cu), counted without a GPU.

    python -m benchmarks.tile_counts

The machine code for sm_90 gives the instructions of each part (tests/compile_tiles.py). Fits of
photographs on the CPU give, at every fifth step, the Gaussians and the rows that the step looks at,
and so the real lists: those that the kernel itself makes, over the emulated warp. What no count
knows: stalls, caches, atomic adds in L2, and special functions, which a processor takes 16 of a
cycle.

Columns: Gaussians of a tile; thousand warp instructions per image and step for lists, tiles and
Adam; their sum; the sum with all rows looked at; weights that are drawn again; then, estimated,
image-steps/s at 65 % of an H200's issue slots, and images/s of a whole fit with REST_US for all
that is not a step (benchmarks/notes/gpu_fit.md).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.device_predictions import ISSUE, SLOTS_PER_S
from benchmarks.record import sample_images, save
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.kernels import cuda
from splatshard.pipeline.kernels.cpu_step import FusedStep
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.kernels.tile_step import THREADS, TileStep, cdiv
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig
from tests.compile_tiles import Parts, inspected, instructions, loops, machine_code, parts
from tests.emulator import Emulator

EVERY = 5
LISTED, KEPT = 128, 3
"""As in tile_step.cu: a tile's Gaussians at once, and blocks of 16 whose weights are kept."""
REST_US = {400: 62, 900: 70, 1600: 80, 3136: 95, 4900: 115}
"""Start, relocations and copies per image on an H200, in microseconds; estimated, not measured."""


def moments_of(target: Tensor, config: FitConfig) -> list[tuple[Splats, int, int]]:
    """Splats [B, N], stride and phase at every fifth step of a fit of `target` [B, 3, H, W]."""
    seen: list[tuple[Splats, int, int]] = []

    class Recorded(FusedStep):
        steps = 0

        def step(self, splats: Splats, moments: Any, phase: int, *rest: Any) -> Splats:
            if self.steps % EVERY == 0:
                seen.append((splats.map(torch.clone), self.stride, phase))
            self.steps += 1
            return super().step(splats, moments, phase, *rest)

    fit(target, config, replace(select_backend("cpu"), make_step=Recorded))
    return seen


def lists(splats: Splats, target: Tensor, stride: int, phase: int) -> np.ndarray:
    """Which tiles list which Gaussians: bool [B, rows, columns, 32 words]."""
    batch, n = splats.mask.shape
    one = TileStep(target, FitConfig(num_gaussians=n), stride, Emulator().launch)
    moments = (torch.zeros(batch, n, 8), torch.zeros(batch, n, 8))
    argument = one.argument(splats, moments, phase, 0.0, 0.0, 1.0)
    one.launch("list_gaussians", cdiv(batch * n, THREADS), THREADS, argument)
    assert one.scratch is not None
    shape = (batch, *one.tiles, cdiv(n, 32))
    words = one.scratch[2].numpy().view(np.uint8)[: 4 * int(np.prod(shape))]
    return np.unpackbits(words, bitorder="little").reshape(*shape[:3], -1).astype(bool)


def of_tiles(listed: np.ndarray, part: Parts) -> tuple[float, float]:
    """Warp instructions per image in fit_tiles, and the share of blocks drawn twice. Tiles and
    words without a Gaussian are counted as if they had one."""
    hits = listed.sum(-1)
    blocks = -(-hits // 16)
    fills = np.where(hits > LISTED, 2 * -(-hits // LISTED), 1)
    words = listed.reshape(*listed.shape[:3], -1, 32).sum(-1)
    words = np.pad(words, ((0, 0),) * 3 + ((0, -words.shape[3] % 32),))
    chunks = words.reshape(*words.shape[:3], -1, 32).max(-1)
    filled = part.chunk * chunks.shape[-1] + part.bit * chunks.sum(-1)
    again = np.maximum(blocks - KEPT, 0)
    groups = -(-hits // 32)
    cost = part.tile + fills * filled + groups * (part.group + part.group_back)
    cost = cost + -(-hits // 4) * part.four_back
    cost = cost + blocks * (part.block + part.block_back) + again * part.draw_again
    return float(cost.sum((1, 2)).mean()), float(again.sum() / blocks.sum())


def of_lists(listed: np.ndarray, code: list[str]) -> float:
    """Warp instructions per image in list_gaussians, whose warps run to their longest lane."""
    (row_first, row_last), (first, last) = loops(code)
    column, row = last - first + 1, row_last - row_first + 1 - (last - first + 1)
    around = len(instructions(code)) - row - column
    columns = listed.sum(2).transpose(0, 2, 1)  # [B, N, rows]
    begin = (columns > 0).argmax(-1)[..., None] + np.arange(columns.shape[2])
    from_first = np.take_along_axis(columns, np.minimum(begin, columns.shape[2] - 1), -1)
    from_first = np.where(begin < columns.shape[2], from_first, 0)
    longest = from_first.reshape(len(listed), -1, 32, columns.shape[2]).max(2)
    cost = around + row * (longest > 0).sum(-1) + column * longest.sum(-1)
    return float(cost.sum(1).mean())


def row_of(
    target: Tensor, n: int, part: Parts, lines: dict[str, list[str]]
) -> dict[str, float | int]:
    """The table's line for one N."""
    config = FitConfig(num_gaussians=n)
    adam = len(instructions(lines["move_gaussians"])) * n / 32
    costs, hits, whole = [], [], []
    stride = 1
    for splats, stride, phase in moments_of(target, config):
        listed = lists(splats, target, stride, phase)
        hits.append(listed.sum(-1).mean())
        costs.append((of_lists(listed, lines["list_gaussians"]), *of_tiles(listed, part)))
    for splats, _, _ in moments_of(target, config)[::4]:
        listed = lists(splats, target, 1, 0)
        whole.append(of_lists(listed, lines["list_gaussians"]) + of_tiles(listed, part)[0])
    listing, tiles, again = np.mean(costs, 0).tolist()
    step = listing + tiles + adam
    per_s = ISSUE * SLOTS_PER_S
    return {
        "num_gaussians": n,
        "stride": stride,
        "per_tile": float(np.mean(hits)),
        "lists": listing,
        "tiles": tiles,
        "adam": adam,
        "step": step,
        "step_all_rows": float(np.mean(whole)) + adam,
        "drawn_again": again,
        "image_steps_per_s_estimated": per_s / step,
        "images_per_s_estimated": 1 / (config.steps * step / per_s + REST_US[n] / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gaussians", type=int, nargs="+", default=list(REST_US))
    parser.add_argument("--images", type=int, default=6)
    args = parser.parse_args()
    target = sample_images(args.images)
    usage, lines = inspected(machine_code((9, 0)))
    part = parts(lines["fit_tiles"])
    print(f"{part}\n{usage}")
    print(
        "    N  rows per tile    lists    tiles     adam      sum all rows  again  steps/s images/s"
    )
    rows = []
    for n in args.gaussians:
        found = row_of(target, n, part, lines)
        rows.append(found)
        thousands = [found[k] / 1e3 for k in ("lists", "tiles", "adam", "step", "step_all_rows")]
        print(
            f"{n:5} 1 in {found['stride']} {found['per_tile']:8.1f}"
            + "".join(f"{count:9.1f}" for count in thousands)
            + f"{found['drawn_again']:7.2f} {found['image_steps_per_s_estimated']:9,.0f}"
            f" {found['images_per_s_estimated']:9,.0f}",
            flush=True,
        )
    about = {"nvrtc": cuda.nvrtc_version(), "usage": usage, "parts": asdict(part)}
    estimated = {"issue": ISSUE, "slots_per_s": SLOTS_PER_S, "rest_us": REST_US}
    assumed = {"images": args.images, "steps": FitConfig().steps, **estimated}
    save("tile_counts", {**about, "assumed": assumed, "rows": rows})


if __name__ == "__main__":
    main()
