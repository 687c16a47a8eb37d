"""The processes that train together, on plain torch.distributed.

Who starts them is not known here: torchrun (its environment variables are there), a cluster's
launcher (its process group is there), or nobody, and then it is one process. Collectives of one
process do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from schemas.errors import UsageError


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, on `device`."""

    rank: int
    size: int
    device: torch.device

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes of a small tensor; no gradient."""
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

    def same(self, value: Any) -> Any:
        """Rank 0's value, on all."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


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

    Raises UsageError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _device(device)
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    ours = launched and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield World(dist.get_rank(), dist.get_world_size(), chosen)
            if ours:
                dist.barrier()  # nobody leaves while another one still reads from it
        else:
            yield World(0, 1, chosen)
    finally:
        if ours:
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
