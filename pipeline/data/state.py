"""Where reading is, as plain data, and whether that fits a dataset.

A state is what the order depends on and how much of it was taken:

    version, epoch, samples          samples of the epoch's order that all ranks have taken
    lanes, grain                     of the epoch's order; a dataset that is given the state ends
                                     the epoch with them, and begins the next one with its own
    seed, shuffle, shuffle_shards    must be those of the dataset
    filter, data, weights            what is read; `data` has a digest per source
    reader                           only within a DataLoader worker: who it is, where the epoch's
                                     samples began, and how many batches of which size it has
                                     delivered
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splatshard.pipeline.data.epoch_order import Reader
from splatshard.schemas.errors import UsageError

VERSION = 1

WORKERS, LAST_WORKER, LOADED, UNREAD, NAMED = range(4, 9)
"""What a dataset shares with DataLoader workers beside the four numbers of a Start: whether they
have begun since that was set, and which was the last; the epoch of the newest state that was
loaded, plus 1, and whether nothing was read since; whether set_epoch or a state ever said where to
begin."""

_ENDED: dict[str, Tensor] = {}
KEPT = 64


def ended_cells(which: object) -> Tensor:
    """int64 [2], which all datasets of this process that are described by the same `which` share
    with their workers: how many epochs one of them has read to the end, and whether it was told
    that another reads them again. Only the newest are kept."""
    key = repr(which)
    _ENDED[key] = cells = _ENDED.pop(key, torch.zeros(2, dtype=torch.int64)).share_memory_()
    while len(_ENDED) > KEPT:
        del _ENDED[next(iter(_ENDED))]
    return cells


def made_anew(epoch: int, ended: Tensor) -> str:
    """What to say, once, where a dataset begins `epoch` that one like it has read (`ended` int64
    [2], see ended_cells); empty for nothing."""
    if ended[1] or ended[0] <= epoch:
        return ""
    ended[1] = 1
    return (
        f"epoch {epoch} is read again, by a dataset that is made like an earlier one of this "
        "process, and begins where that did: make it once and keep it, or call set_epoch before "
        "each epoch (set_epoch(0) where a new run begins)"
    )


class Start(NamedTuple):
    """Where an epoch's reading begins, and the lanes and grain of its order."""

    epoch: int
    samples: int
    lanes: int
    grain: int


def state_of(start: Start, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": VERSION, **start._asdict(), **settings}


def worker_state_of(
    start: Start, settings: Mapping[str, Any], reader: Reader, batch_size: int, taken: int
) -> dict[str, Any]:
    """The state of one DataLoader worker, which has delivered `taken` batches since `start`."""
    counted = {"batch_size": batch_size, "taken": taken}
    return state_of(start, settings) | {"reader": reader._asdict() | counted}


def left_state(epoch: int, loaded: int, unread: bool, left: int) -> str:
    """What to say where `epoch` is begun after a state of the epoch `loaded`, of which `left`
    batches are not read; empty for nothing. `unread` says that none was since.

    Raises UsageError where those would be lost, for an epoch that was over by then.
    """
    if unread and epoch < loaded:
        further = loaded if left else loaded + 1
        raise UsageError(
            f"set_epoch({epoch}) after a state of epoch {loaded} was loaded, of which nothing is "
            f"read yet: begin the loop over epochs at {further}; a loader that accelerate prepared "
            f"counts from 0 in every process, so call its set_epoch({further}) first. To begin "
            "again on purpose make the dataset without the state"
        )
    if unread and epoch > loaded and left:
        return (
            f"set_epoch({epoch}) leaves out {left} batches of epoch {loaded}, whose state was "
            f"loaded: set_epoch({loaded}) reads them"
        )
    if not unread and epoch <= loaded:
        return (
            f"epoch {epoch} is read again, since the state that was loaded is one of epoch "
            f"{loaded}: begin the loop over epochs at that (with accelerate by set_epoch of its "
            "loader)"
        )
    return ""


def nothing_left(epoch: int, left: int) -> str:
    """What to say where `left` batches of `epoch` are read; empty for any."""
    if left:
        return ""
    return (
        f"nothing is left of epoch {epoch} after the state that was loaded, so nothing is read: "
        f"call set_epoch({epoch + 1}) to go on"
    )


def start_of(
    state: Mapping[str, Any], settings: Mapping[str, Any], reader: Reader, batch_size: int
) -> tuple[Start, int]:
    """Where `state` says to begin, and how many batches this reader has had since.

    Raises UsageError for a state of other data, settings or, if it is a worker's, another reader
    or batch size: what it counts are batches.
    """
    expected = {"version", *Start._fields, *settings}
    if not isinstance(state, Mapping) or not expected <= state.keys() <= expected | {"reader"}:
        raise UsageError(
            f"this is no state of a dataset: it must have the fields {sorted(expected)}"
        )
    for name, value in {"version": VERSION, **settings}.items():
        if state[name] != value:
            raise UsageError(
                f"the state was saved with {name} {state[name]!r}, this dataset has {value!r}: "
                "make the dataset as it was, or begin a new epoch without the state"
            )
    start = Start(*(state[name] for name in Start._fields))
    if not all(type(n) is int and n >= least for n, least in zip(start, (0, 0, 1, 1), strict=True)):
        raise UsageError(f"the state says {start._asdict()}, which no dataset saves")
    if "reader" not in state:
        return start, 0
    saved = dict(state["reader"])
    taken = saved.pop("taken", None)
    here = reader._asdict() | {"batch_size": batch_size}
    if {"batch_size": batch_size} | saved != here or type(taken) is not int or taken < 0:
        raise UsageError(
            f"the state is one of DataLoader worker {saved}, this is {here}: to go on with other "
            "ranks, workers or batches save dataset.state_after(batch) and load that"
        )
    return start, taken
