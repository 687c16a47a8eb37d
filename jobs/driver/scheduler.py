"""Which shard is tried next, and what follows when an attempt goes wrong.

Whose fault is it?
- A node that ends takes its workers with it: their shards go back without a count.
- A store that does not answer: the shard waits, longer each time.
- A worker that dies, runs out of memory or hangs: each of its shards is tried again alone at a
  worker. One that kills a worker twice alone is searched for the samples that do it
  (`jobs.driver.bisect`); they are quarantined and the rest is converted. One whose reading kills,
  or that has killed MOST_DEATHS workers, is given up.
- An error that is neither the data's nor a store's: the worker's device or process may be broken,
  or our code. The same, but a shard that meets one twice alone is given up with it, unsearched.

Every shard that goes in comes out once: the driver finishes it, or is told here to give it up.
Parts of it may still be in work then; what becomes of them is of no account (`closed`).

Pure: no Ray; the clock is passed in.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splatshard.jobs.driver.bisect import READ, Bisection
from splatshard.jobs.driver.stats import RetryKind
from splatshard.jobs.driver.worker import Task
from splatshard.schemas.shard import ShardRef

DEATHS_ALONE = 2
"""Times a shard may kill a worker that does nothing else before its samples are searched; or break
it, before the shard is given up."""
MOST_DEATHS = 256
"""Workers that a shard may kill while it is alone: some 20 poison samples among 1,000."""
FUTILE_BISECTS = 2
"""Searches that find no culprit before the shard is given up."""
UNAVAILABLE = 8
"""Times a shard may find a store that does not answer."""
LONGEST_WAIT_S = 60.0

REASONS: dict[RetryKind, str] = {
    "worker_death": "killed its worker: a crash in a decoder or kernel, or the system ran out of "
    "memory",
    "oom": "ran its worker out of memory",
    "hang": "kept its worker busy for longer than --sample-timeout",
}
"""What becomes the error of a quarantined sample: without times or hosts, so that runs agree."""


@dataclass(kw_only=True)
class Trouble:
    """What has gone wrong with one shard."""

    deaths_alone: int = 0
    deaths: int = 0
    errors: int = 0
    unavailable: int = 0
    futile_bisects: int = 0
    bisection: Bisection = field(default_factory=Bisection)
    quarantine: dict[int, str] = field(default_factory=dict)


class Schedule:
    """The tasks that wait, and the troubles of their shards; `closed` have come out.

    `retried(kind, shard, message)` and `tell(line)` hear of what happens.
    """

    def __init__(
        self,
        work: Iterable[ShardRef],
        replaces: Mapping[str, str],
        retried: Callable[[RetryKind, str, str], None],
        tell: Callable[[str], None],
    ) -> None:
        self.job = secrets.token_hex(4)
        self._attempts = itertools.count()
        self._replaces, self._retried, self._tell = replaces, retried, tell
        self.closed: set[str] = set()
        self._troubles: dict[str, Trouble] = {}
        self._later: list[tuple[float, Task]] = []
        self._alone: deque[Task] = deque()
        self._ready = deque(self._task(ref) for ref in work)

    def __len__(self) -> int:
        """Tasks that wait."""
        return len(self._ready) + len(self._alone) + len(self._later)

    @property
    def ready(self) -> int:
        """Tasks that may be given out beside others."""
        return len(self._ready)

    @property
    def suspects(self) -> bool:
        """Whether tasks wait for an idle worker, to be alone at it."""
        return bool(self._alone)

    def take(self, now: float) -> Task | None:
        """The next task for an idle worker."""
        for when, task in [entry for entry in self._later if entry[0] <= now]:
            self._later.remove((when, task))
            self._back(task)
        waiting = self._alone or self._ready
        return waiting.popleft() if waiting else None

    def take_beside(self) -> Task | None:
        """The next task for a worker that has another; none while some wait for an idle worker."""
        return self._ready.popleft() if self._ready and not self._alone else None

    def unavailable(self, task: Task, message: str, now: float) -> bool:
        """A store did not answer: True when the shard will be tried again, False to give it up."""
        trouble = self._trouble(task)
        trouble.unavailable += 1
        if trouble.unavailable > UNAVAILABLE:
            return False
        self._retried("storage", task.ref.name, message)
        pause = min(LONGEST_WAIT_S, 2.0 ** (trouble.unavailable - 1)) * random.uniform(0.5, 1.5)
        self._later.append((now + pause, self._again(task)))
        return True

    def innocent(self, task: Task, kind: RetryKind) -> None:
        """The worker is gone, and not by this task's doing."""
        self._retried(kind, task.ref.name, "its worker is gone")
        self._back(self._again(task))

    def died(self, task: Task, kind: RetryKind, error: str = "") -> str:
        """The worker died at this task, or at one beside it: why to give it up, "" to go on.

        "application" is the kind of an `error` after which the worker is not trusted any more.
        """
        name, trouble = task.ref.name, self._trouble(task)
        trouble.deaths += task.alone
        trouble.errors += task.alone and kind == "application"
        if not task.alone:
            self._retried(kind, name, f"{error or 'may have done it'}; next time alone at a worker")
            self._back(self._again(task, alone=True))
        elif kind == "application" and trouble.errors < DEATHS_ALONE:
            self._retried(kind, name, f"{error}; once more, alone")
            self._back(self._again(task))
        elif kind == "application":
            return error
        elif task.span == READ:
            return (
                f"shard {name}: reading {task.ref.root or task.ref.urls[0]} {REASONS[kind]}; the "
                "source is damaged in a way that its reader does not survive, or a sample of it "
                "does not fit into memory: replace it, or convert it on a larger machine"
            )
        elif trouble.deaths >= MOST_DEATHS:
            return (
                f"shard {name} {REASONS[kind]}, {MOST_DEATHS} times: too many of its samples do it "
                "(is the machine in order?)"
            )
        elif task.span:
            trouble.bisection.died(task.span, REASONS[kind])
            self._bisect_on(task)
        elif trouble.deaths_alone + 1 < DEATHS_ALONE:
            trouble.deaths_alone += 1
            self._retried(kind, name, "once more, alone")
            self._back(self._again(task))
        elif trouble.futile_bisects < FUTILE_BISECTS:
            self._retried(kind, name, "searching for the sample that does it")
            trouble.bisection = Bisection()
            self._bisect_on(task)
        else:
            return (
                f"shard {name} {REASONS[kind]}; no single sample does it alone (fewer --workers "
                "leave each more memory)"
            )
        return ""

    def survived(self, task: Task, tried: int) -> None:
        """A span of a shard, which has `tried` samples, did no harm."""
        assert task.span is not None
        self._trouble(task).bisection.survived(task.span, tried)
        self._bisect_on(task)

    def close(self, task: Task) -> None:
        """Its shard has come out, done or failed: no part of it is tried any more."""
        name = task.ref.name
        self.closed.add(name)
        if self._troubles.pop(name, None):
            self._alone = deque(other for other in self._alone if other.ref.name != name)
            self._later = [entry for entry in self._later if entry[1].ref.name != name]

    def _bisect_on(self, task: Task) -> None:
        """Queue the next spans; once all were tried, the shard without the culprits."""
        trouble, name = self._trouble(task), task.ref.name
        bisection = trouble.bisection
        if not bisection.over:
            self._alone += [self._again(task, span=span) for span in bisection.take()]
            return
        for number, reason in sorted(bisection.found.items()):
            self._tell(f"shard {name}: sample {number} is quarantined: it {reason}")
        trouble.quarantine |= bisection.found
        trouble.futile_bisects += not bisection.found
        trouble.deaths_alone = DEATHS_ALONE - 1 if bisection.found else 0
        self._alone.append(self._again(task, span=None))

    def _back(self, task: Task) -> None:
        """To the front: a shard that was begun is finished first."""
        (self._alone if task.alone else self._ready).appendleft(task)

    def _again(self, task: Task, **changes: Any) -> Task:
        """The same as another attempt; what has been quarantined meanwhile is."""
        changes = {"alone": task.alone, "span": task.span} | changes
        quarantine = tuple(sorted(self._trouble(task).quarantine.items()))
        return self._task(task.ref, quarantine=quarantine, **changes)

    def _task(self, ref: ShardRef, **changes: Any) -> Task:
        attempt = f"{self.job}{next(self._attempts)}"
        replaces = self._replaces.get(ref.name, "")
        return Task(ref=ref, attempt=attempt, replaces=replaces, **changes)

    def _trouble(self, task: Task) -> Trouble:
        return self._troubles.setdefault(task.ref.name, Trouble())
