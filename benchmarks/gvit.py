"""Gaussians learned with their classifier, against offline fits and patches: GViT's ablation.

    python -m benchmarks.gvit                         20 classes of Tiny-ImageNet, on 2 cores
    python -m benchmarks.gvit --dataset digits --classes 10 --gaussians 4 8 16 --residual 1 \
        --epochs 24 --name gvit_digits                digits
    python -m benchmarks.gvit --gaussians 128 196 --arms unguided learned offline patches \
        --further unguided learned offline --name gvit_more
    python -m benchmarks.gvit --classes 100 --gaussians 64 --epochs 8 --name gvit_all
    python -m benchmarks.gvit --classes 100 --further guided unguided learned offline \
        --epochs 100 --width 192 --layers 9 --predictor-layers 6 --heads 3 --lr 1e-3 \
        --batch-size 256 --precision bf16

The last on a GPU; the two before it take 25 and 60 minutes. 64 px, digits 32, from random weights,
3 seeds; all arms have the same samples, order, augmentation's random numbers, classifier's blocks,
steps and schedule. The arms, after arXiv 2506.23532:

    guided     the predictor gets the classifier's gradient, too
    unguided   it gets the reconstruction's alone
    learned    guided, from Gaussians that are weights and not drawn
    grey       guided, from Gaussians drawn without a look at the image, as the paper's are: ours
               take its colours (not among the arms run by default)
    offline    splatshard convert's fits, a token each
    patches    the classifier on patches, no Gaussians

`patches` and `unguided` in the table are points of top-1 above these arms, the latter at the same
k, seed by seed: mean and deviation. `dB` is the PSNR of held-out images: of the fits, or of what
the trained predictor draws. `train` is in wall seconds; runs are side by side, one thread each.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks import accuracy_data
from benchmarks.accuracy_train import Run
from benchmarks.arms import (
    SIDES,
    Dataset,
    Options,
    Result,
    by_arm,
    deviation,
    execute_all,
    percent,
    samples_in,
    summary,
    workspace,
)
from benchmarks.record import save
from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
    StemConfig,
)
from splatshard.schemas.train import TrainConfig

Arm = Literal["guided", "unguided", "learned", "grey", "offline", "patches"]
STARTS: dict[Arm, Literal["image", "random", "learned"]] = {
    "guided": "image",
    "unguided": "image",
    "learned": "learned",
    "grey": "random",
}
"""Of the arms that predict Gaussians."""
PATCHES = 8
"""On each side of an image, in both ViTs."""
LAYOUT = "{:<15}{:<10}{:>5}{:>7}{:>7}  {:<14}{:<14}{:<14}{:>6}{:>9}{:>9}"


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    dataset: Dataset = "tiny-imagenet"
    gaussians: tuple[int, ...] = (64, 128, 196)
    """Per image."""
    arms: tuple[Arm, ...] = ("guided", "unguided", "learned", "offline", "patches")
    """Run with the first of these numbers,"""
    further: tuple[Arm, ...] = ("guided",)
    """and with all of them."""
    epochs: int = 6
    predictor_layers: int = 2
    """Of what predicts Gaussians."""
    residual: float = 0.3
    """Of GViTConfig."""
    name: str = "gvit"
    """Of the results' file."""


def config_of(args: Args, arm: Arm, k: int, seed: int, samples: int) -> TrainConfig:
    """What an arm reads, and what its predictor learns from; all have the same blocks for the
    classifier."""
    predicted = arm in STARTS
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
    stem = StemConfig.for_gvit(k, hidden) if arm in STARTS else StemConfig(hidden=hidden)
    encoder = EncoderConfig(layers=args.layers, stem=stem, resampler=None, **sizes)
    if arm == "offline":
        return ModelConfig(encoder=encoder, num_classes=args.classes)
    predictor = EncoderConfig(input="patches", layers=args.predictor_layers, **patches)
    gvit = GViTConfig(gaussians=k, start=STARTS[arm], residual=args.residual, predictor=predictor)
    return ModelConfig(encoder=encoder, num_classes=args.classes, gvit=gvit)


