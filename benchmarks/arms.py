"""What the comparisons of arms share: sizes and budget, trainings side by side, means over seeds.

An arm is one training in one of its clothes; all arms of a table have the same samples in the same
order, the same random numbers for augmentation, blocks, steps and schedule.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch

from benchmarks.accuracy_train import Run, execute
from splatshard.schemas.train import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    TrainConfig,
)

Dataset = Literal["digits", "tiny-imagenet"]
Result = dict[str, Any]

SIDES: dict[Dataset, int] = {"digits": 32, "tiny-imagenet": 64}
"""Of the images, px."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size and budget of every arm, and how they run."""

    classes: int = 20
    """The first so many of the dataset's."""
    seeds: int = 3
    epochs: int = 11
    batch_size: int = 50
    width: int = 64
    layers: int = 3
    """Of the classifier."""
    heads: int = 2
    lr: float = 2e-3
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    processes: int = 2
    """Runs side by side."""
    folder: str = ""
    """Inputs and runs stay here, for looking at; empty: a temporary folder."""

    def training(self, dataset: Dataset, samples: int, seed: int, **fields: Any) -> TrainConfig:
        """What all arms have in common; `fields` of TrainConfig are the arm's own."""
        steps = self.epochs * (samples // self.batch_size)
        return TrainConfig(
            seed=seed,
            data=DataConfig(batch_size=self.batch_size, seed=seed, workers=0, shuffle_shards=64),
            augment=augment_of(dataset),
            optim=OptimConfig(
                steps=steps,
                lr=self.lr,
                warmup_steps=steps // 10,
                weight_decay=0.05,
                label_smoothing=0.1,
                ema=0.99,
            ),
            precision=self.precision,
            checkpoint=CheckpointConfig(every=1 << 30, keep=1),
            **fields,
        )


def augment_of(dataset: Dataset) -> AugmentConfig:
    """What can be done to Gaussians and to pixels alike."""
    side = SIDES[dataset]
    if dataset == "digits":
        return AugmentConfig(height=side, width=side, rotation=8, zoom=(0.9, 1.1), shift=0.08)
    colors = dict.fromkeys(("brightness", "contrast", "saturation"), 0.3)
    return AugmentConfig(height=side, width=side, crop_scale=(0.3, 1.0), flip=0.5, **colors)


def samples_in(folder: Path) -> int:
    """Of a folder's Parquet files."""
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))


@contextmanager
def workspace(folder: str) -> Iterator[Path]:
    """`folder`, or a temporary one that goes when the work is done."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def execute_all(runs: Sequence[Run], processes: int) -> list[Result]:
    """All runs, so many at a time with one thread each, told as they end. Those that need a teacher
    begin when all others are through."""
    threads = 0 if torch.cuda.is_available() else 1
    waves = [[r for r in runs if bool(r.teacher) == late] for late in (False, True)]
    results: list[Result] = []
    begin = time.perf_counter()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for wave in waves:
            for result in pool.map(execute, wave, [threads] * len(wave)):
                results.append(result)
                spent = time.perf_counter() - begin
                left = spent / len(results) * (len(runs) - len(results))
                print(
                    f"  {len(results)}/{len(runs)}  {result['arm']} {result['inputs']} "
                    f"seed {result['seed']}: {100 * result['top1']:.1f} %  "
                    f"{result['train_s']:.0f} s   {spent / 60:.0f} min, about "
                    f"{left / 60:.0f} min left",
                    flush=True,
                )
    return results


def by_arm(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by arm and inputs, each seed by seed."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        found.setdefault((result["arm"], result["inputs"]), []).append(result)
    return found


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Means of one arm over its seeds; deviations are of samples."""
    top1 = [r["top1"] for r in results]
    return {
        "seeds": len(results),
        "top1": statistics.mean(top1),
        "top1_deviation": deviation(top1),
        "top5": statistics.mean(r["top5"] for r in results),
        "train_s": statistics.mean(r["train_s"] for r in results),
        "parameters": results[0]["parameters"],
    }


def deviation(values: Sequence[float]) -> float | None:
    """Of a sample; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def percent(value: float, spread: float | None = None) -> str:
    """`38.2 +- 0.7`."""
    return f"{100 * value:.1f}" + ("" if spread is None else f" +- {100 * spread:.1f}")
