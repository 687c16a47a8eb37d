"""The verify job: re-read every shard of DST and compare it with its marker.

Checks size and SHA-256 of the data file, the number of rows and of each status, and every payload.
Orphan data files (left by a killed worker; no marker names them) are notes, not errors: readers
never see them. Missing and failed shards are errors, since the dataset is not whole.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import track

from jobs.cli import EXIT_ERROR, EXIT_OK, Switch, count, parse, print_json, run, say
from jobs.files import read_plan, require_dataset
from jobs.plan import Status, status
from pipeline.storage import find
from schemas.splats import EXTENSIONS

MAX_NOTES = 20


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Re-read everything in DST: checksums, counts, payloads. Exit code 1 names what is wrong."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder given to splatshard convert."""
    json: Switch = False
    """End standard output with one JSON line."""


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
    from pipeline.markers import read_markers

    dst = require_dataset(options.dst)
    state = status(read_plan(dst), read_markers(dst))
    findings = check(dst, state)
    for note in findings.notes[:MAX_NOTES]:
        say(f"note: {note}")
    if len(findings.notes) > MAX_NOTES:
        say(f"note: ... {len(findings.notes) - MAX_NOTES:,} more")
    for problem in findings.problems:
        say(f"wrong: {problem}")
    checked = f"{count(findings.shards, 'shard')}, {count(findings.samples, 'sample')}"
    if findings.problems:
        say(f"splatshard: error: {count(len(findings.problems), 'problem')} in {checked}")
    else:
        say(f"all good: {checked} read back as their markers say")
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


def check(dst: str, state: Status) -> Findings:
    """Re-read all done shards; list everything else that keeps the dataset from being whole."""
    from pipeline.shards import verify_shard

    findings = Findings()
    console = Console(stderr=True)
    shards = track(
        state.done,
        description="verifying",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for manifest in shards:
        findings.shards += 1
        findings.samples += manifest.samples
        findings.problems += verify_shard(dst, manifest)
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
        findings.problems.append(f"{dst} holds no shard")
    findings.notes += orphans(dst, state)
    return findings


def orphans(dst: str, state: Status) -> list[str]:
    """Data files that no marker names. After a stale or corrupt marker nobody can tell."""
    if state.stale or state.corrupt:
        return []
    named = {manifest.data_file for manifest in state.done}
    extensions = tuple(f".{extension}" for extension in EXTENSIONS.values())
    files = [url.rsplit("/", 1)[-1] for url in find(dst)]
    return [
        f"{file}: no marker names this data file; readers ignore it and it can be deleted"
        for file in sorted(files)
        if file.endswith(extensions) and file not in named
    ]


if __name__ == "__main__":
    sys.exit(main())
