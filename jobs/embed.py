"""The embed job: a teacher's embeddings for the finished shards of DST; nothing is fitted again.

    markers -> their sources -> plan -> shard by shard: read both, embed, replace

One process on one device: a teacher is much faster than a fit. Shards that have these embeddings
are passed over, so the same command continues after an interruption, and a second one on another
machine does no harm. Not while something trains on DST: data files are replaced.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from splatshard.jobs.cli.command import EXIT_FAILED_SHARDS, EXIT_OK, parse, run
from splatshard.jobs.cli.dataset import open_dataset
from splatshard.jobs.cli.options import DatasetOptions, Device, torch_device
from splatshard.jobs.cli.text import count, duration, print_json, say
from splatshard.jobs.destination.class_texts import planned_classes
from splatshard.jobs.destination.manifest import Catalog
from splatshard.jobs.destination.plan import PlannedShard
from splatshard.jobs.destination.plan_file import read_plan, write_plan
from splatshard.jobs.destination.sources import refuse_outside, remember
from splatshard.schemas.config import (
    ConvertConfig,
    config_from_output,
    describe_difference,
    identities,
    output_config,
    recipe_digest,
    source_of,
)
from splatshard.schemas.errors import CorruptShardError, SourceError, UsageError
from splatshard.schemas.shard import ShardManifest, ShardRef

SAY_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(DatasetOptions):
    """Store a teacher's embedding of each image in the finished shards of DST.

    Run the same command again to continue after an interruption. Exit codes: 0 all done, 1 usage,
    configuration or storage, 3 there are shards that could not be given embeddings.
    """

    src: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="[SRC]", help_behavior_hint="(default: as convert was told)"),
    ] = ""
    """The images that DST was made of, if they are elsewhere by now."""
    teacher: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A CLIP: a local folder, or a name on the Hugging Face hub."""
    samples_per_shard: Annotated[int, tyro.conf.arg(metavar="N")] = 1000
    """As for convert, when SRC is a folder of images."""
    device: Annotated[
        Device, tyro.conf.arg(help="Where the teacher runs; auto is cuda where there is one.")
    ] = "auto"


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard embed argv`."""
    started = time.monotonic()
    return run(lambda: embed(parse(EmbedOptions, "embed", argv), started))


def embed(options: EmbedOptions, started: float) -> int:
    """The whole job; returns the exit code."""
    from splatshard.pipeline.embed import embed_shard
    from splatshard.pipeline.models.teacher import resolve_teacher
    from splatshard.pipeline.shards.commit import check_destination, clean_staging

    dst = open_dataset(options)
    check_destination(dst)
    device = torch_device(options.device)
    teacher = resolve_teacher(options.teacher) if options.teacher else None
    done = done_shards(dst)
    configs = {d: replace(c, teacher=teacher) for d, c in configs_of(done).items()}
    refs = sources_of(dst, done, options)
    wanted = {name: configs[recipe_digest(m.inputs["recipe"])] for name, m in done.items()}
    todo = [name for name, m in done.items() if m.inputs["recipe"] != output_config(wanted[name])]
    say(f"{count(len(done), 'done shard')}: {len(done) - len(todo):,} with these embeddings")
    write_plan(dst, entries(done, refs, wanted, todo))
    failed: dict[str, str] = {}
    said = images = 0.0
    for number, name in enumerate(todo):
        try:
            manifest = embed_shard(dst, done[name], refs[name], wanted[name], device)
        except (SourceError, CorruptShardError) as e:
            failed[name] = str(e)
            continue
        images += manifest.samples
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            say(f"{number + 1:,} of {count(len(todo), 'shard')}, {images:,.0f} images")
    clean_staging(dst)
    Catalog(dst, done_shards(dst).values()).write()
    for name in list(failed)[:10]:
        say(f"failed: {name}: {failed[name]}")
    embedded = len(todo) - len(failed)
    say(f"{count(embedded, 'shard')} embedded in {duration(time.monotonic() - started)}")
    say(f"next: splatshard train RECIPE --set data.src={dst}, of the stage distill")
    if options.json:
        print_json({"embedded": embedded, "before": len(done) - len(todo), "failed": failed})
    return EXIT_FAILED_SHARDS if failed else EXIT_OK


def done_shards(dst: str) -> dict[str, ShardManifest]:
    """The done markers of `dst`. Raises UsageError when there are none."""
    from splatshard.pipeline.shards.markers import read_markers

    markers = read_markers(dst, trust_manifest=False)
    done = {name: m for name, m in markers.items() if isinstance(m, ShardManifest)}
    if not done:
        raise UsageError(f"{dst} has no finished shards: give the DST of a splatshard convert")
    if left := len(markers) - len(done):
        say(f"{count(left, 'shard')} failed or damaged and left alone: run splatshard repair")
    return done


def configs_of(done: Mapping[str, ShardManifest]) -> dict[str, ConvertConfig]:
    """The configuration of each recipe, by its digest. Raises UsageError for one that this build
    cannot repeat."""
    recipes = {id(m.inputs["recipe"]): m.inputs["recipe"] for m in done.values()}.values()
    return {recipe_digest(each): config_from_output(each) for each in recipes}


def sources_of(
    dst: str, done: Mapping[str, ShardManifest], options: EmbedOptions
) -> dict[str, ShardRef]:
    """The source of each shard. Raises UsageError where one is missing or of another size."""
    from splatshard.pipeline.source.listing import current, list_source

    plan = read_plan(dst)
    if options.src:
        folders = {name: shard for name, shard in plan.items() if shard.ref.kind == "folder"}
        lists = planned_classes(folders)
        classes = lists.pop() if len(lists) == 1 else ()
        refs = list_source(options.src, None, options.samples_per_shard, dst, classes).refs
        remember(dst, options.src)
    else:
        refs = [shard.ref for name, shard in plan.items() if name in done]
        refuse_outside(refs, dst, "", "SRC")
        refs = current(refs)
    found = {ref.name: ref for ref in refs}
    matched: dict[str, ShardRef] = {}
    for name, manifest in done.items():
        if name not in found:
            raise UsageError(
                f"shard {name} has no source in {options.src or f'the plan of {dst}'}: give all "
                "the images that DST was made of as SRC"
            )
        source = manifest.inputs["source"]
        ref = replace(found[name], limit=source.get("limit"))
        lines = describe_difference(source, source_of(ref))
        if different := [line for line in lines if not line.startswith("etag")]:
            raise UsageError(
                f"{ref.root or ref.urls[0]} is not what shard {name} was made of "
                f"({different[0]}): give that source, or redo it with convert --teacher"
            )
        matched[name] = ref
    return matched


def entries(
    done: Mapping[str, ShardManifest],
    refs: Mapping[str, ShardRef],
    wanted: Mapping[str, ConvertConfig],
    todo: list[str],
) -> dict[str, PlannedShard]:
    """What `_plan.json` says from now on: all shards with embeddings."""
    identity = {id(config): identities(config) for config in wanted.values()}
    names = set(todo)
    found: dict[str, PlannedShard] = {}
    for name, ref in refs.items():
        inputs, digest = done[name].inputs, done[name].fingerprint
        if name in names:
            inputs, digest = identity[id(wanted[name])](ref)
        source = inputs["source"] if inputs["source"] != source_of(ref) else None
        found[name] = PlannedShard(
            ref=ref, recipe=inputs["recipe"], source=source, fingerprint=digest
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
