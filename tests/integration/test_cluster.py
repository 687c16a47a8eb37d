"""A cluster that grows and shrinks under a job: --workers auto follows it, a drain is obeyed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.nodes import Nodes, ray_nodes
from tests.integration.running import SMALL, assert_verified, tars, wait_until
from tests.web import Quiet, served

pytestmark = pytest.mark.integration

SHARDS = 60
FLAGS = [flag for flag in SMALL if not flag.startswith("--workers")]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ray_nodes({}, number=1) as cluster:
        yield cluster


@contextmanager
def slow_source(folder: Path, hurry: threading.Event) -> Iterator[str]:
    """`folder` over HTTP, three seconds for each file until `hurry` is set: a job that lasts as
    long as it must, and keeps no core busy meanwhile."""

    class Slow(Quiet):
        def do_GET(self) -> None:
            hurry.wait(3)
            super().do_GET()

    with served(folder, Slow) as address:
        yield address


def drain(address: str, node_id: str) -> None:
    """Tell the cluster that a node will end in ten minutes, as a cloud's spot notice does."""
    from ray._raylet import GcsClient

    deadline_ms = int((time.time() + 600) * 1000)
    reason = 2  # preemption
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "test", deadline_ms)
    assert accepted, why


def progress(dst: Path) -> dict[str, Any]:
    path = dst / "_progress.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_workers_follow_the_nodes(
    nodes: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars(tmp_path / "in", shards=SHARDS, samples=1)
    dst, log, hurry = tmp_path / "out", tmp_path / "log", threading.Event()
    with slow_source(tmp_path / "in", hurry) as url, log.open("wb") as stream:
        src = f"{url}/{{{0:08d}..{SHARDS - 1:08d}}}.tar"
        job = subprocess.Popen(
            [
                *(sys.executable, "-m", "jobs", "convert", src, str(dst), *FLAGS),
                *("--json", "--log-format=json"),
            ],
            stdout=subprocess.PIPE,
            stderr=stream,
            env=os.environ | {"RAY_ADDRESS": nodes.address},
        )
        try:
            wait_until(lambda: progress(dst).get("images"), "the first node works")
            assert progress(dst)["workers"] == 1
            first = nodes.members()[0]
            nodes.add()
            wait_until(lambda: progress(dst).get("workers") == 2, "the second node has a worker")
            drain(nodes.address, first.node_id)
            wait_until(lambda: "is draining" in log.read_text(), "the drain is noticed")
            left = "a worker leaves: its node is draining"
            wait_until(lambda: left in log.read_text(), "the drained node's worker leaves")
            hurry.set()
            out, _ = job.communicate(timeout=240)
        finally:
            job.kill()
            job.communicate()
    assert job.returncode == 0, log.read_text()
    found = json.loads(out.splitlines()[-1])
    assert (found["shards_done"], found["retries"], found["workers"]) == (SHARDS, {}, 2)
    assert assert_verified(capsys, dst)["shards_done"] == SHARDS
