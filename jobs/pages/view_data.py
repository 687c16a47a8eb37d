"""What the page of `splatshard view` asks for, as plain data.

    markers                        -> figures of DST or a shard, the list of shards
    scalar columns of one shard    -> lists of samples; over all shards a piece at a time
    one row                        -> view_sample.py

Nothing is read before it is asked for, and lists read no payloads. A list over all shards is a
scan that goes on where the last one ended: the page asks again until it has seen enough. Shards of
which the marker says that none of their samples is wanted are not opened.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from splatshard.jobs.cli.dataset import UNFINISHED
from splatshard.jobs.cli.text import say
from splatshard.jobs.destination.figures import dataset_figures
from splatshard.jobs.destination.plan import PlannedShard, Status, status
from splatshard.jobs.destination.plan_file import read_plan
from splatshard.jobs.pages.view_originals import Originals
from splatshard.schemas.config import BackendName
from splatshard.schemas.errors import CorruptShardError, SplatshardError, UsageError
from splatshard.schemas.shard import OK, PSNR_STEP, SKIP_STATUSES, ShardManifest
from splatshard.schemas.splats import metadata_of

if TYPE_CHECKING:
    from splatshard.pipeline.data.catalog import Shard

PAGE = 50
"""Entries of a list at a time."""
LISTED = ("key", "caption", "status", "psnr", "num_gaussians")
"""Columns of lists of samples."""
CAPTION_CHARS = 200
SCAN_S = 0.3
"""After so long a scan says how far it is."""
TABLES, CHUNKS, CHUNK_ROWS = 8, 8, 16
"""Shards whose listed columns stay in memory; pieces of so many rows with their payloads."""
ORDERS = ("row", "worst", "best")


@dataclass(frozen=True)
class Query:
    """Which samples a list has: with `text` in caption or key, in any case; of `status` ("" for
    any, "skipped" for all but ok); of a PSNR from `low` to below `high` dB."""

    text: str = ""
    status: str = ""
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.status not in ("", "skipped", OK, *SKIP_STATUSES):
            raise UsageError(f"status {self.status!r}: choose ok, skipped or one of its kinds")


@dataclass
class View:
    """DST as it is looked at; `shards` are the finished ones by name, sorted."""

    dst: str
    src: str = ""
    backend: BackendName = "auto"
    state: Status = field(init=False)
    shards: dict[str, ShardManifest] = field(init=False)
    planned: dict[str, PlannedShard] = field(init=False)
    originals: Originals = field(init=False)
    drawing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        from splatshard.pipeline.data.cache import ShardCache
        from splatshard.pipeline.data.files import ShardFiles, default_cache_dir

        self.files = ShardFiles(ShardCache(default_cache_dir(), 100 << 30), checksum=False)
        self.table = lru_cache(TABLES)(self._table)
        self.chunk = lru_cache(CHUNKS)(self._chunk)
        self.shares = lru_cache(TABLES)(self._shares)
        self.read_markers()

    def read_markers(self) -> None:
        """What there is now. Raises UsageError when DST holds no finished shard."""
        from splatshard.pipeline.shards.markers import read_markers

        planned: dict[str, PlannedShard] = {}
        try:
            planned = read_plan(self.dst)
        except CorruptShardError as e:
            say(f"without originals, and what is missing or stale is unknown: {e}")
        state = status(planned, read_markers(self.dst))
        if not state.done:
            raise UsageError(f"{self.dst} {UNFINISHED}")
        self.state, self.planned = state, planned
        self.shards = {manifest.name: manifest for manifest in state.done}
        self.originals = Originals(self.dst, self.src)

    def manifest(self, name: str) -> ShardManifest:
        """Raises UsageError for a name that no finished shard has."""
        if name not in self.shards:
            raise UsageError(f"{self.dst} has no finished shard {name!r}")
        return self.shards[name]

    def shard(self, manifest: ShardManifest) -> Shard:
        from splatshard.pipeline.data.catalog import layout_of, shard_of

        url = f"{self.dst}/{manifest.data_file}"
        return shard_of(url, manifest, layout_of(metadata_of(manifest.inputs["recipe"]), None, url))

    def _table(self, shard: Shard) -> Any:
        from splatshard.pipeline.data.filters import scalars_of

        return scalars_of(shard, list(LISTED), self.files)

    def _chunk(self, shard: Shard, number: int) -> list[dict[str, Any]]:
        """CHUNK_ROWS rows of a shard, with sizes in place of the further members."""
        from splatshard.pipeline.data.files import shard_errors
        from splatshard.pipeline.shards.rows import rows_from

        with shard_errors(shard), self.files.open(shard) as stream:
            rows = rows_from(stream, shard.url, shard.format, number * CHUNK_ROWS)
            return [lean(row) for row in islice(rows, CHUNK_ROWS)]

    def _shares(self, shard: Shard) -> dict[str, float]:
        """What a byte of each column of payloads takes in a Parquet file; empty for a tar."""
        import pyarrow.parquet as pq

        from splatshard.pipeline.data.files import shard_errors
        from splatshard.pipeline.shards.verify import column_sizes

        if shard.format == "webdataset":
            return {}
        with shard_errors(shard), self.files.open(shard) as stream:
            return {
                name: stored / max(1, whole)
                for name, (stored, whole) in column_sizes(pq.ParquetFile(stream).metadata).items()
            }

    def row(self, name: str, number: int) -> dict[str, Any]:
        """A row with its payloads. Raises UsageError where there is none, CorruptShardError and
        others where it cannot be read."""
        manifest = self.manifest(name)
        if not 0 <= number < manifest.samples:
            raise UsageError(f"shard {name} has rows 0 to {manifest.samples - 1}, not {number}")
        rows = self.chunk(self.shard(manifest), number // CHUNK_ROWS)
        if number % CHUNK_ROWS >= len(rows):
            shard = self.shard(manifest)
            raise CorruptShardError(f"{shard.url} has no row {number}: {shard.remedy}")
        return rows[number % CHUNK_ROWS]


def lean(row: dict[str, Any]) -> dict[str, Any]:
    members = [{"name": m["name"], "bytes": len(m["data"] or b"")} for m in row["members"]]
    return row | {"members": members}


# Of DST, and of its shards


def overview(view: View) -> dict[str, Any]:
    """Figures of all finished shards, and what keeps DST from being whole."""
    kinds = ("done", "failed", "missing", "stale", "corrupt")
    return {
        "dst": view.dst,
        "shards": {kind: len(getattr(view.state, kind)) for kind in kinds},
        **figures(view.state.done),
    }


def shard_overview(view: View, name: str) -> dict[str, Any]:
    """The same of one shard, and how it was made."""
    manifest = view.manifest(name)
    recipe = manifest.inputs["recipe"]
    return {
        "shard": name,
        "file": manifest.data_file,
        "source": manifest.source_url,
        "codec": recipe["pack"]["codec"],
        "budgets": metadata_of(recipe)["budgets"],
        **figures([manifest]),
    }


def figures(manifests: Iterable[ShardManifest]) -> dict[str, Any]:
    found = list(manifests)
    return {**dataset_figures(found), "histogram": histogram(found)}


def histogram(manifests: Iterable[ShardManifest]) -> dict[str, Any] | None:
    """Images by PSNR, in steps from `begin` on; None where a marker does not say."""
    steps: dict[int, int] = {}
    for statistics in (m.statistics for m in manifests if m.counts.get(OK)):
        if "psnr_histogram" not in statistics:
            return None
        first = round(statistics["psnr_histogram_from"] / PSNR_STEP)
        for step, images in enumerate(map(int, statistics["psnr_histogram"].split()), first):
            steps[step] = steps.get(step, 0) + images
    if not steps:
        return None
    first, last = min(steps), max(steps)
    counts = [steps.get(i, 0) for i in range(first, last + 1)]
    return {"begin": first * PSNR_STEP, "step": PSNR_STEP, "counts": counts}


def list_shards(view: View, text: str, order: str, start: int) -> dict[str, Any]:
    """PAGE shards from `start` on, those that need attention first; of names with `text`,
    in any case."""
    state = view.state
    broken = [
        *(
            {"name": f.name, "state": "failed", "why": f"{f.error}: {f.message}"}
            for f in state.failed
        ),
        *({"name": name, "state": "corrupt", "why": why} for name, why in state.corrupt),
        *({"name": s.name, "state": "stale", "why": "; ".join(s.differences)} for s in state.stale),
        *({"name": name, "state": "missing", "why": ""} for name in state.missing),
    ]
    keys = {
        "name": lambda m: m.name,
        "worst": lambda m: m.statistics.get("psnr_min", float("inf")),
        "mean": lambda m: m.statistics.get("psnr_mean", float("inf")),
        "skipped": lambda m: m.counts.get(OK, 0) - m.samples,
    }
    if order not in keys:
        raise UsageError(f"order {order!r}: choose {', '.join(keys)}")
    text = text.casefold()
    broken = [entry for entry in broken if text in entry["name"].casefold()]
    done = sorted((m for m in state.done if text in m.name.casefold()), key=keys[order])
    total = len(broken) + len(done)
    shown = (*broken[start : start + PAGE],)
    begin = max(0, start - len(broken))
    shown += tuple(map(shard_entry, done[begin : begin + PAGE - len(shown)]))
    return {"items": shown, "start": start, "total": total}


def shard_entry(manifest: ShardManifest) -> dict[str, Any]:
    statistics = manifest.statistics
    return {
        "name": manifest.name,
        "state": "done",
        "samples": manifest.samples,
        "skipped": manifest.samples - manifest.counts.get(OK, 0),
        "psnr_mean": statistics.get("psnr_mean"),
        "psnr_min": statistics.get("psnr_min"),
    }


# Lists of samples


def list_samples(
    view: View, name: str, query: Query, order: str, start: int, around: int | None
) -> dict[str, Any]:
    """PAGE samples of one shard from `start` on, or those among which the row `around` is."""
    import numpy as np

    manifest = view.manifest(name)
    table = view.table(view.shard(manifest))
    rows = matching(table, query)
    if order not in ORDERS:
        raise UsageError(f"order {order!r}: choose {', '.join(ORDERS)}")
    if order != "row":
        psnr = table.column("psnr").to_numpy()[rows].astype(float)  # NaN where there is none
        rows = rows[np.argsort(psnr if order == "worst" else -psnr, kind="stable")]
    if around is not None:
        found = np.flatnonzero(rows == around)
        start = int(found[0]) // PAGE * PAGE if len(found) else 0
    items = entries(table, name, rows[start : start + PAGE])
    return {"items": items, "start": start, "total": len(rows)}


def scan(view: View, query: Query, shard: str, row: int) -> dict[str, Any]:
    """Up to PAGE samples of all shards, from row `row` of `shard` on, and where to go on (None at
    the end); fewer where it takes longer than SCAN_S. Damaged shards are named and left out."""
    names = list(view.shards)
    at, until = bisect_left(names, shard), time.monotonic() + SCAN_S
    row = row if names[at : at + 1] == [shard] else 0
    items: list[dict[str, Any]] = []
    damaged: list[str] = []
    going_on = None
    while at < len(names) and going_on is None:
        manifest = view.shards[names[at]]
        if may_match(manifest, query):
            try:
                table = view.table(view.shard(manifest))
            except SplatshardError as e:
                damaged.append(str(e))
            else:
                rows = matching(table, query)
                rows = rows[rows >= row]
                taken = rows[: PAGE - len(items)]
                items += entries(table, names[at], taken)
                if len(taken) < len(rows):
                    going_on = [names[at], int(taken[-1]) + 1]
                    break
        at, row = at + 1, 0
        if at < len(names) and (len(items) == PAGE or time.monotonic() > until):
            going_on = [names[at], 0]
    known = {"done": at, "shards": len(names), "damaged": damaged}
    return {"items": items, "next": going_on, **known}


def may_match(manifest: ShardManifest, query: Query) -> bool:
    """Whether a shard may have such samples, by its marker."""
    ok = manifest.counts.get(OK, 0)
    skipped = {"": manifest.samples, "skipped": manifest.samples - ok}
    if not skipped.get(query.status, manifest.counts.get(query.status, 0)):
        return False
    if query.low is None and query.high is None:
        return True
    low, high = (manifest.statistics.get(name) for name in ("psnr_min", "psnr_max"))
    too_low = query.low is not None and high is not None and high < query.low
    too_high = query.high is not None and low is not None and low >= query.high
    return ok > 0 and not too_low and not too_high


def matching(table: Any, query: Query) -> Any:
    """Numbers of the rows that `query` wants, int64 [K], ascending."""
    import numpy as np
    import pyarrow.compute as pc

    from splatshard.pipeline.data.filters import fulfilled, is_ok

    bounds = (("psnr", ">=", query.low), ("psnr", "<", query.high))
    left = fulfilled(table, tuple((c, o, v) for c, o, v in bounds if v is not None))
    if query.status == "skipped":
        left &= ~is_ok(table)
    elif query.status:
        left &= pc.call_function("equal", [table.column("status"), query.status]).to_numpy()
    if query.text:
        options = pc.MatchSubstringOptions(query.text, ignore_case=True)
        there = np.zeros(len(table), bool)
        for name in ("caption", "key"):
            found = pc.call_function("match_substring", [table.column(name)], options)
            there |= found.fill_null(False).to_numpy()
        left &= there
    return np.flatnonzero(left)


def entries(table: Any, name: str, rows: Any) -> list[dict[str, Any]]:
    found = table.take(rows).to_pylist()
    for number, entry in zip(rows.tolist(), found, strict=True):
        entry |= {"shard": name, "row": number, "caption": (entry["caption"] or "")[:CAPTION_CHARS]}
    return found
