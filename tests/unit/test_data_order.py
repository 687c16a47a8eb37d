"""The order in which samples are read: a permutation whoever reads it, and exact after any number
of interruptions and resizes."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from splatshard.pipeline.data.epoch_order import (
    PERIOD,
    EpochOrder,
    Reader,
    Share,
    choices,
    epoch_steps,
    permutation,
    shares,
)

Sample = tuple[int, int, int]
"""Source, shard and number within the shard."""

counts = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any)


@st.composite
def orders(draw: st.DrawFn) -> EpochOrder:
    return EpochOrder(
        [np.array(draw(counts))],
        draw(st.integers(0, 1000)),
        seed=draw(st.integers(-(2**70), 2**70)),
        grain=draw(st.integers(1, 12)),
        lanes=draw(st.integers(1, 12)),
        shuffle=draw(st.booleans()),
        shuffle_shards=draw(st.integers(1, 4)),
    )


def samples_of(order: EpochOrder, begin: int, end: int) -> list[Sample]:
    found = []
    for span in order.spans(begin, end):
        window = order.window(span.window)
        places = [
            (window.source, piece.shard, i)
            for piece in window.pieces
            for i in range(piece.begin, piece.end)
        ]
        assert len(places) == len(window.permutation)
        found += [places[i] for i in window.permutation[span.begin : span.end]]
    return found


def everything(order: EpochOrder) -> list[Sample]:
    return [
        (source, shard, i)
        for source, counts in enumerate(order.counts)
        for shard, count in enumerate(counts)
        for i in range(count)
    ]


def read(
    order: EpochOrder,
    start: int,
    batch_size: int,
    drop_last: bool,
    world_size: int,
    workers: int,
) -> Iterator[list[list[Share]]]:
    """Step by step what all ranks get, as a DataLoader of so many workers on each delivers it."""
    readers = [
        [
            shares(start, order.total, batch_size, drop_last, Reader(r, world_size, w, workers))
            for w in range(workers)
        ]
        for r in range(world_size)
    ]
    for step in range(epoch_steps(order.total - start, batch_size, world_size, drop_last)):
        yield [next(of_rank[step % workers]) for of_rank in readers]
    assert all(next(worker, None) is None for of_rank in readers for worker in of_rank)


@given(orders())
def test_an_order_is_a_permutation_however_it_is_cut(order: EpochOrder) -> None:
    whole = samples_of(order, 0, order.total)
    assert sorted(whole) == everything(order)
    cut = order.total // 3
    assert samples_of(order, 0, cut) + samples_of(order, cut, order.total) == whole


@given(orders(), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_every_sample_once_for_any_readers(
    order: EpochOrder, batch_size: int, world_size: int, workers: int
) -> None:
    seen: list[Sample] = []
    for step in read(order, 0, batch_size, False, world_size, workers):
        assert {share.after for share in step} == {step[0].after}
        assert all(share.end - share.begin <= batch_size for share in step)
        seen += [s for share in step for s in samples_of(order, share.begin, share.end)]
        assert len(seen) == step[0].after
    assert seen == samples_of(order, 0, order.total)  # and whoever reads, it is the same order


@given(orders(), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_drop_last_leaves_out_less_than_a_step(
    order: EpochOrder, batch_size: int, world_size: int, workers: int
) -> None:
    steps = list(read(order, 0, batch_size, True, world_size, workers))
    assert all(share.end - share.begin == batch_size for step in steps for share in step)
    left = order.total - len(steps) * batch_size * world_size
    assert 0 <= left < batch_size * world_size
    assert not steps or steps[-1][0].after == order.total


@given(
    orders(),
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 6)),
        max_size=6,
    ),
)
def test_any_sequence_of_interrupts_and_resizes_sees_each_sample_once(
    order: EpochOrder, runs: list[tuple[int, int, int, int]]
) -> None:
    """Each run has a batch size, ranks and workers of its own, and is interrupted after some steps;
    the last one is not."""
    seen: list[Sample] = []
    start = 0
    for batch_size, world_size, workers, steps in [*runs, (3, 2, 2, order.total)]:
        run = list(read(order, start, batch_size, False, world_size, workers))[:steps]
        for step in run:
            seen += [s for share in step for s in samples_of(order, share.begin, share.end)]
            start = step[0].after
    assert sorted(seen) == everything(order)


@given(orders(), st.integers(1, 4), st.integers(1, 4))
def test_a_worker_goes_on_where_it_was(order: EpochOrder, workers: int, taken: int) -> None:
    reader = Reader(0, 1, workers - 1, workers)
    every = list(shares(0, order.total, order.grain, False, reader))
    assert list(shares(0, order.total, order.grain, False, reader, taken)) == every[taken:]


@given(
    st.lists(st.integers(5, 40), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_readers_with_lanes_of_their_own_share_no_window(
    counts: list[int], world_size: int, workers: int, lanes_each: int
) -> None:
    lanes = world_size * workers * lanes_each
    order = EpochOrder([np.array(counts)], 0, seed=1, grain=2, lanes=lanes)
    in_lanes = order.per_lane * lanes
    users: dict[object, set[Reader]] = {}
    for rank in range(world_size):
        for worker in range(workers):
            reader = Reader(rank, world_size, worker, workers)
            for share in shares(0, in_lanes, 2, True, reader):
                for span in order.spans(share.begin, share.end):
                    users.setdefault(span.window, set()).add(reader)
    assert all(len(readers) == 1 for readers in users.values())
    assert order.total - in_lanes < lanes * 2


@given(orders())
def test_windows_of_a_stream_come_one_after_the_other(order: EpochOrder) -> None:
    """So a reader never needs a window again that it gave up."""
    latest: dict[tuple[int, int], tuple[int, int]] = {}
    for span in order.spans(0, order.total):
        key = span.window
        assert latest.get(key.stream, (0, 0)) <= (key.cycle, key.number)
        latest[key.stream] = (key.cycle, key.number)


@given(orders())
def test_a_window_mixes_so_many_shards(order: EpochOrder) -> None:
    keys = {span.window for span in order.spans(0, order.total)}
    assert all(len(order.window(key).pieces) <= order.shuffle_shards for key in keys)


@given(orders(), st.integers(1, 12))
def test_the_order_of_one_lane_does_not_depend_on_the_batch(order: EpochOrder, grain: int) -> None:
    one, other = (
        EpochOrder(order.counts, order.key[1], seed=order.key[0], grain=g)
        for g in (order.grain, grain)
    )
    assert samples_of(one, 0, one.total) == samples_of(other, 0, one.total)


def test_unshuffled_is_as_stored() -> None:
    order = EpochOrder([np.array([3, 0, 2])], 7, seed=5, grain=2, shuffle=False)
    assert samples_of(order, 0, 5) == everything(order)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    wholes = [
        tuple(samples_of(EpochOrder([np.full(9, 30)], epoch, seed=seed, grain=8), 0, 270))
        for epoch in range(3)
        for seed in (0, 1, 2)
    ]
    assert len(set(wholes)) == 9
    shard_orders = [tuple(dict.fromkeys(shard for _, shard, _ in whole)) for whole in wholes]
    assert len(set(shard_orders)) == 9


def test_the_order_stays_what_it_is() -> None:
    """Checkpoints of a run in progress depend on it."""
    order = EpochOrder([np.array([4, 3, 5])], 2, seed=3, grain=2, lanes=2)
    assert [(shard, i) for _, shard, i in samples_of(order, 0, 12)] == STORED
    assert permutation(8, 1, 2).tolist() == STORED_PERMUTATION


def test_permutations_are_fair() -> None:
    """Each place is as likely as the others: 3,000 permutations of 5."""
    firsts = Counter(int(permutation(5, key)[0]) for key in range(3000))
    assert all(480 < firsts[place] < 720 for place in range(5))


def test_a_billion_samples_need_no_memory() -> None:
    counts = np.full(130_000, 10_000)
    tracemalloc.start()
    order = EpochOrder([counts], 3, seed=9, grain=256, lanes=512)
    spans = order.spans(order.total // 2, order.total // 2 + 1024)
    windows = [order.window(span.window) for span in spans]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(window.permutation) for window in windows) <= 5 * 20_000
    assert peak < 20e6


@st.composite
def mixtures(draw: st.DrawFn) -> EpochOrder:
    sources = draw(st.integers(2, 3))
    lanes = draw(st.integers(1, 4))
    big = st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(lambda c: sum(c) >= 4)
    return EpochOrder(
        [np.array(draw(big)) for _ in range(sources)],
        draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 9)),
        grain=draw(st.integers(1, 7)),
        lanes=lanes,
        shuffle_shards=draw(st.integers(1, 3)),
        weights=draw(st.lists(st.floats(0.1, 9), min_size=sources, max_size=sources)),
        epoch_samples=draw(st.integers(1, 300)),
    )


@given(mixtures(), st.integers(1, 50))
def test_a_mixture_is_the_same_however_it_is_cut(order: EpochOrder, step: int) -> None:
    whole = samples_of(order, 0, order.total)
    assert len(whole) == order.total
    parts = [
        samples_of(order, begin, min(order.total, begin + step))
        for begin in range(0, order.total, step)
    ]
    assert [sample for part in parts for sample in part] == whole


@given(mixtures())
def test_a_mixture_repeats_a_sample_only_after_the_others(order: EpochOrder) -> None:
    """With one lane: k times as many samples of a source as it has are each of its samples k
    times."""
    order.lanes = 1
    whole = samples_of(order, 0, order.total)
    for source, size in enumerate(order.sizes):
        of_source = [sample for sample in whole if sample[0] == source]
        for begin in range(0, len(of_source), size):
            turn = of_source[begin : begin + size]
            assert len(set(turn)) == len(turn)


def test_weights_are_shares() -> None:
    order = EpochOrder(
        [np.full(10, 100), np.full(20, 100), np.full(3, 100)],
        0,
        seed=0,
        grain=10,
        lanes=4,
        weights=(0.5, 0.3, 0.2),
        epoch_samples=20_000,
    )
    taken = Counter(source for source, _, _ in samples_of(order, 0, 20_000))
    assert all(abs(taken[i] / 20_000 - w) < 0.01 for i, w in enumerate((0.5, 0.3, 0.2)))
    early = Counter(source for source, _, _ in samples_of(order, 0, 800))
    assert all(abs(early[i] / 800 - w) < 0.07 for i, w in enumerate((0.5, 0.3, 0.2)))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 9999))
def test_choices_count_what_came_before(weights: list[float], turn: int) -> None:
    choice = choices(tuple(weights))
    assert len(choice.sources) == PERIOD
    taken: Counter[int] = Counter()
    for before in range(min(turn, 50)):
        source, number = choice.at(3, before)
        assert number == taken[source]
        taken[source] += 1
    source, number = choice.at(3, turn + PERIOD)
    quota = int(choice.before[PERIOD, source])
    assert (source, number) == (choice.at(3, turn)[0], choice.at(3, turn)[1] + quota)


STORED = [
    *((1, 2), (0, 2), (2, 3), (2, 2), (1, 0), (0, 1)),
    *((2, 4), (0, 3), (1, 1), (0, 0), (2, 0), (2, 1)),
]
STORED_PERMUTATION = [2, 7, 3, 1, 5, 6, 0, 4]
