"""Gaussians learned with their classifier, against offline fits and patches: GViT's ablation.

    python -m benchmarks.gvit                                     digits, on 2 cores
    python -m benchmarks.gvit --datasets tiny-imagenet --classes 20 --gaussians 64 128 196 \
        --further guided --epochs 8                               20 classes, on 2 cores
    python -m benchmarks.gvit --datasets tiny-imagenet --classes 100 --gaussians 64 128 196 \
        --shards 0 --further guided unguided learned offline --epochs 100 --width 192 --layers 9 \
        --predictor-layers 6 --heads 3 --lr 1e-3 --batch-size 256 --precision bf16    on a GPU

Digits at 32 px or Tiny-ImageNet at 64, from random weights, 3 seeds; all
arms have the same samples, order, augmentation's random numbers, classifier's blocks, steps and
schedule. The arms, after arXiv 2506.23532:

    guided     the predictor gets the classifier's gradient, too
    unguided   it gets the reconstruction's alone
    learned    guided, from Gaussians that are weights and not drawn
    offline    splatshard convert's fits, a token each
    patches    the classifier on patches, no Gaussians

`points` are of top-1, to patches. `dB` is the PSNR of held-out images: of the fits, or of what the
trained predictor draws. `train` is in wall seconds; runs are side by side, one thread each.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
import tyro

from benchmarks import accuracy_data as data
from benchmarks.accuracy_train import Run, execute
from benchmarks.record import save
from schemas.model import EncoderConfig, GViTConfig, GViTLossConfig, ModelConfig, StemConfig
from schemas.train import AugmentConfig, CheckpointConfig, DataConfig, OptimConfig, TrainConfig

Arm = Literal["guided", "unguided", "learned", "offline", "patches"]
ARMS: tuple[Arm, ...] = ("guided", "unguided", "learned", "offline", "patches")
PREDICTED = ("guided", "unguided", "learned")
LAYOUT = "{:<15}{:<10}{:>5}{:>7}{:>7}  {:<14}{:>7}{:>8}{:>9}{:>9}"


@dataclass(frozen=True)
class Set:
    """A dataset: images of `side` px in {folder}/train and /val. `patch`: of both ViTs, px."""

    name: str
    source: data.Inputs
    side: int
    patch: int
    classes: int
    samples: int
    augment: AugmentConfig


@dataclass(frozen=True)
class Args:
    datasets: tuple[Literal["digits", "tiny-imagenet"], ...] = ("digits",)
    classes: int = 20
    """The first so many of each dataset's,"""
    shards: int = 4
    """and of their training samples so many times 500; 0: all."""
    gaussians: tuple[int, ...] = (16, 32, 64)
    """Per image."""
    arms: tuple[Arm, ...] = ARMS
    """Run with the first of these numbers,"""
    further: tuple[Arm, ...] = ("guided", "unguided", "offline")
    """and with all of them."""
    seeds: int = 3
    epochs: int = 16
    batch_size: int = 50
    width: int = 64
    layers: int = 3
    """Of the classifier,"""
    predictor_layers: int = 2
    """and of what predicts Gaussians."""
    heads: int = 2
    lr: float = 2e-3
    precision: str = "fp32"
    processes: int = 2
    """Runs side by side."""
    folder: str = ""
    """Inputs and runs stay here, for looking at; empty: a temporary folder."""
    name: str = "gvit"
    """Of the results' file."""


def write(dataset: str, folder: Path, args: Args) -> Set:
    """The images of a dataset, its samples shuffled; of the training ones no more than wanted."""
    source = data.write_source(folder / "source", dataset, args.classes)
    paths = sorted((folder / "source" / "train").glob("*.parquet"))
    for path in paths[args.shards or len(paths) :]:
        path.unlink()
    samples = sum(pq.read_metadata(path).num_rows for path in paths if path.exists())
    if dataset == "digits":
        augment = AugmentConfig(height=32, width=32, rotation=8, zoom=(0.9, 1.1), shift=0.08)
        return Set(dataset, source, 32, 4, min(10, args.classes), samples, augment)
    augment = AugmentConfig(
        height=64,
        width=64,
        crop_scale=(0.3, 1.0),
        flip=0.5,
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
    )
    return Set(dataset, source, 64, 8, args.classes, samples, augment)


