"""Ranks that read different datasets: found through the process group's store, without waiting;
tests/integration/test_data_ranks.py has real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from splatshard.pipeline.data import SplatDataset, ranks
from splatshard.schemas.errors import UsageError
from tests.splat_shards import keys_of, make_dataset
from tests.unit.reader.conftest import Rows

Become = Callable[[int], None]


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Become:
    """Makes this process that rank of two, whose store is here."""
    store = dist.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def become(rank: int) -> None:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)

    return become


def open_dataset(src: str | list[str], **options: Any) -> SplatDataset:
    return SplatDataset(src, **({"batch_size": 4} | options))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 2),
        ("seed", 1),
        ("filter", [("label", ">", 3)]),
        ("lanes", 2),
        ("shuffle_shards", 3),
        ("drop_last", False),
    ],
)
def test_ranks_of_other_settings_are_refused(
    dst: str, become: Become, option: str, value: Any
) -> None:
    become(0)
    open_dataset(dst)
    become(1)
    with pytest.raises(UsageError, match=f"ranks 0 and 1 .*{option} .*alike on all ranks"):
        open_dataset(dst, **{option: value})


def test_ranks_of_other_shards_are_refused(dst: str, tmp_path: Path, become: Become) -> None:
    make_dataset(str(tmp_path), [10, 7, 1, 16, 5, 4])  # as many samples
    become(1)
    open_dataset(dst)
    become(0)
    with pytest.raises(UsageError, match=r"ranks 1 and 0 .*data '5 shards, .* and '6 shards"):
        open_dataset(str(tmp_path))


def test_what_is_alike_is_read_and_one_may_read_alone(
    dst: str, rows: Rows, tmp_path: Path, become: Become
) -> None:
    """Whatever else rank 0 has, if it says that this is its own."""
    make_dataset(str(tmp_path), [8, 8])
    read = []
    for rank in range(2):
        become(rank)
        if not rank:
            assert keys_of(open_dataset(str(tmp_path), rank=0, world_size=1))
        read += keys_of(open_dataset(dst, drop_last=False, lanes=2))
        open_dataset(str(tmp_path), batch_size=2)
        open_dataset(str(tmp_path), shuffle=False)
    assert set(read) == set(rows)


def test_a_rank_that_evaluates_alone_is_told(
    dst: str, become: Become, caplog: pytest.LogCaptureFixture
) -> None:
    become(0)
    open_dataset(dst, batch_size=2, shuffle=False)
    open_dataset(dst)
    become(1)
    open_dataset(dst)
    assert caplog.text == ""
    open_dataset(dst, batch_size=8, shuffle=False)
    assert "ranks 0 and 1 read different datasets, of batch_size 2 and 8" in caplog.text


@pytest.mark.parametrize("begin", [iter, lambda dataset: dataset.set_epoch(1)])
def test_what_is_made_before_the_group_is_compared_when_it_is_read(
    dst: str, become: Become, begin: Callable[[SplatDataset], object]
) -> None:
    """With DataLoader workers `set_epoch` is all that this process sees of it."""
    first, second = open_dataset(dst), open_dataset(dst, seed=1)
    become(0)
    begin(first)
    become(1)
    with pytest.raises(UsageError, match="seed 0 and 1"):
        begin(second)


def test_a_store_that_has_ended_is_not_asked(
    dst: str, become: Become, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        def add(self, *arguments: object) -> int:
            raise dist.DistStoreError("connection closed")

    become(0)
    monkeypatch.setattr(ranks, "_store", Ended)
    assert keys_of(open_dataset(dst))
