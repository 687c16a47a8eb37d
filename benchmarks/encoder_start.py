"""Fits that begin where a trained GViT says, beside the other starts: PSNR against steps.

    python -m benchmarks.encoder_start                   trains an encoder for each N first
    python -m benchmarks.gvit --folder gvit              or takes those of these runs:
    python -m benchmarks.encoder_start --encoders gvit/runs/guided{64,128,196}-0

Tiny-ImageNet at 64 px: encoders learn from the training images of 20 classes, by default to
reconstruct alone, without labels; the fits are of held-out images. `ms` is per image, start
included, on one core in batches of 16. All else is convert's default recipe.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import accuracy_data
from benchmarks.arms import Options, samples_in, workspace
from benchmarks.gvit import Args as GViTArgs
from benchmarks.gvit import config_of
from benchmarks.record import save
from splatshard.pipeline.data import ImageDataset
from splatshard.pipeline.fitting.encoder_start import resolve_encoder
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.train.loop import train
from splatshard.schemas.config import FitConfig
from splatshard.schemas.model import GViTLossConfig

SIDE = 64
TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    encoders: tuple[str, ...] = ()
    """The dst of a run of the stage gvit for each number of Gaussians; none: they are trained."""
    epochs: int = 10
    gaussians: tuple[int, ...] = (64, 128, 196)
    steps: tuple[int, ...] = (0, 1, 3, 10, 30, 100)
    images: int = 64
    name: str = "encoder_start"
    """Of the results' file."""


def trained_encoder(args: Args, n: int, folder: Path) -> str:
    """The dst of a GViT of `n` Gaussians that has only learned to reconstruct."""
    own = GViTArgs(gaussians=(n,), classes=args.classes, epochs=args.epochs, lr=args.lr)
    samples = samples_in(folder / "source" / "train")
    config = config_of(own, "unguided", n, 0, samples)
    dst = str(folder / f"encoder{n}")
    train(
        replace(
            config,
            gvit=GViTLossConfig(classification=0.0, gamma=0.0),
            data=replace(config.data, src=str(folder / "source" / "train")),
            dst=dst,
        )
    )
    return dst


def held_out(folder: Path, count: int) -> torch.Tensor:
    """[count, 3, 64, 64], 0 to 1."""
    src = str(folder / "source" / "val")
    dataset = ImageDataset(src, image_size=SIDE, batch_size=count, shuffle=False)
    return next(iter(dataset)).floating().pixels


def measured(target: torch.Tensor, config: FitConfig) -> dict[str, float]:
    """Mean PSNR in dB and ms per image."""
    backend = select_backend("cpu")
    quality: list[float] = []
    fit(target[:TOGETHER], config, backend)  # compiled, loaded
    begin = time.perf_counter()
    fits = [fit(part, config, backend)[0] for part in target.split(TOGETHER)]
    seconds = time.perf_counter() - begin
    for part, splats in zip(target.split(TOGETHER), fits, strict=True):
        quality += psnr(backend.render(splats, SIDE, SIDE, config.cutoff), part).tolist()
    return {"psnr": statistics.mean(quality), "ms_per_image": 1000 * seconds / len(target)}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with workspace(args.folder) as folder:
        accuracy_data.write_source(folder / "source", "tiny-imagenet", args.classes)
        encoders = args.encoders or [trained_encoder(args, n, folder) for n in args.gaussians]
        target = held_out(folder, args.images)
        print(
            f"{'N':>5}{'steps':>7}" + "".join(f"{x:>20}" for x in ("adaptive", "grid", "encoder"))
        )
        for n, run in zip(args.gaussians, encoders, strict=True):
            own = resolve_encoder(f"encoder:{run}", n)
            starts = {"adaptive": "adaptive", "grid": "grid", "encoder": own}
            for steps in args.steps:
                row: dict[str, Any] = {"gaussians": n, "steps": steps}
                for name, init in starts.items():
                    config = FitConfig(num_gaussians=n, steps=steps, init=init)
                    row[name] = measured(target, config)
                rows.append(row)
                cells = (f"{row[x]['psnr']:.2f} dB {row[x]['ms_per_image']:.1f} ms" for x in starts)
                print(f"{n:>5}{steps:>7}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    save(args.name, {"arguments": asdict(args), "rows": rows})


if __name__ == "__main__":
    main()
