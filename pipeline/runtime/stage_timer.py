"""What a worker is doing: busy seconds per stage, and what has been running for how long.

`convert_shard` enters a stage around each piece of work; another thread takes a `StageStats` of it.
The driver shows these figures, and takes a worker for hung when one piece of work runs too long for
the samples it covers.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("read", "decode", "fit", "pack", "publish")


@dataclass(frozen=True, kw_only=True)
class StageStats:
    """A clock at one moment.

    busy_s: seconds, by stage, in which at least one thread was in it, since the clock's start.
    up_s: seconds since the clock's start. slowest_s: of all work running now, the longest, in
    seconds per sample it covers; slowest: its stage. queued: batches that wait, by what for.
    """

    busy_s: dict[str, float] = field(default_factory=dict)
    up_s: float = 0.0
    slowest_s: float = 0.0
    slowest: str = ""
    queued: dict[str, int] = field(default_factory=dict)


class StageTimer:
    """Times stages on any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._running: dict[object, tuple[str, int, float]] = {}
        self._threads: Counter[str] = Counter()
        self._entered: dict[str, float] = {}
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._queued: Counter[str] = Counter()

    @contextmanager
    def stage(self, name: str, samples: int = 1) -> Iterator[None]:
        """The block is work of that stage on so many samples."""
        token = object()
        with self._lock:
            now = time.monotonic()
            self._running[token] = name, samples, now
            self._threads[name] += 1
            if self._threads[name] == 1:
                self._entered[name] = now
        try:
            yield
        finally:
            with self._lock:
                del self._running[token]
                self._threads[name] -= 1
                if self._threads[name] == 0:
                    self._busy[name] += time.monotonic() - self._entered[name]

    def queue(self, name: str, change: int) -> None:
        """`change` batches more, or fewer, wait for the stage `name`."""
        with self._lock:
            self._queued[name] += change

    def stage_stats(self) -> StageStats:
        """The state now; from any thread."""
        with self._lock:
            now = time.monotonic()
            busy = dict(self._busy)
            for name, threads in self._threads.items():
                if threads:
                    busy[name] = busy.get(name, 0.0) + now - self._entered[name]
            each = [
                ((now - since) / samples, name) for name, samples, since in self._running.values()
            ]
            slowest_s, slowest = max(each, default=(0.0, ""))
            return StageStats(
                busy_s=busy,
                up_s=now - self._begin,
                slowest_s=slowest_s,
                slowest=slowest,
                queued=dict(self._queued),
            )
