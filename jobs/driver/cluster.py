"""What the driver asks of its Ray: how many workers there is room for, which nodes are about to go,
and why an actor died."""

from __future__ import annotations

import socket
from typing import Any, Literal

import ray
from ray.exceptions import OutOfMemoryError, RayError

from splatshard.jobs.cli.text import say
from splatshard.jobs.driver.stats import RetryKind
from splatshard.schemas.config import CPU_BACKENDS
from splatshard.schemas.errors import BackendError

Workers = int | Literal["auto"]

ANSWER_S = 5.0
HEAD_S = 40.0
"""A head may be silent for so long, as when it is started again; Ray itself would end this process
after 60 s, without a word to people."""
PARTS = {"gcs_server": "the head process (GCS)", "raylet": "the node process (raylet)"}
AGAIN = ": was it killed, or short of memory? Finished shards are kept; run the same command again"


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


def check_alive(answered: float, now: float) -> float:
    """When the head last answered, until now at `answered` (monotonic s). Raises BackendError where
    Ray is gone: a part of one of our own, all nodes, or the head, for HEAD_S."""
    from ray._private import worker  # nothing public tells it

    node: Any = worker._global_node
    own = [name for name, _ in node.dead_processes() if name in PARTS]
    if own:
        raise BackendError(f"{PARTS[own[0]]} of this job's Ray has died{AGAIN}")
    gcs = ray.get_runtime_context().gcs_address
    if not answers(gcs):
        if now - answered > HEAD_S:
            raise BackendError(f"Ray's head ({gcs}) has not answered for {HEAD_S:.0f} s{AGAIN}")
        say(
            f"Ray's head ({gcs}) does not answer; the job ends where it stays so for {HEAD_S:.0f} s"
        )
        return answered
    if not any(node["Alive"] for node in ray.nodes()):
        raise BackendError(f"no node of this Ray is alive any more{AGAIN}")
    return now


def answers(gcs: str) -> bool:
    """Whether somebody listens at `host:port`; Ray itself would wait for 40 s and more."""
    host, _, port = gcs.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except OSError:
        return False
    return True


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
