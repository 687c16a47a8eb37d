"""What the driver asks of its Ray: how many workers there is room for, which nodes are about to go,
and why an actor died."""

from __future__ import annotations

from typing import Literal

import ray
from ray.exceptions import OutOfMemoryError, RayError

from splatshard.jobs.driver.stats import RetryKind
from splatshard.schemas.config import CPU_BACKENDS
from splatshard.schemas.errors import BackendError

Workers = int | Literal["auto"]


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
