"""Nested budgets against separate fits: PSNR given up, time and bytes saved.

    python -m benchmarks.nested [--images 16] [--steps 150 50 450] [--backend cpu]

The first photographs of one datacomp-sample shard, and centre crops of Kodak's, at 224 x 224. Mean
PSNR in dB of float32 splats (before packing); `difference` is nested minus separate, with its
median and worst image beside it. Seconds are per image for all budgets together: CPU time of one
thread, or on a GPU wall time with the device waited for; the fastest of `repeats` runs, nested and
separate in turn. Bytes are payloads of codec fp16, packed: one nested sample against one for every
budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import DATA, sample_images, save
from splatshard.pipeline.codec.pack import pack
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.fitting.nested import fit_nested
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import DecodeConfig, FitConfig


@dataclass(frozen=True)
class Args:
    images: int = 16
    """Photographs, from the front of the shard (the constants were tuned on numbers 40 to 79)."""
    shard: int = 0
    budgets: tuple[int, ...] = (400, 900, 1600, 3136)
    steps: tuple[int, ...] = (150, 50, 450)
    """Of the separate fits, and of the nested fit's first tier; the other tiers follow."""
    repeats: int = 2
    backend: str = "cpu"


def kodak_images(count: int, size: int = 224) -> Tensor:
    """Centre crops of the first `count` Kodak photographs, [count, 3, size, size], 0 to 1."""
    paths = sorted((DATA / "kodak").glob("*.png"))[:count]
    config = DecodeConfig(image_size=size)
    pixels = np.stack([decode(path.read_bytes(), path.name, config).pixels for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()


def timed(run: Callable[[], Any], backend: Backend) -> tuple[Any, float]:
    """What `run` returns, and its seconds; see the module's docstring."""
    if backend.device.type != "cuda":
        start = time.process_time()
        result = run()
        return result, time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def compare(target: Tensor, budgets: tuple[int, ...], steps: int, backend: Backend, repeats: int):
    """One row: both ways of fitting `target` [B, 3, H, W] for all `budgets`."""
    config = FitConfig(steps=steps)

    def together() -> Splats:
        return fit_nested(target, budgets, config, backend)[0]

    def apart() -> list[Splats]:
        return [fit(target, replace(config, num_gaussians=n), backend)[0] for n in budgets]

    seconds = {"nested": float("inf"), "separate": float("inf")}
    for _ in range(repeats):
        nested, s = timed(together, backend)
        seconds["nested"] = min(seconds["nested"], s / len(target))
        separate, s = timed(apart, backend)
        seconds["separate"] = min(seconds["separate"], s / len(target))
    rows = []
    for n, own in zip(budgets, separate, strict=True):
        prefix = Splats(*(x[:, :n] for x in nested.fields))
        a, b = quality(prefix, target, config, backend), quality(own, target, config, backend)
        row = {"num_gaussians": n, "psnr_nested": a.mean().item(), "psnr_separate": b.mean().item()}
        row |= {"difference": (a - b).mean().item(), "median": (a - b).median().item()}
        rows.append(row | {"worst": (a - b).min().item()})
    pairs = zip(budgets, separate, strict=True)
    return {
        "images": len(target),
        "steps": steps,
        "budgets": rows,
        "s_per_image": seconds,
        "time_of_separate": seconds["nested"] / seconds["separate"],
        "bytes_nested": packed_bytes(nested, target, backend, budgets),
        "bytes_separate": sum(packed_bytes(own, target, backend, (n,)) for n, own in pairs),
    }


def quality(splats: Splats, target: Tensor, config: FitConfig, backend: Backend) -> Tensor:
    """PSNR [B] in dB."""
    return psnr(backend.render(splats, *target.shape[2:], config.cutoff), target)


def packed_bytes(
    splats: Splats, target: Tensor, backend: Backend, budgets: tuple[int, ...]
) -> float:
    """Bytes of an image's fp16 payloads, all budgets' columns together."""
    cutoff = FitConfig().cutoff
    payloads = pack(splats, target, "fp16", cutoff, backend, budgets)
    return sum(len(part) for image in payloads for part in image.values()) / len(target)


def describe(name: str, row: dict[str, Any]) -> str:
    line = "  N={num_gaussians:<5} nested {psnr_nested:6.2f}  separate {psnr_separate:6.2f}"
    line += "  {difference:+.2f} dB (median image {median:+.2f}, worst {worst:+.2f})"
    seconds = row["s_per_image"]
    return "\n".join(
        [f"{name}, {row['images']} images, {row['steps']} steps"]
        + [line.format(**budget) for budget in row["budgets"]]
        + [
            f"  {seconds['nested']:.3f} s against {seconds['separate']:.3f} s per image: "
            f"{row['time_of_separate']:.2f};  "
            f"{row['bytes_nested']:,.0f} B against {row['bytes_separate']:,.0f} B"
        ]
    )


def main() -> None:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    backend = select_backend(args.backend)
    sets = {"datacomp": sample_images(args.images, args.shard), "kodak": kodak_images(args.images)}
    compare(sets["kodak"][:1].to(backend.device), args.budgets, 4, backend, 1)  # compile
    rows = []
    for steps in args.steps:
        for name, target in sets.items():
            row = compare(target.to(backend.device), args.budgets, steps, backend, args.repeats)
            rows.append({"set": name, **row})
            print(describe(name, row), flush=True)
    save("nested", {"backend": args.backend, "rows": rows})


if __name__ == "__main__":
    main()
