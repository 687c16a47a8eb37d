"""SplatDataset through torch's DataLoader and torchdata's StatefulDataLoader: same batches, same
order, exact resume, whoever prefetches."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from splatshard.pipeline.data import SplatDataset, TrainBatch
from splatshard.pipeline.data.batch import values_of
from splatshard.schemas.errors import CorruptShardError, UsageError
from tests.splat_shards import keys_of, make_dataset

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # few cores
    # torchdata 0.11 beside a newer torch
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]

COUNTS = [10, 7, 1, 16, 9, 12]
WORKERS = (0, 1, 3)


@pytest.fixture(scope="module")
def dst(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = str(tmp_path_factory.mktemp("shards"))
    make_dataset(found, COUNTS)
    return found


def dataset_of(dst: str, **options: Any) -> SplatDataset:
    return SplatDataset(dst, **({"batch_size": 4, "drop_last": False} | options))


def loader_of(dataset: SplatDataset, workers: int, **options: Any) -> DataLoader[TrainBatch]:
    return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


def stateful(dataset: SplatDataset, workers: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        torchdata = pytest.importorskip("torchdata.stateful_dataloader")
        return torchdata.StatefulDataLoader(dataset, batch_size=None, num_workers=workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_any_number_of_workers_delivers_the_same_batches(dst: str, workers: int) -> None:
    dataset = dataset_of(dst, lanes=2)
    expected = list(dataset_of(dst, lanes=2))
    loader = loader_of(dataset, workers)
    assert len(loader) == len(expected)
    found = list(loader)
    assert keys_of(found) == keys_of(expected)
    assert [b.position for b in found] == [b.position for b in expected]
    assert all(values_of(batch.splats) is not None for batch in found)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.splats.means, b.splats.means)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_what_counts_as_read_is_what_was_delivered(dst: str, workers: int, steps: int) -> None:
    """Workers are far ahead by then. The run goes on with another number of them, and ranks."""
    dataset = dataset_of(dst)
    whole = keys_of(dataset_of(dst))
    for batch, _ in zip(loader_of(dataset, workers), range(steps), strict=False):
        state = json.loads(json.dumps(dataset.state_after(batch)))
    rest = []
    for rank in range(2):
        resumed = dataset_of(dst, rank=rank, world_size=2, batch_size=3)
        resumed.load_state_dict(state)
        rest += keys_of(loader_of(resumed, 2))
    assert sorted(whole[: 4 * steps] + rest) == sorted(whole)


@pytest.mark.parametrize(
    "made",
    [lambda d: d, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))],
    ids=["itself", "deepcopy", "pickle"],
)
def test_persistent_workers_see_set_epoch(
    dst: str, made: Callable[[SplatDataset], SplatDataset]
) -> None:
    """Those of a copy, too."""
    dataset = made(dataset_of(dst))
    loader = loader_of(dataset, 2, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(keys_of(loader))
    expected = [keys_of(dataset_of(dst))]
    other = dataset_of(dst)
    for epoch in (1, 2):
        other.set_epoch(epoch)
        expected.append(keys_of(other))
    assert epochs == expected


@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers_who_counts_to_len_calls_set_epoch(dst: str, persistent: bool) -> None:
    """The way that docs/reading.md gives for Lightning."""
    other, dataset = dataset_of(dst), dataset_of(dst)
    loader = loader_of(dataset, 2, persistent_workers=persistent)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert keys_of(islice(loader, len(loader))) == keys_of(other)


def test_the_dataset_of_workers_does_not_know_how_far_they_are(dst: str) -> None:
    dataset = dataset_of(dst)
    loader = loader_of(dataset, 1)
    next(iter(loader))
    with pytest.raises(UsageError, match="state_after"):
        dataset.state_dict()
    dataset.set_epoch(1)
    assert dataset.state_dict()["epoch"] == 1


@contextmanager
def log_of(path: Path) -> Iterator[None]:
    """What the dataset logs in this process and those that it forks, in a file."""
    file = logging.FileHandler(path)
    logger = logging.getLogger("splatshard.pipeline.data.base")
    logger.addHandler(file)
    try:
        yield
    finally:
        logger.removeHandler(file)
        file.close()


def test_an_epoch_that_workers_read_again_is_said(dst: str, tmp_path: Path) -> None:
    """Without set_epoch they would do so for ever."""
    dataset = dataset_of(dst, lanes=2)
    with log_of(tmp_path / "log"):
        first = keys_of(loader_of(dataset, 2))
        assert keys_of(loader_of(dataset, 2)) == first
        dataset.set_epoch(1)
        assert keys_of(loader_of(dataset, 2)) != first
    said = (tmp_path / "log").read_text().splitlines()
    assert said == ["epoch 0 is read again: call set_epoch before each epoch"]


def test_a_dataset_made_anew_for_each_epoch_of_workers_is_said_once(
    dst: str, tmp_path: Path
) -> None:
    """They are forked anew, too: what the last ones read is known to this process."""
    with log_of(tmp_path / "log"):
        first, *others = [keys_of(loader_of(dataset_of(dst), 1)) for _ in range(3)]
    assert others == [first, first]
    (said,) = (tmp_path / "log").read_text().splitlines()
    assert said.startswith("epoch 0 is read again, by a dataset that is made like an earlier one")


def test_workers_that_read_the_same_shards_are_said_once(dst: str, tmp_path: Path) -> None:
    dataset = dataset_of(dst)
    with log_of(tmp_path / "log"):
        for epoch in range(2):
            dataset.set_epoch(epoch)
            list(loader_of(dataset, 3))
    (said,) = (tmp_path / "log").read_text().splitlines()
    assert "lanes is 1 with 3 ranks x workers" in said
    assert "lanes=3" in said


def test_workers_errors_name_the_shard(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [9])
    dataset = dataset_of(str(tmp_path))
    (path,) = tmp_path.glob("*.parquet")
    path.unlink()
    with pytest.raises(CorruptShardError, match=str(path)):
        list(loader_of(dataset, 1))


def test_a_spawned_worker_reads_the_same(dst: str) -> None:
    dataset = dataset_of(dst)
    loader = loader_of(dataset, 1, multiprocessing_context="spawn")
    assert keys_of(loader) == keys_of(dataset_of(dst))


def interrupted(loader: Any, steps: int) -> tuple[list[str], dict[str, Any]]:
    """The keys of some steps, and the loader's state after them."""
    batches: Iterator[TrainBatch] = iter(loader)
    keys = keys_of([next(batches) for _ in range(steps)])
    return keys, loader.state_dict()


