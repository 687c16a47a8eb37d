"""The train job: a recipe to checkpoints, in one process, under torchrun, or on Ray's workers.

    splatshard train RECIPE --set data.src=splats --set dst=runs/a
    torchrun --nproc-per-node 8 -m jobs.train RECIPE ...
    ray job submit -- python -m jobs.train RECIPE ... --ray-workers 16
    splatshard train RECIPE --dry-run    its parameters by group, and which are trained

The same command again goes on from the last checkpoint in dst. SIGTERM and the first Ctrl-C end the
run after its step, with a checkpoint (exit codes 143 and 130); torchrun passes both on, but kills
its processes 30 s later and ends with a code of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from splatshard.jobs.cli.command import EXIT_OK, Interrupted, parse, run
from splatshard.jobs.cli.log import configure, log, structured
from splatshard.jobs.cli.options import (
    USUAL_ENVIRONMENT,
    DebugRay,
    Json,
    LogFormat,
    Number,
    StorageOptions,
    Switch,
    use_storage_options,
)
from splatshard.jobs.cli.recipe import load_recipe
from splatshard.jobs.cli.signals import MESSAGES, StopSignals
from splatshard.jobs.cli.text import answer, duration, print_json, say, size
from splatshard.schemas.errors import UsageError
from splatshard.schemas.train import TrainConfig

LINE_EVERY_S = 5.0

NEXT = {
    "distill": "splatshard train RECIPE --set init={dst}, of the stage contrast or classify",
    "contrast": "splatshard evaluate {dst} NAME=DATA --task retrieval (or zeroshot)",
    "classify": "splatshard evaluate {dst} NAME=DATA    splatshard explain {dst} IMAGE",
    "gvit": "splatshard evaluate {dst} NAME=DATA    splatshard explain {dst} IMAGE",
}
"""By stage, what to do with a run that is done."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a model on splat shards, as the recipe says."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """A Python file that makes a TrainConfig named config, or the name of one in jobs/recipes/, as
    in classify_digits."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FIELD=VALUE")]
    """Another value for a field of the recipe, as in --set optim.lr=1e-3; as often as you like."""
    ray_workers: Number = None
    """Train in N processes on Ray, one per GPU: the cluster of `ray job submit`, else one here."""
    dry_run: Switch = False
    """Print the model's parameters by group, and which are trained; reads and writes no data."""
    storage_options: Annotated[StorageOptions, USUAL_ENVIRONMENT] = ""
    log_format: LogFormat = "text"
    json: Json = False
    debug: DebugRay = False

    def __post_init__(self) -> None:
        if self.ray_workers is not None and self.ray_workers < 1:
            raise UsageError(f"--ray-workers {self.ray_workers}: must be at least 1")


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard train argv`."""
    return run(lambda: start(parse(TrainOptions, "train", argv)))


def start(options: TrainOptions) -> int:
    """Train; the last record about a step goes to standard output with --json."""
    configure(options.log_format)
    given = use_storage_options(options.storage_options)
    config = load_recipe(options.recipe, options.set)
    first = os.environ.get("RANK", "0") == "0"  # the others of torchrun tell nothing
    if options.dry_run:
        return dry_run(config, options.json) if first else EXIT_OK
    with Shown(first) as shown:
        if options.ray_workers:
            from splatshard.jobs.driver.ray_train import launch

            result = launch(config, options.ray_workers, shown, given)
        else:
            from splatshard.pipeline.train.loop import train

            with StopSignals(quiet=not first) as signals:
                result = train(config, shown, lambda: signals.received)
    if result.stopped:
        message = MESSAGES[signal.Signals(result.stopped)]
        if not first:
            return 128 + result.stopped
        raise Interrupted(128 + result.stopped, f"{message} (saved: {result.checkpoint})")
    if first:
        say(f"next: {NEXT[config.stage].format(dst=config.dst)}")
    if options.json and shown.end:
        print_json(shown.last | shown.end)
    return EXIT_OK


def dry_run(config: TrainConfig, as_json: bool) -> int:
    """Print the parameters that `config` has and trains, of a model with random weights."""
    import torch

    from splatshard.pipeline.models.build import build_model
    from splatshard.pipeline.models.count import count, table
    from splatshard.pipeline.train.distributed import World
    from splatshard.pipeline.train.groups import report
    from splatshard.pipeline.train.loop import total_steps, used_groups
    from splatshard.pipeline.train.losses import stage_of

    if config.optim.steps:
        total_steps(config.optim, 0)
    here = World(0, 1, torch.device("cpu"))
    model = build_model(config.model)
    groups = used_groups(model, stage_of(config, here.device), config, here)
    counts = count(model, groups.now, groups.later)
    answer(table(counts, groups.later_from if groups.later else None), as_json)
    if groups.unused:
        unused = count(model, groups.unused)[-1].trained
        note = f"{unused:,} more are chosen, but the loss of {config.stage} does not depend on them"
        answer(note, as_json)
    if as_json:
        by_group = {c.name: asdict(c) for c in counts}
        print_json({"dry_run": True, "groups": by_group, **report(model, groups)})
    return EXIT_OK


class Shown:
    """Shows a run's records: a live bar on a terminal, else a line every few seconds. `last` is the
    last one about a step, `end` the one at the end."""

    def __init__(self, first: bool = True) -> None:
        self.last: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self._steps = 0
        self._last_line = float("-inf")
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal and first and not structured():
            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("reading the first batch ...", total=None)

    def __enter__(self) -> Shown:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Show a record of log.jsonl."""
        show = {"start": self._start, "step": self._step, "end": self._end}
        if record["event"] in show:
            fields = {k: v for k, v in record.items() if k not in ("event", "time")}
            show[record["event"]](fields)

    def _start(self, record: dict[str, Any]) -> None:
        self._steps = record["steps"]
        log("train_start", start_line(record), **record)

    def _step(self, record: dict[str, Any]) -> None:
        self.last = record
        done, now = record["step"], time.monotonic()
        if self._bar:
            text = step_line(record, self._steps)
            self._bar.update(self._task, description=text, total=self._steps, completed=done)
        elif now - self._last_line >= LINE_EVERY_S or done == self._steps:
            self._last_line = now
            log("train_step", step_line(record, self._steps), **record)

    def _end(self, record: dict[str, Any]) -> None:
        self.end = record
        log("train_end", f"{record['step']:,} steps are done: {record['url']}", **record)


def start_line(record: Mapping[str, Any]) -> str:
    """`classify: step 0 of 500, 100 per epoch, on 2 x cpu; 1.2M of 4.0M parameters (30.0 %)`."""
    share = f"{record['trainable_share']:.1%}".replace("%", " %")
    return (
        f"{record['stage']}: step {record['step']:,} of {record['steps']:,}, "
        f"{record['steps_per_epoch']:,} per epoch, on {record['processes']} x {record['device']}; "
        f"trains {record['trainable'] / 1e6:.1f}M of {record['parameters'] / 1e6:.1f}M parameters "
        f"({share})"
    )


def step_line(record: Mapping[str, Any], steps: int) -> str:
    """`120/500  loss 1.234  accuracy 0.61  lr 5.0e-04  812 images/s  waits 3 %  1.2 GB  ...`."""
    parts = [f"{record['step']:,}/{steps:,}", f"loss {record['loss']:.4g}"]
    parts += [f"{name} {record[name]:.3g}" for name in ("accuracy", "cosine") if name in record]
    parts += [
        f"lr {record['lr']:.1e}",
        f"{record['images_per_s']:,.0f} images/s",
        f"waits {100 * record['data_wait_share']:.0f} %",
        size(record["memory_bytes"]),
        f"{duration(record['eta_s'])} left",
    ]
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
