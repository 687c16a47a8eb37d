"""What is to be done: source shards + markers + configuration -> todo / done / failed / stale.

Pure: no file, no clock, no Ray; the one thing that may cost a read, a source's checksum, is passed
in. A marker is believed only when its fingerprint is the one this run would write. When nothing but
the source's etag differs (a copied file has a new modification time) the checksum decides, so that
moving a dataset does not redo a thousand shards; and where there is no etag.

A folder of images is cut into numbered shards. When it is cut into fewer, the rest of the older cut
would hold samples for a second time (or deleted ones): `gone`. They are known by their source, and
judged only when that folder has been listed whole, so not with --limit.

`_plan.json` remembers every shard ever planned for DST, so that `status` can name what is missing
from a listing alone: a line per shard, recipes once. Left out: sample counts (unknown until a tar
is read), times (the file is deterministic), and the secrets in URLs, since DST may be shared:
`repair` cannot read such a source again, `convert` is told it anew.

A plan for 100,000 shards is to take seconds and little memory. So a recipe is serialised once, and
all shards made by it share it; see benchmarks/plan_status.py.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from sys import intern
from typing import Any

from splatshard.pipeline.storage.options import redact_url
from splatshard.schemas.config import (
    ConvertConfig,
    describe_difference,
    identities,
    output_config,
    recipe_digest,
    source_of,
)
from splatshard.schemas.document import is_object
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    StaleShardError,
    UsageError,
)
from splatshard.schemas.shard import (
    LIMIT,
    FailedShard,
    ShardManifest,
    ShardRef,
    is_recipe,
    marker_digest,
)
from splatshard.schemas.splats import canonical_json

PLAN_FILE = "_plan.json"
PLAN_VERSION = 1

KINDS = ("tar", "parquet", "folder")
"""Of sources."""

CHECKSUMS = 16
"""Sources read at once where only a checksum can tell whether they have changed."""

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
    are in it too; `refuse_stale` stops the run first unless the user wants them redone. `replaces`
    maps those of `work` that have a done marker to its digest: a worker replaces only what was
    planned to be replaced. `others` are the done markers of DST that are not in
    `done`: of shards that SRC does not name, and of stale ones.

    `folders` are the folders of images that are planned whole, without secrets, and `gone` the
    markers of shards that they were once cut into and are no longer; done ones are in `others`,
    too. They stay until all of `work` is done.
    """

    todo: tuple[ShardRef, ...]
    done: tuple[ShardManifest, ...]
    failed: tuple[FailedShard, ...]
    stale: tuple[StaleShard, ...]
    corrupt: tuple[str, ...]
    work: tuple[ShardRef, ...]
    replaces: dict[str, str] = field(default_factory=dict[str, str])
    others: tuple[ShardManifest, ...] = ()
    folders: frozenset[str] = frozenset()
    gone: tuple[ShardManifest | FailedShard, ...] = ()


def make_plan(
    refs: Iterable[ShardRef],
    markers: Mapping[str, Marker],
    config: ConvertConfig,
    source_sha256: Callable[[ShardRef], str],
    *,
    whole: Iterable[str] = (),
) -> Plan:
    """Sort `refs` by what their markers say. `whole`: folders of which they are all the shards.

    `source_sha256(ref)` is called only for shards of which nothing but the source's etag changed,
    or whose source has none, on several threads. Raises UsageError when two source shards would
    write to one name.
    """
    todo: list[ShardRef] = []
    done: list[ShardManifest] = []
    failed: list[FailedShard] = []
    stale: list[StaleShard] = []
    corrupt: list[str] = []
    work: list[ShardRef] = []
    replaces: dict[str, str] = {}
    named = _by_name(refs)
    differences = _differences(named, markers, config, source_sha256)
    folders = frozenset(map(redact_url, whole))
    for name, ref in named.items():
        marker = markers.get(name)
        if isinstance(marker, ShardManifest):
            if name not in differences:
                done.append(marker)
                continue
            stale.append(StaleShard(name=name, differences=differences[name]))
            replaces[name] = marker_digest(marker)
        elif isinstance(marker, FailedShard):
            failed.append(marker)
        elif isinstance(marker, CorruptShardError):
            corrupt.append(name)
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
        replaces=replaces,
        others=tuple(
            marker
            for name, marker in markers.items()
            if isinstance(marker, ShardManifest) and (name not in named or name in differences)
        ),
        folders=folders,
        gone=tuple(
            marker
            for name, marker in markers.items()
            if not isinstance(marker, CorruptShardError)
            and name not in named
            and marker.source_url in folders
        ),
    )


def _by_name(refs: Iterable[ShardRef]) -> dict[str, ShardRef]:
    named: dict[str, ShardRef] = {}
    for ref in refs:
        other = named.setdefault(ref.name, ref)
        if other is not ref:
            raise UsageError(
                f"two source shards are named {ref.name} ({other.urls[0]} and {ref.urls[0]}); "
                "convert them into separate DSTs"
            )
    return named