@pytest.mark.parametrize("workers", WORKERS)
def test_stateful_loader_resumes(dst: str, workers: int) -> None:
    """Twice, at steps that leave its workers at different places."""
    whole = keys_of(dataset_of(dst))
    first, state = interrupted(stateful(dataset_of(dst), workers), 4)
    loader = stateful(dataset_of(dst), workers)
    loader.load_state_dict(state)
    second, state = interrupted(loader, 3)
    loader = stateful(dataset_of(dst), workers)
    loader.load_state_dict(state)
    assert first + second + keys_of(loader) == whole


@pytest.mark.parametrize("workers", WORKERS)
def test_stateful_loader_goes_on_with_the_next_epoch(dst: str, workers: int) -> None:
    other = dataset_of(dst)
    other.set_epoch(3)
    expected = keys_of(other)
    other.set_epoch(4)
    dataset = dataset_of(dst)
    dataset.set_epoch(3)
    keys, state = interrupted(stateful(dataset, workers), 2)
    resumed = dataset_of(dst)
    loader = stateful(resumed, workers)
    loader.load_state_dict(state)
    assert keys + keys_of(loader) == expected
    resumed.set_epoch(4)
    assert keys_of(loader) == keys_of(other)


@pytest.mark.parametrize("workers", WORKERS)
def test_stateful_loader_at_the_end_of_an_epoch(dst: str, workers: int) -> None:
    """Saved after the last step, nothing of the epoch is left."""
    steps = len(dataset_of(dst))
    keys, state = interrupted(stateful(dataset_of(dst), workers), steps)
    assert keys == keys_of(dataset_of(dst))
    dataset = dataset_of(dst)
    loader = stateful(dataset, workers)
    loader.load_state_dict(state)
    assert keys_of(loader) == []
    dataset.set_epoch(1)
    assert sorted(keys_of(loader)) == sorted(keys) != keys


def test_a_workers_state_is_for_that_worker(dst: str) -> None:
    _, state = interrupted(stateful(dataset_of(dst), 2), 2)
    other = stateful(dataset_of(dst, rank=1, world_size=2), 2)
    other.load_state_dict(state)
    with pytest.raises(UsageError, match="state_after"):
        next(iter(other))


