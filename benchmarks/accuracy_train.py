"""One training of an arm, in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging

from splatshard.pipeline.evaluation.tasks import classify
from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.encoder import vision_config
from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.trained import load_trained, open_data
from splatshard.schemas.model import ModelConfig
from splatshard.schemas.train import TrainConfig

DISTILLED = 0.4
"""Share of arm D's steps in which only its stem learns, from the teacher's embeddings."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed. `train` and `val` are folders. A `teacher` is the dst of a run on
    patches, from whose blocks and embeddings `train` are distilled first."""

    arm: str
    inputs: str
    seed: int
    config: TrainConfig
    train: str
    val: str
    dst: str
    source: str = ""
    teacher: str = ""


def execute(run: Run, threads: int) -> dict[str, Any]:
    """Train and evaluate; top1 and top5 on `val`, seconds of training, parameters."""
    if threads:
        torch.set_num_threads(threads)
    begin = time.perf_counter()
    own = replace(run.config.data, src=run.train)
    config = replace(run.config, dst=run.dst, data=own)
    if run.teacher:
        config = distilled(run, config)
    records: list[dict[str, Any]] = []
    train(config, lambda record: records.append(dict(record)))
    seconds = time.perf_counter() - begin
    trained = load_trained(
        run.dst, "auto", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    found = classify(trained, open_data(trained, run.val, 250))
    losses = [record["loss"] for record in records if record["event"] == "step"]
    return {
        "arm": run.arm,
        "inputs": run.inputs,
        "seed": run.seed,
        **found["metrics"],
        "samples": found["samples"],
        "train_s": seconds,
        "last_loss": losses[-1],
        "parameters": sum(p.numel() for p in trained.model.parameters()),
    }


def distilled(run: Run, config: TrainConfig) -> TrainConfig:
    """Stage 1 of arm D, and the configuration of the rest of its steps. The student begins with
    the teacher's blocks; while they are frozen its stem learns to give the teacher's CLS."""
    folder = Path(run.dst)
    teacher = save_teacher(run.teacher, folder / "teacher")
    shutil.copytree(run.train, folder / "taught")
    command = [sys.executable, "-m", "jobs", "embed", str(folder / "taught"), run.source]
    subprocess.run([*command, "--teacher", str(teacher)], check=True, capture_output=True)
    steps = config.optim.steps
    assert steps is not None, "arms are compared by steps"
    first = round(DISTILLED * steps)
    optim = replace(
        config.optim, steps=first, trainable=("vision.stem.*", "vision.resampler.*"), ema=None
    )
    stage1 = replace(
        config,
        stage="distill",
        model=ModelConfig(encoder=config.model.encoder),
        optim=optim,
        init_clip=str(teacher),
        data=replace(config.data, src=str(folder / "taught")),
        dst=str(folder / "stage1"),
    )
    train(stage1)
    return replace(
        config, init=str(folder / "stage1"), optim=replace(config.optim, steps=steps - first)
    )


def save_teacher(run: str, folder: Path) -> Path:
    """The vision tower of a run on patches as a CLIP that transformers loads, its text tower made
    up."""
    model = load_trained(run, "auto", torch.device("cpu")).model
    assert isinstance(model, SplatClassifier), "arm A is a classifier"
    encoder = model.encoder
    assert isinstance(encoder, PatchEncoder), "arm A reads patches"
    vision = vision_config(encoder.config)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "vocab_size": 8, "eos_token_id": 7, "bos_token_id": 6}
    clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text))
    clip.vision_model.load_state_dict(encoder.state_dict())
    logging.disable_progress_bar()
    clip.save_pretrained(folder)
    return folder
