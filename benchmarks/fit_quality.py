"""PSNR against Gaussians and steps: the default recipe beside `--preset paper`.

    python -m benchmarks.fit_quality [--images 16] [--shard 0]

Mean PSNR in dB of the fitted splats (float32, before packing) over the first images of one
datacomp-sample shard at 224 x 224. `paper` is the published loop without its pruning, `paper
pruned` with it (how many Gaussians that leaves stands beside). Seconds are per image and thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from benchmarks.record import sample_images, save
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.fitting.prune import prune
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.schemas.config import PRESETS


@dataclass(frozen=True)
class Args:
    images: int = 16
    """Photographs, from the front of the shard."""
    shard: int = 0
    """Number of the datacomp-sample shard (the recipe's constants were tuned on 1 to 3)."""
    gaussians: tuple[int, ...] = (400, 900, 1600, 3136)
    steps: tuple[int, ...] = (15, 50, 150, 450)
    paper_steps: tuple[int, ...] = (100, 3000)


def measure(target: torch.Tensor, preset: str, n: int, steps: int, pruned: bool = False) -> dict:
    """One row: preset, Gaussians, steps, PSNR and seconds per image."""
    backend = select_backend("cpu")
    config = PRESETS[preset.split()[0]]
    config = replace(config, fit=replace(config.fit, num_gaussians=n, steps=steps))
    if preset.endswith("no L1"):
        config = replace(config, fit=replace(config.fit, l1_colors=0.0))
    start = time.perf_counter()
    splats, _ = fit(target, config.fit, backend)
    seconds = (time.perf_counter() - start) / len(target)
    row = {"preset": preset, "num_gaussians": n, "steps": steps, "s_per_image": seconds}

    def quality(s) -> float:
        return psnr(backend.render(s, *target.shape[2:], config.fit.cutoff), target).mean().item()

    row["psnr"] = quality(splats)
    if pruned:
        left = prune(splats, target, config, backend)
        row["psnr_pruned"] = quality(left)
        row["num_gaussians_pruned"] = left.num_gaussians.double().mean().item()
    return row


def main() -> None:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    target = sample_images(args.images, args.shard)
    measure(target[:1], "default", 400, 2)  # compile
    rows = []
    for n in args.gaussians:
        for steps in args.steps:
            rows.append(measure(target, "default", n, steps))
            print(describe(rows[-1]), flush=True)
        for steps in args.paper_steps:
            last = steps == args.paper_steps[-1]
            for preset in ("paper no L1", "paper") if last else ("paper no L1",):
                rows.append(measure(target, preset, n, steps, pruned=preset == "paper"))
                print(describe(rows[-1]), flush=True)
    save(f"fit_quality_shard{args.shard}", {"images": args.images, "rows": rows})


def describe(row: dict) -> str:
    text = "N={num_gaussians:<5} {preset:11} {steps:5} steps  {psnr:6.2f} dB  {s_per_image:7.3f} s"
    text = text.format(**row)
    if "psnr_pruned" in row:
        text += f"   pruned to {row['num_gaussians_pruned']:.0f}: {row['psnr_pruned']:.2f} dB"
    return text


if __name__ == "__main__":
    main()
