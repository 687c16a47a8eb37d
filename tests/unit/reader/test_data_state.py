"""SplatDataset by epochs and ranks: interrupts, resizes, and the states it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import ChainDataset, DataLoader, IterableDataset

from splatshard.pipeline.data import SplatDataset, TrainBatch
from splatshard.pipeline.data.loaders import in_any_order
from splatshard.schemas.errors import (
    UsageError,
)
from tests.splat_shards import commit, keys_of, make_dataset, rows_of
from tests.unit.reader.conftest import Rows


def test_epochs_differ_and_repeat(dst: str) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    first, second = keys_of(dataset), keys_of(dataset)  # one after the other by itself
    assert (first != second, dataset.epoch) == (True, 2)
    dataset.set_epoch(0)
    assert keys_of(dataset) == first
    dataset.set_epoch(1)
    assert keys_of(dataset) == second
    assert keys_of(SplatDataset(dst, batch_size=4, seed=1)) != first


class Steps(IterableDataset[Any]):
    """A pipeline of functions, the first of which holds the dataset."""

    def __init__(self, *steps: Callable[[], Any]) -> None:
        self.steps = steps

        self.last = partial(iter, self)  # which holds it in turn

    def __iter__(self) -> Iterator[Any]:
        yield from self.steps[0]()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: ChainDataset([d]),
        lambda d: Steps(partial(iter, d)),
        lambda d: Steps(partial(dict, a=d)),
        lambda d: Steps(lambda: d),
    ],
    ids=["itself", "chain", "partial", "keyword", "closure"],
)
def test_loaders_that_keep_no_order_are_found(dst: str, wrap: Callable[[Any], Any]) -> None:
    """Within the datasets that a dataset lists, too; tests/integration/test_data_loaders.py loses
    samples in this way."""
    for in_order in (True, False):
        dataset = SplatDataset(dst, batch_size=4)
        loader = DataLoader(wrap(dataset), batch_size=None, num_workers=2, in_order=in_order)
        assert in_any_order(dataset) != in_order
        del loader


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_get_as_many_batches_and_share_the_samples(
    dst: str, rows: Rows, drop_last: bool
) -> None:
    ranks = [
        list(SplatDataset(dst, batch_size=4, rank=r, world_size=3, drop_last=drop_last))
        for r in range(3)
    ]
    lengths = {len(batches) for batches in ranks}
    assert lengths == {len(rows) // 12 if drop_last else -(-len(rows) // 12)}
    keys = [key for batches in ranks for key in keys_of(batches)]
    assert len(keys) == len(set(keys)) == (len(rows) // 12 * 12 if drop_last else len(rows))
    for batches in ranks:
        assert all(len(batch) == 4 == len(batch.keys) for batch in batches)
    last = [int(batches[-1].valid.sum()) for batches in ranks]
    assert last == ([4, 4, 4] if drop_last else [3, 3, 4])


def test_ranks_without_a_sample_of_the_last_step_get_a_batch_all_the_same(tmp_path: Path) -> None:
    commit(str(tmp_path), "a", rows_of(0, 3))
    for rank in range(4):
        (batch,) = SplatDataset(
            str(tmp_path), batch_size=2, rank=rank, world_size=4, drop_last=False
        )
        assert (len(batch), int(batch.valid.sum())) == (2, 1 if rank else 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)),
        max_size=4,
    ),
    st.integers(0, 99),
)
def test_any_sequence_of_interrupts_and_resizes_sees_each_sample_once(
    shards: dict[str, tuple[str, Rows]], runs: list[tuple[int, int, int, int]], seed: int
) -> None:
    """Batch size, ranks and lanes change; the state travels as JSON."""
    dst, rows = shards["parquet"]
    seen: list[str] = []
    state = None
    for batch_size, world_size, lanes, steps in [*runs, (3, 2, 1, 99)]:
        after = state
        for rank in range(world_size):
            dataset = SplatDataset(
                dst,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                lanes=lanes,
                drop_last=False,
                seed=seed,
                prefetch_windows=0,
            )
            if state is not None:
                dataset.load_state_dict(json.loads(json.dumps(state)))
            for _, batch in zip(range(steps), dataset, strict=False):
                seen += keys_of([batch])
                after = dataset.state_after(batch)
                assert after == dataset.state_dict()
        state = after
    assert sorted(seen) == sorted(rows)
    assert (state["epoch"], state["samples"]) == (0, len(rows))


@pytest.mark.parametrize("through", [iter, lambda d: iter(DataLoader(d, batch_size=None))])
def test_who_counts_to_len_goes_on_with_the_next_epoch(
    dst: str, through: Callable[[SplatDataset], Iterator[TrainBatch]]
) -> None:
    """Lightning does not ask for one more batch to learn that there is none."""
    whole = SplatDataset(dst, batch_size=4)
    expected = [keys_of(whole) for _ in range(3)]
    dataset = SplatDataset(dst, batch_size=4)
    for epoch in range(3):
        batches = through(dataset)
        read = [next(batches) for _ in range(len(dataset) - 1)]
        assert dataset.epoch == epoch  # so far it may be given up
        read.append(next(batches))
        assert keys_of(read) == expected[epoch]
        assert dataset.epoch == epoch + 1
        assert dataset.state_dict() == dataset.state_after(read[-1])
        assert dataset.state_dict()["epoch"] == epoch
        del batches
    dataset.set_epoch(1)
    assert keys_of(dataset) == expected[1]


@pytest.mark.parametrize("taken", [1, 3])
def test_who_counts_on_from_a_state_reads_whole_epochs(dst: str, taken: int) -> None:
    """Lightning keeps len() and the number of the batch: what was left ended each epoch early."""
    whole = SplatDataset(dst, batch_size=4)
    expected = [keys_of(whole) for _ in range(2)]
    whole.set_epoch(0)
    (*_, last) = islice(whole, taken)
    dataset = SplatDataset(dst, batch_size=4)
    dataset.load_state_dict(whole.state_after(last))
    steps = len(dataset)
    assert steps == len(whole)
    assert dataset.steps_left == steps - taken
    assert keys_of(islice(dataset, steps - taken)) == expected[0][4 * taken :]
    assert keys_of(islice(dataset, steps)) == expected[1]


def test_an_iterator_given_up_does_not_move_the_dataset(dst: str) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    whole = keys_of(SplatDataset(dst, batch_size=4))
    next(iter(dataset))
    assert dataset.state_dict()["samples"] == 4
    assert keys_of(dataset) == whole


def test_a_state_is_refused_where_another_thread_reads_ahead(dst: str) -> None:
    """What it had taken, and nobody had seen, was not read again."""
    dataset = SplatDataset(dst, batch_size=4)
    batches = iter(dataset)
    with ThreadPoolExecutor(1) as thread:
        first, _ = (thread.submit(next, batches).result() for _ in range(2))
    with pytest.raises(UsageError, match="another thread reads ahead"):
        dataset.state_dict()
    dataset.load_state_dict(dataset.state_after(first))
    assert keys_of(dataset) == keys_of(SplatDataset(dst, batch_size=4))[4:]
    assert dataset.state_dict()["epoch"] == 1


def test_an_epoch_that_begins_again_is_told(dst: str, caplog: pytest.LogCaptureFixture) -> None:
    """Batches that were given out come a second time, and those behind them never do."""
    dataset = SplatDataset(dst, batch_size=4)
    first = keys_of(islice(dataset, 3))
    assert caplog.text == ""
    assert keys_of(islice(dataset, 3)) == first
    assert "epoch 0 is read again, since its last iterator was left after 3" in caplog.text
    caplog.clear()
    dataset.set_epoch(1)
    next(iter(dataset))  # only a look
    list(dataset)
    dataset.set_epoch(1)
    list(islice(dataset, 3))
    dataset.set_epoch(1)  # meant so
    list(islice(dataset, 3))
    evaluated = SplatDataset(dst, batch_size=4, shuffle=False)
    for _ in range(2):
        list(islice(evaluated, 2))
    assert caplog.text == ""


def test_a_step_that_takes_the_first_batch_each_time_is_told(
    dst: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    for _ in range(2):  # looks
        next(iter(dataset))
    assert caplog.text == ""
    for _ in range(2):
        next(iter(dataset))
    assert "epoch 0 is read again, since its last iterator was left after 1" in caplog.text


@pytest.mark.parametrize("drop_last", [True, False])
def test_after_the_last_step_nothing_of_the_epoch_is_left(
    dst: str, drop_last: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Not for fewer ranks either, which could fill a step with what was dropped."""
    dataset = SplatDataset(dst, batch_size=4, rank=0, world_size=4, drop_last=drop_last)
    batches = iter(dataset)
    (*_, last) = (next(batches) for _ in range(len(dataset)))
    resumed = SplatDataset(dst, batch_size=1, drop_last=drop_last)
    resumed.load_state_dict(dataset.state_after(last))
    resumed.set_epoch(0)
    assert resumed.steps_left == 0
    assert keys_of(resumed) == []
    assert "nothing is left of epoch 0 after the state that was loaded" in caplog.text
    assert resumed.epoch == 1
    caplog.clear()
    assert keys_of(resumed)
    assert "nothing is left" not in caplog.text