def _differences(
    refs: Mapping[str, ShardRef],
    markers: Mapping[str, Marker],
    config: ConvertConfig,
    source_sha256: Callable[[ShardRef], str],
) -> dict[str, tuple[str, ...]]:
    """What makes done shards stale, by name; those that are as wanted are left out."""
    identity = identities(config)
    found: dict[str, tuple[str, ...]] = {}
    touched: list[ShardRef] = []
    for name, ref in refs.items():
        marker = markers.get(name)
        if not isinstance(marker, ShardManifest):
            continue
        wanted, digest = identity(ref)
        if marker.fingerprint == digest:
            if not ref.etag:
                touched.append(ref)
            continue
        lines = describe_difference(marker.inputs, wanted)
        found[name] = tuple(lines) or ("fingerprint differs (marker edited by hand?)",)
        if len(lines) == 1 and lines[0].startswith("source.etag:"):
            touched.append(ref)
    for ref, content in zip(touched, _checksums(touched, source_sha256), strict=True):
        marker = markers[ref.name]
        assert isinstance(marker, ShardManifest)
        if content == marker.source_sha256:
            found.pop(ref.name, None)
        else:
            found[ref.name] = (f"source content of {ref.urls[0]} changed (same size)",)
    return found


def _checksums(refs: Sequence[ShardRef], source_sha256: Callable[[ShardRef], str]) -> list[str]:
    if not refs:
        return []
    with ThreadPoolExecutor(CHECKSUMS) as pool:
        return list(pool.map(source_sha256, refs))


def refuse_stale(plan: Plan, markers: Mapping[str, Marker], dst: str) -> None:
    """Raises StaleShardError with one readable diff per distinct difference, if any is stale or
    done but gone from its source."""
    gone = [marker for marker in plan.gone if isinstance(marker, ShardManifest)]
    if not plan.stale and not plan.corrupt and not gone:
        return
    groups: dict[tuple[str, ...], list[str]] = {}
    for shard in plan.stale:
        groups.setdefault(shard.differences, []).append(shard.name)
    lines: list[str] = []
    for marker in gone:
        groups.setdefault(_recut(marker), []).append(marker.name)
    if plan.stale or gone:
        lines.append(
            f"{dst} holds {_some([*plan.stale, *gone])} of another configuration or source; "
            "nothing was touched"
        )
    for differences, names in groups.items():
        lines.append(f"  {_some(names)} ({_few(names)}):")
        lines += [f"    {difference}" for difference in differences]
    if plan.corrupt:
        first = markers[plan.corrupt[0]]
        lines.append(f"{dst} holds {_some(plan.corrupt)} with a broken marker, the first: {first}")
    remedy = "redo or delete them" if gone else "redo them"
    lines.append(f"  {remedy} with --overwrite-stale, or choose another DST")
    raise StaleShardError("\n".join(lines))


def mixed(plan: Plan, config: ConvertConfig) -> str:
    """A line on shards of another recipe that are done, that SRC does not name, and that stay; ""
    where there are none."""
    wanted, going = (
        output_config(config),
        plan.replaces.keys() | {marker.name for marker in plan.gone},
    )
    others = [m for m in plan.others if m.name not in going and m.inputs["recipe"] != wanted]
    if not others:
        return ""
    old, new = {"recipe": others[0].inputs["recipe"]}, {"recipe": wanted}
    return (
        f"DST also holds {_some(others)} of another configuration that SRC does not name, and "
        f"readers will take both ({'; '.join(describe_difference(old, new)[:3])}); to keep them "
        "apart choose another DST"
    )


def _recut(marker: ShardManifest) -> tuple[str, ...]:
    return (f"source: {marker.source_url} is cut into fewer shards now, without this one",)


def _some(items: Iterable[object]) -> str:
    number = len(list(items))
    return f"{number:,} shard" + ("s" if number != 1 else "")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """An entry of `_plan.json`: where a shard comes from, what its marker is expected to say.

    `recipe` and `source` are the fingerprint's inputs; None for the source that `ref` is now.
    """

    ref: ShardRef
    recipe: dict[str, Any]
    source: dict[str, Any] | None
    fingerprint: str

    @property
    def inputs(self) -> dict[str, Any]:
        """As in a marker."""
        return {"recipe": self.recipe, "source": self.source or source_of(self.ref)}

    @property
    def folder(self) -> str:
        """The folder of images that this is a piece of, as in `Plan.folders`; empty for others."""
        return redact_url(self.ref.root)


