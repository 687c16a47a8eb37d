"""Train a model on splat shards. Start here: `train` is the whole of it.

    feed -> gradients -> clip -> AdamW -> average -> (record) -> (checkpoint)

One loop for four stages (losses.py): classification, distillation from the teacher's embeddings in
the shards, contrastive training on captions, Gaussians learned together with their classifier. The
same function runs in one process, under torchrun and in a cluster's workers (distributed.py).

What a step sees is a function of the configuration, the shards and the step's number. So a run that
was killed goes on from its last checkpoint as if nothing had happened, on any number of processes.
One that is asked to stop saves one more after its step.

Left out: sharding of model or optimiser (the models here are far smaller than a GPU), and
validation, which `splatshard evaluate` does on the checkpoints.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.gvit import guidance_at
from splatshard.pipeline.models.pretrained import init_from_clip, load_clip
from splatshard.pipeline.shards.commit import check_destination, check_scheme
from splatshard.pipeline.storage.fs import absolute
from splatshard.pipeline.train import checkpoint as checkpoint_module
from splatshard.pipeline.train.batches import Feed, probe
from splatshard.pipeline.train.check import check_data
from splatshard.pipeline.train.checkpoint import Checkpoint, Weights
from splatshard.pipeline.train.distributed import Stopping, World, on_rank_zero, world
from splatshard.pipeline.train.groups import (
    Average,
    Groups,
    freeze,
    groups_of,
    make_optimizer,
    report,
)
from splatshard.pipeline.train.losses import Stage, clamp, stage_of, vision_of
from splatshard.pipeline.train.metrics import MetricsLogger, Show
from splatshard.pipeline.train.schedule import learning_rate, seed_everything
from splatshard.pipeline.train.step import Embedder, Gradients
from splatshard.schemas.errors import UsageError
from splatshard.schemas.train import OptimConfig, TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended: `steps` are done, `checkpoint` is the URL of its last one's folder,
    `record` the last line about a step that this call wrote (empty where there was nothing to
    do), `stopped` the signal's number where it was asked to stop before its end, else 0."""

    steps: int
    checkpoint: str
    record: dict[str, Any]
    stopped: int = 0


def train(
    config: TrainConfig,
    show: Show = lambda record: None,
    asked: Callable[[], int] = lambda: 0,
) -> TrainResult:
    """Train as `config` says, from the last checkpoint in `config.dst` on if there is one.

    `show` gets every record of the log as it is written (rank 0 only). Once `asked()` is a
    signal's number in any of the processes, all end after a step, with a checkpoint of it. Raises
    UsageError for configurations, samples and checkpoints that do not fit each other,
    CorruptShardError for damaged ones, StorageError and UnavailableError, SplatshardError where
    the loss is not finite.
    """
    config = replace(config, dst=destination(config))
    with world(config.device) as here:
        return train_here(config, here, show, asked)  # nothing of it may outlive the process group


