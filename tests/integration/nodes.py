"""A Ray cluster of several nodes in processes of this machine, to kill nodes of.

A head without CPUs, to which drivers attach, and nodes of one CPU each. A node is a raylet with its
workers; it dies with the raylet, but the workers take a moment to notice, as they would behind a
broken network. `HEALTH_CHECKS` let the head notice within a second instead of 14.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.integration.running import descendants

HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
OBJECT_STORE = 80 * 2**20
START_ATTEMPTS = 3


@dataclass(kw_only=True)
class Nodes:
    """A running cluster; `environment` is set in all of its processes."""

    cluster: Any
    environment: dict[str, str]

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return self.cluster.address

    def add(self, **arguments: Any) -> None:
        """One more node, of one CPU unless `arguments` say otherwise.

        On a loaded machine a raylet gives up waiting for its agent after 15 s; another may not.
        """
        arguments = {"num_cpus": 1, "object_store_memory": OBJECT_STORE} | arguments
        for attempt in range(START_ATTEMPTS):
            try:
                with mock.patch.dict(os.environ, self.environment):
                    self.cluster.add_node(**arguments)
                return
            except Exception as e:  # Ray raises just that
                if "timed out during startup" not in str(e) or attempt == START_ATTEMPTS - 1:
                    raise

    def remove(self, node: Any) -> None:
        """What is left of a node whose raylet was killed, or all of it."""
        self.cluster.remove_node(node, allow_graceful=False)

    def members(self) -> list[Any]:
        """The nodes without the head, in a stable order."""
        return sorted(self.cluster.worker_nodes, key=raylet)


@contextmanager
def ray_nodes(environment: dict[str, str], number: int = 2) -> Iterator[Nodes]:
    """A cluster of so many nodes, in whose processes `environment` is set."""
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    nodes = Nodes(cluster=Cluster(), environment=environment | quiet)
    try:
        nodes.add(num_cpus=0, include_dashboard=False, _system_config=HEALTH_CHECKS)
        for _ in range(number):
            nodes.add()
        yield nodes
    finally:
        nodes.cluster.shutdown()
        Path(get_ray_address_file(None)).unlink(missing_ok=True)  # or ray.init() looks for it


def raylet(node: Any) -> int:
    """Process id of a node's raylet."""
    return node.all_processes["raylet"][0].process.pid


def workers(node: Any) -> list[int]:
    """Processes of a node's actors, loading or converting."""
    below = descendants(raylet(node))
    return [pid for pid, command in below.items() if "FitActor" in command]
