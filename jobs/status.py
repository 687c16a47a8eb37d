"""The status job: what is done, failed, missing and stale in DST, from `_plan.json` and markers,
and what of SRC was left out, from `_run.json`.

One listing, `_manifest.json` in place of the markers it stands for, and the rest of the markers; no
shard is opened, so it is quick on a large DST and may run beside a conversion, whose
`_progress.json` it shows. Whether the sources have changed since is a question for `convert`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from splatshard.jobs.cli.command import EXIT_OK, parse, run
from splatshard.jobs.cli.dataset import NOTHING, open_dataset
from splatshard.jobs.cli.options import DatasetOptions
from splatshard.jobs.cli.text import answer, count, duration, print_json, size
from splatshard.jobs.destination.figures import dataset_figures, left_out_of
from splatshard.jobs.destination.manifest import psnr_quantiles
from splatshard.jobs.destination.plan import PlannedShard, Status, status
from splatshard.jobs.destination.plan_file import (
    PROGRESS_FILE,
    REMEDY,
    RUN_FILE,
    read_plan,
    read_record,
)
from splatshard.jobs.driver.progress import file_every_s
from splatshard.pipeline.source.left_out import left_out_line
from splatshard.schemas.errors import CorruptShardError

MAX_NAMED = 20
OF_THE_PLAN = ("shards_missing", "shards_stale", "missing", "stale", "unplanned")
"""What nobody knows without a plan, null in `--json`."""

CORRUPT = "broken markers; repair redoes them, but those that no plan mentions: delete these"
SILENT_S = 30.0
"""A job that has not written its progress for so long has probably died; or four times as long as
from one writing to the next, where that is more."""


@dataclass(frozen=True, kw_only=True)
class StatusOptions(DatasetOptions):
    """Show what is done, failed, missing and stale in DST, from the markers alone."""


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard status argv`; 0 whatever the state is, 1 where that is not known."""
    return run(lambda: show(parse(StatusOptions, "status", argv)))


def show(options: StatusOptions) -> int:
    """Print the state of DST. Raises CorruptShardError at the end, when all that the markers say is
    printed, for a plan that cannot be read."""
    from splatshard.pipeline.shards.markers import read_markers

    dst = open_dataset(options)
    shards: dict[str, PlannedShard] = {}
    damaged = None
    try:
        shards = read_plan(dst)
    except CorruptShardError as e:
        damaged = e
    markers = read_markers(dst)
    state = status(shards, markers)
    figures = dataset_figures(state.done) | {"psnr_quantiles": psnr_quantiles(state.done)}
    progress = read_record(dst, PROGRESS_FILE)
    left_out = left_out_of(read_record(dst, RUN_FILE))
    stream = sys.stderr if options.json else sys.stdout
    answer(table_of(dst, state, figures, stream, planned=not damaged), options.json)
    if not (shards or markers or damaged):
        answer(f"{dst} {NOTHING}", options.json)
    if line := left_out_line(left_out):
        answer(line, options.json)
    if line := last_job(progress, datetime.now(UTC), max(SILENT_S, 4 * file_every_s(dst))):
        answer(line, options.json)
    if options.json:
        unknown = dict.fromkeys(OF_THE_PLAN) if damaged else {}
        found = as_dict(state, figures) | unknown
        print_json(found | {"progress": progress or None, "left_out": left_out})
    if damaged:
        raise CorruptShardError(f"{damaged}; until then nobody knows what is missing or stale")
    return EXIT_OK


