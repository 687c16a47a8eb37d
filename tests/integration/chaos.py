"""Conversions that are disturbed on purpose, finished by the same command, and compared.

    disturb -> run again until done -> verify -> compare with the undisturbed run

The source is in S3 behind a fault proxy, and so is DST. All runs of one store share one undisturbed
run. Data names on S3 carry attempt ids, so shards are compared by their markers, but for that name,
and by the bytes that these name. Markers that exist may never change: a finished shard is not
redone. What happened goes into TALLY, which is printed at the end of the tests.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq

from splatshard.jobs import verify as verify_module
from splatshard.pipeline.storage import fs
from tests.integration.faults import FaultPlan, Proxy
from tests.integration.nodes import Nodes
from tests.integration.running import kill_tree, tars
from tests.integration.stores import SECRET_KEY, Store

SHARDS, SAMPLES = 8, 6
RECIPE = (
    *("--image-size=64", "--num-gaussians=100", "--steps=150", "--row-stride=1"),
    "--batch-size=2",
)
"""A fifth of a second per shard, so that a kill finds some done and some not."""

MAX_RUNS = 5
RUN_TIMEOUT_S = 240.0

Shards = dict[str, tuple[dict[str, Any], bytes]]
"""By name: the marker without `data_file`, and the bytes of the data file."""


@dataclass(kw_only=True)
class Arena:
    """Where conversions run: a store behind a proxy, the source in it, an undisturbed run.

    `normal_requests` is how often the undisturbed run asked S3. `nodes` is the cluster that drivers
    join.
    """

    store: Store
    proxy: Proxy
    folder: Path
    nodes: Nodes
    src: str = "s3://source/{00000000..00000007}.tar"
    out: str = "s3://target"
    undisturbed: Shards = field(default_factory=Shards)
    normal_requests: int = 0

    def begin(self, plan: FaultPlan | None = None) -> None:
        """What S3 does from now on: by default, what it should."""
        self.proxy.begin(plan or FaultPlan(), self.store.endpoint)


@dataclass(kw_only=True)
class Moment:
    """One line of the tally: what was done, to whom, how it went on.

    `at` is the number of requests before a strike, `struck` its victim. `exits` are the exit codes
    of all runs, `done_before` the shards that were done after the first, `orphans` the data files
    at the end that nobody needs.
    """

    what: str
    seed: int
    store: str
    at: int = 0
    struck: str = ""
    exits: list[int] = field(default_factory=list[int])
    done_before: int = 0
    retries: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    orphans: int = 0
    seconds: float = 0.0
    ok: bool = False


TALLY: list[Moment] = []


def open_arena(store: Store, proxy: Proxy, folder: Path, nodes: Nodes) -> Arena:
    """The source in bucket `source`, an empty bucket `target`, and the undisturbed run."""
    tars(folder / "in", SHARDS, SAMPLES)
    store.put("source", {path.name: path.read_bytes() for path in sorted(folder.glob("in/*.tar"))})
    store.put("target", {})
    arena = Arena(store=store, proxy=proxy, folder=folder, nodes=nodes)
    arena.begin()
    dst, log = f"{arena.out}/undisturbed", folder / "undisturbed.log"
    assert ended(launch(arena, dst, log=log), log) == 0, tail(log)
    arena.normal_requests = proxy.requests()
    arena.undisturbed = shards(holdings(arena, dst))
    assert len(arena.undisturbed) == SHARDS
    return arena


@contextmanager
def tallied(arena: Arena, what: str, seed: int = 0) -> Iterator[Moment]:
    """A line of the tally; it counts as whole when the block ends without an error."""
    moment = Moment(what=what, seed=seed, store=arena.store.name)
    TALLY.append(moment)
    begun = time.monotonic()
    try:
        yield moment
        moment.ok = True
    finally:
        moment.seconds = time.monotonic() - begun
        moment.faults.update(arena.proxy.faults())
        arena.begin()


# Running


def launch(
    arena: Arena, dst: str, *flags: str, log: Path, alone: bool = False, **environment: str
) -> subprocess.Popen[bytes]:
    """The convert command, on the arena's cluster unless it shall be `alone` with a Ray of its own;
    output is appended to `log`, the summary is its last line."""
    variables = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    variables |= arena.store.environment(arena.proxy.endpoint) | environment
    if not alone:
        variables["RAY_ADDRESS"] = arena.nodes.address
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
    """The JSON line of the last run in `log` that wrote one; empty when none did."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if '{"' in line]
    for line in reversed(lines):
        try:
            return json.loads(line[line.index('{"') :])
        except ValueError:
            continue
    return {}


