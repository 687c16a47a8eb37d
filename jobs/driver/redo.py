"""Redo chosen shards of DST with the recipes of `_plan.json`; what `repair` and `retry-failed`
share.

A shard is redone from its source as it is now: where that has changed since, the new marker says
so, as after a convert. One run of `execute` for each recipe in the plan, which is nearly always
one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from splatshard.jobs.cli.command import EXIT_OK
from splatshard.jobs.cli.options import RedoOptions
from splatshard.jobs.cli.text import say
from splatshard.jobs.destination.plan import Marker, Plan, PlannedShard, status
from splatshard.jobs.destination.sources import refuse_outside
from splatshard.jobs.driver.execute import execute
from splatshard.pipeline.storage.options import is_redacted
from splatshard.schemas.config import ConvertConfig, config_from_output, recipe_digest
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardManifest, ShardRef, marker_digest


def redo(
    dst: str,
    names: Collection[str],
    shards: Mapping[str, PlannedShard],
    options: RedoOptions,
    started: float,
) -> int:
    """Convert the shards `names` (all of them planned ones) again; returns the exit code.

    Their old markers and data stay until the new ones are there. Raises UsageError for a recipe
    that this build cannot repeat, a source whose address was a secret, that the user has not
    named, or one in `dst`, before anything is done; and for a foreign file in the place of a
    marker.
    """
    from splatshard.pipeline.shards.markers import markers_and_others, refuse_foreign
    from splatshard.pipeline.source.listing import check_apart, current

    check_apart((shard.ref for shard in shards.values()), dst)
    for name in sorted(names):
        for url in filter(is_redacted, shards[name].ref.urls):
            raise UsageError(
                f"the source of {name} is {url}, whose signature or password is not kept in "
                "_plan.json: give it to splatshard convert again, which redoes missing and failed "
                "shards, and damaged ones whose markers were deleted"
            )
    refuse_outside((shards[name].ref for name in sorted(names)), dst, options.src, "--src")
    code = EXIT_OK
    left = set(names)
    for config, group in list(by_recipe(names, shards, options.backend)):
        refs = current(shards[name].ref for name in group)
        for ref in refs:
            if (before := shards[ref.name].ref) != ref:
                say(f"the source of {ref.name} has changed since: {before.urls[0]}")
        markers, foreign = markers_and_others(dst)
        refuse_foreign(dst, group, foreign)
        plan = redo_plan(refs, left, shards, markers)
        quiet = dataclasses.replace(options, json=False)
        code = max(code, execute(plan, refs, config, dst, quiet, started))
        left -= set(group)
    return code


def by_recipe(
    names: Collection[str], shards: Mapping[str, PlannedShard], backend: str
) -> Iterator[tuple[ConvertConfig, list[str]]]:
    """The configurations that made `names`, with the names of each, in order."""
    groups: dict[str, list[str]] = {}
    digests: dict[int, str] = {}
    for name in sorted(names):
        recipe = shards[name].recipe
        if id(recipe) not in digests:
            digests[id(recipe)] = recipe_digest(recipe)
        groups.setdefault(digests[id(recipe)], []).append(name)
    for group in groups.values():
        config = config_from_output(shards[group[0]].recipe)
        yield dataclasses.replace(config, backend=backend), group  # type: ignore[arg-type]


def redo_plan(
    refs: Sequence[ShardRef],
    left: Collection[str],
    shards: Mapping[str, PlannedShard],
    markers: Mapping[str, Marker],
) -> Plan:
    """A plan to convert `refs` whatever their markers say. `left` are all shards that are still to
    be redone, which are not among its done ones."""
    state = status(shards, markers)
    names = {ref.name for ref in refs}
    manifests = {n: marker for n, marker in markers.items() if isinstance(marker, ShardManifest)}
    done = [manifest for manifest in state.done if manifest.name not in left]
    kept = {manifest.name for manifest in done}
    failed = tuple(marker for marker in state.failed if marker.name in names)
    corrupt = tuple(name for name, _ in state.corrupt if name in names)
    elsewhere = {*corrupt, *(marker.name for marker in failed)}
    return Plan(
        todo=tuple(ref for ref in refs if ref.name not in elsewhere),
        done=tuple(done),
        failed=failed,
        stale=(),
        corrupt=corrupt,
        work=tuple(refs),
        replaces={
            name: marker_digest(manifests[name]) for name in sorted(names & manifests.keys())
        },
        others=tuple(marker for name, marker in manifests.items() if name not in kept),
    )
