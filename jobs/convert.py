"""The convert job: image dataset SRC to splat shards in DST, resumable, locally or on a cluster.

    parse -> list SRC -> check DST -> plan -> (dry run) -> Ray -> drive -> summary

Also runs as `ray job submit -- python -m jobs.convert SRC DST ...`. The recovery for everything is
to run the same command again: done shards are recognised by their markers and never redone.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from splatshard.jobs.cli.command import parse, run
from splatshard.jobs.cli.options import RunOptions, Switch, prepare
from splatshard.jobs.cli.text import say
from splatshard.jobs.destination.class_texts import read_classes
from splatshard.jobs.destination.plan import make_plan, refuse_stale
from splatshard.jobs.destination.sources import remember
from splatshard.jobs.driver.execute import execute
from splatshard.pipeline.shards.names import check_names
from splatshard.pipeline.source.left_out import left_out_line
from splatshard.pipeline.storage.fs import absolute
from splatshard.schemas.config import ENCODER, PRESETS, ConvertConfig, PresetName
from splatshard.schemas.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(RunOptions):
    """Convert an image dataset into shards of 2D Gaussians.

    Run the same command again to continue after any interruption; finished shards are kept.
    Exit codes: 0 all done, 1 usage, configuration or storage, 3 finished with failed shards, or
    without a single good sample.
    """

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Tars, Hugging Face Parquet files or a folder of images: a path, a brace pattern or glob
    (quote it), several joined by ::, a list file (.txt), or any fsspec URL."""
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder for the shards, local or s3://, apart from SRC; created when absent."""
    preset: PresetName = "default"
    """Base of the recipe; explicit flags override it. paper: the published recipe."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Convert only the first N samples."""
    samples_per_shard: Annotated[int, tyro.conf.arg(metavar="N")] = 1000
    """Samples per shard when SRC is a folder; other sources keep their shards."""
    classes: Annotated[str, tyro.conf.arg(metavar="LIST|DST", help_behavior_hint="")] = ""
    """Numbers of a folder's classes: a text file with a class folder's name per line, or the DST of
    another split, whose numbers are taken. Default: the class folders of SRC by name."""
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
    given = {a.partition("=")[0].replace("_", "-") for a in args}
    if {"--nested", "--num-gaussians"} <= given:
        raise UsageError(
            "--num-gaussians does not go with --nested, whose last budget is the number: leave "
            "one of them out"
        )
    if {"--gaussians-per-megapixel", "--num-gaussians"} <= given:
        raise UsageError(
            "--num-gaussians does not go with --gaussians-per-megapixel, which stands for it: "
            "leave one of them out"
        )
    try:
        options = parse(ConvertOptions, "convert", args, default)
    except UsageError as e:
        if sum(arg.endswith((".tar", ".parquet")) for arg in args) > 1:
            raise UsageError(f"{e}; if the shell expanded a pattern, quote it") from None
        raise
    if "--image-size" in given and options.config.decode.resize == "none":
        raise UsageError(
            "--image-size does not go with --resize none, which leaves images as they are: leave "
            "one of them out"
        )
    return options


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
    from splatshard.pipeline.shards.commit import check_destination, check_scheme
    from splatshard.pipeline.shards.markers import markers_and_others, refuse_foreign
    from splatshard.pipeline.source.listing import list_source
    from splatshard.pipeline.source.read import source_sha256

    prepare(options)
    check_scheme(options.dst)
    config = with_teacher(with_encoder(options.config), options.teacher)
    dst = absolute(options.dst).rstrip("/")
    classes = read_classes(options.classes) if options.classes else ()
    found = list_source(options.src, options.limit, options.samples_per_shard, dst, classes)
    refs = found.refs
    for note in found.notes:
        say(note)
    if not options.dry_run:
        check_destination(dst)
    markers, foreign = markers_and_others(dst)
    refuse_foreign(dst, (ref.name for ref in refs), foreign)
    if not options.dry_run:
        check_names(refs, markers, dst)
    whole = found.folders if options.limit is None else ()
    plan = make_plan(refs, markers, config, source_sha256, whole=whole)
    if not options.overwrite_stale:
        refuse_stale(plan, markers, options.dst)
    if options.dry_run:
        from splatshard.jobs.driver.dryrun import dry_run

        say(left_out_line(found.left_out) or "all files of SRC are converted")
        workers = None if options.workers == "auto" else options.workers
        return dry_run(plan.work, config, workers, options.json)
    remember(dst, options.src)
    return execute(plan, refs, config, dst, options, started, found.left_out)


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


if __name__ == "__main__":
    sys.exit(main())
