"""Training on the workers of a Ray cluster: a thin launcher around `pipeline.train.loop.train`.

Ray Train starts the processes and makes their process group; each calls the same `train(config)` as
a process of torchrun does. Checkpoints are the loop's own, in `config.dst`: where a process died
all are started again, and go on from there. Those of Ray Train are not used.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Thread
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.queue import Queue

from splatshard.jobs.cli.command import Interrupted
from splatshard.jobs.cli.log import configure, log_format
from splatshard.jobs.cli.signals import StopSignals
from splatshard.jobs.cli.text import say
from splatshard.jobs.driver.session import ray_session
from splatshard.pipeline.storage.errors import storage_errors
from splatshard.pipeline.storage.fs import use_options
from splatshard.pipeline.storage.options import redact
from splatshard.pipeline.storage.staging import temporary
from splatshard.pipeline.train.loop import TrainResult
from splatshard.schemas.errors import SplatshardError, UnavailableError, UsageError
from splatshard.schemas.train import TrainConfig

RESTARTS = 3
"""How often all processes are started again after one died."""

POLL_S = 1.0

Show = Callable[[Mapping[str, Any]], None]


def launch(
    config: TrainConfig,
    workers: int,
    show: Show,
    storage_options: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Run `train(config)` in `workers` processes, one per GPU where Ray has GPUs, all with these
    `storage_options`; SIGINT and SIGTERM end it as they end one process.

    Raises the SplatshardError of the process that failed, UsageError where the cluster has no room.
    """
    ends: list[Mapping[str, Any]] = []

    def shown(record: Mapping[str, Any]) -> None:
        show(record)
        if record["event"] in ("end", "stop"):
            ends.append(record)

    with ray_session(workers):
        scaling = scaling_of(workers, config.device)
        with storage_errors(place := temporary()):
            folder = tempfile.TemporaryDirectory(prefix="splatshard-ray-", dir=place)
        with folder as path, record_queue(shown) as queue:
            run_all(config, scaling, path, queue, storage_options or {})
    (end,) = ends[-1:] or [{"step": 0, "url": ""}]
    return TrainResult(end["step"], end["url"], {}, end.get("signal", 0))


def scaling_of(workers: int, device: str) -> ScalingConfig:
    """One GPU for each worker, or one core where there are none or `device` is cpu. Raises
    UsageError where there are not so many."""
    gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
    kind, room = ("GPU", gpus) if gpus else ("CPU", int(ray.cluster_resources()["CPU"]))
    if workers > room:
        raise UsageError(
            f"--ray-workers {workers}: the cluster has {room} {kind}s: choose at most that many"
        )
    return ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker={kind: 1})


def run_all(
    config: TrainConfig,
    scaling: ScalingConfig,
    folder: str,
    queue: Queue,
    storage_options: Mapping[str, Any],
) -> None:
    """All processes until they are through, started again where one dies. Raises as `launch`."""
    orders = ray.remote(num_cpus=0)(Orders).remote(config, storage_options)
    settings = {"queue": queue, "orders": orders, "log_format": log_format()}
    with StopSignals() as signals:  # after Ray has set a handler of its own
        for left in reversed(range(RESTARTS + 1)):
            trainer = TorchTrainer(
                train_worker,
                train_loop_config=settings,
                scaling_config=scaling,
                run_config=RunConfig(storage_path=folder),
            )
            try:
                fit(trainer, orders, signals)
                return
            except TrainingFailedError as error:
                _raise_own(error)
                if signals.received:
                    raise Interrupted(128 + signals.received, signals.message) from error
                if not left:
                    raise SplatshardError(
                        f"training failed {RESTARTS + 1} times: {error}"
                    ) from error
                say(f"a training process died; all start again: {_last_line(error)}")


def fit(trainer: TorchTrainer, orders: Any, signals: StopSignals) -> None:
    """`trainer.fit()`, on a thread: there it sets no handler for Ctrl-C, which would abort."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as e:
            failed.append(e)

    thread = Thread(target=work, daemon=True)
    thread.start()
    passed_on = 0
    while thread.is_alive():
        thread.join(POLL_S)
        if signals.received and not passed_on:
            passed_on = signals.received
            orders.give.remote(passed_on)
    if failed:
        raise failed[0]


class Orders:
    """An actor that keeps the signal to stop for the processes that start later, too, and what may
    have secrets: Ray's dashboard would show those in `train_loop_config`."""

    def __init__(self, config: TrainConfig, storage_options: Mapping[str, Any]) -> None:
        self.signal = 0
        self._given = config, storage_options

    def given(self) -> tuple[TrainConfig, Mapping[str, Any]]:
        return self._given

    def give(self, signal: int) -> None:
        self.signal = signal

    def look(self) -> int:
        return self.signal


def train_worker(settings: Mapping[str, Any]) -> None:
    """What each process runs."""
    from splatshard.pipeline.train.loop import train

    configure(settings["log_format"], alone=True)  # not beside the handlers of Ray Train
    config, storage_options = ray.get(settings["orders"].given.remote())
    use_options(storage_options)
    if config.device == "auto":
        config = replace(config, device=str(get_device()))
    with errors_without_secrets():
        train(config, settings["queue"].put, looked_for(settings["orders"]))


@contextmanager
def errors_without_secrets() -> Iterator[None]:
    """Ray Train writes errors to logs of its own, so they leave here without secrets; one that is
    not ours then becomes a RuntimeError with its traceback as text."""
    try:
        yield
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        if redact(trace) == trace:
            raise
        if isinstance(error, SplatshardError):
            shown: Exception = type(error)(redact(str(error)))
        else:
            shown = RuntimeError(redact(trace))
        raise shown.with_traceback(error.__traceback__) from None


def looked_for(orders: Any) -> Callable[[], int]:
    """The order of the actor `orders`, looked for on a thread until there is one."""
    found = [0]

    def look() -> None:
        with suppress(RayError):  # the driver is gone
            while not found[0]:
                found[0] = ray.get(orders.look.remote())
                time.sleep(POLL_S)

    Thread(target=look, daemon=True).start()
    return lambda: found[0]


@contextmanager
def record_queue(show: Show) -> Iterator[Queue]:
    """A queue whose records are shown here, on a thread; None ends it."""
    queue = Queue(actor_options={"num_cpus": 0})

    def read() -> None:
        while (record := queue.get()) is not None:
            show(record)

    thread = Thread(target=read, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def _raise_own(error: TrainingFailedError) -> None:
    """Raise the error that a process raised on purpose, and that a restart would meet again."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, SplatshardError) and not isinstance(cause, UnavailableError):
            raise cause from error


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]