def late(worker: int) -> None:
    if worker == 0:
        time.sleep(2)


class Wrapped(IterableDataset[TrainBatch]):
    """As a user who changes the batches wraps a dataset."""

    def __init__(self, inner: SplatDataset) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[TrainBatch]:
        return iter(self.inner)


@pytest.mark.parametrize("wrap", [lambda d: d, Wrapped], ids=["itself", "wrapped"])
def test_a_state_of_batches_in_any_order_is_refused(dst: str, wrap: Callable[..., Any]) -> None:
    """Worker 1 is asked again and again while worker 0 has not begun: no state says that."""
    dataset = dataset_of(dst)
    options = {"in_order": False, "worker_init_fn": late, "prefetch_factor": 1}
    batches = iter(loader_of(wrap(dataset), 2, **options))  # the loader itself is gone by then
    batch = [next(batches) for _ in range(3)][-1]
    with pytest.raises(UsageError, match="in_order=True"):
        dataset.state_after(batch)
    del batches
    dataset.set_epoch(1)
    for batch in loader_of(wrap(dataset), 2, in_order=True):
        assert dataset.state_after(batch)["epoch"] == 1


def test_one_worker_has_one_order(dst: str) -> None:
    dataset = dataset_of(dst)
    loader = loader_of(dataset, 1, in_order=False)
    first = keys_of(islice(loader, 2))
    dataset.set_epoch(0)
    state = [dataset.state_after(batch) for batch, _ in zip(loader, range(2), strict=False)][-1]
    resumed = dataset_of(dst)
    resumed.load_state_dict(state)
    assert first + keys_of(loader_of(resumed, 2)) == keys_of(dataset_of(dst))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"prefetch_factor": 1}, {"prefetch_factor": 4, "persistent_workers": True}),
        ({"persistent_workers": True}, {"multiprocessing_context": "spawn"}),
    ],
)
def test_options_of_loaders_do_not_change_what_is_read(
    dst: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    dataset = dataset_of(dst, lanes=2, drop_last=True)
    loader = loader_of(dataset, 3, **before)
    read = list(islice(loader, 4))
    state = dataset.state_after(read[-1])
    resumed = dataset_of(dst, drop_last=False, batch_size=3)
    resumed.load_state_dict(state)
    rest = keys_of(loader_of(resumed, 2, **after))
    assert sorted(keys_of(read) + rest) == sorted(keys_of(dataset_of(dst)))


def rows_in(dataset: SplatDataset) -> Iterator[dict[str, str]]:
    for batch in dataset:
        yield from ({"key": key} for key in batch.keys)


def test_hugging_faces_dataset_reads_in_all_workers_or_none(dst: str) -> None:
    """It has one shard, and so reads in one worker, whose part of the samples was all there was."""
    datasets = pytest.importorskip("datasets")
    wrapped = datasets.IterableDataset.from_generator(
        rows_in, gen_kwargs={"dataset": dataset_of(dst)}
    )
    for workers in (0, 1):
        keys = [row["key"] for row in loader_of(wrapped, workers)]
        assert set(keys) == set(keys_of(dataset_of(dst)))
    with pytest.raises(UsageError, match=r"has 1 shards.* 2 workers.*or num_workers=1"):
        list(loader_of(wrapped, 2))


def test_accelerates_count_of_epochs_does_not_drop_a_state(dst: str) -> None:
    """Its loaders begin at 0 in every process, and call `set_epoch` themselves."""
    accelerate = pytest.importorskip("accelerate.data_loader")
    whole = dataset_of(dst, drop_last=True)
    _, second, third = ([batch.labels.tolist() for batch in whole] for _ in range(3))
    whole.set_epoch(1)
    state = whole.state_after(list(islice(whole, 2))[-1])
    dataset = dataset_of(dst, drop_last=True, as_dict=True)
    dataset.load_state_dict(state)
    loader = accelerate.DataLoaderShard(dataset, batch_size=None)
    with pytest.raises(UsageError, match=r"state of epoch 1 .* call its set_epoch\(1\) first"):
        next(iter(loader))
    loader.set_epoch(1)
    for expected in (second[2:], third):
        assert [batch["labels"].tolist() for batch in loader] == expected
