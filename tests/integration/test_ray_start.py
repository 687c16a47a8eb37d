"""A Ray that a job starts or joins, on machines as users have them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.running import SMALL, kill_tree, tars, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.ray]

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With an empty home, and nothing about Ray."""
    (tmp_path / "home").mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {"HOME": str(tmp_path / "home"), "RAY_USAGE_STATS_ENABLED": "0"}


def convert(folder: Path, name: str, environment: dict[str, str]) -> str:
    """Standard error of a conversion that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "convert", f"{folder}/in/*.tar", f"{folder}/{name}", *SMALL],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_long_tmpdir_and_no_home(tmp_path: Path, environment: dict[str, str]) -> None:
    """Without a home Ray could not keep a token, either."""
    tars(tmp_path / "in", shards=1)
    long = tmp_path / "slurm_jobdir/13557001/projects/experiment/node-local" / ("x" * 60)
    long.mkdir(parents=True)
    before = set(Path("/tmp").glob("splatshard-ray-*"))
    convert(tmp_path, "out", environment | {"HOME": "/proc/nowhere", "TMPDIR": str(long)})
    assert set(Path("/tmp").glob("splatshard-ray-*")) <= before


def free_ports(number: int) -> list[int]:
    """That nobody listens at now."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]


@pytest.fixture
def head(tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
    """Address of a Ray that was started with a token in the home."""
    port, *others = free_ports(3)
    subprocess.run(
        [RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True
    )
    command = [
        *(RAY, "start", "--head", "--block", "--num-cpus=1", f"--port={port}"),
        *("--include-dashboard=false", "--object-store-memory=80000000"),
        f"--ray-client-server-port={others[0]}",
        f"--dashboard-agent-listen-port={others[1]}",
    ]
    log = tmp_path / "head.log"
    with log.open("wb") as stream:
        started = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        wait_until(lambda: b"Ray runtime started" in log.read_bytes(), "the head starts")
        yield f"127.0.0.1:{port}"
    finally:
        kill_tree(started)  # asked to end it takes half a minute


def test_a_cluster_that_wants_a_token_is_joined_with_it(
    tmp_path: Path, environment: dict[str, str], head: str
) -> None:
    assert (tmp_path / "home/.ray/auth_token").exists()
    tars(tmp_path / "in", shards=1)
    told = convert(tmp_path, "joined", environment | {"RAY_ADDRESS": head})
    assert "InvalidAuthToken" not in told
