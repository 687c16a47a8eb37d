"""One Ray and one S3 server for all tests that run in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.integration.chaos import TALLY, Arena, open_arena, ray_nodes, tally_lines
from tests.integration.faults import Proxy, fault_proxy
from tests.integration.stores import Store, moto_store


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """A local Ray of two cores, which `convert` joins since it is already there."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An S3 server that never fails; tests keep apart by bucket."""
    with moto_store(tmp_path_factory.mktemp("moto")) as store:
        yield store


@pytest.fixture(scope="session")
def proxy(moto: Store) -> Iterator[Proxy]:
    """A server in front of `moto` that fails as it is told; one test at a time."""
    with fault_proxy(moto.endpoint) as running:
        yield running


@pytest.fixture(scope="session")
def arena(moto: Store, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """Conversions on a cluster of two nodes, from S3 to S3."""
    folder = tmp_path_factory.mktemp("arena")
    with ray_nodes(moto.environment(proxy.endpoint)) as nodes:
        yield open_arena(moto, proxy, folder, nodes)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tally of what was broken on purpose."""
    if TALLY:
        terminalreporter.section("broken on purpose")
        for line in tally_lines():
            terminalreporter.write_line(line)
