"""Conversions that are disturbed on purpose, finished by the same command, and compared.

    strike at a seeded moment -> run again until done -> verify -> compare with the undisturbed run

A moment is a share of the time that the undisturbed run took, drawn from its seed, so that it falls
into the start of the workers, between two shards or into a commit alike. What is struck:

    worker    SIGKILL to a worker process that has loaded or is loading
    raylet    SIGKILL to a node's raylet; another node joins, while orphaned workers may still write
    driver    SIGKILL to the driver alone; its workers may still write while the next run begins
    machine   SIGKILL to a driver, its own Ray and all workers at once

The source is in S3 behind a fault proxy, so is DST. All runs of one store share one undisturbed
run; data names on S3 carry attempt ids, so shards are compared by their markers, but for that name,
and by the bytes that these name. Markers that exist may never change: a finished shard is not
redone. What happened goes into TALLY, which is printed at the end of the tests.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.integration.faults import FaultPlan, Proxy
from tests.integration.running import descendants, kill_tree, tars, wait_until
from tests.integration.stores import SECRET_KEY, Store

SHARDS, SAMPLES = 8, 6
RECIPE = (
    *("--image-size=64", "--num-gaussians=100", "--steps=300"),
    *("--batch-size=2", "--workers=2"),
)
"""Half a second per shard, so that a kill finds some done and some not."""

MAX_RUNS = 5
DRAWS = 3
RUN_TIMEOUT_S = 240.0

HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""A dead node is noticed after a second, not after 14."""

Shards = dict[str, tuple[dict[str, Any], bytes]]
"""By name: the marker without `data_file`, and the bytes of the data file."""


@dataclass(kw_only=True)
class Nodes:
    """A Ray cluster in processes of this machine: a head without CPUs and nodes of one CPU."""

    cluster: Any
    environment: dict[str, str]

    def add(self) -> None:
        """One more node; its workers see `environment`."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def workers(self) -> list[int]:
        """Processes of actors, loading or converting, on all nodes."""
        return [
            pid
            for node in self.cluster.worker_nodes
            for pid, command in descendants(raylet(node)).items()
            if "FitActor" in command
        ]


@dataclass(kw_only=True)
class Arena:
    """Where conversions run: a store behind a proxy, the source in it, an undisturbed run.

    `normal_s` is what the undisturbed run took. `nodes` is the cluster that drivers join.
    """

    store: Store
    proxy: Proxy
    folder: Path
    src: str = "s3://source/{00000000..00000007}.tar"
    out: str = "s3://target"
    nodes: Nodes | None = None
    undisturbed: Shards = field(default_factory=Shards)
    normal_s: float = 0.0


@dataclass(kw_only=True)
class Moment:
    """One line of the tally. `struck` names the victim, "" when the run was over by then."""

    what: str
    seed: int
    store: str
    at_s: float = 0.0
    struck: str = ""
    exits: list[int] = field(default_factory=list[int])
    done_before: int = 0
    retries: Counter[str] = field(default_factory=Counter[str])
    faults: dict[str, int] = field(default_factory=dict[str, int])
    orphans: int = 0
    seconds: float = 0.0
    ok: bool = False


TALLY: list[Moment] = []


@contextmanager
def ray_nodes(environment: dict[str, str]) -> Iterator[Nodes]:
    """A cluster of two nodes, in whose processes `environment` is set."""
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": 80 * 2**20,
        "_system_config": HEALTH_CHECKS,
    }
    nodes = Nodes(cluster=Cluster(), environment=environment | quiet)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in nodes.environment.items():
                patch.setenv(name, value)
            nodes.cluster.add_node(**head)
        for _ in range(2):
            nodes.add()
        yield nodes
    finally:
        nodes.cluster.shutdown()
        Path(get_ray_address_file(None)).unlink(missing_ok=True)  # or ray.init() looks for it


def raylet(node: Any) -> int:
    """Process id of a node's raylet."""
    return node.all_processes["raylet"][0].process.pid


def open_arena(store: Store, proxy: Proxy, folder: Path, nodes: Nodes | None = None) -> Arena:
    """The source in bucket `source`, an empty bucket `target`, and the undisturbed run."""
    tars(folder / "in", SHARDS, SAMPLES)
    store.put("source", {path.name: path.read_bytes() for path in sorted(folder.glob("in/*.tar"))})
    store.put("target", {})
    arena = Arena(store=store, proxy=proxy, folder=folder, nodes=nodes)
    proxy.begin(FaultPlan(), store.endpoint)
    log = folder / "undisturbed.log"
    for name in ("warming-up", "undisturbed"):  # the first may have kernels to compile
        begun = time.monotonic()
        dst = f"{arena.out}/{name}"
        assert ended(launch(arena, dst, log=log), log) == 0, tail(log)
        arena.normal_s = time.monotonic() - begun
    arena.undisturbed = shards(holdings(arena, dst))
    assert len(arena.undisturbed) == SHARDS
    return arena


