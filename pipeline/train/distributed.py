"""The processes that train together, on plain torch.distributed.

Who starts them is not known here: torchrun (its environment variables are there), a cluster's
launcher (its process group is there), or nobody, and then it is one process. Collectives of one
process do nothing.

All end together, too. One that was told to stop (a spot machine's, say) must not leave the others
waiting for its gradients, so about once a second they tell each other (Stopping).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from splatshard.schemas.errors import SplatshardError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes of a small tensor [...]; no gradient."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value / self.size

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [B, D] of all processes, [size * B, D] in order of rank.

        The gradient of a row is the sum of those that all processes have for it. So if each
        process's loss is the mean over its own rows, against all columns, then the mean of the
        processes' gradients, which is what DDP makes, is the gradient of the mean over all rows.
        """
        return _Gather.apply(rows, self.rank, self.size) if self.size > 1 else rows

    def largest(self, *values: int) -> list[int]:
        """The largest that any process has, of each of `values`."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def same(self, value: Any) -> Any:
        """Rank 0's value, on all."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


ASK_EVERY_S = 1.0
LONGEST_WAIT_S = 3600
"""Of a process for the others: rank 0 uploads a checkpoint, say. NCCL's own is ten minutes."""
TELL_EVERY_S = 60.0
"""So often rank 0 tells those who wait for `on_rank_zero` that it is at work, which may take
hours."""


class Stopping:
    """Whether all processes end after a step, since one was asked to: `asked` gives a signal's
    number, 0 where nobody asks.

    To tell each other at every step would make a GPU wait for its process at every step. So they
    do it every so many steps, which are as many as the fastest takes in a second, and each time
    agree on the next such step as well. One process alone just looks.
    """

    def __init__(self, world: World, asked: Callable[[], int]) -> None:
        self.world, self.asked = world, asked
        self._wait = self._every = 1
        self._since = time.perf_counter()

    def after_step(self) -> int:
        """The signal's number on all processes, or 0; all call it after every step."""
        if self.world.size == 1:
            return self.asked()
        self._wait -= 1
        if self._wait:
            return 0
        now = time.perf_counter()
        steps = self._every * ASK_EVERY_S / max(now - self._since, 1e-6)
        self._since = now
        found, every = self.world.largest(self.asked(), min(100, max(1, int(steps))))
        self._wait = self._every = every
        return found


def ignore_signals(worker: int) -> None:
    """For processes that only read: whoever signals a whole group (Ctrl-C, Slurm) means the ones
    that train, which need these until their step is done, and end them afterwards."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def on_rank_zero(world: World, find: Callable[[], T]) -> T:
    """What `find` gives on rank 0; the others wait for it. Raises on all the SplatshardError
    that it raises there."""
    if world.size == 1:
        return find()
    with ThreadPoolExecutor(1, thread_name_prefix="on_rank_zero") as pool:
        future = pool.submit(_tried, find) if world.rank == 0 else None
        while not world.same(future and bool(wait((future,), TELL_EVERY_S).done)):
            pass
        value, error = world.same(future and future.result())
    if error:
        raise error
    return cast(T, value)


def _tried(find: Callable[[], T]) -> tuple[T | None, SplatshardError | None]:
    try:
        return find(), None
    except SplatshardError as e:
        return None, e


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank = rank
        parts = [torch.empty_like(rows) for _ in range(size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # all_reduce, since gloo has no reduce_scatter; embeddings are small next to the weights
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        size = dist.get_world_size()
        return total.chunk(size)[ctx.rank], None, None


@contextmanager
def world(device: str) -> Iterator[World]:
    """This process's place among those that train together; ends a process group that it made.

    Not after an error: NCCL would wait for the others, which wait for this one, and nobody would
    see the error. The launcher ends them once this process is gone. Raises UsageError for a device
    that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _device(device)
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    ours = launched and not dist.is_initialized()
    if ours:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=LONGEST_WAIT_S))
    if not dist.is_initialized():
        yield World(0, 1, chosen)
        return
    yield World(dist.get_rank(), dist.get_world_size(), chosen)
    if ours:
        dist.barrier()  # nobody leaves while another one still reads from it
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UsageError(f"device is {name!r}: choose auto, cpu or cuda") from e
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UsageError(f"device is {name!r}, but torch finds no CUDA device: choose auto or cpu")
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
