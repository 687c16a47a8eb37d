"""What is to be done: source shards + markers + configuration -> todo / done / failed / stale.

Pure: no file, no clock, no Ray; the one thing that may cost a read, a source's checksum, is passed
in. A marker is believed only when its fingerprint is the one this run would write. When nothing but
the source's etag differs (a copied file has a new modification time) the checksum decides, so that
moving a dataset does not redo a thousand shards.

`_plan.json` remembers every shard ever planned for DST, so that `status` can name what is missing
from a listing alone. Recipes are stored once, not per shard. Left out: sample counts (unknown until
a tar is read) and times (the file is deterministic).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from schemas.config import ConvertConfig, describe_difference, fingerprint, inputs
from schemas.errors import CorruptShardError, StaleShardError, UsageError
from schemas.shard import FailedShard, ShardManifest, ShardRef

PLAN_FILE = "_plan.json"
PLAN_VERSION = 1

Marker = ShardManifest | FailedShard | CorruptShardError


@dataclass(frozen=True, kw_only=True)
class StaleShard:
    """A done shard with another fingerprint; `differences` are lines `field: old -> new`."""

    name: str
    differences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One entry per source shard, in exactly one of `todo`, `done`, `failed`, `stale`, `corrupt`.

    `work` is what a run converts, in source order: all but the done ones. Stale and corrupt ones
    are in it too; `refuse_stale` stops the run first unless the user wants them redone.
    """

    todo: tuple[ShardRef, ...]
    done: tuple[ShardManifest, ...]
    failed: tuple[FailedShard, ...]
    stale: tuple[StaleShard, ...]
    corrupt: tuple[str, ...]
    work: tuple[ShardRef, ...]


def make_plan(
    refs: Iterable[ShardRef],
    markers: Mapping[str, Marker],
    config: ConvertConfig,
    source_sha256: Callable[[ShardRef], str],
) -> Plan:
    """Sort `refs` by what their markers say.

    `source_sha256(ref)` is called only for shards of which nothing but the source's etag changed.
    Raises UsageError when two source shards would write to one name.
    """
    todo: list[ShardRef] = []
    done: list[ShardManifest] = []
    failed: list[FailedShard] = []
    stale: list[StaleShard] = []
    corrupt: list[str] = []
    work: list[ShardRef] = []
    seen: dict[str, ShardRef] = {}
    for ref in refs:
        if ref.name in seen:
            raise UsageError(
                f"two source shards are named {ref.name} ({seen[ref.name].urls[0]} and "
                f"{ref.urls[0]}); convert them into separate DSTs"
            )
        seen[ref.name] = ref
        marker = markers.get(ref.name)
        if isinstance(marker, ShardManifest):
            differences = _differences(marker, inputs(config, ref), ref, source_sha256)
            if not differences:
                done.append(marker)
                continue
            stale.append(StaleShard(name=ref.name, differences=differences))
        elif isinstance(marker, FailedShard):
            failed.append(marker)
        elif isinstance(marker, CorruptShardError):
            corrupt.append(ref.name)
        else:
            todo.append(ref)
        work.append(ref)
    return Plan(
        todo=tuple(todo),
        done=tuple(done),
        failed=tuple(failed),
        stale=tuple(stale),
        corrupt=tuple(corrupt),
        work=tuple(work),
    )


def _differences(
    marker: ShardManifest,
    wanted: dict[str, Any],
    ref: ShardRef,
    source_sha256: Callable[[ShardRef], str],
) -> tuple[str, ...]:
    """What makes a done shard stale; empty when it is as wanted."""
    if marker.fingerprint == fingerprint(wanted):
        return ()
    lines = describe_difference(marker.inputs, wanted)
    if len(lines) == 1 and lines[0].startswith("source.etag:"):
        found = source_sha256(ref)
        if found == marker.source_sha256:
            return ()
        return (f"source content of {ref.urls[0]} changed (same size)",)
    return tuple(lines) or ("fingerprint differs (marker edited by hand?)",)


def refuse_stale(plan: Plan, markers: Mapping[str, Marker], dst: str) -> None:
    """Raises StaleShardError with one readable diff per distinct difference, if any is stale."""
    if not plan.stale and not plan.corrupt:
        return
    groups: dict[tuple[str, ...], list[str]] = {}
    for shard in plan.stale:
        groups.setdefault(shard.differences, []).append(shard.name)
    lines: list[str] = []
    if plan.stale:
        lines.append(
            f"{dst} holds {_some(plan.stale)} of another configuration or source; "
            "nothing was touched"
        )
    for differences, names in groups.items():
        lines.append(f"  {_some(names)} ({_few(names)}):")
        lines += [f"    {difference}" for difference in differences]
    if plan.corrupt:
        first = markers[plan.corrupt[0]]
        lines.append(f"{dst} holds {_some(plan.corrupt)} with a broken marker, the first: {first}")
    lines.append("  redo them with --overwrite-stale, or choose another DST")
    raise StaleShardError("\n".join(lines))


