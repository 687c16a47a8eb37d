"""The convert job: image dataset SRC to splat shards in DST, resumable, locally or on a cluster.

    parse -> list SRC -> check DST -> plan -> (dry run) -> Ray -> drive -> summary

Also runs as `ray job submit -- python -m jobs.convert SRC DST ...`. The recovery for everything is
to run the same command again: done shards are recognised by their markers and never redone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from jobs.cli import (
    EXIT_FAILED_SHARDS,
    EXIT_OK,
    Interrupted,
    Switch,
    count,
    duration,
    parse,
    print_json,
    run,
    say,
    size,
)
from jobs.files import RUN_FILE, write_plan, write_text
from jobs.plan import Plan, make_plan, planned, refuse_stale
from jobs.progress import Progress, run_summary
from jobs.signals import StopSignals
from pipeline.storage import absolute
from schemas.config import PRESETS, ConvertConfig
from schemas.errors import SourceError, UsageError
from schemas.shard import ShardRef

Preset = Literal["default", "paper"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert an image dataset into shards of 2D Gaussians.

    Run the same command again to continue after any interruption; finished shards are kept.
    Exit codes: 0 all done, 1 usage, configuration or storage, 3 finished with failed shards.
    """

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Tars, Hugging Face Parquet files or a folder of images: a path, a brace pattern or glob
    (quote it), several joined by ::, a list file (.txt), or any fsspec URL."""
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder for the shards; created when absent."""
    preset: Preset = "default"
    """Base of the recipe; explicit flags override it. paper: the published recipe."""
    workers: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores, or GPUs)")
    ] = None
    """Worker processes, one shard at a time each."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Convert only the first N samples."""
    samples_per_shard: Annotated[int, tyro.conf.arg(metavar="N")] = 1000
    """Samples per shard when SRC is a folder; other sources keep their shards."""
    overwrite_stale: Switch = False
    """Redo shards in DST that were made by another configuration or from another source."""
    dry_run: Switch = False
    """Fit a few images and estimate time, size and PSNR of the whole job; writes nothing."""
    json: Switch = False
    """End standard output with one JSON line."""
    debug: Switch = False
    """Show tracebacks and Ray's log."""
    config: Annotated[ConvertConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        for name in ("workers", "limit", "samples_per_shard"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {value}: must be at least 1")


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard convert argv`."""
    started = time.monotonic()
    return run(lambda: convert(parse_options(argv), started))


def parse_options(argv: list[str] | None) -> ConvertOptions:
    """The options, on top of the preset they name."""
    args = sys.argv[1:] if argv is None else argv
    preset = preset_in(args)
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: choose {' or '.join(PRESETS)}")
    default = ConvertOptions(
        src=tyro.MISSING, dst=tyro.MISSING, preset=preset, config=PRESETS[preset]
    )
    return parse(ConvertOptions, "convert", args, default)


def preset_in(args: list[str]) -> Any:
    """The last --preset of the command line, "default" without one."""
    preset = "default"
    for i, arg in enumerate(args):
        if arg == "--preset" and i + 1 < len(args):
            preset = args[i + 1]
        elif arg.startswith("--preset="):
            preset = arg.partition("=")[2]
    return preset


def convert(options: ConvertOptions, started: float) -> int:
    """The whole job; returns the exit code."""
    from pipeline.commit import check_destination, clean_staging
    from pipeline.markers import read_markers
    from pipeline.sources import list_shards

    if options.debug:
        os.environ["SPLATSHARD_DEBUG"] = "1"
    config = options.config
    dst = absolute(options.dst).rstrip("/")
    refs = list_shards(options.src, options.limit, options.samples_per_shard)
    if not options.dry_run:
        check_destination(dst)
    markers = read_markers(dst)
    plan = make_plan(refs, markers, config, source_sha256)
    if not options.overwrite_stale:
        refuse_stale(plan, markers, options.dst)
    if options.dry_run:
        from jobs.dryrun import dry_run

        return dry_run(plan.work, config, options.workers, options.json)
    say(describe(plan, len(refs)))
    write_plan(dst, planned(refs, plan, config))
    clean_staging(dst)
    progress = Progress(plan.work, plan.done, started)
    try:
        workers = drive_all(plan, config, dst, options.workers, progress) if plan.work else 0
    finally:
        clean_staging(dst)  # of workers that died
    summary = run_summary(progress, plan.done, started, workers)
    if plan.work:
        write_text(dst, RUN_FILE, json.dumps(summary, sort_keys=True, indent=2) + "\n")
    tell_summary(summary, progress, options.dst)
    if options.json:
        print_json(summary)
    return EXIT_FAILED_SHARDS if progress.failures else EXIT_OK


def source_sha256(ref: ShardRef) -> str:
    """The checksum that the shard's marker would hold; "" for a source that is damaged by now."""
    from pipeline.read import read

    digest = hashlib.sha256()
    try:
        for _ in read(ref, digest):
            pass
    except SourceError:
        return ""
    return digest.hexdigest()


def drive_all(
    plan: Plan, config: ConvertConfig, dst: str, workers: int | None, progress: Progress
) -> int:
    """Start Ray, convert what is left to do; returns the number of workers."""
    from jobs.drive import drive, ray_session

    with ray_session(workers, config.backend) as (available, resources):
        team = min(available, len(plan.work))
        say(f"converting with {count(team, 'worker')}; Ctrl-C stops, the same command continues")
        with StopSignals() as signals, progress:
            try:
                drive(plan.work, config, dst, team, resources, progress, signals)
            except Interrupted as e:
                kept = count(len(plan.done) + len(progress.manifests), "finished shard")
                raise Interrupted(e.code, f"{e} ({kept} kept)") from None
    return team


def describe(plan: Plan, total: int) -> str:
    """`4 shards: 1 done, 1 to retry, 2 to convert`."""
    parts = [
        (len(plan.done), "done"),
        (len(plan.todo), "to convert"),
        (len(plan.failed), "failed before, to retry"),
        (len(plan.stale), "stale, to redo"),
        (len(plan.corrupt), "with a broken marker, to redo"),
    ]
    return f"{count(total, 'shard')}: " + ", ".join(f"{n:,} {what}" for n, what in parts if n)


def tell_summary(summary: dict[str, Any], progress: Progress, dst: str) -> None:
    """A few readable lines on stderr: what there is now, what failed, where to look next."""
    if not summary["shards_done"] and not summary["shards_failed"]:
        say("everything is already done")
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in summary["skipped"].items())
    say(
        f"{count(summary['samples'], 'sample')}: {summary['ok']:,} ok"
        + (f", skipped: {skipped}" if skipped else "")
    )
    if summary["ok"]:
        say(
            f"  PSNR {summary['psnr_mean']:.2f} dB   "
            f"{summary['num_gaussians_mean']:,.0f} Gaussians and "
            f"{size(summary['bytes_per_image'])} per image"
        )
    if summary["images_per_s"]:
        say(
            f"  {summary['images_per_s']:.1f} images/s over {duration(summary['wall_s'])}, start "
            f"included; first shard after {duration(summary['time_to_first_shard_s'])}"
        )
    if progress.failures:
        say(f"{count(len(progress.failures), 'shard')} failed; the same command retries them:")
        for name in sorted(progress.failures)[:10]:
            outcome = progress.failures[name]
            say(f"  {name}: {outcome.error}: {outcome.message}")
        if len(progress.failures) > 10:
            say(f"  ... all of them: splatshard status {dst}")
    say(f"next: splatshard verify {dst}    splatshard report {dst}")


if __name__ == "__main__":
    sys.exit(main())