def train_here(
    config: TrainConfig, here: World, show: Show, asked: Callable[[], int]
) -> TrainResult:
    """`train` in one of the processes. Its frame holds DDP, which holds the process group. In the
    frame of `train` that would end outside of the barrier, when the other process may be gone, and
    wait for it for ever (2 of 8 stopped runs of two processes; so, none of 15)."""
    feed = Feed(config, here)
    steps = total_steps(config.optim, feed.steps_per_epoch)
    stage = stage_of(config, here.device)
    found = on_rank_zero(here, lambda: checkpoint_module.latest(config.dst))
    if found:
        checkpoint_module.refuse_changes(found, config)
        refuse_another_ramp(found, config)
    else:
        check_data(feed.dataset, config, here)
    model = start_model(config, found, feed.cutoff).to(here.device)
    groups = used_groups(model, stage, config, here)
    optimizer = make_optimizer(model, groups, config.optim)
    scaler = torch.amp.GradScaler(here.device.type, enabled=config.precision == "fp16")
    average = Average(model, config.optim.ema) if config.optim.ema else None
    first = resume(found, config, feed, optimizer, scaler, average) if found else 0
    logger = MetricsLogger(config, here, feed, first, steps, show)
    logger.start(report(model, groups))

    stopping = Stopping(here, asked)
    gradients = None
    url = found.url if found else ""
    done, stopped = first, 0
    for number, step in zip(range(first, steps), feed, strict=False):
        if gradients is None or number == groups.later_from:
            freeze(model, groups.at(number))
            gradients = None  # DDP's hooks go with it
            gradients = Gradients(parallel(model, stage, here), stage, config, here, scaler)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, steps, config.optim)
        step = replace(step, guidance=guidance_at(number, steps, config.gvit))
        loss, metrics = gradients(step, number)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        clamp(model)
        if average:
            average.update(model, number)
        done = number + 1
        stopped = stopping.after_step() if done < steps else 0
        saving = done == steps or done % config.checkpoint.every == 0
        if saving or done % config.log.every == 0 or done == 1:
            logger.step(done, loss, metrics | {"grad_norm": norm})
        elif stopped:
            logger.unrecorded(done, loss, norm)
        if (saving or stopped) and here.rank == 0:
            url = save(done, config, model, average, optimizer, scaler, feed)
            logger.checkpoint(done, url)
        if stopped:
            break
    logger.end(done, url, stopped)
    return TrainResult(done, here.same(url), logger.record, stopped)


def save(
    done: int,
    config: TrainConfig,
    model: nn.Module,
    average: Average | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    feed: Feed,
) -> str:
    """Write the checkpoint after step number `done`; its folder's URL."""
    state = {
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "reader": feed.state,
    }
    values = average.values if average else None
    keep = config.checkpoint.keep
    return checkpoint_module.save(
        config.dst, done, model.state_dict(), values, state, config, feed.shards, keep
    )


def destination(config: TrainConfig) -> str:
    """The absolute `config.dst`, which can be written. Raises UsageError and StorageError."""
    if not config.dst:
        raise UsageError("dst is empty: give a folder for checkpoints and the log")
    check_scheme(config.dst)
    dst = absolute(config.dst).rstrip("/")
    check_destination(dst)
    return dst