def runs_of(args: Args, folder: Path) -> tuple[list[Run], dict[str, accuracy_data.Inputs]]:
    """Every arm with every seed, and the inputs by their names; converts what offline fits need."""
    dataset = args.dataset
    source = accuracy_data.write_source(folder / "source", dataset, args.classes)
    samples = samples_in(folder / "source" / "train")
    inputs = {dataset: source}
    runs: list[Run] = []
    for i, k in enumerate(args.gaussians):
        arms = [a for a in (args.arms if i == 0 else args.further) if i == 0 or a != "patches"]
        for arm in arms:
            given, name = source, dataset if arm == "patches" else f"{dataset}{k}"
            if arm == "offline":
                given = accuracy_data.convert(source, folder / f"splats{k}", k, SIDES[dataset])
                inputs[name] = given
            for seed in range(args.seeds):
                runs.append(
                    Run(
                        arm=arm,
                        inputs=name,
                        seed=seed,
                        config=config_of(args, arm, k, seed, samples),
                        train=given.split("train"),
                        val=given.split("val"),
                        dst=str(folder / "runs" / f"{arm}{k}-{seed}"),
                    )
                )
    return runs, inputs


def rows_of(
    results: list[Result], dataset: Dataset, inputs: dict[str, accuracy_data.Inputs]
) -> list[dict[str, Any]]:
    """A row per arm and k, and what it is above patches and unguided, in points of top-1."""
    rows = []
    runs = by_arm(results)
    for (arm, name), own in runs.items():
        offline = arm == "offline"
        quality = [r["psnr"] for r in own if "psnr" in r]
        rows.append(
            {
                "dataset": dataset,
                "arm": arm,
                "gaussians": int(name.removeprefix(dataset) or 0),
                "psnr": inputs[name].psnr if offline else mean(quality),
                **summary(own),
                **gain(own, runs.get(("patches", dataset)), "patches"),
                **gain(own, runs.get(("unguided", name)), "unguided"),
                "fit_s_per_image": inputs[name].seconds if offline else 0.0,
            }
        )
    return sorted(rows, key=lambda row: (row["gaussians"], get_args(Arm).index(row["arm"])))


def gain(own: list[Result], base: list[Result] | None, name: str) -> dict[str, float | None]:
    """Of `own` over `base`, points of top-1, seed by seed: mean and deviation."""
    if base is None or own is base:
        return {f"to_{name}": None, f"to_{name}_deviation": None}
    points = [100 * (a["top1"] - b["top1"]) for a, b in zip(own, base, strict=True)]
    return {f"to_{name}": mean(points), f"to_{name}_deviation": deviation(points)}


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
        points(row, "patches"),
        points(row, "unguided"),
        percent(row["top5"]),
        f"{row['fit_s_per_image'] * 1000:.1f}",
        f"{row['train_s']:.0f}",
    )


def points(row: dict[str, Any], name: str) -> str:
    """`-1.9 +- 0.4`."""
    value, spread = row[f"to_{name}"], row[f"to_{name}_deviation"]
    if value is None:
        return "-"
    return f"{value:+.1f}" + ("" if spread is None else f" +- {spread:.1f}")


def main() -> None:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__)
    begin = time.perf_counter()
    with workspace(args.folder) as folder:
        runs, inputs = runs_of(args, folder)
        results = execute_all(runs, args.processes)
    rows = rows_of(results, args.dataset, inputs)
    head = "set arm k seeds dB top1,% patches unguided top5,% fit,ms train,s"
    print("\n" + LAYOUT.format(*head.split()))
    for row in rows:
        print(describe(row))
    wall = time.perf_counter() - begin
    print(f"{wall / 60:.1f} minutes")
    save(args.name, {"arguments": asdict(args), "wall_s": wall, "rows": rows, "runs": results})


if __name__ == "__main__":
    main()
