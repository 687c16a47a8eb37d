"""Who hands out a dataset's batches, as seen from the dataset: DataLoaders, and accelerate.

A DataLoader tells its dataset nothing of how it was made. So it is looked for where it asks for an
iterator, on the stack, or later among the objects that refer to the dataset, which the garbage
collector knows. That takes a good part of a second in a large process; the stack costs nothing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from threading import get_ident
from types import CellType, FrameType, FunctionType
from typing import Any, NamedTuple

from torch.utils.data import Dataset, get_worker_info

from splatshard.schemas.errors import UsageError


def check_in_order(dataset: Dataset[Any]) -> None:
    """Raises UsageError where a DataLoader hands out batches of `dataset` in another order."""
    if in_any_order(dataset):
        raise UsageError(
            "a DataLoader of this dataset has in_order=False, so batches before this one may not "
            "have been given out, and a state would lose them: make the DataLoader with "
            "in_order=True"
        )


def in_any_order(dataset: Dataset[Any]) -> bool:
    """Whether several workers of a DataLoader with in_order=False read `dataset`, itself or within
    a dataset that wraps it, be it by a partial or a function that holds the dataset."""
    return _in_any_order(dataset, set())


def _in_any_order(dataset: object, seen: set[int]) -> bool:
    """`seen` are the ids of those that were asked: they may hold each other."""
    if id(dataset) in seen:
        return False
    seen.add(id(dataset))
    for holder in _holders(dataset):
        for hidden in ("", "_"):  # a DataLoader, and its iterator, which may outlive it
            own = [holder.get(f"{hidden}{name}") for name in ("dataset", "in_order", "num_workers")]
            if own[0] is dataset and own[1] is False and (own[2] or 0) > 1:
                return True
        wrapper = holder.get(_OWNER)
        if isinstance(wrapper, Dataset) and _in_any_order(wrapper, seen):
            return True
    return any(_in_any_order(found, seen) for found in _callables(dataset))


def check_not_collated(caller: FrameType) -> None:
    """Raises UsageError where `caller`, who asks for an iterator, fetches for a DataLoader that
    joins whole batches by a function that knows nothing of them, or adds a dimension to them."""
    if caller.f_globals.get("__name__") != "torch.utils.data._utils.fetch":
        return
    fetcher = caller.f_locals.get("self")
    collate = getattr(fetcher, "collate_fn", None)
    collate = getattr(collate, "data_collator", collate)  # of transformers, which removes columns
    library = getattr(collate, "__module__", "").partition(".")[0]
    if library not in ("torch", "transformers") or not getattr(fetcher, "auto_collation", False):
        return
    raise UsageError(
        "a DataLoader would collate what are whole batches already: make it with batch_size=None, "
        "as in DataLoader(dataset, batch_size=None, num_workers=2); transformers' Trainer makes "
        "its own unless its get_train_dataloader returns such a one. SplatTable has single samples"
    )


def check_divided_once(world_size: int) -> None:
    """Raises UsageError where accelerate divides once more what a dataset divides among ranks: by
    its default rank 0 alone would read its part, and all others get some of that."""
    if world_size == 1:
        return
    if found := _accelerate(("DataLoaderDispatcher", "IterableDatasetShard")):
        raise UsageError(
            f"accelerate ({found}) divides among the ranks what this dataset divides already, "
            "so the rest would never be read: do not prepare() its DataLoader, or give the dataset "
            "rank=0 and world_size=1"
        )


def check_all_workers_read() -> None:
    """Raises UsageError in a DataLoader worker that asks for an iterator through Hugging Face's
    IterableDataset, where that reads in fewer workers than there are: the others' parts would never
    be read."""
    info = get_worker_info()
    _, reader = _at_work("datasets.iterable_dataset", ("IterableDataset",)) if info else ("", None)
    shards = getattr(reader, "num_shards", None)
    if info and shards is not None and shards < info.num_workers:
        raise UsageError(
            f"datasets.IterableDataset has {shards} shards, so it reads in as many of the "
            f"DataLoader's {info.num_workers} workers, and the others' samples would never be "
            "read: give the DataLoader the dataset itself, with batch_size=None, or "
            f"num_workers={shards}"
        )


class Taker(NamedTuple):
    """Who takes batches of a dataset: the class of accelerate's that does so before it hands out
    the last one, if that is it, and the thread."""

    ahead: str
    thread: int


def taker_of() -> Taker:
    """As seen from a dataset's iterator."""
    return Taker(_accelerate(("DataLoaderDispatcher", "DataLoaderShard")), get_ident())


def check_not_ahead(taker: Taker | None, asker: str) -> None:
    """Raises UsageError where batches may have been taken and not yet handed out, so that a state
    of the dataset would lose them. `asker` is the module that wants the state: torchdata, within
    accelerate's stateful loaders, does so before it goes on."""
    ahead = "" if taker is None or asker.startswith("torchdata.") else taker.ahead
    if taker is None or (ahead, taker.thread) == ("", get_ident()):
        return
    who = f"accelerate ({ahead})" if ahead else "another thread"
    raise UsageError(
        f"{who} reads ahead, and state_dict() would take for read what was not yet handed out: "
        "save dataset.state_after(batch)"
    )


def _accelerate(names: tuple[str, ...]) -> str:
    """Which of these classes of accelerate's is at work."""
    return _at_work("accelerate.data_loader", names)[0]


def _at_work(module: str, names: tuple[str, ...]) -> tuple[str, Any]:
    """Which of these classes of `module` is at work, as the stack has it, of which a forked
    DataLoader worker has its parent's; and the object."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_qualname.partition(".")[0]
        if name in names and frame.f_globals.get("__name__") == module:
            return name, frame.f_locals.get("self")
        frame = frame.f_back
    return "", None


def _callables(value: object) -> list[object]:
    """Partials that have `value` among their arguments, and functions that hold it in a closure."""
    found = gc.get_referrers(value)
    cells = [cell for cell in found if isinstance(cell, CellType)]
    closures = gc.get_referrers(*cells) if cells else []
    further = [each for each in (*found, *closures) if type(each) in (tuple, dict)]
    owners = [*found, *(gc.get_referrers(*further) if further else [])]
    return [
        owner
        for owner in owners
        if (isinstance(owner, partial) and _has(value, (*owner.args, *owner.keywords.values())))
        or (isinstance(owner, FunctionType) and _has(value, map(_content, owner.__closure__ or ())))
    ]


def _has(value: object, among: Iterable[object]) -> bool:
    return any(each is value for each in among)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


_OWNER = object()


def _holders(value: object) -> Iterator[dict[Any, Any]]:
    """The attributes of every object that has `value` among them, itself or in a list, tuple or
    dictionary (torch's ChainDataset), and the object as _OWNER."""
    for found in gc.get_referrers(value):
        if isinstance(found, list | tuple | dict):
            yield from _owners(found)
    yield from _owners(value)


def _owners(value: object) -> Iterator[dict[Any, Any]]:
    for found in gc.get_referrers(value):
        owners = gc.get_referrers(found) if isinstance(found, dict) else [found]
        for owner in owners:
            attributes = getattr(owner, "__dict__", None)
            if isinstance(attributes, dict) and any(v is value for v in attributes.values()):
                yield {**attributes, _OWNER: owner}
