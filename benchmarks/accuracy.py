"""Classification on splats against RGB patches: the control experiment.

    python -m benchmarks.accuracy               20 classes, on 2 cores, under 30 minutes
    python -m benchmarks.accuracy --dataset digits --classes 10 --gaussians 24 16 \
        --arms ABCDEFGPT --further T --epochs 25 --name accuracy_digits
    python -m benchmarks.accuracy --classes 100 --further BCDEFGPT --epochs 100 --width 192 \
        --layers 9 --heads 3 --lr 1e-3 --batch-size 256 --precision bf16

The last on a GPU. Tiny-ImageNet at 64 px or digits at 32, from random weights, 3 seeds; the arms
differ in what the first layer reads and in nothing else: samples, order, augmentation's random
numbers, blocks, tokens, steps, schedule.

    A  RGB patches of the source's files             E  patches of JPEG or WebP files, and F of as
    B  RGB patches of what the splats render to         few pixels, as the splats take bytes
    C  splats by the resampler, as many tokens as A  G  as C, colours changed about among each
    D  as C, distilled from A first (stage 1)           image's Gaussians
    P  as C, the resampler as it was published       L  as A, with a block more: its parameters are
    T  splats, a token each, no resampler               nearer to those of C, which has a resampler

`ratio`: mean top-1 over that of A, and in brackets the mean of the seeds' ratios. Bytes are what a
sample takes in its shard (JPEG's tables not counted), `fit` core seconds per image of conversion
(wall seconds on a GPU), `train` wall seconds of the run, `all` with the fitting of its training
images. Runs are side by side, one thread each.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import accuracy_data
from benchmarks.accuracy_train import Run
from benchmarks.arms import (
    SIDES,
    Dataset,
    Options,
    by_arm,
    deviation,
    execute_all,
    percent,
    samples_in,
    summary,
    workspace,
)
from benchmarks.record import save
from splatshard.schemas.model import EncoderConfig, ModelConfig, ResamplerConfig, StemConfig
from splatshard.schemas.train import TrainConfig

PATCH = 8
LAYOUT = "{:<4}{:<18}{:>7}{:>8}{:>8}{:>7}  {:<14}{:<8}{:<16}{:>8}{:>8}{:>8}"


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    dataset: Dataset = "tiny-imagenet"
    gaussians: tuple[int, ...] = (128, 64, 196)
    """Per image."""
    arms: str = "ABCDEFGLP"
    """Run with the first of these numbers,"""
    further: str = "C"
    """and with all of them."""
    name: str = "accuracy"
    """Of the results' file."""

    @property
    def side(self) -> int:
        """Of the images, px."""
        return SIDES[self.dataset]

    @property
    def tokens(self) -> int:
        """One for each patch, in all arms but T."""
        return (self.side // PATCH) ** 2


def config_of(args: Args, arm: str, seed: int, samples: int) -> TrainConfig:
    """The one thing in which an arm differs from the others: its encoder."""
    layers = args.layers + (arm == "L")
    sizes = {"width": args.width, "layers": layers, "heads": args.heads, "tokens": args.tokens}
    if arm in "ABEFL":
        encoder = EncoderConfig(input="patches", patch_size=PATCH, image_size=args.side, **sizes)
    else:
        resampler = ResamplerConfig(heads=args.heads)
        if arm == "P":
            resampler = ResamplerConfig(heads=args.heads, neighbours=0, bias="none")
        if arm == "T":
            resampler = None
        encoder = EncoderConfig(
            stem=StemConfig(hidden=2 * args.width), resampler=resampler, **sizes
        )
    model = ModelConfig(encoder=encoder, num_classes=args.classes)
    return args.training(args.dataset, samples, seed, stage="classify", model=model)


def prepare(args: Args, folder: Path) -> dict[str, accuracy_data.Inputs]:
    """All sets of inputs by arm and N, `A`, `B128`, ...; JPEG and WebP are arms E and e."""
    source = accuracy_data.write_source(folder / "source", args.dataset, args.classes)
    found = {arm: source for arm in "AL" if arm in args.arms}
    for i, n in enumerate(args.gaussians):
        arms = args.arms if i == 0 else args.further
        splats = accuracy_data.convert(source, folder / f"splats{n}", n, args.side)
        found |= {f"{arm}{n}": splats for arm in "CDPT" if arm in arms}
        if "B" in arms:
            found[f"B{n}"] = accuracy_data.render(source, splats, folder / f"rendered{n}")
        if "E" in arms:
            for arm, format in (("E", "JPEG"), ("e", "WEBP")):
                place = folder / f"{format.lower()}{n}"
                found[f"{arm}{n}"] = accuracy_data.compress(
                    source, splats, place, format, args.side
                )
        if "F" in arms:
            found[f"F{n}"] = accuracy_data.shrink(source, splats, folder / f"tiny{n}", args.side)
        if "G" in arms:
            found[f"G{n}"] = accuracy_data.shuffle(splats, folder / f"shuffled{n}")
    return found


def runs_of(args: Args, inputs: dict[str, accuracy_data.Inputs], folder: Path) -> list[Run]:
    """Every arm with every seed."""
    samples = samples_in(folder / "source" / "train")
    runs = []
    for name, given in inputs.items():
        arm = name[0]
        for seed in range(args.seeds):
            runs.append(
                Run(
                    arm=arm,
                    inputs=given.name,
                    seed=seed,
                    config=config_of(args, arm.upper(), seed, samples),
                    train=given.split("train"),
                    val=given.split("val"),
                    dst=str(folder / "runs" / f"{name}-{seed}"),
                    source=str(folder / "source" / "train"),
                    teacher=str(folder / "runs" / f"A-{seed}") if arm == "D" else "",
                )
            )
    return runs


def rows_of(
    args: Args, results: list[dict[str, Any]], inputs: dict[str, accuracy_data.Inputs], samples: int
) -> list[dict[str, Any]]:
    """A row per arm and N: mean and deviation over seeds, and both ratios to arm A; `samples` of
    training."""
    found = by_arm(results)
    base = [r["top1"] for r in found.get(("A", "source"), [])]
    rows = []
    for name, given in inputs.items():
        own = found[name[0], given.name]
        means = summary(own)
        row = {
            "arm": name[0],
            "inputs": given.name,
            "bytes": given.size_bytes,
            "psnr": given.psnr,
            "tokens": int(name[1:]) if name[0] == "T" else args.tokens,
            **means,
            "fit_s_per_image": given.seconds,
            "all_s": means["train_s"] + samples * given.seconds,
        }
        if base:
            ratios = [r["top1"] / a for r, a in zip(own, base, strict=True)]
            row["ratio_of_means"] = means["top1"] * len(base) / sum(base)
            row["mean_of_ratios"] = sum(ratios) / len(ratios)
            row["ratio_deviation"] = deviation(ratios)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["arm"].upper(), row["arm"], row["bytes"]))


def describe(row: dict[str, Any]) -> str:
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
        percent(row["top5"]),
        ratio,
        f"{row['fit_s_per_image'] * 1000:.1f}",
        f"{row['train_s']:.0f}",
        f"{row['all_s']:.0f}",
    )


def main() -> None:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__)
    begin = time.perf_counter()
    with workspace(args.folder) as folder:
        inputs = prepare(args, folder)
        runs = runs_of(args, inputs, folder)
        samples = samples_in(folder / "source" / "train")
        results = execute_all(runs, args.processes)
    rows = rows_of(args, results, inputs, samples)
    head = "arm inputs bytes dB tokens seeds top1,% top5,% ratio fit,ms train,s all,s"
    print("\n" + LAYOUT.format(*head.split()))
    for row in rows:
        print(describe(row))
    wall = time.perf_counter() - begin
    print(f"{wall / 60:.1f} minutes")
    save(args.name, {"arguments": asdict(args), "wall_s": wall, "rows": rows, "runs": results})


if __name__ == "__main__":
    main()
