"""Gaussians learned with their classifier, against offline fits and patches: GViT's ablation.

    python -m benchmarks.gvit                         20 classes of Tiny-ImageNet, on 2 cores
    python -m benchmarks.gvit --dataset digits --classes 10 --gaussians 64 --epochs 15 \
        --name gvit_digits                            digits
    python -m benchmarks.gvit --classes 100 --further guided unguided learned offline --first 20 \
        --epochs 100 --width 192 --layers 9 --predictor-layers 6 --heads 3 --lr 1e-3 \
        --batch-size 256 --precision bf16

The last on a GPU. 64 px, digits 32, from random weights, 3 seeds; all arms
have the same samples, order, augmentation's random numbers, classifier's blocks, steps and
schedule. The arms, after arXiv 2506.23532:

    guided     the predictor gets the classifier's gradient, too
    unguided   it gets the reconstruction's alone
    learned    guided, from Gaussians that are weights and not drawn
    offline    splatshard convert's fits, a token each
    patches    the classifier on patches, no Gaussians

Where Gaussians are predicted, the predictor first learns to reconstruct, without labels or
classifier (`predictor`, and `queries` for the arm learned), as offline fits are made without them;
from there all arms train as many epochs. A classifier that begins beside a predictor that knows
nothing learns little in so few: top-1 was 10 % for 23 % (k = 64, 6 epochs, one seed).

`points` are of top-1, to patches. `dB` is the PSNR of held-out images: of the fits, or of what the
trained predictor draws. `train` is in wall seconds; runs are side by side, one thread each.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
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
FIRST: dict[Arm, str] = {"guided": "predictor", "unguided": "predictor", "learned": "queries"}
"""Arms that predict Gaussians, and the run that each begins with."""
PATCHES = 8
"""On each side of an image, in both ViTs."""
LAYOUT = "{:<15}{:<10}{:>5}{:>7}{:>7}  {:<14}{:>7}{:>8}{:>9}{:>9}"


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    dataset: Dataset = "tiny-imagenet"
    gaussians: tuple[int, ...] = (64, 128, 196)
    """Per image."""
    arms: tuple[Arm, ...] = ARMS
    """Run with the first of these numbers,"""
    further: tuple[Arm, ...] = ("guided",)
    """and with all of them."""
    epochs: int = 5
    first: int = 4
    """Epochs of reconstruction alone, before those of the arms that predict Gaussians."""
    predictor_layers: int = 2
    """Of what predicts Gaussians."""
    name: str = "gvit"
    """Of the results' file."""


def config_of(args: Args, arm: Arm, k: int, seed: int, samples: int) -> TrainConfig:
    """What an arm reads, and what its predictor learns from; all have the same blocks for the
    classifier."""
    predicted = arm in FIRST
    return args.training(
        args.dataset,
        samples,
        seed,
        stage="gvit" if predicted else "classify",
        model=model_of(args, arm, k),
        gvit=GViTLossConfig(gamma=float(arm != "unguided")) if predicted else None,
    )


def model_of(args: Args, arm: Arm, k: int) -> ModelConfig:
    """The heads start at zero."""
    sizes: dict[str, Any] = {"width": args.width, "heads": args.heads}
    side = SIDES[args.dataset]
    patches = {"patch_size": side // PATCHES, "image_size": side, "tokens": PATCHES**2, **sizes}
    if arm == "patches":
        encoder = EncoderConfig(input="patches", layers=args.layers, **patches)
        return ModelConfig(encoder=encoder, num_classes=args.classes)
    hidden = 2 * args.width
    stem = StemConfig.for_gvit(k, hidden) if arm in FIRST else StemConfig(hidden=hidden)
    encoder = EncoderConfig(layers=args.layers, stem=stem, resampler=None, **sizes)
    if arm == "offline":
        return ModelConfig(encoder=encoder, num_classes=args.classes)
    predictor = EncoderConfig(input="patches", layers=args.predictor_layers, **patches)
    start = "learned" if arm == "learned" else "random"
    gvit = GViTConfig(gaussians=k, start=start, predictor=predictor)
    return ModelConfig(encoder=encoder, num_classes=args.classes, gvit=gvit)


def first_run(
    args: Args, arm: Arm, k: int, seed: int, source: data.Inputs, samples: int, folder: Path
) -> Run:
    """The predictor that `arm` begins with, which learns to reconstruct. One for each k: of what
    one made for 64 Gaussians says with 196, a classifier learns nothing in so few epochs."""
    config = config_of(args, arm, k, seed, samples)
    steps = args.first * (samples // args.batch_size)
    return Run(
        arm=FIRST[arm],
        inputs=f"{args.dataset}{k}",
        seed=seed,
        config=replace(
            config,
            gvit=GViTLossConfig(classification=0.0, gamma=0.0),
            optim=replace(config.optim, steps=steps, warmup_steps=steps // 10),
        ),
        train=source.split("train"),
        val=source.split("val"),
        dst=str(folder / "runs" / f"{FIRST[arm]}{k}-{seed}"),
    )


def runs_of(args: Args, folder: Path) -> tuple[list[Run], dict[str, data.Inputs]]:
    """Every arm with every seed, and the inputs by their names; converts what offline fits need."""
    dataset = args.dataset
    source = data.write_source(folder / "source", dataset, args.classes)
    samples = samples_in(folder / "source" / "train")
    inputs = {dataset: source}
    runs: list[Run] = []
    first: dict[str, Run] = {}
    for i, k in enumerate(args.gaussians):
        arms = [a for a in (args.arms if i == 0 else args.further) if i == 0 or a != "patches"]
        for arm in arms:
            given, name = source, dataset if arm == "patches" else f"{dataset}{k}"
            if arm == "offline":
                given = data.convert(source, folder / f"splats{k}", k, SIDES[dataset])
                inputs[name] = given
            for seed in range(args.seeds):
                before = ""
                if arm in FIRST:
                    run = first_run(args, arm, k, seed, source, samples, folder)
                    before = first.setdefault(run.dst, run).dst
                runs.append(
                    Run(
                        arm=arm,
                        inputs=name,
                        seed=seed,
                        config=config_of(args, arm, k, seed, samples),
                        train=given.split("train"),
                        val=given.split("val"),
                        dst=str(folder / "runs" / f"{arm}{k}-{seed}"),
                        after=before,
                    )
                )
    return [*first.values(), *runs], inputs


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
        classifies = bool(base) and row["arm"] not in FIRST.values()
        row["points"] = 100 * (row["top1"] - base[0]) if classifies else None
    order = (*ARMS, *FIRST.values())
    return sorted(rows, key=lambda row: (row["gaussians"], order.index(row["arm"])))


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
    with workspace(args.folder) as folder:
        runs, inputs = runs_of(args, folder)
        results = execute_all(runs, args.processes)
    rows = rows_of(results, args.dataset, inputs)
    head = "set arm k seeds dB top1,% points top5,% fit,ms train,s"
    print("\n" + LAYOUT.format(*head.split()))
    for row in rows:
        print(describe(row))
    wall = time.perf_counter() - begin
    print(f"{wall / 60:.1f} minutes")
    save(args.name, {"arguments": asdict(args), "wall_s": wall, "rows": rows, "runs": results})


if __name__ == "__main__":
    main()