def last_job(progress: Mapping[str, Any], now: datetime, silence_s: float) -> str:
    """`a job is running, as of 3 s ago: 3/4 shards, 4.1 images/s, 20 s left`, or that it has been
    silent for longer than `silence_s`, or did not come to its end; "" of one that did."""
    state = progress.get("state")
    if state not in ("running", "interrupted", "failed"):
        return ""
    try:
        silent_s = max(0.0, (now - datetime.fromisoformat(progress["updated"])).total_seconds())
        finished = progress["shards_done"] + progress["shards_failed"]
        done = f"{finished:,}/{count(progress['shards'], 'shard')}"
        rate = progress["images_per_s"]
        parts = [done] if rate is None else [done, f"{rate:.1f} images/s"]
        if progress["eta_s"] is not None:
            parts.append(f"{duration(progress['eta_s'])} left")
    except (KeyError, TypeError, ValueError):
        return f"a job may be running ({PROGRESS_FILE} cannot be understood; {REMEDY})"
    ago = duration(silent_s)
    if state == "interrupted":
        return f"the last job was stopped {ago} ago, at {done}; the same command continues"
    if state == "failed":
        return f"the last job ended {ago} ago with an error or failed shards, at {done}"
    if silent_s > silence_s:
        return (
            f"no sign of life for {ago} of the job that was running ({', '.join(parts)}): it was "
            "killed, or its machine or store hangs; once it is gone, run the same command again"
        )
    return f"a job is running, as of {ago} ago: {', '.join(parts)}"


def as_dict(state: Status, figures: dict[str, Any]) -> dict[str, Any]:
    """The `--json` object: shard counts, names that need attention, figures of the rest."""
    return {
        "shards_done": len(state.done),
        "shards_failed": len(state.failed),
        "shards_missing": len(state.missing),
        "shards_stale": len(state.stale),
        "shards_corrupt": len(state.corrupt),
        "failed": {f.name: {"error": f.error, "message": f.message} for f in state.failed},
        "missing": list(state.missing),
        "stale": {s.name: list(s.differences) for s in state.stale},
        "corrupt": dict(state.corrupt),
        "unplanned": list(state.unplanned),
        **figures,
    }


def table_of(
    dst: str, state: Status, figures: dict[str, Any], stream: TextIO, planned: bool = True
) -> str:
    """Counts as a table, then the shards that need attention, as `stream` shows them: in colours
    and as wide as the terminal, or plain with a line for each row. `planned`: whether there is a
    plan that can be read."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = 1000
    table = Table(box=None, pad_edge=False)
    table.add_column("shards")
    table.add_column("number", justify="right")
    table.add_column("")
    skipped = sum(figures["skipped"].values())
    table.add_row(
        "done",
        f"{len(state.done):,}",
        f"{figures['ok']:,} images ok, {skipped:,} skipped, {size(figures['shard_bytes'])}"
        + (f", PSNR {figures['psnr_mean']:.2f} dB" if figures["ok"] else ""),
    )
    if quantiles := figures["psnr_quantiles"]:
        spread = ", ".join(f"{n[1:]} % below {value:.1f}" for n, value in quantiles.items())
        table.add_row("", "", f"PSNR in dB: {spread}")
    table.add_row("failed", f"{len(state.failed):,}", "the next convert retries them")
    if planned:
        table.add_row("missing", f"{len(state.missing):,}", "the next convert makes them")
        table.add_row("stale", f"{len(state.stale):,}", "redone by convert --overwrite-stale")
    else:
        table.add_row(
            "missing", "?", "nobody knows without a plan; nor which of those done are stale"
        )
    table.add_row("corrupt", f"{len(state.corrupt):,}", CORRUPT)
    if planned and state.unplanned:
        table.add_row("unplanned", f"{len(state.unplanned):,}", "markers that no plan mentions")
    with console.capture() as captured:
        console.print(dst, markup=False, soft_wrap=True)
        console.print(table)
        print_names(console, state)
    return captured.get().rstrip()


def print_names(console: Console, state: Status) -> None:
    """The first MAX_NAMED shards of each kind that needs attention."""
    kinds: dict[str, list[str]] = {
        "failed": [f"{f.name}: {f.error}: {f.message}" for f in state.failed],
        "missing": list(state.missing),
        "stale": [f"{s.name}: {'; '.join(s.differences)}" for s in state.stale],
        "corrupt": [f"{name}: {message}" for name, message in state.corrupt],
    }
    for kind, lines in kinds.items():
        for line in lines[:MAX_NAMED]:
            console.print(f"{kind}  {line}", markup=False, soft_wrap=True)
        if len(lines) > MAX_NAMED:
            console.print(f"{kind}  ... {len(lines) - MAX_NAMED:,} more (--json names them all)")


if __name__ == "__main__":
    sys.exit(main())