def planned(refs: Iterable[ShardRef], plan: Plan, config: ConvertConfig) -> dict[str, PlannedShard]:
    """The entries of this run. A done shard is expected as it is (its etag may be an older one)."""
    identity = identities(config)
    expected = {m.name: (m.inputs, m.fingerprint) for m in plan.done}
    entries: dict[str, PlannedShard] = {}
    for ref in refs:
        inputs, fingerprint = expected.get(ref.name) or identity(ref)
        entries[ref.name] = PlannedShard(
            ref=ref,
            recipe=inputs["recipe"],
            source=inputs["source"] if inputs["source"] != source_of(ref) else None,
            fingerprint=fingerprint,
        )
    return entries


_REF_FIELDS = {f.name: f.default for f in dataclasses.fields(ShardRef)}


def plan_lines(shards: Mapping[str, PlannedShard]) -> Iterator[str]:
    """`_plan.json`, piece by piece: all planned shards by name, a line each, without defaults."""
    recipes = {id(shard.recipe): shard.recipe for shard in shards.values()}
    digests = {number: recipe_digest(recipe) for number, recipe in recipes.items()}
    texts = {digests[number]: canonical_json(recipe) for number, recipe in recipes.items()}
    yield f'{{"plan_version":{PLAN_VERSION},\n"recipes":{{\n'
    yield ",\n".join(f'"{digest}":{text}' for digest, text in sorted(texts.items()))
    yield '\n},\n"shards":{\n'
    separator = ""
    for name in sorted(shards):
        shard = shards[name]
        values = {field: getattr(shard.ref, field) for field in _REF_FIELDS}
        values["urls"] = tuple(map(redact_url, shard.ref.urls))
        values["root"] = redact_url(shard.ref.root)
        entry: dict[str, Any] = {
            "ref": {k: v for k, v in values.items() if v != _REF_FIELDS[k]},
            "recipe": digests[id(shard.recipe)],
            "fingerprint": shard.fingerprint,
        }
        if shard.source:
            entry["source"] = shard.source
        yield f"{separator}{canonical_json(name)}:{canonical_json(entry)}"
        separator = ",\n"
    yield "\n}}\n"


def plan_from_json(text: str | bytes, name: str) -> dict[str, PlannedShard]:
    """Parse `_plan.json`; `name` (its path) goes into messages. Raises CorruptShardError."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        document: dict[str, Any] = json.loads(text, object_hook=_lean)
        version: int = document["plan_version"]
        if type(version) is int and version > PLAN_VERSION:
            raise FormatVersionError(
                f"{name} has plan version {reprlib.repr(version)}, this build reads up to "
                f"{PLAN_VERSION}: upgrade splatshard"
            )
        recipes: dict[str, dict[str, Any]] = document["recipes"]
        for digest, recipe in recipes.items():
            if not is_object(recipe) or not is_recipe(recipe):
                raise TypeError(f"recipe {reprlib.repr(digest)} cannot be understood")
        return {key: _planned(key, entry, recipes) for key, entry in document["shards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, UsageError):
            raise
        raise CorruptShardError(
            f"{name} cannot be read ({type(e).__name__}: {e}); delete it, the next convert "
            "writes it anew"
        ) from e


def _lean(values: dict[str, Any]) -> dict[str, Any] | ShardRef:
    """A ShardRef as soon as it is parsed, since it is much smaller than its dictionary."""
    if "urls" not in values:
        return values
    urls, labels = tuple(values.pop("urls")), tuple(values.pop("labels", ()))
    values["kind"] = intern(values["kind"])
    return ShardRef(urls=urls, labels=labels, **values)


def _planned(key: str, entry: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> PlannedShard:
    """A shard of the file. Raises TypeError and others for what none of our plans says."""
    ref, source, fingerprint = entry["ref"], entry.get("source"), entry["fingerprint"]
    if not isinstance(ref, ShardRef) or ref.name != key or "/" in key or key[:1] in ("", "_", "."):
        raise TypeError(f"{reprlib.repr(key)} is no shard of that name")
    texts = (*ref.urls, *ref.labels, ref.etag, ref.root, fingerprint)
    numbers = (ref.size_bytes, *(() if ref.limit is None else (ref.limit,)))
    if (
        not all(isinstance(text, str) for text in texts)
        or not all(type(number) is int and 0 <= number < LIMIT for number in numbers)
        or ref.kind not in KINDS
        or not ref.urls
        or (ref.kind == "folder" and not ref.root)
        or not (source is None or is_object(source))
    ):
        raise TypeError(f"shard {key} has fields that cannot be understood")
    "".join(ref.urls).encode("utf-8", "surrogateescape")  # as files may be called
    recipe = recipes[entry["recipe"]]
    return PlannedShard(ref=ref, recipe=recipe, source=source, fingerprint=fingerprint)


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
    """Compare planned shards with markers; shards that no plan mentions are `unplanned` too, and
    stale if they are pieces of a folder whose others are planned."""
    folders = {redact_url(root) for root in {shard.ref.root for shard in shards.values()} if root}
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
        elif not plan and marker.source_url in folders:
            stale.append(StaleShard(name=name, differences=_recut(marker)))
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
