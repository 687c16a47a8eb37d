"""Classification on splats against RGB patches: the control experiment.

    python -m benchmarks.accuracy                       digits, on 2 cores, under 30 minutes
    python -m benchmarks.accuracy --dataset tiny-imagenet --classes 20 --gaussians 128 64
    python -m benchmarks.accuracy --dataset tiny-imagenet --classes 100 --gaussians 64 128 196 \
        --further BCDEFGPT --epochs 100 --width 192 --layers 9 --heads 3 --lr 1e-3 --batch-size 256

The last on a GPU. Digits at 32 px or Tiny-ImageNet at 64, from random weights, 3 seeds; the arms
differ in what the first layer reads and in nothing else: samples, order, augmentation's random
numbers, blocks, tokens, steps, schedule.

    A  RGB patches of the source's files             E  patches of JPEG or WebP files, and F of as
    B  RGB patches of what the splats render to         few pixels, as the splats take bytes
    C  splats by the resampler, as many tokens as A  G  as C, colours changed about among each
    D  as C, distilled from A first (stage 1)           image's Gaussians
    P  as C, the resampler as it was published       T  splats, a token each, no resampler

`ratio`: mean top-1 over that of A, and in brackets the mean of the seeds' ratios. Bytes are what a
sample takes in its shard (JPEG's tables not counted), `fit` core seconds per image of conversion
(wall seconds on a GPU), `train` wall seconds of the run. Runs are side by side, one thread each.
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
from schemas.model import EncoderConfig, ModelConfig, ResamplerConfig, StemConfig
from schemas.train import AugmentConfig, CheckpointConfig, DataConfig, OptimConfig, TrainConfig

PATCH = 8
LAYOUT = "{:<4}{:<18}{:>7}{:>8}{:>8}{:>7}  {:<14}{:<14}{:<16}{:>8}{:>8}"


@dataclass(frozen=True)
class Args:
    dataset: Literal["digits", "tiny-imagenet"] = "digits"
    classes: int = 10
    """The first so many of the dataset's 10 or 100."""
    gaussians: tuple[int, ...] = (24, 16)
    """Per image."""
    arms: str = "ABCDEFGPT"
    """Run with the first of these numbers,"""
    further: str = "T"
    """and with all of them."""
    seeds: int = 3
    epochs: int = 25
    batch_size: int = 50
    width: int = 64
    layers: int = 3
    heads: int = 2
    lr: float = 2e-3
    precision: str = "fp32"
    processes: int = 2
    """Runs side by side."""
    folder: str = ""
    """Inputs and runs stay here, for looking at; empty: a temporary folder."""
    name: str = "accuracy"
    """Of the results' file."""

    @property
    def side(self) -> int:
        """Of the images, px."""
        return 32 if self.dataset == "digits" else 64

    @property
    def tokens(self) -> int:
        """One for each patch, in all arms but T."""
        return (self.side // PATCH) ** 2


def config_of(args: Args, arm: str, n: int, seed: int, samples: int) -> TrainConfig:
    """What all arms have in common, and the one thing in which they differ."""
    sizes = {"width": args.width, "layers": args.layers, "heads": args.heads, "tokens": args.tokens}
    if arm in "ABEF":
        encoder = EncoderConfig(input="patches", patch_size=PATCH, image_size=args.side, **sizes)
    else:
        resampler = ResamplerConfig(heads=args.heads)
        if arm == "P":
            resampler = ResamplerConfig(heads=args.heads, neighbours=0, bias="none")
        if arm == "T":
            resampler = None
        stem = StemConfig(hidden=2 * args.width)
        encoder = EncoderConfig(stem=stem, resampler=resampler, **sizes)
    steps = args.epochs * (samples // args.batch_size)
    return TrainConfig(
        stage="classify",
        model=ModelConfig(encoder=encoder, num_classes=args.classes),
        seed=seed,
        data=DataConfig(batch_size=args.batch_size, seed=seed, workers=0, shuffle_shards=64),
        augment=augment_of(args),
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


def augment_of(args: Args) -> AugmentConfig:
    """What can be done to Gaussians and to pixels alike."""
    side = args.side
    if args.dataset == "digits":
        return AugmentConfig(height=side, width=side, rotation=8, zoom=(0.9, 1.1), shift=0.08)
    colors = dict.fromkeys(("brightness", "contrast", "saturation"), 0.3)
    return AugmentConfig(height=side, width=side, crop_scale=(0.3, 1.0), flip=0.5, **colors)


def prepare(args: Args, folder: Path) -> dict[str, data.Inputs]:
    """All sets of inputs by arm and N, `A`, `B128`, ...; JPEG and WebP are arms E and e."""
    source = data.write_source(folder / "source", args.dataset, args.classes)
    found = {"A": source} if "A" in args.arms else {}
    for i, n in enumerate(args.gaussians):
        arms = args.arms if i == 0 else args.further
        splats = data.convert(source, folder / f"splats{n}", n, args.side)
        found |= {f"{arm}{n}": splats for arm in "CDPT" if arm in arms}
        if "B" in arms:
            found[f"B{n}"] = data.render(source, splats, folder / f"rendered{n}")
        if "E" in arms:
            for arm, format in (("E", "JPEG"), ("e", "WEBP")):
                place = folder / f"{format.lower()}{n}"
                found[f"{arm}{n}"] = data.compress(source, splats, place, format, args.side)
        if "F" in arms:
            found[f"F{n}"] = data.shrink(source, splats, folder / f"tiny{n}", args.side)
        if "G" in arms:
            found[f"G{n}"] = data.shuffle(splats, folder / f"shuffled{n}")
    return found


def runs_of(args: Args, inputs: dict[str, data.Inputs], folder: Path) -> list[Run]:
    """Every arm with every seed; those that wait for arm A's come last."""
    paths = (folder / "source" / "train").glob("*.parquet")
    samples = sum(pq.read_metadata(path).num_rows for path in paths)
    runs = []
    for name, given in inputs.items():
        arm, n = name[0], int(name[1:] or 0)
        for seed in range(args.seeds):
            runs.append(
                Run(
                    arm=arm,
                    inputs=given.name,
                    seed=seed,
                    config=config_of(args, arm.upper(), n, seed, samples),
                    train=given.split("train"),
                    val=given.split("val"),
                    dst=str(folder / "runs" / f"{name}-{seed}"),
                    source=str(folder / "source" / "train"),
                    teacher=str(folder / "runs" / f"A-{seed}") if arm == "D" else "",
                )
            )
    return sorted(runs, key=lambda run: bool(run.teacher))


def execute_all(runs: list[Run], args: Args) -> Iterable[dict[str, Any]]:
    """Results as they come. Arm D begins when all else is through."""
    threads = 0 if torch.cuda.is_available() else 1
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for group in (
            [r for r in runs if not r.teacher],
            [r for r in runs if r.teacher],
        ):
            yield from pool.map(execute, group, [threads] * len(group))


def rows_of(
    args: Args, results: list[dict[str, Any]], inputs: dict[str, data.Inputs]
) -> list[dict[str, Any]]:
    """A row per arm and N: mean and deviation over seeds, and both ratios to arm A."""
    by_arm: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        by_arm.setdefault((result["arm"], result["inputs"]), []).append(result)
    base = [r["top1"] for r in by_arm.get(("A", "source"), [])]
    rows = []
    for name, given in inputs.items():
        found = by_arm[name[0], given.name]
        top1 = [r["top1"] for r in found]
        top5 = [r["top5"] for r in found]
        row = {
            "arm": name[0],
            "inputs": given.name,
            "bytes": given.size_bytes,
            "psnr": given.psnr,
            "tokens": int(name[1:]) if name[0] == "T" else args.tokens,
            "seeds": len(found),
            "top1": statistics.mean(top1),
            "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else None,
            "top5": statistics.mean(top5),
            "fit_s_per_image": given.seconds,
            "train_s": statistics.mean(r["train_s"] for r in found),
            "parameters": found[0]["parameters"],
        }
        if base:
            ratios = [a / b for a, b in zip(top1, base, strict=False)]
            row["ratio_of_means"] = statistics.mean(top1) / statistics.mean(base)
            row["mean_of_ratios"] = statistics.mean(ratios)
            row["ratio_deviation"] = statistics.stdev(ratios) if len(ratios) > 1 else None
        rows.append(row)
    return sorted(rows, key=lambda row: (row["arm"].upper(), row["arm"], row["bytes"]))


def describe(row: dict[str, Any]) -> str:
    def percent(value: float, deviation: float | None) -> str:
        return f"{100 * value:.1f}" + ("" if deviation is None else f" +- {100 * deviation:.1f}")

    ratio = "-"
    if "ratio_of_means" in row:
        ratio = f"{row['ratio_of_means']:.3f} ({row['mean_of_ratios']:.3f})"
    return LAYOUT.format(
        row["arm"].upper(),
        row["inputs"],
        f"{row['bytes']:,.0f}",
        "-" if row["psnr"] is None else f"{row['psnr']:.1f}",
        row["tokens"],
        row["seeds"],
        percent(row["top1"], row["top1_deviation"]),
        percent(row["top5"], None),
        ratio,
        f"{row['fit_s_per_image'] * 1000:.1f}",
        f"{row['train_s']:.0f}",
    )


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        inputs = prepare(args, folder)
        runs = runs_of(args, inputs, folder)
        results = []
        for result in execute_all(runs, args):
            results.append(result)
            print(
                f"  {len(results)}/{len(runs)}  {result['arm']} {result['inputs']} "
                f"seed {result['seed']}: {100 * result['top1']:.1f} %  {result['train_s']:.0f} s",
                flush=True,
            )
    rows = rows_of(args, results, inputs)
    head = "arm inputs bytes dB tokens seeds top1,% top5,% ratio fit,ms train,s"
    print("\n" + LAYOUT.format(*head.split()))
    for row in rows:
        print(describe(row))
    save(args.name, {"arguments": asdict(args), "rows": rows, "runs": results})


if __name__ == "__main__":
    main()