def total_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Steps of the whole run. Raises UsageError where it ends before its warm-up does, or before
    those of `optim.later` are trained."""
    steps = config.steps or (config.epochs or 0) * steps_per_epoch
    length = f"optim.steps is {steps:,}"
    if config.epochs:
        length = f"the run's {config.epochs:,} epochs are {steps:,} ({steps_per_epoch:,} each)"
    if config.warmup_steps > steps:
        raise UsageError(
            f"optim.warmup_steps is {config.warmup_steps:,}, but {length}, and optim.lr is never "
            f"reached: set optim.warmup_steps to at most that, such as {steps // 10:,}, or train "
            "for longer"
        )
    field = "warmup_steps" if config.later_from is None else "later_from"
    begin: int = getattr(config, field)
    if config.later and begin >= steps:
        raise UsageError(
            f"optim.{field} is {begin:,}, but {length}, and what optim.later names is never "
            f"trained: set optim.later_from below that, such as {steps // 10:,}, train for longer, "
            "or set optim.later to ()"
        )
    return steps


def refuse_another_ramp(found: Checkpoint, config: TrainConfig) -> None:
    """Raises UsageError where the stage gvit is to have another number of steps than it began
    with: the ramp of its guidance, in shares of them, would move."""
    before, now = found.train_config().optim, config.optim
    if config.gvit and (before.steps, before.epochs) != (now.steps, now.epochs):
        raise UsageError(
            f"optim.steps and optim.epochs were {before.steps} and {before.epochs} in {found.url} "
            f"and are {now.steps} and {now.epochs}: gvit.ramp is in shares of the run, and would "
            f"move: set them as they were, or choose another dst and init={found.url}"
        )


def start_model(config: TrainConfig, found: Checkpoint | None, cutoff: float | None) -> nn.Module:
    """The model with the weights of the checkpoint `found`, else as the configuration begins.

    Raises UsageError for weights of another model or of shards with another `cutoff`.
    """
    seed_everything(config.seed)
    model = build_model(config.model)
    if found:
        model.load_state_dict(found.weights())
    else:
        if config.init_clip:
            if not isinstance(model, SplatCLIP):
                raise UsageError(f"init_clip is {config.init_clip}: a classifier takes init alone")
            init_from_clip(model, load_clip(config.init_clip))
        if config.init:
            weights, origin = checkpoint_module.initial_weights(config.init)
            if origin:
                checkpoint_module.refuse_other_inputs(origin, config, cutoff)
            take(model, weights, config.init)
    if config.compile:
        others = (getattr(model, name, None) for name in ("text", "predictor"))
        for tower in (vision_of(model), *others):
            if tower is not None:
                tower.compile()
    return model.train()


def take(model: nn.Module, weights: Weights, origin: str) -> None:
    """Take over the weights whose name and shape are the model's. Raises UsageError where none
    of the vision tower's are."""
    own = model.state_dict()
    prefix = {"encoder.": "vision.", "vision.": "encoder."}  # of a classifier and of a CLIP
    for name in list(weights):
        start = name[: name.index(".") + 1] if "." in name else ""
        if name not in own and start in prefix:
            weights[prefix[start] + name.removeprefix(start)] = weights.pop(name)
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    tower = next(name for name in ("vision.", "encoder.") if any(k.startswith(name) for k in own))
    expected = {name for name in own if name.startswith(tower)}
    if not expected <= fitting.keys():
        missing = sorted(expected - fitting.keys())
        raise UsageError(
            f"init {origin} lacks {len(missing)} of the vision tower's {len(expected)} weights, or "
            f"has them in another shape, first of them {missing[0]}: give a run with this "
            "model.encoder"
        )
    model.load_state_dict(fitting, strict=False)


def used_groups(model: nn.Module, stage: Stage, config: TrainConfig, here: World) -> Groups:
    """The groups of parameters, less what the stage's loss does not depend on (a text tower in
    distillation): found out on two made-up samples, since DDP waits for all that are trained."""
    groups = groups_of(model, config.optim)
    freeze(model, groups.now + groups.later)
    step = probe(config, here.device)
    loss, _ = stage.loss(stage.embed(model, step), step, config, World(0, 1, here.device))
    loss.backward()
    parameters = model.named_parameters()
    unused = {name for name, p in parameters if p.requires_grad and p.grad is None}
    model.zero_grad(set_to_none=True)
    now, later = (
        tuple(name for name in names if name not in unused) for names in (groups.now, groups.later)
    )
    if not now:
        raise UsageError(
            f"optim.trainable is {config.optim.trainable!r}, but the loss of the stage "
            f"{config.stage} depends on none of them: add the vision tower's"
        )
    return replace(groups, now=now, later=later, unused=tuple(sorted(unused)))


def parallel(model: nn.Module, stage: Stage, here: World) -> nn.Module:
    """What to call for features: with several processes it exchanges gradients."""
    embedder = Embedder(model, stage)
    if here.size == 1:
        return embedder
    devices = [here.device] if here.device.type == "cuda" else None
    with warnings.catch_warnings():  # newer ones want another name, which older ones do not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(embedder, device_ids=devices, broadcast_buffers=False)


def resume(
    found: Checkpoint,
    config: TrainConfig,
    feed: Feed,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: Average | None,
) -> int:
    """Bring all but the model to where the checkpoint was saved; the steps that are done."""
    state = found.state()
    feed.load(state["reader"])
    for saved, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        saved["fused"] = own["fused"]  # as suits this device, not the one before
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if average:
        average.load(found.weights(checkpoint_module.AVERAGE))
    return found.step
