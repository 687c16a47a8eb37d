"""The job's own small files beside the shards: `_plan.json`, `_run.json`, `_progress.json`,
`report.html`.

Written whole or not at all, so that neither a reader nor a crash sees half a file. Two jobs may add
to one plan at a time: under a lock on a local disk, by conditional writes on S3.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from splatshard.jobs.cli.text import say
from splatshard.jobs.destination.figures import is_left_out
from splatshard.jobs.destination.plan import PLAN_FILE, PlannedShard, plan_from_json, plan_lines
from splatshard.pipeline.storage.errors import storage_errors
from splatshard.pipeline.storage.fs import (
    open_read,
    read_bytes,
    stat,
    write_bytes,
)
from splatshard.schemas.document import document, is_text
from splatshard.schemas.errors import CorruptShardError, SourceError, UnavailableError
from splatshard.schemas.shard import is_number

RUN_FILE = "_run.json"
PROGRESS_FILE = "_progress.json"
REPORT_FILE = "report.html"

REMEDY = "delete it, the next job writes it anew"
_NUMBER, _TEXT = (is_number, "a number"), (is_text, "a string")
SHOWN = {
    **dict.fromkeys(("images_per_s", "time_to_first_shard_s", "wall_s", "workers"), _NUMBER),
    **dict.fromkeys(("shards", "shards_done", "shards_failed", "eta_s"), _NUMBER),
    **dict.fromkeys(("state", "updated", "backend"), _TEXT),
    "left_out": (is_left_out, "numbers of files by reason and extension"),
}
"""Fields of `_run.json` and `_progress.json` that are shown, where they are there and not null."""


def read_file(dst: str, name: str) -> bytes | None:
    """All of `dst/name`, None when there is none. Raises StorageError, UnavailableError."""
    url = f"{dst}/{name}"
    with storage_errors(url, "read"):
        try:
            return read_bytes(url)
        except FileNotFoundError:
            return None


def read_record(dst: str, name: str) -> dict[str, Any]:
    """What a job wrote into `dst/name` about itself; empty when nothing is there, and when it is
    damaged, which is told: nothing depends on it. Raises StorageError, UnavailableError."""
    text, url = read_file(dst, name), f"{dst}/{name}"
    if text is None:
        return {}
    try:
        found = document(text, url, REMEDY)
        for field, (check, wanted) in SHOWN.items():
            if (value := found.get(field)) is not None and not check(value):
                raise CorruptShardError(
                    f"{url}: {field} is {reprlib.repr(value)}, not {wanted}; {REMEDY}"
                )
    except CorruptShardError as e:
        say(f"passed over: {e}")
        return {}
    return found


def write_text(dst: str, name: str, text: str) -> None:
    """Write `dst/name` atomically. Raises StorageError and UnavailableError."""
    write_bytes(f"{dst}/{name}", text.encode())


def read_plan(dst: str) -> dict[str, PlannedShard]:
    """All shards ever planned for `dst`; empty when nothing was. Raises CorruptShardError."""
    text = read_file(dst, PLAN_FILE)
    return plan_from_json(text, f"{dst}/{PLAN_FILE}") if text is not None else {}


def write_plan(dst: str, shards: dict[str, PlannedShard], folders: Collection[str] = ()) -> None:
    """Merge `shards` into the plan of `dst`; leaves an unchanged file alone.

    What else the plan has of the source folders `folders`, as `PlannedShard.folder` names them, is
    forgotten: they are cut otherwise now. Raises CorruptShardError when the plan that is there
    cannot be read, UnavailableError when others write it all the time, StorageError and others.
    """
    from splatshard.pipeline.shards.commit import ROUNDS, staged_file
    from splatshard.pipeline.storage.atomic import exclusive, head, upload_if

    url = f"{dst}/{PLAN_FILE}"
    with staged_file(dst, "plan") as path:
        write_lines(path, plan_lines(shards))
        if _same(path, url):
            return
        with exclusive(dst, "plan"):
            for _ in range(ROUNDS):
                found = head(url)  # first: should the plan change while it is read, ours is refused
                before = read_plan(dst)
                kept = {n: s for n, s in before.items() if s.folder not in folders}
                if before:
                    write_lines(path, plan_lines(kept | shards))
                if _same(path, url) or upload_if(path, url, found.etag if found else None):
                    return
    raise UnavailableError(f"{url} changes again and again")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a local file piece by piece: its whole text may be 100 MB. Raises StorageError."""
    with storage_errors(path), path.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def put_file(path: Path, url: str) -> None:
    """Put a finished local file (which may be moved) to `url`, unless the same is there already.

    Raises StorageError and UnavailableError.
    """
    from splatshard.pipeline.storage.atomic import upload

    if not _same(path, url):
        upload(path, url)


def _same(path: Path, url: str) -> bool:
    try:
        if stat(url).size_bytes != path.stat().st_size:
            return False
        with open_read(url) as theirs, path.open("rb") as ours:
            while block := ours.read(1 << 20):
                if theirs.read(len(block)) != block:
                    return False
    except SourceError:  # nothing there
        return False
    return True
