"""The job's own small files beside the shards: `_plan.json`, `_run.json`, `report.html`.

Written whole or not at all, so that neither a reader nor a crash sees half a file.
"""

from __future__ import annotations

from jobs.plan import PLAN_FILE, PlannedShard, plan_from_json, plan_to_json
from pipeline.storage import exists, read_bytes, write_bytes
from pipeline.store_errors import storage_errors
from schemas.errors import UsageError

RUN_FILE = "_run.json"
REPORT_FILE = "report.html"


def read_text(dst: str, name: str) -> str | None:
    """The text of `dst/name`, None when there is none. Raises StorageError, UnavailableError."""
    url = f"{dst}/{name}"
    with storage_errors(url, "read"):
        try:
            return read_bytes(url).decode(errors="replace")
        except FileNotFoundError:
            return None


def write_text(dst: str, name: str, text: str) -> None:
    """Write `dst/name` atomically. Raises StorageError and UnavailableError."""
    write_bytes(f"{dst}/{name}", text.encode())


def read_plan(dst: str) -> dict[str, PlannedShard]:
    """All shards ever planned for `dst`; empty when nothing was. Raises CorruptShardError."""
    text = read_text(dst, PLAN_FILE)
    return plan_from_json(text, f"{dst}/{PLAN_FILE}") if text is not None else {}


def write_plan(dst: str, shards: dict[str, PlannedShard]) -> None:
    """Merge `shards` into the plan of `dst`; leaves an unchanged file alone."""
    before, text = read_text(dst, PLAN_FILE), plan_to_json(shards)
    if before is not None and before != text:
        text = plan_to_json(plan_from_json(before, f"{dst}/{PLAN_FILE}") | shards)
    if before != text:
        write_text(dst, PLAN_FILE, text)


def require_dataset(dst: str) -> str:
    """`dst` without a closing slash. Raises UsageError when nothing is there."""
    dst = dst.rstrip("/") or "/"
    if not exists(dst):
        raise UsageError(f"{dst}: no such folder; give the DST of a splatshard convert")
    return dst
