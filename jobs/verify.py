"""The verify job: re-read every shard of DST and compare it with its marker.

Checks size and SHA-256 of the data file, the number of rows and of each status, and every payload.
Every marker is read; `_manifest.json` is not believed, but compared with them. Orphan data files
(left by a killed worker; no marker names them) are notes, not errors: readers never see them.
Missing and failed shards are errors, since the dataset is not whole.

A shard in a remote store is downloaded once, several at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from splatshard.jobs.cli.command import EXIT_ERROR, EXIT_OK, parse, run
from splatshard.jobs.cli.dataset import open_dataset
from splatshard.jobs.cli.options import DatasetOptions
from splatshard.jobs.cli.text import answer, count, print_json, say
from splatshard.jobs.destination.integrity import orphans, verified
from splatshard.jobs.destination.plan import Marker, PlannedShard, Status, status
from splatshard.jobs.destination.plan_file import read_plan
from splatshard.schemas.config import describe_difference, recipe_digest
from splatshard.schemas.errors import CorruptShardError, SplatshardError
from splatshard.schemas.manifest import MANIFEST_FILE
from splatshard.schemas.shard import ShardManifest

MAX_NOTES = 20


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(DatasetOptions):
    """Re-read everything in DST: checksums, counts, payloads. Exit code 1 names what is wrong."""


@dataclass(kw_only=True)
class Findings:
    """What is wrong (`problems`), and what is only odd (`notes`)."""

    shards: int = 0
    samples: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard verify argv`."""
    return run(lambda: verify(parse(VerifyOptions, "verify", argv)))


def verify(options: VerifyOptions) -> int:
    """Verify DST and print the findings; returns the exit code."""
    from splatshard.pipeline.shards.markers import read_markers

    dst = open_dataset(options)
    markers = read_markers(dst, trust_manifest=False)
    shards: dict[str, PlannedShard] = {}
    damaged: list[str] = []
    try:
        shards = read_plan(dst)
    except CorruptShardError as e:
        damaged.append(f"{e}; until then nobody knows which shards are missing or stale")
    findings = check(dst, markers, status(shards, markers))
    findings.problems[:0] = damaged
    lines = [f"note: {note}" for note in findings.notes[:MAX_NOTES]]
    if len(findings.notes) > MAX_NOTES:
        lines.append(f"note: ... {len(findings.notes) - MAX_NOTES:,} more")
    lines += [f"wrong: {problem}" for problem in findings.problems]
    checked = f"{count(findings.shards, 'shard')}, {count(findings.samples, 'sample')}"
    if findings.problems:
        mended = f" (splatshard repair {dst} redoes bad, missing and failed shards)"
        lines.append(
            f"splatshard: error: {count(len(findings.problems), 'problem')} in {checked}"
            + (mended if shards or markers else "")
        )
    else:
        lines.append(f"all good: {checked} read back as their markers say")
    for line in lines:
        answer(line, options.json)
    if not findings.problems:
        say(f"next: splatshard view {dst}    splatshard train RECIPE --set data.src={dst}")
    if options.json:
        print_json(
            {
                "ok": not findings.problems,
                "shards": findings.shards,
                "samples": findings.samples,
                "problems": findings.problems,
                "notes": findings.notes,
            }
        )
    return EXIT_ERROR if findings.problems else EXIT_OK


def check(dst: str, markers: Mapping[str, Marker], state: Status) -> Findings:
    """Re-read all done shards; list everything else that keeps the dataset from being whole."""
    from splatshard.pipeline.storage.errors import storage_errors
    from splatshard.pipeline.storage.fs import list_folder

    findings = Findings()
    for manifest, problems in verified(dst, state.done):
        findings.shards += 1
        findings.samples += manifest.samples
        findings.problems += problems
    for name, message in state.corrupt:
        findings.problems.append(f"shard {name}: {message}")
    for failed in state.failed:
        findings.problems.append(f"shard {failed.name} failed: {failed.error}: {failed.message}")
    for name in state.missing:
        findings.problems.append(f"shard {name} is planned but missing: run convert again")
    for stale in state.stale:
        findings.problems.append(
            f"shard {stale.name} is stale ({'; '.join(stale.differences)}): run convert "
            "--overwrite-stale"
        )
    if not state.done and not findings.problems:
        findings.problems.append(f"{dst} holds no shard: run splatshard convert first")
    with storage_errors(dst, "read"):
        files = list_folder(dst)
    findings.notes += [
        f"{file}: no marker names this file, so readers ignore it; if splatshard wrote it, "
        "splatshard repair --delete-orphans deletes it"
        for file in orphans(files, markers)
    ]
    findings.notes += recipe_notes(markers) + manifest_notes(dst, markers)
    return findings


def recipe_notes(markers: Mapping[str, Marker]) -> list[str]:
    """Whether the shards are of one configuration."""
    done = [marker for marker in markers.values() if isinstance(marker, ShardManifest)]
    recipes = {id(m.inputs["recipe"]): m.inputs["recipe"] for m in done}.values()
    different = {recipe_digest(recipe): recipe for recipe in recipes}
    if len(different) < 2:
        return []
    first, second, *_ = different.values()
    differences = describe_difference({"recipe": first}, {"recipe": second})
    return [
        f"shards of {len(different)} configurations, which readers take together, such as "
        f"{'; '.join(differences[:3])}"
    ]


def manifest_notes(dst: str, markers: Mapping[str, Marker]) -> list[str]:
    """Where the run-level manifest, if there is one, does not say what the markers say."""
    from splatshard.pipeline.shards.markers import read_manifest
    from splatshard.pipeline.storage.fs import exists

    url = f"{dst}/{MANIFEST_FILE}"
    if not exists(url):
        return []
    try:
        listed = {name: entry.manifest for name, entry in read_manifest(url).items()}
    except SplatshardError as e:
        return [str(e)]
    done = {name: m for name, m in markers.items() if isinstance(m, ShardManifest)}
    different = [name for name in done.keys() | listed.keys() if done.get(name) != listed.get(name)]
    if not different:
        return []
    return [
        f"{url} differs from the markers in {count(len(different), 'shard')} ({min(different)}, "
        "...); markers count: delete it, the next convert writes it anew"
    ]


if __name__ == "__main__":
    sys.exit(main())
