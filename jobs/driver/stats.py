"""The figures of a running conversion: one `Snapshot` from which every display derives.

Images are those of committed shards plus those of shards in work; a shard lost with its worker
leaves the totals again. All totals run along, so that a snapshot costs the same after 100,000
shards as after one. Rates are of the last while: what a cluster does now, not what it did when it
was half as large. Images come in batches, on a slow machine one a minute: so the while is RECENT_S,
or as long as ROUNDS batches of each worker take, and it ends with a batch. It begins with one, too,
since the first has waited for kernels to be compiled.

How many samples a tar holds is unknown until it is read; what is left of such shards comes from
their source bytes, at the samples per byte of those already done. Files of a folder are counted.

Pure: no Ray, no clock of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from splatshard.jobs.driver.worker import Counters, WorkerState
from splatshard.schemas.shard import OK, ShardManifest, ShardRef

RetryKind = Literal[
    "application", "worker_death", "node_death", "oom", "hang", "storage", "preempted"
]

RECENT_S = 30.0
ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A conversion at one moment; shards and images are those of this run.

    images: samples read, skipped ones included. ok: those with splats. images_committed,
    payload_bytes and skipped (by status) count finished shards only. images_per_s: of the last
    while; None before each worker has done its second batch. images_per_s_mean: since the first
    worker was ready. busy: share of the last RECENT_S
    in which a worker was busy with a stage, mean over workers. queued: batches that wait, by stage.
    psnr_mean is in dB. fraction: finished share of the images; None while their number is unknown.
    """

    shards: int = 0
    shards_done: int = 0
    shards_failed: int = 0
    shards_in_work: int = 0
    images: int = 0
    ok: int = 0
    images_committed: int = 0
    payload_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    psnr_mean: float | None = None
    images_per_s: float | None = None
    images_per_s_mean: float = 0.0
    fraction: float | None = None
    eta_s: float | None = None
    busy: dict[str, float] = field(default_factory=dict)
    queued: dict[str, int] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    workers: int = 0
    backend: str = ""


class Batched(NamedTuple):
    """So many images had come by then, in so many batches."""

    when: float
    images: int
    batches: int


