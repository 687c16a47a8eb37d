"""Which Ray a job starts or joins, and how: folders, addresses, tokens; when it is given up. No Ray
runs here."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import ray._private.worker
from ray._private.node import Node

from splatshard.jobs.driver import cluster, session
from splatshard.jobs.driver.cluster import HEAD_S, check_alive
from splatshard.jobs.driver.session import (
    LONGEST_TMPDIR,
    MODE,
    TOKEN,
    authentication,
    mode_of,
    only_what_converts,
    ray_session,
    short_folder,
    submission_id,
)
from splatshard.schemas.errors import BackendError, UnavailableError, UsageError

MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def bare(monkeypatch: MonkeyPatch) -> None:
    """Nothing in the environment says anything about Ray."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", MODE, TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)


def test_what_does_nothing_on_one_machine_is_not_started(monkeypatch: MonkeyPatch) -> None:
    names = ("start_monitor", "start_log_monitor", "start_api_server")
    before = [getattr(Node, name) for name in names]
    node: Any = SimpleNamespace()
    with only_what_converts():
        Node.start_monitor(node)
        Node.start_log_monitor(node)
        Node.start_api_server(node, include_dashboard=False, raise_on_failure=False)
    assert vars(node) == {"_webui_url": ""}
    monkeypatch.setenv("SPLATSHARD_DEBUG", "1")
    with only_what_converts():
        assert Node.start_log_monitor is before[1]
    assert [getattr(Node, name) for name in names] == before


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_tmpdir_is_not_for_sockets(variable: str, monkeypatch: MonkeyPatch) -> None:
    longest_socket = "/ray/session_2026-11-30_23-59-59_999999_4194304/sockets/plasma_store.999"
    assert LONGEST_TMPDIR + len(longest_socket) <= 107
    monkeypatch.setattr(session.os, "access", lambda path, mode: True)
    monkeypatch.setenv(variable, "/" + "x" * (LONGEST_TMPDIR - 1))
    with short_folder() as folder:
        assert folder is None
    monkeypatch.setenv(variable, "/" + "x" * LONGEST_TMPDIR)
    with short_folder() as folder:
        assert folder is not None
        assert len(folder) <= LONGEST_TMPDIR
        assert os.stat(folder).st_mode & 0o777 == 0o700
    assert not os.path.exists(folder)
    monkeypatch.setenv(variable, "/jürgen")  # Ray's C++ takes no such path
    with short_folder() as folder:
        assert folder is not None


def test_a_tmpdir_that_cannot_be_written_is_not_for_ray(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with short_folder() as folder:
        assert folder is not None
    monkeypatch.setattr(session, "SHORT", "/neither")
    with pytest.raises(BackendError, match=r"nowhere is too long, .* can /neither .* RAY_TMPDIR"):
        short_folder().__enter__()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            Exception("The current node timed out during startup. This could"),
            "Ray cannot start: its processes were not up within 30 s; is the machine very busy",
        ),
        (OSError(28, "No space left"), r"cannot start: OSError: .* left \(RAY_TMPDIR, .* writes"),
    ],
)
def test_a_ray_that_does_not_start(error: Exception, words: str, monkeypatch: MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        assert len(os.environ[TOKEN]) == 64  # or Ray would write one into the home
        raise error

    monkeypatch.setattr(session.ray, "init", refuse)
    with pytest.raises(BackendError, match=words), ray_session(1):
        pass
    assert TOKEN not in os.environ


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "ray job submit .* --working-dir . -- python -m splatshard.jobs"),
        ("ray://head:10001", r"host:port of the head, such as 10.0.0.5:6379"),
        ("nonsense", "RAY_ADDRESS=nonsense: give auto or host:port"),
        ("auto", "RAY_ADDRESS=auto: no Ray runs on this machine: ray start"),
    ],
)
def test_what_is_no_address_of_a_ray(address: str, words: str, monkeypatch: MonkeyPatch) -> None:
    if address == "auto":  # other tests may have a Ray on this machine
        monkeypatch.setattr(session, "canonicalize_bootstrap_address", lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=words), ray_session(1):
        pass


def test_an_address_where_nobody_listens(monkeypatch: MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UnavailableError, match="no Ray answers at"), ray_session(1):
        pass


@pytest.mark.parametrize(
    ("wanted", "mode"), [(("disabled", "token"), "disabled"), (("token",), "token")]
)
def test_a_token_is_used_where_the_cluster_wants_one(
    wanted: tuple[str, ...], mode: str, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "lets_in", lambda _, mode: mode in wanted)
    assert mode_of("head:1") == mode


def test_a_token_that_does_not_fit(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(session, "lets_in", lambda *_: False)
    with pytest.raises(UsageError, match=r"head:1 wants a token, .* copy .*auth_token here"):
        mode_of("head:1")


def test_the_environment_is_as_before(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "mine" * 8)
    with authentication({MODE: "token", TOKEN: "ours" * 8}):
        os.environ[MODE] = "token"  # as Ray itself does
        assert os.environ[TOKEN] == "ours" * 8
    assert MODE not in os.environ
    assert os.environ[TOKEN] == "mine" * 8


def test_the_id_of_a_submitted_job(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert submission_id() == ""
    job = '{"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    assert submission_id() == "raysubmit_1"


# While the job runs


@pytest.fixture
def alive(monkeypatch: MonkeyPatch) -> SimpleNamespace:
    """What there is of Ray, all of it well; parts of a Ray of one's own that are `dead`."""
    found = SimpleNamespace(answers=True, nodes=[False, True], dead=[])
    node = SimpleNamespace(dead_processes=lambda: [(name, None) for name in found.dead])
    context = SimpleNamespace(gcs_address="head:1")
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": a} for a in found.nodes])
    monkeypatch.setattr(cluster, "answers", lambda gcs: found.answers)
    return found


def test_a_ray_lives_as_long_as_a_node_does(alive: SimpleNamespace) -> None:
    alive.dead = ["log_monitor"]
    assert check_alive(answered=5.0, now=9.0) == 9.0
    alive.nodes = [False, False]
    with pytest.raises(BackendError, match=r"no node .* is alive any more: .* shards are kept"):
        check_alive(answered=5.0, now=9.0)


def test_a_head_has_time_to_come_back(
    alive: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    alive.answers = False
    assert check_alive(answered=5.0, now=5.0 + HEAD_S) == 5.0
    assert "head (head:1) does not answer; the job ends" in capsys.readouterr().err
    with pytest.raises(BackendError, match=r"head \(head:1\) has not answered for 40 s"):
        check_alive(answered=5.0, now=5.1 + HEAD_S)
    alive.answers = True
    assert check_alive(answered=5.0, now=5.1 + HEAD_S) == 5.1 + HEAD_S


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_dead_part_of_a_ray_of_ones_own_ends_it_at_once(
    part: str, alive: SimpleNamespace
) -> None:
    alive.dead = [part]
    with pytest.raises(BackendError, match="of this job's Ray has died"):
        check_alive(answered=5.0, now=5.0)
