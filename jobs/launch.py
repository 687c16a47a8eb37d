"""Training on the workers of a Ray cluster: a thin launcher around `pipeline.train.loop.train`.

Ray Train starts the processes and makes their process group; each calls the same `train(config)` as
a process of torchrun does. Checkpoints are the loop's own, in `config.dst`: where a process died
all are started again, and go on from there. Those of Ray Train are not used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.queue import Queue

from jobs.cli import say
from jobs.cluster import ray_session
from schemas.errors import SplatshardError, UnavailableError, UsageError
from schemas.train import TrainConfig

RESTARTS = 3
"""How often all processes are started again after one died."""

Show = Callable[[Mapping[str, Any]], None]


def launch(config: TrainConfig, workers: int, show: Show) -> None:
    """Run `train(config)` in `workers` processes, one per GPU where Ray has GPUs.

    Raises the SplatshardError of the process that failed, UsageError where the cluster has no room.
    """
    with ray_session(workers):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        kind, room = ("GPU", gpus) if gpus else ("CPU", int(ray.cluster_resources()["CPU"]))
        if workers > room:
            raise UsageError(
                f"--ray-workers {workers}: the cluster has {room} {kind}s: choose at most that many"
            )
        scaling = ScalingConfig(
            num_workers=workers, use_gpu=bool(gpus), resources_per_worker={kind: 1}
        )
        with tempfile.TemporaryDirectory(prefix="splatshard-ray-") as folder, told(show) as queue:
            for left in reversed(range(RESTARTS + 1)):
                trainer = TorchTrainer(
                    train_worker,
                    train_loop_config={"config": config, "queue": queue},
                    scaling_config=scaling,
                    run_config=RunConfig(storage_path=folder),
                )
                try:
                    trainer.fit()
                    return
                except TrainingFailedError as error:
                    _raise_own(error)
                    if not left:
                        raise SplatshardError(
                            f"training failed {RESTARTS + 1} times: {error}"
                        ) from error
                    say(f"a training process died; all start again: {_last_line(error)}")


def train_worker(settings: Mapping[str, Any]) -> None:
    """What each process runs."""
    from pipeline.train.loop import train

    config: TrainConfig = settings["config"]
    if config.device == "auto":
        config = replace(config, device=str(get_device()))
    train(config, settings["queue"].put)


@contextmanager
def told(show: Show) -> Iterator[Queue]:
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
