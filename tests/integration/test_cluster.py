"""A cluster that grows and shrinks under a job: --workers auto follows it, a drain is obeyed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.nodes import Nodes, ray_nodes
from tests.integration.running import LONG, assert_verified, tars, wait_until

pytestmark = pytest.mark.integration

SLOW = [flag for flag in LONG if not flag.startswith("--workers")]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ray_nodes({}, number=1) as cluster:
        yield cluster


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
    src, dst, log = tars(tmp_path / "in", shards=28, samples=8), tmp_path / "out", tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "jobs",
        "convert",
        src,
        str(dst),
        *SLOW,
        "--json",
        "--log-format=json",
    ]
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    with log.open("wb") as stream:
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, env=environment)
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
        out, _ = job.communicate(timeout=240)
    finally:
        job.kill()
        job.communicate()
    assert job.returncode == 0, log.read_text()
    found = json.loads(out.splitlines()[-1])
    assert (found["shards_done"], found["retries"], found["workers"]) == (28, {}, 2)
    assert assert_verified(capsys, dst)["shards_done"] == 28
