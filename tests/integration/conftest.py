"""One Ray and one S3 server for all tests that run in this process.

Tests that use a Ray are marked `ray`, by their fixtures or by hand where they start one of their
own; tests/groups.py says which of them run in one process, so that what they share is prepared
once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.groups import group_of
from tests.integration.chaos import Arena, open_arena
from tests.integration.faults import Proxy, fault_proxy
from tests.integration.nodes import Nodes, ray_nodes
from tests.integration.stores import Store, ceph_store, missing_ceph, moto_store

Folders = pytest.TempPathFactory

RAYS = {"shared_ray", "free_ray", "nodes", "arena", "moto_arena", "ceph_arena"}
"""Fixtures that start one."""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a Ray, and see that groups.py knows their files."""
    for item in items:
        if not RAYS.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("ray")
        if item.get_closest_marker("ray") and not group_of(item.nodeid):
            raise pytest.UsageError(f"{item.path.name} uses a Ray: name it in tests/groups.py")


@pytest.fixture(scope="module")
def shared_ray() -> None:
    """A local Ray of two cores, which `convert` joins since it is already there; until the last
    test of a group (`pytest_runtest_teardown`)."""
    import ray

    if ray.is_initialized():
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        _system_config={"metrics_report_interval_ms": 1000},
    )


@pytest.fixture(scope="module", autouse=True)  # before what a file prepares once
def kept_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Jobs on the shared Ray leave their workers to each other."""
    if not group_of(request.node.nodeid):
        yield
        return
    from tests.integration import warm

    with warm.kept_workers():
        yield


@pytest.hookimpl(trylast=True)  # behind the fixtures
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """No other test meets the shared Ray: one that converts would join it, and one that tries out
    tokens would take its own away."""
    if group_of(item.nodeid) and not (nextitem and group_of(nextitem.nodeid)):
        import ray

        from tests.integration.warm import release

        release()
        ray.shutdown()


@pytest.fixture
def free_ray(shared_ray: None) -> None:
    """The same with all of its cores free."""
    from tests.integration.warm import release

    release()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: Folders) -> Iterator[Store]:
    """An S3 server that never fails; tests keep apart by bucket."""
    with moto_store(tmp_path_factory.mktemp("moto")) as store:
        yield store


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: Folders) -> Iterator[Store]:
    """Another, that checks signatures and clocks; skips where it is not installed."""
    if reason := missing_ceph():
        pytest.skip(reason)
    with ceph_store(tmp_path_factory.mktemp("ceph")) as store:
        yield store


@pytest.fixture(scope="session")
def proxy(moto: Store) -> Iterator[Proxy]:
    """A server in front of one of the stores that fails as it is told; one test at a time."""
    with fault_proxy(moto.endpoint) as running:
        yield running


@pytest.fixture(scope="session")
def nodes(moto: Store, proxy: Proxy) -> Iterator[Nodes]:
    """A cluster whose workers reach the stores through the proxy."""
    with ray_nodes(moto.environment(proxy.endpoint)) as running:
        yield running


@pytest.fixture(scope="session")
def moto_arena(moto: Store, proxy: Proxy, nodes: Nodes, tmp_path_factory: Folders) -> Arena:
    return open_arena(moto, proxy, tmp_path_factory.mktemp("arena"), nodes)


@pytest.fixture(scope="session")
def ceph_arena(ceph: Store, proxy: Proxy, nodes: Nodes, tmp_path_factory: Folders) -> Arena:
    return open_arena(ceph, proxy, tmp_path_factory.mktemp("arena"), nodes)


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.slow)])
def arena(request: pytest.FixtureRequest) -> Arena:
    """Conversions on a cluster, from S3 to S3."""
    return request.getfixturevalue(f"{request.param}_arena")
