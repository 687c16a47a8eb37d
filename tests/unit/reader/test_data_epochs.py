"""Which epoch is read where a state was loaded, or a dataset made anew: nothing lost unsaid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from splatshard.pipeline.data import SplatDataset, TrainBatch
from splatshard.schemas.errors import UsageError
from tests.splat_shards import keys_of


def state_of(dst: str, epoch: int, batches: int) -> dict[str, Any]:
    """The state after so many `batches` of `epoch`."""
    dataset = SplatDataset(dst, batch_size=4)
    dataset.set_epoch(epoch)
    read = iter(dataset)
    (*_, last) = (next(read) for _ in range(batches))
    return dataset.state_after(last)


def resumed(dst: str, epoch: int, batches: int) -> SplatDataset:
    dataset = SplatDataset(dst, batch_size=4)
    dataset.load_state_dict(state_of(dst, epoch, batches))
    return dataset


@pytest.fixture(scope="module")
def orders(dst: str) -> list[list[str]]:
    """The keys of three epochs."""
    dataset = SplatDataset(dst, batch_size=4)
    return [keys_of(dataset) for _ in range(3)]


class Counting:
    """As a loader that accelerate prepared: each process counts its iterations from 0."""

    def __init__(self, loader: DataLoader[TrainBatch]) -> None:
        self.loader, self.iteration = loader, 0

    def set_epoch(self, epoch: int) -> None:
        self.iteration = epoch
        self.loader.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[TrainBatch]:
        self.set_epoch(self.iteration)
        yield from self.loader
        self.iteration += 1


def test_an_epoch_before_that_of_a_state_is_refused(dst: str, orders: list[list[str]]) -> None:
    """The loop that begins at 0 again read epoch 0, and the rest of the state's never."""
    dataset = resumed(dst, 1, 2)
    with pytest.raises(UsageError, match=r"set_epoch\(0\) after a state of epoch 1.* loop .* at 1"):
        dataset.set_epoch(0)
    assert keys_of(dataset) == orders[1][8:]  # it is still there
    dataset = resumed(dst, 1, len(dataset))
    with pytest.raises(UsageError, match="loop over epochs at 2"):
        dataset.set_epoch(0)


def test_a_loader_that_counts_from_0_is_refused(dst: str, orders: list[list[str]]) -> None:
    """Without `set_epoch`, which tells it where the run is."""
    loader = Counting(DataLoader(resumed(dst, 1, 2), batch_size=None))
    with pytest.raises(UsageError, match=r"so call its set_epoch\(1\) first"):
        next(iter(loader))
    loader.set_epoch(1)
    assert keys_of(loader) == orders[1][8:]
    assert keys_of(loader) == orders[2]


def test_an_epoch_after_that_of_a_state_is_told(
    dst: str, orders: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = resumed(dst, 0, 2)
    dataset.set_epoch(1)
    left = len(dataset) - 2
    assert f"set_epoch(1) leaves out {left} batches of epoch 0" in caplog.text
    assert keys_of(dataset) == orders[1]
    caplog.clear()
    for batches in (2, len(dataset)):
        dataset = resumed(dst, 0, batches)
        if batches == 2:
            assert keys_of(dataset) == orders[0][8:]
        dataset.set_epoch(1)
        dataset.set_epoch(0)  # meant so
    assert caplog.text == ""


def test_an_epoch_that_a_state_was_of_is_not_read_again_unsaid(
    dst: str, orders: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """StatefulDataLoader loads the state as its loop has named epoch 0 and begins to read."""
    dataset = SplatDataset(dst, batch_size=4)
    dataset.set_epoch(0)
    dataset.load_state_dict(state_of(dst, 1, 2))
    assert keys_of(dataset) == orders[1][8:]
    assert caplog.text == ""
    dataset.set_epoch(1)
    assert "epoch 1 is read again, since the state that was loaded is one of" in caplog.text
    assert keys_of(dataset) == orders[1]


def test_a_dataset_made_anew_for_each_epoch_is_told_once(
    dst: str, orders: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """As Lightning's reload_dataloaders_every_n_epochs makes it: no order but that of epoch 0."""
    for _ in range(3):
        assert keys_of(SplatDataset(dst, batch_size=4)) == orders[0]
    (said,) = caplog.messages
    assert said.startswith("epoch 0 is read again, by a dataset that is made like an earlier one")


def test_what_is_made_anew_and_meant_is_not_told(
    dst: str, orders: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (0, 1, 0):
        dataset = SplatDataset(dst, batch_size=4)
        dataset.set_epoch(epoch)
        assert keys_of(dataset) == orders[epoch]
    assert keys_of(resumed(dst, 0, 2)) == orders[0][8:]
    for options in ({"seed": 1}, {"filter": [("label", ">", 3)]}, {"num_gaussians": 6}):
        list(SplatDataset(dst, batch_size=4, **options))
    list(SplatDataset(dst, batch_size=4, rank=1, world_size=2))
    for _ in range(2):
        list(SplatDataset(dst, batch_size=4, shuffle=False))
    assert caplog.text == ""