# Running


def launch(
    arena: Arena, dst: str, *flags: str, log: Path, alone: bool = False, **environment: str
) -> subprocess.Popen[bytes]:
    """The convert command, on the arena's cluster unless it shall be `alone` with a Ray of its own;
    output is appended to `log`, the summary is its last line."""
    variables = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    variables |= arena.store.environment(arena.proxy.endpoint) | environment
    if arena.nodes and not alone:
        variables["RAY_ADDRESS"] = arena.nodes.cluster.address
    command = [sys.executable, "-m", "jobs", "convert", arena.src, dst, *RECIPE, *flags, "--json"]
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, env=variables, start_new_session=True
        )


def ended(process: subprocess.Popen[bytes], log: Path) -> int:
    """The exit code; fails with the log when there is none in time, or when it shows a secret."""
    try:
        code = process.wait(RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise AssertionError(f"still running after {RUN_TIMEOUT_S} s:\n{tail(log)}") from None
    text = log.read_text(errors="replace")
    assert SECRET_KEY not in text, f"the secret key is in {log}"
    assert "Traceback" not in text, tail(log)
    return code


def tail(log: Path) -> str:
    """The end of a log, for messages."""
    return log.read_text(errors="replace")[-6000:]


def summary(log: Path) -> dict[str, Any]:
    """The JSON line of the last run in `log`; empty when it did not get that far."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if '{"' in line]
    for line in reversed(lines):
        try:
            return json.loads(line[line.index('{"') :])
        except ValueError:
            continue
    return {}


def finish(arena: Arena, dst: str, moment: Moment, log: Path) -> None:
    """The same command until it says that all is done, MAX_RUNS times at most; what was finished
    before each stays as it is."""
    while moment.exits[-1:] != [0] or len(moment.exits) < 2:
        assert len(moment.exits) < MAX_RUNS, f"exit codes {moment.exits}:\n{tail(log)}"
        before = markers(arena, dst)
        moment.exits.append(ended(launch(arena, dst, log=log), log))
        after = markers(arena, dst)
        redone = [name for name, marker in before.items() if after.get(name) != marker]
        assert not redone, f"finished shards were redone: {redone}\n{tail(log)}"
        moment.retries.update(summary(log).get("retries", {}))


# Looking


def holdings(arena: Arena, dst: str, contents: str = "") -> dict[str, bytes]:
    """All files in DST by relative name, fetched past the proxy; contents as `Store.objects`."""
    if dst.startswith("s3://"):
        return arena.store.objects(dst, contents)
    return {
        str(path.relative_to(dst)): path.read_bytes()
        for path in sorted(Path(dst).rglob("*"))
        if path.is_file()
    }


def markers(arena: Arena, dst: str) -> dict[str, bytes]:
    """The done markers in DST."""
    return done_markers(holdings(arena, dst, contents=".json"))


def done_markers(files: dict[str, bytes]) -> dict[str, bytes]:
    return {
        name: data
        for name, data in files.items()
        if name.endswith(".json") and not name.endswith(".failed.json") and name[0] != "_"
    }


def shards(files: dict[str, bytes]) -> Shards:
    """What the markers promise and the data files hold."""
    found: Shards = {}
    for name, text in done_markers(files).items():
        marker = json.loads(text)
        found[name.removesuffix(".json")] = marker, files[marker.pop("data_file")]
    return found


def keys(found: Shards) -> Counter[str]:
    """How often each sample's key occurs."""
    return Counter(
        key
        for _, data in found.values()
        for key in pq.read_table(io.BytesIO(data), columns=["key"])["key"].to_pylist()
    )


def compare(arena: Arena, dst: str) -> int:
    """Nothing lost, nothing doubled, bytes as those of the undisturbed run, and `verify` agrees;
    returns the number of data files that nobody needs."""
    files = holdings(arena, dst)
    found = shards(files)
    assert sorted(found) == sorted(arena.undisturbed)
    assert set(keys(found).values()) == {1}
    assert len(keys(found)) == SHARDS * SAMPLES
    different = [name for name in found if found[name] != arena.undisturbed[name]]
    assert not different, f"other bytes than the undisturbed run: {different}"
    assert not [name for name in files if name.endswith(".failed.json")]
    secrets = [name for name, data in files.items() if SECRET_KEY.encode() in data]
    assert not secrets, f"the secret key is in {secrets}"
    verify(arena, dst)
    return sum(name.endswith(".parquet") for name in files) - SHARDS


def verify(arena: Arena, dst: str) -> None:
    """`splatshard verify` finds nothing wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "verify", dst, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | arena.store.environment(),
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Disturbing


def ordeal(arena: Arena, what: str, seed: int, plan: FaultPlan | None = None) -> Moment:
    """Strike one conversion, finish it, compare; `plan` is what S3 does meanwhile.

    A run that was over before its moment is repeated, with another moment of the same seed.
    """
    chance = random.Random(seed)
    moment = Moment(what=what, seed=seed, store=arena.store.name)
    TALLY.append(moment)
    log = arena.folder / f"{what}-{seed}.log"
    begun = time.monotonic()
    for draw in range(DRAWS):
        dst = f"{arena.out}/{what}-{seed}-{draw}"
        arena.proxy.begin(plan or FaultPlan(), arena.store.endpoint)
        moment.exits = [struck_run(arena, dst, moment, chance, log)]
        if moment.struck or what not in STRIKES:
            break
    if what in ("worker", "raylet") and plan is None:
        assert moment.exits == [0], tail(log)
    moment.retries.update(summary(log).get("retries", {}))
    moment.done_before = len(markers(arena, dst))
    finish(arena, dst, moment, log)
    moment.faults = arena.proxy.faults()
    arena.proxy.begin(FaultPlan())
    moment.orphans = compare(arena, dst)
    moment.seconds, moment.ok = time.monotonic() - begun, True
    return moment


def struck_run(arena: Arena, dst: str, moment: Moment, chance: random.Random, log: Path) -> int:
    """One run, struck at a moment if `moment.what` is a strike; its exit code."""
    begun = time.monotonic()
    process = launch(arena, dst, log=log, alone=moment.what == "machine")
    if moment.what in STRIKES:
        moment.at_s = chance.uniform(0.05, 0.95) * arena.normal_s
        try:
            process.wait(moment.at_s)
        except subprocess.TimeoutExpired:
            moment.struck = STRIKES[moment.what](arena, process, chance)
    code = ended(process, log)
    if not moment.struck:
        arena.normal_s = min(arena.normal_s, time.monotonic() - begun)
    return code


def strike_worker(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """SIGKILL to one of the workers, as soon as there is one."""
    assert arena.nodes
    found = wait_until(
        lambda: arena.nodes.workers() or process.poll() is not None, "a worker, or the end"
    )
    return "" if found is True else kill(chance.choice(found), "worker")


def strike_raylet(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """SIGKILL to the raylet of one node; another node takes its place after up to two seconds."""
    assert arena.nodes
    cluster = arena.nodes.cluster
    node = chance.choice(sorted(cluster.worker_nodes, key=raylet))
    struck = kill(raylet(node), "raylet")
    time.sleep(chance.uniform(0, 2))
    cluster.remove_node(node, allow_graceful=False)  # its agents; it is dead already
    arena.nodes.add()
    return struck


def strike_driver(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """SIGKILL to the driver alone."""
    return kill(process.pid, "driver")


def strike_machine(arena: Arena, process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """SIGKILL to a driver and all below it."""
    kill_tree(process)
    return "machine"


def kill(pid: int, name: str) -> str:
    """`name`, or "" when the process had ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    return name


STRIKES: dict[str, Callable[[Arena, subprocess.Popen[bytes], random.Random], str]] = {
    "worker": strike_worker,
    "raylet": strike_raylet,
    "driver": strike_driver,
    "machine": strike_machine,
}


def tally_lines() -> list[str]:
    """The tally as a table, and its sums."""
    lines = [
        f"{'what':<9}{'seed':>5} {'store':<6}{'at':>7}  {'exits':<12}{'done':>5}"
        f"{'orphans':>8}{'time':>8}  retries; faults"
    ]
    for m in TALLY:
        what = m.what if m.struck or m.what not in STRIKES else f"({m.what})"
        at = f"{m.at_s:.1f} s" if m.at_s else "-"
        told = ", ".join(f"{n} {kind}" for kind, n in (*m.retries.items(), *m.faults.items()))
        lines.append(
            f"{what:<9}{m.seed:>5} {m.store:<6}{at:>7}  {' '.join(map(str, m.exits)):<12}"
            f"{m.done_before:>5}{m.orphans:>8}{m.seconds:>6.0f} s  {told}"
            + ("" if m.ok else "  FAILED")
        )
    struck = Counter(m.struck for m in TALLY if m.struck)
    faults = sum((Counter(m.faults) for m in TALLY), Counter[str]())
    kept = sum(m.ok for m in TALLY)
    lines.append(
        f"{kept} of {len(TALLY)} ended whole: "
        + ", ".join(f"{n} killed {name}" for name, n in sorted(struck.items()))
        + f"; {sum(faults.values())} requests disturbed; (in brackets): over before the strike"
    )
    return lines