def test_set_epoch_keeps_what_a_state_says_of_that_epoch(dst: str) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    whole = keys_of(dataset)
    dataset.set_epoch(0)
    batch = next(iter(dataset))
    resumed = SplatDataset(dst, batch_size=4, lanes=2)
    resumed.load_state_dict(dataset.state_after(batch))
    resumed.set_epoch(0)
    assert resumed.steps_left == len(whole) // 4 - 1
    assert keys_of(resumed) == whole[4:]
    assert resumed.state_dict()["lanes"] == 2  # the next epoch is its own


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("seed", {"seed": 1}),
        ("shuffle", {"shuffle": False}),
        ("shuffle_shards", {"shuffle_shards": 3}),
        ("filter", {"filter": [("psnr", ">", 26)]}),
    ],
)
def test_a_state_of_other_settings_is_refused(
    dst: str, field: str, options: dict[str, Any]
) -> None:
    state = SplatDataset(dst, batch_size=4).state_dict()
    with pytest.raises(UsageError, match=f"saved with {field} "):
        SplatDataset(dst, batch_size=4, **options).load_state_dict(state)


def test_a_state_of_other_data_is_refused(dst: str, tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [6, 6])
    state = SplatDataset(dst, batch_size=4).state_dict()
    with pytest.raises(UsageError, match="saved with data "):
        SplatDataset(str(tmp_path), batch_size=4).load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"samples": -1},
        {"samples": 10**9},
        {"epoch": "1"},
        {"lanes": 0},
        {"more": 1},
        {"reader": {"rank": 0, "taken": 3}},
    ],
)
def test_what_is_no_state_is_refused(dst: str, change: dict[str, Any]) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    with pytest.raises(UsageError):
        dataset.load_state_dict(dataset.state_dict() | change)
    with pytest.raises(UsageError, match="no state"):
        dataset.load_state_dict({})


def test_a_workers_state_fits_its_batch_size(dst: str) -> None:
    """It counts batches: those of twice the size passed over samples that nobody had read."""
    dataset = SplatDataset(dst, batch_size=4)
    place = {"rank": 0, "world_size": 1, "worker": 0, "workers": 1}
    state = dataset.state_dict() | {"reader": place | {"batch_size": 4, "taken": 3}}
    dataset.load_state_dict(state)
    with pytest.raises(
        UsageError, match=r"'batch_size': 8\}: to go on with other ranks, workers or"
    ):
        SplatDataset(dst, batch_size=8).load_state_dict(state)
    state["reader"].pop("batch_size")  # of before
    dataset.load_state_dict(state)
