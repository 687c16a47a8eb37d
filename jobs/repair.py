"""The repair job: verify DST, then redo what is bad, missing or failed, and nothing else.

    read all markers -> verify -> redo with the recipe of `_plan.json` -> orphans

Good shards stay untouched. A bad shard stays in its place until the new one replaces it. Stale
shards are left alone: which of two configurations is wanted is for `convert` to say.

Orphans are data files that no marker names, left by killed uploads. They do no harm but take room,
and look the same as the data of a commit that is under way elsewhere; so they are only listed,
unless told to delete them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from splatshard.jobs.cli.command import EXIT_FAILED_SHARDS, EXIT_OK, parse, run
from splatshard.jobs.cli.dataset import require_dataset, require_shards
from splatshard.jobs.cli.options import RedoOptions, Switch, prepare
from splatshard.jobs.cli.text import count, print_json, say
from splatshard.jobs.destination.integrity import orphans, verified
from splatshard.jobs.destination.plan import Status, status
from splatshard.jobs.destination.plan_file import read_plan
from splatshard.jobs.driver.redo import redo

MAX_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class RepairOptions(RedoOptions):
    """Redo the bad, missing and failed shards of DST; all others stay as they are.

    Verifies everything first. Exit codes: 0 all is well now, 1 usage, configuration or storage, 3
    there are shards that could not be repaired.
    """

    quick: Switch = False
    """Look only at the sizes of data files, in one listing: no checksums, no payloads."""
    delete_orphans: Switch = False
    """Delete data files that no marker names. Only when no other job is writing to DST: its
    uploads look the same."""


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard repair argv`."""
    started = time.monotonic()
    return run(lambda: repair(parse(RepairOptions, "repair", argv), started))


def repair(options: RepairOptions, started: float) -> int:
    """The whole job; returns the exit code."""
    from splatshard.pipeline.shards.commit import check_destination
    from splatshard.pipeline.shards.markers import DONE, FAILED, read_markers
    from splatshard.pipeline.storage.fs import exists

    prepare(options)
    dst = require_dataset(options.dst)
    check_destination(dst)
    shards = read_plan(dst)
    markers = read_markers(dst, trust_manifest=False)
    require_shards(dst, shards, markers)
    state = status(shards, markers)
    bad = to_redo(dst, state, options.quick)
    looked = "looked at" if options.quick else "verified"
    say(f"{count(len(state.done), 'done shard')} {looked}; {len(bad):,} to redo")
    name_some("bad", bad)
    code, left = EXIT_OK, dict(bad)
    if redoable := bad.keys() & shards.keys():
        code = redo(dst, redoable, shards, options, started)
        state = status(read_plan(dst), read_markers(dst, trust_manifest=False))
        left = to_redo(dst, only(state, bad.keys()), options.quick)
    for name in left.keys() - shards.keys():
        marker = f"{dst}/{name}{DONE if exists(f'{dst}/{name}{DONE}') else FAILED}"
        left[name] += (
            f" (no plan mentions it: delete {marker}, and convert its source again if it is wanted)"
        )
    left |= {shard.name: "stale: run convert --overwrite-stale" for shard in state.stale}
    name_some("still bad", left)
    found = sweep(dst, options.delete_orphans)
    if not left:
        say(f"all good now: {count(len(state.done), 'shard')} done")
    if options.json:
        print_json(
            {
                "ok": not left,
                "bad": bad,
                "redone": sorted(redoable - left.keys()),
                "still_bad": left,
                "orphans": found,
                "orphans_deleted": options.delete_orphans,
            }
        )
    return code or (EXIT_FAILED_SHARDS if left else EXIT_OK)


def name_some(what: str, shards: Mapping[str, str]) -> None:
    """The first MAX_NAMED shards and why they are named."""
    for name in sorted(shards)[:MAX_NAMED]:
        say(f"{what}: {name}: {shards[name]}")
    if len(shards) > MAX_NAMED:
        say(f"{what}: ... {len(shards) - MAX_NAMED:,} more (--json names them all)")


def only(state: Status, names: Collection[str]) -> Status:
    """What `state` says about the shards `names`."""
    return replace(
        state,
        done=tuple(manifest for manifest in state.done if manifest.name in names),
        failed=tuple(failed for failed in state.failed if failed.name in names),
        corrupt=tuple((name, why) for name, why in state.corrupt if name in names),
        missing=tuple(name for name in state.missing if name in names),
    )


def to_redo(dst: str, state: Status, quick: bool) -> dict[str, str]:
    """Shards that are not as they should be, and why; sorted."""
    bad: dict[str, str] = dict(state.corrupt)
    bad |= {failed.name: f"failed: {failed.message}" for failed in state.failed}
    bad |= dict.fromkeys(state.missing, "missing")
    if quick:
        bad |= wrong_sizes(dst, state)
    else:
        bad |= {m.name: problems[0] for m, problems in verified(dst, state.done) if problems}
    return dict(sorted(bad.items()))


def wrong_sizes(dst: str, state: Status) -> dict[str, str]:
    """Done shards whose data file is gone or of another size."""
    from splatshard.pipeline.storage.errors import storage_errors
    from splatshard.pipeline.storage.fs import list_folder

    with storage_errors(dst, "read"):
        files = list_folder(dst)
    bad: dict[str, str] = {}
    for manifest in state.done:
        data = files.get(manifest.data_file)
        if data is None:
            bad[manifest.name] = f"{manifest.data_file} is gone"
        elif data.size_bytes != manifest.size_bytes:
            bad[manifest.name] = (
                f"{manifest.data_file} has {data.size_bytes} bytes, its marker says "
                f"{manifest.size_bytes}"
            )
    return bad


def sweep(dst: str, delete: bool) -> list[str]:
    """Files that splatshard wrote and no marker names; deletes them, if told to.

    A file that has a marker by now is no orphan: files are listed first, then markers are read.
    """
    from splatshard.pipeline.shards.markers import read_markers, shard_of
    from splatshard.pipeline.shards.rows import is_shard
    from splatshard.pipeline.storage.atomic import delete as delete_file
    from splatshard.pipeline.storage.errors import storage_errors
    from splatshard.pipeline.storage.fs import list_folder

    with storage_errors(dst, "read"):
        files = list(list_folder(dst))
    named = [f for f in orphans(files, read_markers(dst)) if shard_of(f)]
    found = [f for f in named if is_shard(f"{dst}/{f}")]
    for file in found:
        if delete:
            delete_file(f"{dst}/{file}")
    if found:
        what = "deleted" if delete else "left alone, --delete-orphans deletes them; the first:"
        say(f"{count(len(found), 'data file')} that no marker names {what} {found[0]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
