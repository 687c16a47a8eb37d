"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bare import without_hypothesis
from tests.make import shared_data

try:
    import hypothesis
except ImportError:  # a bare GPU machine: property tests are skipped there, the rest runs
    sys.modules |= without_hypothesis()
else:  # machines that test are loaded: the time of one example says nothing
    hypothesis.settings.register_profile("splatshard", deadline=None)
    hypothesis.settings.load_profile("splatshard")

if not torch.cuda.is_available():  # before Triton is imported: its interpreter runs the GPU kernels
    os.environ["TRITON_INTERPRET"] = "1"


CHAOS = "tests.integration.chaos"

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: threads would only be in their way
    torch.set_num_threads(1)


# The tally of what tests/integration breaks on purpose, from its processes to the one that prints


def pytest_sessionfinish(session: pytest.Session) -> None:
    told, chaos = getattr(session.config, "workeroutput", None), sys.modules.get(CHAOS)
    if told is not None and chaos:
        told["tally"] = chaos.tally_to_json()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    if text := getattr(node, "workeroutput", {}).get("tally"):
        import_module(CHAOS).add_to_tally(text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    chaos = sys.modules.get(CHAOS)
    if chaos and chaos.TALLY:
        terminalreporter.section("broken on purpose")
        for line in chaos.tally_lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What convert remembers of its sources, apart from the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def first_datasets() -> None:
    """Datasets that other tests read are none of this one's."""
    if state := sys.modules.get("splatshard.pipeline.data.state"):
        state._ENDED.clear()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How tests are handed to the processes, unless --dist says otherwise."""
    if config.getvalue("dist") != "load":
        return None
    from tests.groups import Groups

    return Groups(config, log)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The sample data (SPLATSHARD_DATA or ../shared/data); skips the test where it is absent."""
    return shared_data()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset of tests/training.py in three shards of 40, 40 and 10 samples; who changes
    something changes a copy."""
    from tests.training import make_shards

    return make_shards(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the other processes of a test have, so that sums are added up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
