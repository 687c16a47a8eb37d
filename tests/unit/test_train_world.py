"""What surrounds training's steps: the process group, the log's lines, a cluster's resources."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import ray
import torch.distributed as dist

from splatshard.jobs.driver.ray_train import scaling_of
from splatshard.pipeline.train.distributed import world
from splatshard.pipeline.train.log import LOG_FILE, Log, read_log
from splatshard.schemas.errors import UsageError


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the process group of a launched process, which is none."""
    told: list[str] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *a, name=name, **k: told.append(name))
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(told))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return told


def test_all_processes_end_together(group: list[str]) -> None:
    with world("cpu") as here:
        assert (here.rank, here.size) == (0, 2)
    assert group == ["init_process_group", "barrier", "destroy_process_group"]


def test_an_error_does_not_wait_for_the_others(group: list[str]) -> None:
    """They may wait for this process, and would for ever: NCCL's end needs all."""
    with pytest.raises(UsageError), world("cpu"):
        raise UsageError("no such shard")
    assert group == ["init_process_group"]


def test_the_log_is_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    log = Log(str(tmp_path), 0, tensorboard=False)
    record = log.write("step", 1, {"loss": 0.5, "grad_norm": math.inf, "rate": math.nan})
    log.close()
    assert record["grad_norm"] == math.inf
    (line,) = (tmp_path / LOG_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["grad_norm"] is None
    (found,) = read_log(str(tmp_path))
    assert (found["loss"], found["rate"]) == (0.5, None)


def test_a_run_on_cpus_takes_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert scaling_of(2, "auto").use_gpu
    assert scaling_of(2, "auto").resources_per_worker == {"GPU": 1}
    assert not scaling_of(4, "cpu").use_gpu
    assert scaling_of(4, "cpu").resources_per_worker == {"CPU": 1}
    with pytest.raises(UsageError, match="the cluster has 2 GPUs"):
        scaling_of(3, "cuda")