def finish(arena: Arena, dst: str, moment: Moment, log: Path) -> None:
    """The same command again until it ends well, MAX_RUNS times at most; what was finished before
    stays as it is, and an exit code of 0 is never a lie. Then `compare`."""
    done = markers(arena, dst)
    moment.done_before = len(done)
    code = None
    while code != 0:
        assert 0 not in moment.exits[-1:] or len(done) == SHARDS, f"not all is done:\n{tail(log)}"
        assert len(moment.exits) < MAX_RUNS, f"exit codes {moment.exits}:\n{tail(log)}"
        before = done
        code = ended(launch(arena, dst, "--workers=1", log=log), log)
        moment.exits.append(code)
        done = markers(arena, dst)
        redone = [name for name, marker in before.items() if done.get(name) != marker]
        assert not redone, f"finished shards were redone: {redone}\n{tail(log)}"
        moment.retries.update(summary(log).get("retries", {}))
    moment.orphans = compare(arena, dst)


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
    """Those of `files` that say that a shard is done."""
    return {
        name: data
        for name, data in files.items()
        if name.endswith(".json") and not name.endswith(".failed.json") and name[0] != "_"
    }


def shards(files: dict[str, bytes]) -> Shards:
    """What the markers promise and the data files hold; fails when one does not hold the other."""
    found: Shards = {}
    for name, text in done_markers(files).items():
        marker = json.loads(text)
        data = files[marker.pop("data_file")]
        assert hashlib.sha256(data).hexdigest() == marker["sha256"], name
        found[name.removesuffix(".json")] = marker, data
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
    told = io.StringIO()
    with mock.patch.dict(os.environ, arena.store.environment()):
        fs.use_options({})  # another store's clients are not to be met again
        with redirect_stdout(told), redirect_stderr(told):
            code = verify_module.main([dst])
    fs.use_options({})
    assert code == 0, told.getvalue()[-3000:]


def tally_to_json() -> str:
    """The tally of this process, for the one that prints it."""
    return json.dumps([vars(moment) for moment in TALLY])


def add_to_tally(text: str) -> None:
    """What another process told with `tally_to_json`."""
    for fields in json.loads(text):
        counters = {name: Counter(fields[name]) for name in ("retries", "faults")}
        TALLY.append(Moment(**fields | counters))


def tally_lines() -> list[str]:
    """The tally as a table, and its sums."""
    lines = [
        f"{'what':<10}{'seed':>5} {'store':<6}{'request':>8}  {'exits':<12}{'done':>5}"
        f"{'orphans':>8}{'time':>8}  retries; faults"
    ]
    for m in TALLY:
        at = str(m.at) if m.at else "-"
        told = ", ".join(f"{n} {kind}" for kind, n in (*m.retries.items(), *m.faults.items()))
        lines.append(
            f"{m.what:<10}{m.seed:>5} {m.store:<6}{at:>8}  {' '.join(map(str, m.exits)):<12}"
            f"{m.done_before:>5}{m.orphans:>8}{m.seconds:>6.0f} s  {told}"
            + ("" if m.ok else "  FAILED")
        )
    struck = Counter(m.struck for m in TALLY if m.struck)
    killed = ", ".join(f"{n} {name}" for name, n in sorted(struck.items()))
    faults = sum(sum(m.faults.values()) for m in TALLY)
    whole = sum(m.ok for m in TALLY)
    lines.append(
        f"{whole} of {len(TALLY)} ended whole; struck: {killed}; {faults:,} requests disturbed"
    )
    return lines