class Stats:
    """Counts what workers and outcomes tell; times are monotonic seconds."""

    def __init__(self, work: Sequence[ShardRef], done_before: Sequence[ShardManifest]) -> None:
        self.retries: Counter[str] = Counter()
        self._shards = len(work)
        self._left = Counter(samples=0, source_bytes=0)
        for ref in work:
            self._left.update(_weight(ref))
        self._known = Counter(samples=0, source_bytes=0)
        for manifest in done_before:
            self._learn(manifest)
        self._done: Counter[str] = Counter()
        self._psnr_sum = 0.0
        self._skipped: Counter[str] = Counter()
        self._finished: set[str] = set()
        self._failed = 0
        self._in_work: dict[str, Counters] = {}
        self._queued: dict[str, int] = {}
        self._timers: dict[str, float] = {}
        self._ready: float | None = None
        self._grown: dict[str, float] = defaultdict(float)
        self._recent: deque[tuple[float, dict[str, float]]] = deque()
        self._workers = 1
        self._images = self._batches = 0
        self._batched: deque[Batched] = deque()

    @property
    def ready(self) -> bool:
        """Whether a worker has loaded."""
        return self._ready is not None

    def worker_ready(self, now: float) -> None:
        """Rates count from the first one."""
        if self._ready is None:
            self._ready = now
            self._recent.append((now, self._grown.copy()))

    def finished(self, ref: ShardRef, manifest: ShardManifest | None) -> None:
        """A shard was committed or, without a manifest, marked failed."""
        seen = self._in_work.pop(ref.name, None)
        self._finished.add(ref.name)
        self._left.subtract(_weight(ref))
        if manifest is None:
            self._failed += 1
            return
        self._learn(manifest)
        ok = manifest.counts.get(OK, 0)
        payload = int(manifest.statistics.get("payload_bytes", 0))
        self._done.update(shards=1, images=manifest.samples, ok=ok, payload_bytes=payload)
        self._psnr_sum += manifest.statistics.get("psnr_mean", 0.0) * ok
        self._skipped.update({s: n for s, n in manifest.counts.items() if s != OK and n})
        self._grow(manifest.samples - (seen.samples if seen else 0))

    def retried(self, kind: RetryKind, shard: str) -> None:
        """What was in work of the shard is lost."""
        self.retries[kind] += 1
        self._in_work.pop(shard, None)

    def update(self, states: Sequence[WorkerState], now: float) -> None:
        """The polled states of all live workers.

        A shard that no worker mentions keeps its counters until it is finished or retried: its
        result is on the way. One that is finished is ignored: the poll was older.
        """
        for counters in (c for state in states for c in state.shards):
            if counters.shard not in self._finished:
                seen = self._in_work.get(counters.shard)
                self._grow(counters.samples - (seen.samples if seen else 0))
                self._in_work[counters.shard] = counters
        queued: Counter[str] = Counter()
        timers: dict[str, float] = defaultdict(float)
        for state in states:
            queued.update(state.stage_stats.queued)
            timers["up"] += state.stage_stats.up_s
            for stage, seconds in state.stage_stats.busy_s.items():
                timers[f"busy {stage}"] += seconds
        self._queued = dict(queued)
        if all(timers[name] >= seconds for name, seconds in self._timers.items()):
            for name, seconds in timers.items():
                self._grown[name] += seconds - self._timers.get(name, 0.0)
        self._timers = timers  # where one went back, a worker has left: no figures of this moment
        self._workers = max(1, sum(bool(state.shards) for state in states))
        if self._batches > (self._batched[-1].batches if self._batched else 0):
            self._batched.append(Batched(now, self._images, self._batches))
        while len(self._batched) > 1 and self._enough(self._batched[1], now):
            self._batched.popleft()
        if self.ready:
            self._recent.append((now, self._grown.copy()))
            while self._recent[1][0] <= now - RECENT_S:
                self._recent.popleft()

    def snapshot(self, now: float, workers: int, backend: str) -> Snapshot:
        """The figures; `now` is that of the latest update."""
        in_work = self._in_work.values()
        images = self._done["images"] + sum(c.samples for c in in_work)
        ok = self._done["ok"] + sum(c.ok for c in in_work)
        psnr_sum = self._psnr_sum + sum(c.psnr_sum for c in in_work)
        mean = images / max(now - self._ready, 1e-9) if self._ready is not None else 0.0
        recent = self._rates()
        total = self._expected()
        rate, up = self._rate(now), recent.get("up", 0.0)
        return Snapshot(
            shards=self._shards,
            shards_done=self._done["shards"],
            shards_failed=self._failed,
            shards_in_work=len(self._in_work),
            images=images,
            ok=ok,
            images_committed=self._done["images"],
            payload_bytes=self._done["payload_bytes"],
            skipped=dict(self._skipped),
            psnr_mean=psnr_sum / ok if ok else None,
            images_per_s=rate,
            images_per_s_mean=mean,
            fraction=min(1.0, images / total) if total else None,
            eta_s=max(0.0, total - images) / rate if total and rate else None,
            busy={
                name.removeprefix("busy "): min(1.0, share / up)
                for name, share in recent.items()
                if name.startswith("busy ") and up
            },
            queued=self._queued,
            retries=dict(self.retries),
            workers=workers,
            backend=backend,
        )

    def _grow(self, images: int) -> None:
        """A batch has come, of so many."""
        if images > 0:
            self._images += images
            self._batches += 1

    def _enough(self, begin: Batched, now: float) -> bool:
        """Whether a while that begins there is long enough."""
        rounds = (self._batches - begin.batches) / self._workers
        return begin.when <= now - RECENT_S and rounds >= ROUNDS

    def _rate(self, now: float) -> float | None:
        """Images per second over the last whole rounds, or until now where the next batch is late.
        Whole ones, since workers that began together come together."""
        if not self._batched:
            return None
        end = self._batched[-1]
        rounds = (end.batches - self._batched[0].batches) // self._workers
        if rounds < 1:
            return None
        wanted = end.batches - rounds * self._workers
        begin = next(entry for entry in self._batched if entry.batches >= wanted)
        seconds = end.when - begin.when
        late = max(0.0, now - end.when - seconds / rounds)
        return (end.images - begin.images) / max(seconds + late, 1e-9)

    def _rates(self) -> dict[str, float]:
        """Growth per second of the workers' clocks in the last RECENT_S."""
        if len(self._recent) < 2:
            return {}
        (begin, before), (end, after) = self._recent[0], self._recent[-1]
        seconds = max(end - begin, 1e-9)
        return {name: (now - before.get(name, 0.0)) / seconds for name, now in after.items()}

    def _expected(self) -> float | None:
        """Samples of all shards of this run that did not fail; None while it cannot be known."""
        unknown = 0.0
        if self._left["unknown"]:
            return None
        if self._left["source_bytes"]:
            if not self._known["source_bytes"]:
                return None
            per_byte = self._known["samples"] / self._known["source_bytes"]
            unknown = self._left["source_bytes"] * per_byte
        return self._done["images"] + self._left["samples"] + unknown

    def _learn(self, manifest: ShardManifest) -> None:
        source = manifest.inputs["source"]
        if source.get("limit") is None and (size := source.get("size_bytes")) is not None:
            self._known.update(samples=manifest.samples, source_bytes=size)


def _weight(ref: ShardRef) -> Mapping[str, int]:
    """How much there is to convert: in samples where these are known, else in source bytes, unless
    a web server does not tell them."""
    if ref.limit is not None:
        return {"samples": ref.limit}
    if ref.kind == "folder":
        return {"samples": len(ref.urls)}
    return {"source_bytes": ref.size_bytes} if ref.size_bytes else {"unknown": 1}
