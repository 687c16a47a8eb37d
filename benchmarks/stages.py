"""Stage 1, then stage 2, against stage 2 alone, on photographs: zero-shot on held-out ones.

    python -m benchmarks.stages                 20 classes, 3 seeds, on 2 cores

Tiny-ImageNet at 64 px, captioned `a photo of a NAME`. The teacher is an RGB CLIP trained here on
the same images, since no other is at hand; the student has its blocks, projections and text tower,
and a stem and resampler of its own. What is trained is what arXiv 2509.22615 trains: in stage 1
stem and resampler, in stage 2 the first block, final norm and projection as well.

    1 + 2    both stages
    2        the second alone, as many steps as it has there
    2 long   the second alone, as many steps as both

Each with our resampler, whose local tokens begin as the teacher's patch embedding, and with the
published one, which begins from nothing. `top-1` is of 1,000 held-out images among the classes'
prompts, `cosine` that of stage 1 at its end. Seeds are side by side, one thread each.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.utils import logging

from benchmarks import accuracy_data
from benchmarks.arms import Options, deviation, percent, samples_in, workspace
from benchmarks.record import DATA, save
from splatshard.jobs.recipes.toys import write_tokenizer
from splatshard.pipeline.evaluation.tasks import zeroshot
from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.export import save_clip
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.trained import load_trained, open_data
from splatshard.schemas.model import (
    EncoderConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
    TextConfig,
)
from splatshard.schemas.train import TrainConfig

SIDE, PATCH, EMBED = 64, 8, 64
PROMPT = "a photo of a {c}"
STUDENT = ("vision.stem.*", "vision.resampler.*")
STAGE2 = (
    *STUDENT,
    "vision.class_embedding",
    "vision.encoder.layers.0.*",
    "vision.post_layernorm.*",
    "visual_projection.*",
    "logit_scale",
)
RESAMPLERS = {"ours": {}, "published": {"neighbours": 0, "bias": "none"}}
LAYOUT = "{:<12}{:<10}{:>12}{:>10}  {:<14}{:>9}"


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    gaussians: int = 128
    epochs: int = 12
    """Of the teacher,"""
    first: int = 4
    """of stage 1,"""
    second: int = 4
    """and of stage 2."""
    name: str = "stages"
    """Of the results' file."""


@dataclass(frozen=True)
class Place:
    """Where everything lies, and what all seeds share."""

    folder: Path
    names: tuple[str, ...]
    tokens: int
    """Of the tokenizer."""
    samples: int

    def splits(self, name: str) -> tuple[str, str]:
        return str(self.folder / name / "train"), str(self.folder / name / "val")


def prepare(args: Args, folder: Path) -> Place:
    """Images with captions, splats of them, a tokenizer of the captions' words."""
    source = accuracy_data.write_source(folder / "source", "tiny-imagenet", args.classes)
    lines = (DATA / "tiny-imagenet-100" / "classnames.txt").read_text().splitlines()
    names = tuple(" ".join(name.replace("-", " ").replace("'", "").split()) for name in lines)
    names = names[: args.classes]
    captions = [PROMPT.replace("{c}", name) for name in names]
    for path in (folder / "source").glob("*/*.parquet"):
        table = pq.read_table(path)
        column = pa.array([captions[label] for label in table["label"].to_pylist()])
        pq.write_table(table.append_column("caption", column), path)
    accuracy_data.convert(source, folder / "splats", args.gaussians, SIDE)
    tokens = write_tokenizer(folder / "tokenizer", captions)
    return Place(folder, names, tokens, samples_in(folder / "source" / "train"))


