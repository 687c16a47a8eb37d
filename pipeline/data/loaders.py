"""Who hands out a dataset's batches, as seen from the dataset: DataLoaders, and accelerate.

A DataLoader tells its dataset nothing of how it was made. So it is looked for among the objects
that refer to the dataset: the garbage collector knows them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from threading import get_ident
from types import CellType, FunctionType
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

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


def check_not_collated(caller: object) -> None:
    """Raises UsageError where `caller`, who asks for an iterator, is what fetches for a DataLoader
    that joins whole batches, by a function that knows nothing of them, or adds a dimension to
    them."""
    if not getattr(caller, "auto_collation", False):
        return
    collate = getattr(caller, "collate_fn", None)
    collate = getattr(collate, "data_collator", collate)  # of transformers, which removes columns
    if getattr(collate, "__module__", "").partition(".")[0] not in ("torch", "transformers"):
        return
    raise UsageError(
        "a DataLoader would collate what are whole batches already: make it with batch_size=None, "
        "as in DataLoader(dataset, batch_size=None, num_workers=2); transformers' Trainer makes "
        "its own unless its get_train_dataloader returns such a one. SplatTable has single samples"
    )


def check_divided_once(dataset: Dataset[Any], world_size: int) -> None:
    """Raises UsageError where accelerate divides once more what `dataset` divides among ranks: by
    its default rank 0 alone would read its part, and all others get some of that."""
    if world_size == 1:
        return
    if found := _accelerate(dataset, ("DataLoaderDispatcher", "IterableDatasetShard")):
        raise UsageError(
            f"accelerate ({found[0]}) divides among the ranks what this dataset divides already, "
            "so the rest would never be read: do not prepare() its DataLoader, or give the dataset "
            "rank=0 and world_size=1"
        )


class Taker(NamedTuple):
    """Who takes batches of a dataset: the class of accelerate's that does so before it hands out
    the last one, if that is it, and the thread."""

    ahead: str
    thread: int


def taker_of(dataset: Dataset[Any]) -> Taker:
    """As seen from an iterator of `dataset`. accelerate's stateful loaders are not ahead: they ask
    for the state before they go on."""
    found = _accelerate(dataset, ("DataLoaderDispatcher", "DataLoaderShard"))
    ahead = found and not getattr(found[1], "use_stateful_dataloader", False)
    return Taker(found[0] if found and ahead else "", get_ident())


def check_not_ahead(taker: Taker | None) -> None:
    """Raises UsageError where batches may have been taken and not yet handed out, so that a state
    of the dataset would lose them."""
    if taker is None or taker == ("", get_ident()):
        return
    who = f"accelerate ({taker.ahead})" if taker.ahead else "another thread"
    raise UsageError(
        f"{who} reads ahead, and state_dict() would take for read what was not yet handed out: "
        "save dataset.state_after(batch)"
    )


def _accelerate(dataset: Dataset[Any], names: tuple[str, ...]) -> tuple[str, object] | None:
    """Which of these classes of accelerate's holds `dataset`, itself or through others."""
    return _owned_by(dataset, names, depth=3) if "accelerate" in sys.modules else None


def _owned_by(value: object, names: tuple[str, ...], depth: int) -> tuple[str, object] | None:
    for holder in _holders(value):
        owner = holder[_OWNER]
        for kind in type(owner).__mro__:
            if kind.__module__ == "accelerate.data_loader" and kind.__name__ in names:
                return kind.__name__, owner
        further = depth and isinstance(owner, Dataset | DataLoader) and owner is not value
        if further and (found := _owned_by(owner, names, depth - 1)):
            return found
    return None


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
