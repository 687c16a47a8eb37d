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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from splatshard.jobs.cli.log import configure, log
from splatshard.jobs.cli.options import (
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
from splatshard.jobs.cli.signals import StopSignals
from splatshard.jobs.destination.manifest import Catalog
from splatshard.jobs.destination.plan import Plan, make_plan, mixed, planned, refuse_stale
from splatshard.jobs.destination.plan_file import RUN_FILE, write_plan, write_text
from splatshard.jobs.driver.progress import Progress, run_summary
from splatshard.pipeline.storage.fs import absolute
from splatshard.schemas.config import ENCODER, PRESETS, ConvertConfig
from splatshard.schemas.errors import SourceError, StorageError, UnavailableError, UsageError
from splatshard.schemas.shard import ShardRef

Preset = Literal["default", "paper"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a job runs, whatever it converts."""

    workers: Annotated[
        int | Literal["auto"], tyro.conf.arg(metavar="N|auto", help_behavior_hint="(default: auto)")
    ] = "auto"
    """Worker processes. auto: one per GPU, or per core without GPUs, following the cluster as nodes
    come and go."""
    sample_timeout: Annotated[float, tyro.conf.arg(metavar="S")] = 300.0
    """Seconds that one sample may keep a worker busy before it is taken for hung."""
    storage_options: Annotated[
        str, tyro.conf.arg(metavar="JSON", help_behavior_hint="(default: the usual environment)")
    ] = ""
    """Options of the remote store, such as '{"anon": true}', as fsspec's driver takes them;
    SPLATSHARD_STORAGE_OPTIONS does the same and shows in no process list."""
    log_format: Literal["text", "json"] = "text"
    """json: every line on standard error is one JSON object."""
    json: Switch = False
    """End standard output with one JSON line."""
    debug: Switch = False
    """Show tracebacks and Ray's log."""

    def __post_init__(self) -> None:
        if self.workers != "auto" and self.workers < 1:
            raise UsageError(f"--workers {self.workers}: must be auto or at least 1")
        if self.sample_timeout <= 0:
            raise UsageError(f"--sample-timeout {self.sample_timeout}: must be above 0")
        storage_options(self.storage_options)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(RunOptions):
    """Convert an image dataset into shards of 2D Gaussians.

    Run the same command again to continue after any interruption; finished shards are kept.
    Exit codes: 0 all done, 1 usage, configuration or storage, 3 finished with failed shards.
    """

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Tars, Hugging Face Parquet files or a folder of images: a path, a brace pattern or glob
    (quote it), several joined by ::, a list file (.txt), or any fsspec URL."""
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder for the shards, local or s3://, apart from SRC; created when absent."""
    preset: Preset = "default"
    """Base of the recipe; explicit flags override it. paper: the published recipe."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Convert only the first N samples."""
    samples_per_shard: Annotated[int, tyro.conf.arg(metavar="N")] = 1000
    """Samples per shard when SRC is a folder; other sources keep their shards."""
    teacher: Annotated[str, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")] = ""
    """Store this CLIP's embedding of each image, for distillation: a local folder, or a name on the
    Hugging Face hub."""
    overwrite_stale: Switch = False
    """Redo shards in DST that were made by another configuration or from another source, and delete
    those that a folder SRC no longer has."""
    dry_run: Switch = False
    """Fit a few images and estimate time, size and PSNR of the whole job; writes nothing."""
    config: Annotated[ConvertConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("limit", "samples_per_shard"):
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
    if {"--nested", "--num-gaussians"} <= {a.partition("=")[0].replace("_", "-") for a in args}:
        raise UsageError(
            "--num-gaussians does not go with --nested, whose last budget is the number: leave "
            "one of them out"
        )
    try:
        return parse(ConvertOptions, "convert", args, default)
    except UsageError as e:
        if sum(arg.endswith((".tar", ".parquet")) for arg in args) > 1:
            raise UsageError(f"{e}; if the shell expanded a pattern, quote it") from None
        raise


def preset_in(args: list[str]) -> Any:
    """The last --preset of the command line, "default" without one."""
    preset = "default"
    for i, arg in enumerate(args):
        if arg == "--preset" and i + 1 < len(args):
            preset = args[i + 1]
        elif arg.startswith("--preset="):
            preset = arg.partition("=")[2]
    return preset


def storage_options(text: str) -> dict[str, Any]:
    """`--storage-options`, or the environment's. Raises UsageError, which does not repeat them:
    there are secrets in them."""
    text = text or os.environ.get("SPLATSHARD_STORAGE_OPTIONS", "")
    try:
        options = json.loads(text or "{}")
    except ValueError as e:
        raise UsageError(
            f"--storage-options is not JSON (character {getattr(e, 'pos', 0)}); write "
            """'{"anon": true}'"""
        ) from None
    if not isinstance(options, dict):
        raise UsageError("--storage-options must be a JSON object, such as '{\"anon\": true}'")
    return options


def prepare(options: RunOptions) -> None:
    """What every job that converts does first."""
    from splatshard.pipeline.storage.fs import use_options

    configure(options.log_format)
    use_options(storage_options(options.storage_options))


def convert(options: ConvertOptions, started: float) -> int:
    """The whole job; returns the exit code."""
    from splatshard.pipeline.shards.commit import check_destination, check_scheme
    from splatshard.pipeline.shards.markers import read_markers
    from splatshard.pipeline.source.listing import list_shards

    prepare(options)
    check_scheme(options.dst)
    config = with_teacher(with_encoder(options.config), options.teacher)
    dst = absolute(options.dst).rstrip("/")
    refs = list_shards(options.src, options.limit, options.samples_per_shard, dst)
    if not options.dry_run:
        check_destination(dst)
    markers = read_markers(dst)
    plan = make_plan(refs, markers, config, source_sha256, whole=options.limit is None)
    if not options.overwrite_stale:
        refuse_stale(plan, markers, options.dst)
    if options.dry_run:
        from splatshard.jobs.driver.dryrun import dry_run

        workers = None if options.workers == "auto" else options.workers
        return dry_run(plan.work, config, workers, options.json)
    return execute(plan, refs, config, dst, options, started)


def with_teacher(config: ConvertConfig, model: str) -> ConvertConfig:
    """`config` with the teacher `model`, if one is named. Raises UsageError where it cannot be
    loaded."""
    if not model:
        return config
    from splatshard.pipeline.models.teacher import resolve_teacher

    return replace(config, teacher=resolve_teacher(model))


def with_encoder(config: ConvertConfig) -> ConvertConfig:
    """`config` with the encoder of `--init encoder:CHECKPOINT`, if one is named, as a recipe has
    it. Raises UsageError where it cannot be loaded, or does not fit."""
    fit = config.fit
    if not fit.init.startswith(ENCODER):
        return config
    from splatshard.pipeline.fitting.encoder_start import resolve_encoder

    return replace(
        config,
        fit=replace(fit, init=resolve_encoder(fit.init, (*fit.budgets, fit.num_gaussians)[0])),
    )


def execute(
    plan: Plan,
    refs: Sequence[ShardRef],
    config: ConvertConfig,
    dst: str,
    options: RunOptions,
    started: float,
) -> int:
    """Convert what is left to do of `plan`, tell the result; returns the exit code."""
    from splatshard.pipeline.evaluation.class_texts import copy_texts
    from splatshard.pipeline.shards.commit import clean_staging, remove

    say(describe(plan, len(refs)))
    if warning := mixed(plan, config):
        log("mixed", f"warning: {warning}", level="warning")
    write_plan(dst, planned(refs, plan, config), plan.folders)
    for url in copy_texts(refs, dst):
        say(f"copied for evaluation: {url}")
    clean_staging(dst)
    progress = Progress(plan.work, plan.done, started, dst)
    catalog = Catalog(dst, [*plan.done, *plan.others])  # what is replaced stays until it is
    try:
        workers = drive(plan, config, dst, options, progress, catalog) if plan.work else 0
    finally:
        clean_staging(dst)  # of workers that died
    if plan.gone and not progress.failures:  # whose samples may be nowhere else
        catalog.forget(removed := remove(dst, plan.gone))
        say(f"{count(len(removed), 'shard')} deleted that SRC no longer has")
    catalog.write()
    summary = run_summary(progress, plan.done, started, workers)
    if plan.work:
        write_text(dst, RUN_FILE, json.dumps(summary, sort_keys=True, indent=2) + "\n")
    tell_summary(summary, progress, dst)
    if options.json:
        print_json(summary)
    return EXIT_FAILED_SHARDS if progress.failures else EXIT_OK


def source_sha256(ref: ShardRef) -> str:
    """The checksum that the shard's marker would hold; "" for a source that is damaged by now."""
    from splatshard.pipeline.source.read import read

    digest = hashlib.sha256()
    try:
        for _ in read(ref, digest):
            pass
    except SourceError:
        return ""
    return digest.hexdigest()


def drive(
    plan: Plan,
    config: ConvertConfig,
    dst: str,
    options: RunOptions,
    progress: Progress,
    catalog: Catalog,
) -> int:
    """Start Ray, convert what is left to do; returns the number of workers."""
    from splatshard.jobs.driver.cluster import ray_session
    from splatshard.jobs.driver.driver import Driver
    from splatshard.pipeline.shards.commit import clean_attempts

    with ray_session(options.workers), StopSignals() as signals:
        driver = Driver(
            plan,
            config,
            dst,
            workers=options.workers,
            sample_timeout=options.sample_timeout,
            storage_options=storage_options(options.storage_options),
            progress=progress,
            catalog=catalog,
            signals=signals,
        )
        say("converting; Ctrl-C stops, the same command continues")
        try:
            with progress:
                return driver.run()
        except Interrupted as e:
            kept = count(len(plan.done) + len(progress.manifests), "finished shard")
            raise Interrupted(e.code, f"{e} ({kept} kept)") from None
        finally:
            try:
                old = [marker for marker in plan.others if marker.name in plan.replaces]
                clean_attempts(dst, driver.schedule.job, progress.manifests, old)
            except (StorageError, UnavailableError) as e:
                say(f"some of this job's own leftovers stay in {dst}: {e}")


def describe(plan: Plan, total: int) -> str:
    """`4 shards: 1 done, 1 to retry, 2 to convert`."""
    parts = [
        (len(plan.done), "done"),
        (len(plan.todo), "to convert"),
        (len(plan.failed), "failed before, to retry"),
        (len(plan.stale), "stale, to redo"),
        (len(plan.corrupt), "with a broken marker, to redo"),
        (len(plan.gone), "gone from SRC, to delete at the end"),
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
    for shard, sample in progress.skipped:
        say(f"  {sample.key} in shard {shard}: {sample.status}: {sample.error}")
    if sum(summary["skipped"].values()) > len(progress.skipped):
        what = "... the others" if progress.skipped else "which"
        say(f"  {what}: splatshard report {dst}")
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
