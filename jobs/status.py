"""The status job: what is done, failed, missing and stale in DST, from `_plan.json` and markers.

One listing and the markers' few bytes; no shard is opened, so it is quick on a large DST and may
run beside a conversion. Whether the sources have changed since is a question for `convert`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.cli import EXIT_OK, Switch, parse, print_json, run, size
from jobs.files import read_plan, require_dataset
from jobs.plan import Status, status
from jobs.progress import dataset_figures

MAX_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Show what is done, failed, missing and stale in DST, from the markers alone."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder given to splatshard convert."""
    json: Switch = False
    """End standard output with one JSON line."""


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard status argv`; 0 whatever the state is."""
    return run(lambda: show(parse(StatusOptions, "status", argv)))


def show(options: StatusOptions) -> int:
    """Print the state of DST."""
    from pipeline.markers import read_markers

    dst = require_dataset(options.dst)
    state = status(read_plan(dst), read_markers(dst))
    figures = dataset_figures(state.done)
    print_table(dst, state, figures)
    if options.json:
        print_json(as_dict(state, figures))
    return EXIT_OK


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


def print_table(dst: str, state: Status, figures: dict[str, Any]) -> None:
    """Counts as a table, then the shards that need attention, on stderr."""
    console = Console(stderr=True, highlight=False)
    table = Table(title=f"{escape(dst)}", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("shards", "left"), ("number", "right"), ("", "left")):
        table.add_column(name, justify=justify)
    skipped = sum(figures["skipped"].values())
    table.add_row(
        "done",
        f"{len(state.done):,}",
        f"{figures['ok']:,} images ok, {skipped:,} skipped, {size(figures['shard_bytes'])}"
        + (f", PSNR {figures['psnr_mean']:.2f} dB" if figures["ok"] else ""),
    )
    table.add_row("failed", f"{len(state.failed):,}", "the next convert retries them")
    table.add_row("missing", f"{len(state.missing):,}", "the next convert makes them")
    table.add_row("stale", f"{len(state.stale):,}", "redone by convert --overwrite-stale")
    table.add_row("corrupt", f"{len(state.corrupt):,}", "broken markers")
    if state.unplanned:
        table.add_row("unplanned", f"{len(state.unplanned):,}", "markers that no plan mentions")
    console.print(table)
    print_names(console, state)


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