def _some(items: Iterable[object]) -> str:
    number = len(list(items))
    return f"{number:,} shard" + ("s" if number != 1 else "")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """An entry of `_plan.json`: where a shard comes from, what its marker is expected to say."""

    ref: ShardRef
    inputs: dict[str, Any]
    fingerprint: str


def planned(refs: Iterable[ShardRef], plan: Plan, config: ConvertConfig) -> dict[str, PlannedShard]:
    """The entries of this run. A done shard is expected as it is (its etag may be an older one)."""
    done = {manifest.name: manifest for manifest in plan.done}
    entries: dict[str, PlannedShard] = {}
    for ref in refs:
        expected = done[ref.name].inputs if ref.name in done else inputs(config, ref)
        entries[ref.name] = PlannedShard(
            ref=ref, inputs=expected, fingerprint=fingerprint(expected)
        )
    return entries


def plan_to_json(shards: Mapping[str, PlannedShard]) -> str:
    """Canonical JSON of all planned shards, sorted by name."""
    recipes: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for name in sorted(shards):
        shard = shards[name]
        text = json.dumps(shard.inputs["recipe"], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        recipes[digest] = shard.inputs["recipe"]
        entries[name] = {
            "ref": dataclasses.asdict(shard.ref),
            "recipe": digest,
            "source": shard.inputs["source"],
            "fingerprint": shard.fingerprint,
        }
    document = {"plan_version": PLAN_VERSION, "recipes": recipes, "shards": entries}
    return json.dumps(document, sort_keys=True, indent=1) + "\n"


def plan_from_json(text: str, name: str) -> dict[str, PlannedShard]:
    """Parse `_plan.json`; `name` (its path) goes into messages. Raises CorruptShardError."""
    try:
        document: dict[str, Any] = json.loads(text)
        version: int = document["plan_version"]
        if version > PLAN_VERSION:
            raise UsageError(
                f"{name} has plan version {version}, this build reads up to {PLAN_VERSION}: "
                "upgrade splatshard"
            )
        shards: dict[str, PlannedShard] = {}
        for key, entry in document["shards"].items():
            values: dict[str, Any] = entry["ref"]
            urls, labels = tuple(values.pop("urls")), tuple(values.pop("labels"))
            shards[key] = PlannedShard(
                ref=ShardRef(urls=urls, labels=labels, **values),
                inputs={"recipe": document["recipes"][entry["recipe"]], "source": entry["source"]},
                fingerprint=entry["fingerprint"],
            )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, UsageError):
            raise
        raise CorruptShardError(
            f"{name} cannot be read ({type(e).__name__}: {e}); delete it, the next convert "
            "writes it anew"
        ) from e
    return shards


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the markers say about every shard ever planned. All lists are sorted by name."""

    done: tuple[ShardManifest, ...]
    failed: tuple[FailedShard, ...]
    corrupt: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    stale: tuple[StaleShard, ...]
    unplanned: tuple[str, ...]


def status(shards: Mapping[str, PlannedShard], markers: Mapping[str, Marker]) -> Status:
    """Compare planned shards with markers; shards that no plan mentions are `unplanned` too."""
    done: list[ShardManifest] = []
    failed: list[FailedShard] = []
    corrupt: list[tuple[str, str]] = []
    stale: list[StaleShard] = []
    for name in sorted(markers):
        marker = markers[name]
        plan = shards.get(name)
        if isinstance(marker, FailedShard):
            failed.append(marker)
        elif isinstance(marker, CorruptShardError):
            corrupt.append((name, str(marker)))
        elif plan and plan.fingerprint != marker.fingerprint:
            lines = describe_difference(marker.inputs, plan.inputs)
            stale.append(StaleShard(name=name, differences=tuple(lines)))
        else:
            done.append(marker)
    return Status(
        done=tuple(done),
        failed=tuple(failed),
        corrupt=tuple(corrupt),
        missing=tuple(sorted(shards.keys() - markers.keys())),
        stale=tuple(stale),
        unplanned=tuple(sorted(markers.keys() - shards.keys())),
    )
