"""Workers that stay for the next job on the shared Ray, since each takes seconds to load torch.

A worker that was given no blame, and whose job ended well, is kept instead of killed; the next job
with the same arguments gets it. What a job asks of a new worker it asks of this one, too: `start`
loads the backend and sets the timers back. Jobs in processes of their own know nothing of this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ray

from splatshard.jobs.cli.log import log_format
from splatshard.jobs.driver import driver as driver_module
from splatshard.jobs.driver.driver import Driver, Worker
from splatshard.jobs.driver.worker import FitActor

Arguments = tuple[str, str]

_kept: list[tuple[Arguments, Any]] = []


def arguments(driver: Driver) -> Arguments:
    """What the actor of a worker is made with."""
    return repr(sorted(driver.storage_options.items())), str(log_format())


def release() -> None:
    """End the workers that are kept: others need their cores."""
    while _kept:
        ray.kill(_kept.pop()[1])


@contextmanager
def kept_workers() -> Iterator[None]:
    """Jobs of this process in the block leave their workers to each other."""
    hire, dismiss = Driver.hire, Driver.dismiss

    def hire_kept(driver: Driver) -> None:
        usual = driver_module.FitActor is FitActor
        if not usual or not _kept or _kept[-1][0] != arguments(driver):
            release()
            return hire(driver)
        actor = _kept.pop()[1]
        driver.team.append(Worker(actor=actor, started=actor.start.remote(driver.config.backend)))
        return None

    def dismiss_and_keep(driver: Driver, worker: Worker, why: str) -> None:
        idle = worker.able and not worker.in_flight
        if not idle or driver_module.FitActor is not FitActor or sys.exc_info()[0] is not None:
            return dismiss(driver, worker, why)  # in an exception the job is being stopped
        with mock.patch.object(ray, "kill"):
            dismiss(driver, worker, why)
        _kept.append((arguments(driver), worker.actor))
        return None

    with (
        mock.patch.object(Driver, "hire", hire_kept),
        mock.patch.object(Driver, "dismiss", dismiss_and_keep),
    ):
        yield
