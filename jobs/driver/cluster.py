"""The Ray that a job runs on: embedded, joined, or the cluster of `ray job submit`.

What the driver asks of it: how many workers there is room for, which nodes are about to go, and why
an actor died.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, Literal

import ray
from ray.exceptions import OutOfMemoryError, RayError

from splatshard.jobs.cli.log import debugging
from splatshard.jobs.driver.prometheus import advertised
from splatshard.jobs.driver.stats import RetryKind
from splatshard.schemas.config import CPU_BACKENDS
from splatshard.schemas.errors import BackendError

Workers = int | Literal["auto"]


@contextmanager
def ray_session(workers: Workers) -> Iterator[None]:
    """An embedded Ray, or the one this process is in, or that RAY_ADDRESS names (set by
    `ray job submit`)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {
        "log_to_driver": debugging(),
        "logging_level": "INFO" if debugging() else "ERROR",
    }
    joined = ray.is_initialized()
    found_by_prometheus: AbstractContextManager[None] = nullcontext()
    if joined:
        pass
    elif os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
    else:
        context: Any = ray.init(
            address="local",
            num_cpus=workers if isinstance(workers, int) else len(os.sched_getaffinity(0)),
            include_dashboard=False,
            object_store_memory=100 * 2**20,  # only small records pass through it
            **common,
        )
        found_by_prometheus = advertised(context.address_info["session_dir"])
    try:
        # standard output is where Ray's threads would print that a worker died
        with redirect_stdout(sys.stderr), found_by_prometheus:
            yield
    finally:
        if not joined:
            ray.shutdown()


def reservation(backend: str) -> dict[str, float]:
    """What a worker reserves. Raises BackendError for a GPU backend where Ray sees no GPU."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if backend == "triton" and gpus == 0:
        raise BackendError("--backend triton: Ray sees no GPU here; use --backend cpu")
    if gpus and backend not in CPU_BACKENDS:
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": 1}


def needs(reserved: dict[str, float]) -> str:
    """`1 CPU and 1 GPU`."""
    units = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return " and ".join(f"{number:g} {units[name]}" for name, number in reserved.items())


def room(workers: Workers, reserved: dict[str, float], leaving: set[str]) -> int:
    """How many workers there should be: the number that was asked for, else one per GPU (or core)
    that the cluster has at this moment, without the nodes that are `leaving`.

    A number stays what it is when nodes leave: the workers that find no place wait, and an
    autoscaler sees them.
    """
    if isinstance(workers, int):
        return workers
    resource = "GPU" if "num_gpus" in reserved else "CPU"
    staying = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
    return sum(int(node["Resources"].get(resource, 0)) for node in staying)


def draining_nodes() -> set[str]:
    """Ids of the nodes that were told to end (spot notice, scale-down)."""
    from ray._private.state import state  # what Ray's own libraries use; nothing public tells it

    return set(state.get_draining_nodes())


def cause_of_death(error: RayError) -> RetryKind:
    """What killed an actor, by Ray's account. An out-of-memory kill by Linux looks like a crash."""
    text = str(error)
    if getattr(error, "preempted", False):
        return "preempted"
    if "node has died" in text or "node was terminated" in text:
        return "node_death"
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return "oom"
    return "worker_death"
