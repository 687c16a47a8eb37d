"""Processes killed at seeded moments of a conversion.

    worker     SIGKILL to a worker process, loading or converting
    raylet     SIGKILL to a node's raylet; another node joins, orphaned workers may still write
    partition  a node with its workers stands still until it is given up, then goes on writing
    driver     SIGKILL to the driver alone; its workers may still write while the next run begins
    machine    SIGKILL to a driver, its own Ray and all workers at once

A moment is a request to S3, of those that the undisturbed run took, and up to 0.4 s after it, both
drawn from the seed. So moments crowd where jobs read and commit, on a slow machine as on a fast
one; seconds from the start would nearly all fall into the loading of the workers.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.integration.chaos import Arena, Moment, ended, finish, launch, summary, tail, tallied
from tests.integration.faults import FaultPlan
from tests.integration.nodes import raylet, workers
from tests.integration.running import kill_tree, wait_until

DRAWS = 3
"""Moments tried until one comes before the end of the run."""


def ordeal(arena: Arena, what: str, seed: int, plan: FaultPlan | None = None) -> Moment:
    """Strike one conversion, finish it, compare; `plan` is what S3 does meanwhile.

    The driver survives the end of workers and nodes. A run that was over before its moment is
    repeated, with another moment of the same seed.
    """
    chance = random.Random(seed)
    log = arena.folder / f"{what}-{seed}.log"
    with tallied(arena, what, seed) as moment:
        for draw in range(DRAWS):
            dst = f"{arena.out}/{what}-{seed}-{draw}"
            arena.begin(plan)
            moment.exits = [struck_run(arena, dst, moment, chance, log)]
            if moment.struck:
                break
        if what not in ("driver", "machine"):
            assert moment.exits == [0], tail(log)
        moment.retries.update(summary(log).get("retries", {}))
        finish(arena, dst, moment, log)
    return moment


def struck_run(arena: Arena, dst: str, moment: Moment, chance: random.Random, log: Path) -> int:
    """One run, struck at a moment that `chance` draws; its exit code."""
    moment.at, later_s = chance.randint(1, arena.normal_requests), chance.choice((0, 0.1, 0.4))
    process = launch(arena, dst, log=log, alone=moment.what == "machine")
    while arena.proxy.requests() < moment.at and process.poll() is None:
        time.sleep(0.005)
    with suppress(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0, later_s))
    if process.returncode is None and STRIKES[moment.what](arena, process, chance):
        moment.struck = moment.what
    return ended(process, log)


Strike = Callable[[Arena, subprocess.Popen[bytes], random.Random], bool]
"""Strikes, and returns whether there was still something to strike."""


def strike_worker(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """One of the workers, as soon as there is one."""

    def found() -> list[int]:
        return [pid for node in arena.nodes.members() for pid in workers(node)]

    wait_until(lambda: found() or process.poll() is not None, "a worker, or the end")
    victims = found()
    return bool(victims) and kill(chance.choice(victims))


def strike_raylet(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """One node; another takes its place after up to two seconds."""
    node = chance.choice(arena.nodes.members())
    struck = kill(raylet(node))
    time.sleep(chance.uniform(0, 2))
    arena.nodes.remove(node)
    arena.nodes.add()
    return struck


def strike_partition(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """One node stands still for longer than the health checks have patience, then goes on."""
    node = chance.choice(arena.nodes.members())
    frozen = (raylet(node), *workers(node))
    for pid in frozen:
        kill(pid, signal.SIGSTOP)
    arena.nodes.add()
    time.sleep(chance.uniform(1, 4))
    for pid in frozen:
        kill(pid, signal.SIGCONT)
    time.sleep(chance.uniform(0, 2))
    arena.nodes.remove(node)
    return process.poll() is None


def strike_driver(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """The driver alone."""
    return kill(process.pid)


def strike_machine(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """A driver and all below it."""
    kill_tree(process)
    return True


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Whether there was such a process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


STRIKES: dict[str, Strike] = {
    "worker": strike_worker,
    "raylet": strike_raylet,
    "driver": strike_driver,
    "machine": strike_machine,
    "partition": strike_partition,
}
