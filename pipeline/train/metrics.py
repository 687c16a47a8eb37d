"""The figures of a run, measured as it goes: speed, waiting, memory, the loss of all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from splatshard.pipeline.train.batches import Feed
from splatshard.pipeline.train.distributed import World
from splatshard.pipeline.train.log import Log, memory_bytes
from splatshard.pipeline.train.losses import Metrics
from splatshard.pipeline.train.schedule import learning_rate
from splatshard.schemas.errors import SplatshardError
from splatshard.schemas.train import TrainConfig

Record = dict[str, Any]
Show = Callable[[Mapping[str, Any]], None]


class MetricsLogger:
    """Writes the log's records and shows them, on rank 0. `record` is the last one of a step."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        feed: Feed,
        first: int,
        steps: int,
        show: Show,
    ) -> None:
        self.config, self.world, self.feed, self.show = config, world, feed, show
        self.first, self.steps = first, steps
        self.record: Record = {}
        self.log: Log | None = None
        if world.rank == 0:
            self.log = Log(config.dst, first, config.log.tensorboard)
        self._since, self._done, self._waited = time.perf_counter(), first, 0.0

    def start(self, parameters: Mapping[str, object]) -> None:
        """Once, before the first step."""
        fields = {
            "stage": self.config.stage,
            "steps": self.steps,
            "steps_per_epoch": self.feed.steps_per_epoch,
            "processes": self.world.size,
            "device": str(self.world.device),
            "torch": torch.__version__,
            **parameters,
        }
        self._write("start", self.first, fields)
        self._since = time.perf_counter()

    def step(self, done: int, loss: Tensor, metrics: Metrics) -> None:
        """After step number `done`, of which the scalars `loss` and `metrics` are this process's
        share. All processes call it. Raises SplatshardError where the loss is not finite, nor the
        gradient whose step nothing skips."""
        names = ["loss", *metrics]
        values = [loss.detach().float(), *(value.detach().float() for value in metrics.values())]
        together = self.world.mean(torch.stack(values)).tolist()
        now = time.perf_counter()
        passed, steps = now - self._since, done - self._done
        waited = self.feed.waited_s - self._waited
        self._since, self._done, self._waited = now, done, self.feed.waited_s
        fields = {
            "epoch": self.feed.state["epoch"],
            **dict(zip(names, together, strict=True)),
            "lr": learning_rate(done - 1, self.steps, self.config.optim),
            "images_per_s": self.config.data.batch_size * steps / passed,
            "data_wait_share": waited / passed,
            "memory_bytes": memory_bytes(self.world.device),
            "eta_s": passed / steps * (self.steps - done),
        }
        self._check_finite(done, fields["loss"], fields["grad_norm"])
        self.record = fields | {"step": done}
        self._write("step", done, fields)

    def unrecorded(self, done: int, loss: Tensor, norm: Tensor) -> None:
        """After step number `done`, of scalars `loss` and `norm`, which is to be saved though it is
        not to be recorded: a run that goes on then has the log of one that was never stopped.
        Raises as `step`."""
        values = torch.stack((loss.detach().float(), norm.float()))
        self._check_finite(done, *self.world.mean(values).tolist())

    def checkpoint(self, done: int, url: str) -> None:
        """The checkpoint after step number `done` is written."""
        self._write("checkpoint", done, {"url": url})
        if self.log:
            self.log.flush()

    def end(self, done: int, url: str, signal: int) -> None:
        """The run is through, or was stopped by `signal`."""
        if signal:
            self._write("stop", done, {"url": url, "signal": signal})
        else:
            self._write("end", done, {"url": url})
        if self.log:
            self.log.close()

    def _check_finite(self, done: int, loss: float, norm: float) -> None:
        # fp16's scaler skips such a step by itself
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.config.precision != "fp16"):
            raise SplatshardError(
                f"the loss is {loss} in step {done}, its gradient's norm {norm}: nothing was "
                "saved since the last checkpoint; choose a smaller optim.lr, a longer "
                "optim.warmup_steps or optim.clip"
            )

    def _write(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        if self.log:
            self.show(self.log.write(event, step, fields))
