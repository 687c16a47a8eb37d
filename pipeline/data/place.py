"""Which of the processes that read together this one is, where `rank` is not given.

    torch.distributed, where it runs -> in a DataLoader worker, what its parent is
    -> RANK and WORLD_SIZE, as torchrun sets them -> one process alone

Asked again at every iteration, for a dataset is often made before the process group is. Slurm's and
MPI's variables are not followed: a batch script has Slurm's without being one of many, and the
tasks of a sweep each want all samples. There a warning says what to give.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch.distributed as dist
from torch.utils.data import get_worker_info

from splatshard.pipeline.data.epoch_order import Reader
from splatshard.schemas.errors import UsageError

LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "SLURM_NTASKS": "SLURM_PROCID",  # of the whole job, where nothing is said of its step
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "HOROVOD_SIZE": "HOROVOD_RANK",
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
    "FLUX_JOB_SIZE": "FLUX_TASK_RANK",
    "LOCAL_WORLD_SIZE": "LOCAL_RANK",
}
"""Variables that tell how many processes were started together, and which of them this is."""


class Place(NamedTuple):
    """Process `rank` of `world_size`."""

    rank: int
    world_size: int


ALONE = Place(0, 1)


def place_of(rank: int | None, world_size: int | None, parent: Place | None) -> Place:
    """This process's place; what is given counts. `parent` is that of the process which started
    this DataLoader worker, where it said so.

    Raises UsageError for one number of the two that nothing here completes.
    """
    if rank is not None and world_size is not None:
        return Place(rank, world_size)
    if world_size == 1:
        return ALONE
    here = _found(parent)
    if rank not in (None, here.rank) or world_size not in (None, here.world_size):
        raise UsageError(
            f"rank is {rank} and world_size is {world_size}, and this process is rank {here.rank} "
            f"of {here.world_size}: give both, or neither"
        )
    return here


def _found(parent: Place | None) -> Place:
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    if parent is not None and get_worker_info() is not None:
        return parent
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if rank is None or world_size is None:
        return ALONE
    if rank >= world_size:
        raise UsageError(
            f"the environment says RANK {rank} and WORLD_SIZE {world_size}: a rank is below the "
            "world size; set both as torchrun does, or give rank and world_size"
        )
    return Place(rank, world_size)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise UsageError(
            f"the environment says {name} {text!r}, which is no whole number: set it as torchrun "
            "does, or give rank and world_size"
        )
    return int(text)


def doubts(place: Place, given: tuple[int | None, int | None], shuffle: bool) -> str:
    """What speaks against `place` as reading begins, `given` or not; empty for nothing.

    Raises UsageError where nobody gave it, and WORLD_SIZE or RANK alone says that there are others:
    then all would read the same.
    """
    if place != ALONE:
        return ""
    if given != (None, None):
        return _repeats() if shuffle else ""
    if (_number("WORLD_SIZE") or 1) > 1 and _number("RANK") is None:
        raise UsageError(
            f"the environment says WORLD_SIZE {os.environ['WORLD_SIZE']} and no RANK, so all "
            "processes would read the same: begin after torch.distributed.init_process_group, or "
            "give rank and world_size"
        )
    if _number("RANK") and _number("WORLD_SIZE") is None:
        raise UsageError(
            f"the environment says RANK {os.environ['RANK']} and no WORLD_SIZE, so all processes "
            "would read the same: set both as torchrun does, or give rank and world_size"
        )
    told = (name for name, which in LAUNCHERS.items() if {name, which} <= os.environ.keys())
    several = next(told, "")  # a step of one task in a larger job is alone
    count = os.environ.get(several, "")
    if not count.isdecimal() or int(count) < 2:
        return ""
    return (
        f"{several} is {count}, and this dataset is rank 0 of 1, so all of these processes read "
        "the same: if they train together, start them with torchrun, begin after "
        "torch.distributed.init_process_group, or give "
        f'rank=int(os.environ["{LAUNCHERS[several]}"]) and world_size={count}'
    )


def _repeats() -> str:
    """What a rank that is not the first says where it was told to read alone, as in training: one
    alone evaluates on rank 0, or in order."""
    try:
        here = _found(None)
    except UsageError:  # what was given counts
        return ""
    if not here.rank:
        return ""
    return (
        f"rank 0 of 1 was given, and this process is rank {here.rank} of {here.world_size}, so it "
        "reads what other ranks that were given the same read: leave rank and world_size out, "
        "unless these processes share one model"
    )


def crowded(reader: Reader, lanes: int, shards: int) -> str:
    """What the first rank says where all ranks' workers get in one another's way."""
    readers = reader.world_size * reader.workers
    if reader.rank or not lanes % readers or shards <= readers:
        return ""
    return (
        f"lanes is {lanes} with {readers} ranks x workers, so several of them read the same "
        f"shards: lanes={readers} gives each its own"
    )
