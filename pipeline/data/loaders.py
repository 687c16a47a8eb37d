"""Which DataLoaders hand out a dataset's batches, as seen from the dataset.

A DataLoader tells its dataset nothing of how it was made. So it is looked for among the objects
that refer to the dataset: the garbage collector knows them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset


def in_any_order(dataset: Dataset[Any]) -> bool:
    """Whether several workers of a DataLoader with in_order=False read `dataset`, itself or within
    a dataset that wraps it."""
    for holder in _holders(dataset):
        for hidden in ("", "_"):  # a DataLoader, and its iterator, which may outlive it
            own = [holder.get(f"{hidden}{name}") for name in ("dataset", "in_order", "num_workers")]
            if own[0] is dataset and own[1] is False and (own[2] or 0) > 1:
                return True
        wrapper = holder.get(_OWNER)
        if isinstance(wrapper, Dataset) and wrapper is not dataset and in_any_order(wrapper):
            return True
    return False


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