def model_of(args: Args, place: Place, resampler: str | None) -> ModelConfig:
    """The teacher's (None), or a student's with one of RESAMPLERS."""
    tokens = (SIDE // PATCH) ** 2
    sizes: dict[str, Any] = {
        "width": args.width, "layers": args.layers, "heads": args.heads, "tokens": tokens
    }  # fmt: skip
    if resampler is None:
        encoder = EncoderConfig(input="patches", patch_size=PATCH, image_size=SIDE, **sizes)
    else:
        own = ResamplerConfig(heads=args.heads, **RESAMPLERS[resampler])
        encoder = EncoderConfig(stem=StemConfig(hidden=2 * args.width), resampler=own, **sizes)
    text = TextConfig(
        width=args.width,
        layers=1,
        heads=args.heads,
        vocab_size=place.tokens,
        context_length=12,
        tokenizer=str(place.folder / "tokenizer"),
    )
    return ModelConfig(encoder=encoder, text=text, embed_dim=EMBED)


def execute(args: Args, place: Place, seed: int) -> list[dict[str, Any]]:
    """All arms of one seed: a result each."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = place.folder / f"seed{seed}"
    images, held_out = place.splits("source")
    base = args.training(
        "tiny-imagenet", place.samples, seed, stage="contrast", model=model_of(args, place, None)
    )
    teacher = run(base, images, folder / "rgb", place.samples, args.epochs)
    results = [result(place, seed, "teacher", "-", teacher, held_out, args.epochs)]
    trained = load_trained(teacher, "auto", torch.device("cpu"))
    save_clip(str(folder / "teacher"), cast(SplatCLIP, trained.model))
    splats, held_out = place.splits("splats")
    shutil.copytree(splats, folder / "taught")
    command = [sys.executable, "-m", "jobs", "embed", str(folder / "taught"), images]
    command += ["--teacher", str(folder / "teacher")]
    subprocess.run(command, check=True, capture_output=True)
    for kind in RESAMPLERS:
        student = replace(
            base, model=model_of(args, place, kind), init_clip=str(folder / "teacher")
        )
        stage1 = replace(student, stage="distill", augment=None)
        records: list[dict[str, Any]] = []
        first = run(
            stage1,
            f"{folder}/taught",
            folder / kind / "1",
            place.samples,
            args.first,
            STUDENT,
            records,
        )
        arms = {
            "1 + 2": (replace(student, init=first), args.second),
            "2": (student, args.second),
            "2 long": (student, args.first + args.second),
        }
        for arm, (config, epochs) in arms.items():
            dst = run(config, splats, folder / kind / arm, place.samples, epochs, STAGE2)
            found = result(place, seed, arm, kind, dst, held_out, epochs)
            if arm == "1 + 2":
                found["cosine"] = [r["cosine"] for r in records if r["event"] == "step"][-1]
            results.append(found)
    return results


def run(
    config: TrainConfig,
    src: str,
    dst: Path,
    samples: int,
    epochs: int,
    trainable: tuple[str, ...] = ("*",),
    records: list[dict[str, Any]] | None = None,
) -> str:
    """Train and return `dst`; records go to `records`."""
    steps = epochs * (samples // config.data.batch_size)
    optim = replace(
        config.optim,
        steps=steps,
        warmup_steps=steps // 10,
        trainable=trainable,
        label_smoothing=0.0,
    )
    config = replace(config, data=replace(config.data, src=src), dst=str(dst), optim=optim)
    kept = records if records is not None else []
    train(config, lambda record: kept.append(dict(record)))
    return str(dst)


def result(
    place: Place, seed: int, arm: str, resampler: str, dst: str, held_out: str, epochs: int
) -> dict[str, Any]:
    trained = load_trained(dst, "auto", torch.device("cpu"))
    found = zeroshot(trained, open_data(trained, held_out, 250), place.names, [PROMPT])
    settings = {"arm": arm, "resampler": resampler, "seed": seed, "epochs": epochs}
    print(f"  {settings}: {100 * found['metrics']['top1']:.1f} %", flush=True)
    return settings | {"samples": found["samples"], **found["metrics"]}


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per arm and resampler, in the order in which they ran."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in results:
        groups.setdefault((found["resampler"], found["arm"]), []).append(found)
    rows = []
    for (resampler, arm), own in groups.items():
        top1 = [r["top1"] for r in own]
        cosine = [r["cosine"] for r in own if "cosine" in r]
        rows.append(
            {
                "resampler": resampler,
                "arm": arm,
                "epochs": own[0]["epochs"],
                "seeds": len(own),
                "top1": statistics.mean(top1),
                "top1_deviation": deviation(top1),
                "cosine": statistics.mean(cosine) if cosine else None,
            }
        )
    return rows


def main() -> None:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__)
    begin = time.perf_counter()
    with workspace(args.folder) as folder:
        place = prepare(args, folder)
        with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
            each = pool.map(
                execute, *zip(*((args, place, s) for s in range(args.seeds)), strict=True)
            )
            results = [found for of_seed in each for found in of_seed]
    rows = rows_of(results)
    print("\n" + LAYOUT.format("resampler", "arm", "last epochs", "seeds", "top-1, %", "cosine"))
    for row in rows:
        cosine = "-" if row["cosine"] is None else f"{row['cosine']:.3f}"
        score = percent(row["top1"], row["top1_deviation"])
        print(
            LAYOUT.format(row["resampler"], row["arm"], row["epochs"], row["seeds"], score, cosine)
        )
    wall = time.perf_counter() - begin
    print(f"{wall / 60:.1f} minutes")
    save(args.name, {"arguments": asdict(args), "wall_s": wall, "rows": rows, "runs": results})


if __name__ == "__main__":
    main()