def model_of(args: Args, arm: Arm, k: int, found: Set) -> ModelConfig:
    """All arms have the same blocks for the classifier; the head starts at zero."""
    sizes: dict[str, Any] = {"width": args.width, "heads": args.heads}
    tokens = (found.side // found.patch) ** 2
    patches = {"patch_size": found.patch, "image_size": found.side, "tokens": tokens, **sizes}
    if arm == "patches":
        encoder = EncoderConfig(input="patches", layers=args.layers, **patches)
        return ModelConfig(encoder=encoder, num_classes=found.classes)
    stem = StemConfig(hidden=2 * args.width)
    encoder = EncoderConfig(layers=args.layers, stem=stem, resampler=None, **sizes)
    if arm == "offline":
        return ModelConfig(encoder=encoder, num_classes=found.classes)
    predictor = EncoderConfig(input="patches", layers=args.predictor_layers, **patches)
    start = "learned" if arm == "learned" else "random"
    gvit = GViTConfig(gaussians=k, start=start, predictor=predictor)
    return ModelConfig(encoder=encoder, num_classes=found.classes, gvit=gvit)


def config_of(args: Args, arm: Arm, k: int, seed: int, found: Set) -> TrainConfig:
    """What all arms have in common, and the one thing in which they differ."""
    steps = args.epochs * (found.samples // args.batch_size)
    predicted = arm in PREDICTED
    return TrainConfig(
        stage="gvit" if predicted else "classify",
        model=model_of(args, arm, k, found),
        gvit=GViTLossConfig(gamma=float(arm != "unguided")) if predicted else None,
        seed=seed,
        data=DataConfig(batch_size=args.batch_size, seed=seed, workers=0, shuffle_shards=64),
        augment=found.augment,
        optim=OptimConfig(
            steps=steps,
            lr=args.lr,
            warmup_steps=steps // 10,
            weight_decay=0.05,
            label_smoothing=0.1,
            ema=0.99,
        ),
        precision=args.precision,  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(every=1 << 30, keep=1),
    )


def runs_of(args: Args, found: Set, folder: Path) -> tuple[list[Run], dict[str, data.Inputs]]:
    """Every arm with every seed, and the inputs by their names; converts what offline fits need."""
    inputs = {found.name: found.source}
    runs = []
    for i, k in enumerate(args.gaussians):
        arms = [a for a in (args.arms if i == 0 else args.further) if i == 0 or a != "patches"]
        for arm in arms:
            given, name = found.source, f"{found.name}{k}"
            if arm == "offline":
                given = data.convert(found.source, folder / f"splats{k}", k, found.side)
                inputs[name] = given
            for seed in range(args.seeds):
                runs.append(
                    Run(
                        arm=arm,
                        inputs=found.name if arm == "patches" else name,
                        seed=seed,
                        config=config_of(args, arm, k, seed, found),
                        train=given.split("train"),
                        val=given.split("val"),
                        dst=str(folder / "runs" / f"{arm}{k}-{seed}"),
                    )
                )
    return runs, inputs


def execute_all(runs: list[Run], args: Args) -> Iterable[dict[str, Any]]:
    """Results as they come."""
    threads = 0 if torch.cuda.is_available() else 1
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        yield from pool.map(execute, runs, [threads] * len(runs))


def row_of(results: list[dict[str, Any]], found: Set, inputs: dict[str, data.Inputs]) -> Any:
    """Of one arm and k: mean and deviation over the seeds."""
    arm, name = results[0]["arm"], results[0]["inputs"]
    top1 = [r["top1"] for r in results]
    offline = arm == "offline"
    quality = [r["psnr"] for r in results if "psnr" in r]
    return {
        "dataset": found.name,
        "arm": arm,
        "gaussians": int(name.removeprefix(found.name) or 0),
        "seeds": len(results),
        "psnr": inputs[name].psnr if offline else statistics.mean(quality) if quality else None,
        "top1": statistics.mean(top1),
        "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else None,
        "top5": statistics.mean(r["top5"] for r in results),
        "fit_s_per_image": inputs[name].seconds if offline else 0.0,
        "train_s": statistics.mean(r["train_s"] for r in results),
        "parameters": results[0]["parameters"],
    }


def rows_of(
    results: list[dict[str, Any]], found: Set, inputs: dict[str, data.Inputs]
) -> list[dict[str, Any]]:
    """A row per arm and k, and its distance to patches in points of top-1."""
    by_arm: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        by_arm.setdefault((result["arm"], result["inputs"]), []).append(result)
    rows = [row_of(group, found, inputs) for group in by_arm.values()]
    base = [row["top1"] for row in rows if row["arm"] == "patches"]
    for row in rows:
        row["points"] = 100 * (row["top1"] - base[0]) if base else None
    return sorted(rows, key=lambda row: (row["gaussians"], ARMS.index(row["arm"])))


def describe(row: dict[str, Any]) -> str:
    deviation = row["top1_deviation"]
    return LAYOUT.format(
        row["dataset"],
        row["arm"],
        row["gaussians"] or "-",
        row["seeds"],
        "-" if row["psnr"] is None else f"{row['psnr']:.1f}",
        f"{100 * row['top1']:.1f}" + ("" if deviation is None else f" +- {100 * deviation:.1f}"),
        "-" if row["points"] is None else f"{row['points']:+.1f}",
        f"{100 * row['top5']:.1f}",
        f"{row['fit_s_per_image'] * 1000:.1f}",
        f"{row['train_s']:.0f}",
    )


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as place:
        for name in args.datasets:
            folder = Path(place) / name
            found = write(name, folder, args)
            runs, inputs = runs_of(args, found, folder)
            of_set = []
            for result in execute_all(runs, args):
                of_set.append(result)
                print(
                    f"  {len(of_set)}/{len(runs)}  {result['arm']} {result['inputs']} "
                    f"seed {result['seed']}: {100 * result['top1']:.1f} %  "
                    f"{result['train_s']:.0f} s",
                    flush=True,
                )
            rows += rows_of(of_set, found, inputs)
            results += of_set
    head = "set arm k seeds dB top1,% points top5,% fit,ms train,s"
    print("\n" + LAYOUT.format(*head.split()))
    for row in rows:
        print(describe(row))
    save(args.name, {"arguments": asdict(args), "rows": rows, "runs": results})


if __name__ == "__main__":
    main()
