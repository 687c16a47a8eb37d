"""Several jobs at one shard on S3: one stays, and plans and markers of others are kept."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from splatshard.jobs.destination import plan_file
from splatshard.jobs.destination.plan import PLAN_FILE, PlannedShard, make_plan, planned
from splatshard.pipeline.shards.commit import (
    clean_attempts,
    mark_failed,
    remove,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.storage import atomic, fs
from splatshard.schemas.errors import SourceError, StorageError, UnavailableError
from splatshard.schemas.shard import ShardManifest, to_json
from tests.integration.s3.faulty import (
    CONFIG,
    JOB,
    OTHER_JOB,
    Request,
    Server,
    assert_one_shard,
    commit_shard,
)
from tests.rows import config_of, make_ref

pytestmark = pytest.mark.integration


def test_threads_that_race_leave_one_shard(server: Server, dst: str) -> None:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(commit_shard, [dst] * 6, [f"{JOB}{i}" for i in range(6)]))
    winner = assert_one_shard(server, dst)
    assert results == [winner] * 6


RACER = """
import sys
from splatshard.schemas.shard import to_json
from tests.integration.s3.faulty import commit_shard
from tests.rows import config_of
from splatshard.schemas.errors import StorageError
print("ready", flush=True)
sys.stdin.readline()
dst, attempt, format = sys.argv[1:]
try:
    print(to_json(commit_shard(dst, attempt, config_of(format))))
except StorageError as e:
    print(e)
"""


def test_processes_that_race_leave_one_shard(server: Server, dst: str) -> None:
    """Three jobs, one of another configuration: the slower configuration is refused."""
    formats = ("parquet", "webdataset", "parquet")
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, dst, f"{JOB}{number}", format],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, format in enumerate(formats)
    ]
    for job in jobs:
        assert job.stdout
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        assert job.stdin
        job.stdin.write("\n")
        job.stdin.flush()
    said = [job.communicate(timeout=120)[0] for job in jobs]
    winner = assert_one_shard(server, dst)
    for text, format in zip(said, formats, strict=True):
        if format == winner.format:
            assert text.strip() == to_json(winner).strip()
        else:
            assert "pack.format" in text


def test_a_stale_shard_is_replaced(server: Server, dst: str) -> None:
    old = commit_shard(dst, config=config_of("webdataset"))
    mark_failed(dst, make_ref(), config_of(), SourceError("cut"))
    assert read_markers(dst) == {"00000000": old}
    new = commit_shard(dst, f"{OTHER_JOB}1", replaces=old)
    assert assert_one_shard(server, dst) == new
    # a second attempt that was told the same finds it done
    assert commit_shard(dst, f"{OTHER_JOB}2", replaces=old) == new
    assert assert_one_shard(server, dst) == new


def test_damaged_data_and_damaged_markers_are_replaced(server: Server, dst: str) -> None:
    old = commit_shard(dst)
    server.put(dst, {old.data_file: b"damaged"})
    new = commit_shard(dst, f"{OTHER_JOB}1", replaces=old)
    assert assert_one_shard(server, dst) == new != old
    server.put(dst, {"00000000.json": b"{}"})
    newer = commit_shard(dst, f"{OTHER_JOB}2")
    clean_attempts(dst, OTHER_JOB, [newer])
    assert assert_one_shard(server, dst) == newer


def test_another_configuration_is_refused(server: Server, dst: str) -> None:
    first = commit_shard(dst)
    for config in (config_of("webdataset"), config_of("parquet", "balanced")):
        with pytest.raises(StorageError, match=r"pack\.(format|codec).*another job writes"):
            commit_shard(dst, f"{OTHER_JOB}1", config)
    assert assert_one_shard(server, dst) == first


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.parametrize("stale", [False, True])
def test_a_race_that_is_lost_after_the_upload(
    server: Server, dst: str, format: str, stale: bool
) -> None:
    """Another job's marker comes when our data are there already and our marker is on its way."""
    old = commit_shard(dst, config=config_of("parquet", "balanced")) if stale else None
    atomic.keeps_conditions(dst)
    others: list[ShardManifest] = []

    def interfere(request: Request) -> str:
        if request.method == "PUT" and request.key.endswith("00000000.json"):
            server.fault = lambda _: ""
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(commit_shard, dst, f"{OTHER_JOB}1", replaces=old)
                others.append(other.result())
        return ""

    server.fault = interfere
    if format == "parquet":
        assert [commit_shard(dst, f"{JOB}2", replaces=old)] == others
    else:
        with pytest.raises(StorageError, match=r"pack\.format"):
            commit_shard(dst, f"{JOB}2", config_of(format), old)
    assert [assert_one_shard(server, dst)] == others


@pytest.mark.parametrize("fault", ["", "deaf", "lost"])
def test_two_jobs_at_once_keep_each_others_plans(
    server: Server, dst: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Another one writes just when this one has read what is there. A store that ignores conditions
    is looked at once more; a lost answer is tried again."""
    refs = {name: make_ref(name) for name in ("a", "b", "c" * 200)}
    nothing = make_plan([], {}, CONFIG, str)
    of = {name: planned([ref], nothing, CONFIG) for name, ref in refs.items()}
    server.fault = lambda request: fault if request.conditional and fault == "deaf" else ""
    atomic.keeps_conditions(dst)
    plan_file.write_plan(dst, of["a"])
    asked: list[str] = []

    def read_plan(dst: str) -> dict[str, PlannedShard]:
        found = real(dst)
        asked.append(dst)
        if len(asked) == 1:
            plan_file.write_plan(dst, of["b"])
        return found

    real = plan_file.read_plan
    monkeypatch.setattr(plan_file, "read_plan", read_plan)
    if fault == "lost":
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
        fs.use_options({})
        once = iter(["lost"])
        server.fault = lambda request: next(once, "") if request.conditional else ""
    plan_file.write_plan(dst, of["c" * 200])
    assert real(dst) == of["a"] | of["b"] | of["c" * 200]
    assert len(asked) >= 3
    assert server.names(dst) == ["_plan.json"]


def test_a_large_plan_goes_over_in_pieces(server: Server, dst: str) -> None:
    """As a file that is open, not as a hundred MB of memory."""
    nothing = make_plan([], {}, CONFIG, str)
    few, many = (
        planned([make_ref(f"{i:08d}") for i in range(n)], nothing, CONFIG) for n in (1, 20_000)
    )
    for shards in (few, many, few):
        plan_file.write_plan(dst, shards)
    assert plan_file.read_plan(dst) == many
    assert [r.method for r in server.asked if r.key.endswith(PLAN_FILE)].count("PUT") == 2


def test_shards_that_are_gone_are_removed(server: Server, dst: str) -> None:
    marker = commit_shard(dst)
    step = 0
    for step in itertools.count():
        left = itertools.count(step, -1)
        server.fault = lambda _, left=left: "" if next(left) > 0 else "InternalError"
        try:
            assert remove(dst, [marker]) == ["00000000"]
            break
        except UnavailableError:
            server.fault = lambda _: ""
            (marker,) = read_markers(dst).values() or (marker,)
            if isinstance(marker, ShardManifest):
                assert verify_shard(dst, marker) == []
    assert step >= 5
    server.fault = lambda _: ""
    assert server.names(dst) == []


def test_a_zombie_does_not_mark_a_done_shard_failed(server: Server, dst: str) -> None:
    commit_shard(dst)
    mark_failed(dst, make_ref(), config_of(), SourceError("cut"))
    assert_one_shard(server, dst)
