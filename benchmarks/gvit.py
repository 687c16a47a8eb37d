"""Gaussians learned with their classifier, against offline fits and patches: GViT's ablation.

    python -m benchmarks.gvit                         digits and 20 classes, on 2 cores
    python -m benchmarks.gvit --datasets tiny-imagenet --classes 100 --epochs 100 --width 192 \
        --further guided unguided learned offline --layers 9 --predictor-layers 6 --heads 3 \
        --lr 1e-3 --batch-size 256 --precision bf16

The last on a GPU. Digits at 32 px and Tiny-ImageNet at 64, from random weights, 3 seeds; all arms
have the same samples, order, augmentation's random numbers, classifier's blocks, steps and
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
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import accuracy_data as data
from benchmarks.accuracy_train import Run
from benchmarks.arms import (
    SIDES,
    Dataset,
    Options,
    by_arm,
    execute_all,
    percent,
    samples_in,
    summary,
    workspace,
)
from benchmarks.record import save
from schemas.model import EncoderConfig, GViTConfig, GViTLossConfig, ModelConfig, StemConfig
from schemas.train import TrainConfig

Arm = Literal["guided", "unguided", "learned", "offline", "patches"]
ARMS: tuple[Arm, ...] = ("guided", "unguided", "learned", "offline", "patches")
PREDICTED = ("guided", "unguided", "learned")
PATCHES = 8
"""On each side of an image, in both ViTs."""
LAYOUT = "{:<15}{:<10}{:>5}{:>7}{:>7}  {:<14}{:>7}{:>8}{:>9}{:>9}"


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    datasets: tuple[Dataset, ...] = ("digits", "tiny-imagenet")
    gaussians: tuple[int, ...] = (64, 128, 196)
    """Per image."""
    arms: tuple[Arm, ...] = ARMS
    """Run with the first of these numbers,"""
    further: tuple[Arm, ...] = ("guided",)
    """and with all of them."""
    epochs: int = 10
    predictor_layers: int = 2
    """Of what predicts Gaussians."""
    name: str = "gvit"
    """Of the results' file."""


def config_of(
    args: Args, arm: Arm, k: int, seed: int, dataset: Dataset, samples: int
) -> TrainConfig:
    """What an arm reads, and what its predictor learns from; all have the same blocks for the
    classifier."""
    predicted = arm in PREDICTED
    return args.training(
        dataset,
        samples,
        seed,
        stage="gvit" if predicted else "classify",
        model=model_of(args, arm, k, dataset),
        gvit=GViTLossConfig(gamma=float(arm != "unguided")) if predicted else None,
    )


def model_of(args: Args, arm: Arm, k: int, dataset: Dataset) -> ModelConfig:
    """The heads start at zero."""
    classes = classes_of(args, dataset)
    sizes: dict[str, Any] = {"width": args.width, "heads": args.heads}
    side = SIDES[dataset]
    patches = {"patch_size": side // PATCHES, "image_size": side, "tokens": PATCHES**2, **sizes}
    if arm == "patches":
        encoder = EncoderConfig(input="patches", layers=args.layers, **patches)
        return ModelConfig(encoder=encoder, num_classes=classes)
    stem = StemConfig(hidden=2 * args.width)
    encoder = EncoderConfig(layers=args.layers, stem=stem, resampler=None, **sizes)
    if arm == "offline":
        return ModelConfig(encoder=encoder, num_classes=classes)
    predictor = EncoderConfig(input="patches", layers=args.predictor_layers, **patches)
    start = "learned" if arm == "learned" else "random"
    gvit = GViTConfig(gaussians=k, start=start, predictor=predictor)
    return ModelConfig(encoder=encoder, num_classes=classes, gvit=gvit)


def classes_of(args: Args, dataset: Dataset) -> int:
    return min(10, args.classes) if dataset == "digits" else args.classes


def runs_of(args: Args, dataset: Dataset, folder: Path) -> tuple[list[Run], dict[str, data.Inputs]]:
    """Every arm with every seed, and the inputs by their names; converts what offline fits need."""
    source = data.write_source(folder / "source", dataset, classes_of(args, dataset))
    samples = samples_in(folder / "source" / "train")
    inputs = {dataset: source}
    runs = []
    for i, k in enumerate(args.gaussians):
        arms = [a for a in (args.arms if i == 0 else args.further) if i == 0 or a != "patches"]
        for arm in arms:
            given, name = source, dataset if arm == "patches" else f"{dataset}{k}"
            if arm == "offline":
                given = data.convert(source, folder / f"splats{k}", k, SIDES[dataset])
                inputs[name] = given
            for seed in range(args.seeds):
                runs.append(
                    Run(
                        arm=arm,
                        inputs=name,
                        seed=seed,
                        config=config_of(args, arm, k, seed, dataset, samples),
                        train=given.split("train"),
                        val=given.split("val"),
                        dst=str(folder / "runs" / f"{arm}{k}-{seed}"),
                    )
                )
    return runs, inputs


def rows_of(
    results: list[dict[str, Any]], dataset: Dataset, inputs: dict[str, data.Inputs]
) -> list[dict[str, Any]]:
    """A row per arm and k, and its distance to patches in points of top-1."""
    rows = []
    for (arm, name), own in by_arm(results).items():
        offline = arm == "offline"
        quality = [r["psnr"] for r in own if "psnr" in r]
        rows.append(
            {
                "dataset": dataset,
                "arm": arm,
                "gaussians": int(name.removeprefix(dataset) or 0),
                "psnr": inputs[name].psnr if offline else mean(quality),
                **summary(own),
                "fit_s_per_image": inputs[name].seconds if offline else 0.0,
            }
        )
    base = [row["top1"] for row in rows if row["arm"] == "patches"]
    for row in rows:
        row["points"] = 100 * (row["top1"] - base[0]) if base else None
    return sorted(rows, key=lambda row: (row["gaussians"], ARMS.index(row["arm"])))


def mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def describe(row: dict[str, Any]) -> str:
    return LAYOUT.format(
        row["dataset"],
        row["arm"],
        row["gaussians"] or "-",
        row["seeds"],
        "-" if row["psnr"] is None else f"{row['psnr']:.1f}",
        percent(row["top1"], row["top1_deviation"]),
        "-" if row["points"] is None else f"{row['points']:+.1f}",
        percent(row["top5"]),
        f"{row['fit_s_per_image'] * 1000:.1f}",
        f"{row['train_s']:.0f}",
    )


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    with workspace(args.folder) as place:
        for dataset in args.datasets:
            runs, inputs = runs_of(args, dataset, place / dataset)
            found = execute_all(runs, args.processes)
            rows += rows_of(found, dataset, inputs)
            results += found
    head = "set arm k seeds dB top1,% points top5,% fit,ms train,s"
    print("\n" + LAYOUT.format(*head.split()))
    for row in rows:
        print(describe(row))
    wall = time.perf_counter() - begin
    print(f"{wall / 60:.1f} minutes")
    save(args.name, {"arguments": asdict(args), "wall_s": wall, "rows": rows, "runs": results})


if __name__ == "__main__":
    main()
