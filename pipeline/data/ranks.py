"""Whether all ranks read the same dataset, compared through the process group's store.

Ranks share the batches of one order. Where one of them has another batch size, seed, filter or
other shards, some samples are read twice and others never. So the first rank that makes its n-th
dataset writes down what that is, and each other one compares its own. Nobody waits: a rank that
never reads leaves the others alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.utils.data import get_worker_info

from splatshard.pipeline.data.catalog import Source
from splatshard.pipeline.data.place import Place
from splatshard.schemas.errors import UsageError

log = logging.getLogger(__name__)

_inherited = False  # the process group, and with it the store, is of the process that forked this


def _forked() -> None:
    global _inherited
    _inherited = dist.is_available() and dist.is_initialized()


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_forked)


def _together(place: Place) -> bool:
    """Whether this process has a process group of several, in which its place is `place`."""
    if _inherited or get_worker_info() is not None:
        return False
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return place == (dist.get_rank(), dist.get_world_size()) and place.world_size > 1


def compare(place: Place, settings: Mapping[str, Any], sources: Sequence[Source[Any]]) -> bool:
    """Whether there is a process group, in which this rank's place is `place`, to compare with.

    Raises UsageError where its next dataset is another than that of the rank which made it first.
    Unshuffled ones are compared among themselves, and it is only said: a rank may evaluate alone.
    """
    if not _together(place):
        return False
    shards = [
        (shard.content, count)
        for source in sources
        for shard, count in zip(source.shards, source.counts.tolist(), strict=True)
    ]
    digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:12]
    samples = sum(count for _, count in shards)
    mine = {**settings, "data": f"{len(shards)} shards, {samples} samples, {digest}"}
    said = _difference("shuffled" if settings["shuffle"] else "in order", mine)
    if said and settings["shuffle"]:
        raise UsageError(said)
    if said:
        log.warning("%s", said)
    return True


def _difference(kind: str, mine: Mapping[str, Any]) -> str:
    """The fields in which another rank has something else, in words; empty for none."""
    rank, store = dist.get_rank(), _store()
    if store is None:  # MPI's
        return ""
    try:
        number = store.add(f"splatshard/{kind}/{rank}", 1)
        text = json.dumps([rank, mine])
        first, theirs = json.loads(store.compare_set(f"splatshard/{kind} {number}", "", text))
    except RuntimeError:  # the process that keeps the store has ended
        return ""
    other = [
        f"{name} {theirs.get(name)!r} and {value!r}"
        for name, value in mine.items()
        if theirs.get(name) != value
    ]
    if not other:
        return ""
    return (
        f"ranks {first} and {rank} read different datasets, of {', '.join(other)}: some samples "
        "would be read twice and others never. Make it alike on all ranks, or give rank=0 and "
        "world_size=1 to one that a rank reads alone"
    )


def _store() -> Any:
    """That of the process group, for which torch has no public name."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
