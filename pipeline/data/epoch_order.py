"""In which order samples are read: a pure function of (seed, epoch), computed where it is needed.

    line      all shards, shuffled, end to end: each sample has a place on it
    regions   the line cut into `lanes` equal parts, and a rest
    windows   `shuffle_shards` consecutive shards of a region, whose samples are permuted together
    order     `grain` samples of lane 0, as many of lane 1, ..., again of lane 0, ...; then the rest

Rank and worker take batches of that one order in turn, so it does not depend on how many of them
there are. A reader of every R-th batch meets only lanes of its own where `lanes` is a multiple of
R and the batch is a grain: then no shard is read twice, but for those that lie across two regions.
With one lane every reader reads all shards, and leaves out all but its own samples.

Nothing here has a size of the number of samples: per shard an offset, per window a permutation.
The random numbers are hashed from what they are for and sorted (random_numbers.py), so an order
outlives an upgrade in the middle of an epoch.

Known bias: samples of a shard stay within `shuffle_shards` shards of one another.

Mixtures. Every lane chooses a source for each of its grains, in proportion to the weights and as
evenly as they allow; each source has a line of its own, of which every lane owns an equal part, and
begins it anew, shuffled anew, when it is through. An epoch is as many samples as it is said to be,
and begins every line anew: within it a sample comes a second time only after all of its lane's
part came once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from splatshard.pipeline.data.random_numbers import GOLDEN, permutation
from splatshard.schemas.errors import UsageError

PERIOD = 4096
"""Grains of a lane after which the choice of sources repeats; weights are rounded to 1 / PERIOD."""


class Ordering(TypedDict, total=False):
    """Arguments of OrderedDataset that its kinds pass on."""

    batch_size: int
    rank: int | None
    world_size: int | None
    seed: int
    shuffle: bool
    shuffle_shards: int
    lanes: int
    drop_last: bool
    filter: Sequence[Sequence[Any]]
    epoch_samples: int | None
    prefetch_windows: int
    on_rank_zero: Callable[[Callable[[], Any]], Any] | None


class WindowKey(NamedTuple):
    """Window number `number` of a lane's part of a source; `lane` is `lanes` for the rest.

    `cycle` counts how often the epoch has been through that part.
    """

    source: int
    lane: int
    cycle: int
    number: int

    @property
    def stream(self) -> tuple[int, int]:
        """Windows of one stream are used one after the other."""
        return self.source, self.lane


class Span(NamedTuple):
    """Places `begin` to `end` of a window's permutation."""

    window: WindowKey
    begin: int
    end: int


class Piece(NamedTuple):
    """Samples `begin` to `end` of a shard, counted among those that are read at all."""

    shard: int
    begin: int
    end: int


class Window(NamedTuple):
    """What lies in a window, and in which order: `permutation` [n] are places in `pieces`."""

    source: int
    pieces: list[Piece]
    permutation: NDArray[np.int64]


class Line(NamedTuple):
    """`shards` [S] in order, all of which have samples; shard i's are `starts[i]:starts[i + 1]`."""

    shards: NDArray[np.int64]
    starts: NDArray[np.int64]


class EpochOrder:
    """The order of one epoch.

    `counts` are the samples of each shard, an int64 array per source. `weights` (several sources
    only) are positive; `epoch_samples` is the length of a mixture's epoch, by default as many as
    there are samples.
    """

    def __init__(
        self,
        counts: Sequence[NDArray[np.int64]],
        epoch: int,
        *,
        seed: int,
        grain: int,
        lanes: int = 1,
        shuffle: bool = True,
        shuffle_shards: int = 2,
        weights: Sequence[float] | None = None,
        epoch_samples: int | None = None,
    ) -> None:
        self.counts = counts
        self.key: tuple[int, int] = (seed, epoch)
        self.grain = grain
        self.lanes = lanes
        self.shuffle = shuffle
        self.shuffle_shards = shuffle_shards
        self.sizes: list[int] = [int(c.sum()) for c in counts]
        self.choice: Choices | None = None if weights is None else choices(tuple(weights))
        # samples in lanes; the rest of a single source is shorter than a grain of every lane, and
        # one lane has it all, so that its order does not depend on the grain
        whole_grains = self.sizes[0] // (lanes * grain) * grain
        self.per_lane: int = self.sizes[0] if lanes == 1 else whole_grains
        self.total: int = sum(self.sizes) if epoch_samples is None else epoch_samples
        # lanes of a mixture may be at the end of one line and at the beginning of the next
        self._line = lru_cache(maxsize=4 * len(counts))(self._new_line)

    def spans(self, begin: int, end: int) -> list[Span]:
        """Where the samples `begin` to `end` of the order are."""
        found: list[Span] = []
        while begin < end:
            grain, skipped = divmod(begin, self.grain)
            row, lane = divmod(grain, self.lanes)
            size = min(end, begin + self.grain - skipped) - begin
            if self.choice is not None:
                source, number = self.choice.at(lane, row)
                found += self._looped(source, lane, number * self.grain + skipped, size)
            elif begin < self.per_lane * self.lanes:
                found += self._windows(0, lane, 0, row * self.grain + skipped, size)
            else:
                size = end - begin
                offset = begin - self.per_lane * self.lanes
                found += self._windows(0, self.lanes, 0, offset, size)
            begin += size
        return found

    def shards(self, begin: int, end: int) -> list[tuple[int, int]]:
        """From which shards the samples `begin` to `end` are: numbers of source and shard."""
        keys = sorted({span.window for span in self.spans(begin, end)})
        windows = [self.window(key) for key in keys]
        return [(window.source, piece.shard) for window in windows for piece in window.pieces]

    def window(self, key: WindowKey) -> Window:
        """The samples of a window, and their order."""
        begin, end = self._window_bounds(key)
        line = self._line(key.source, key.cycle)
        first = int(np.searchsorted(line.starts, begin, "right")) - 1
        last = int(np.searchsorted(line.starts, end, "left"))
        pieces = []
        for i in range(first, last):
            start, stop = int(line.starts[i]), int(line.starts[i + 1])
            shard = int(line.shards[i])
            pieces.append(Piece(shard, max(begin, start) - start, min(end, stop) - start))
        key_numbers = (*self.key, key.source, key.cycle, key.lane + 1, key.number)
        order = permutation(end - begin, *key_numbers) if self.shuffle else np.arange(end - begin)
        return Window(key.source, pieces, order)

    def _looped(self, source: int, lane: int, offset: int, size: int) -> Iterator[Span]:
        """`size` samples from `offset` on of a lane's part, which begins anew at its end."""
        begin, end = self._region(source, lane)
        while size:
            cycle, place = divmod(offset, end - begin)
            part = min(size, end - begin - place)
            yield from self._windows(source, lane, cycle, place, part)
            offset, size = offset + part, size - part

    def _windows(
        self, source: int, lane: int, cycle: int, offset: int, size: int
    ) -> Iterator[Span]:
        """`size` samples from `offset` on of a region, cut where a window ends."""
        begin, _ = self._region(source, lane)
        starts = self._line(source, cycle).starts
        first = int(np.searchsorted(starts, begin, "right")) - 1
        while size:
            place = int(np.searchsorted(starts, begin + offset, "right")) - 1
            key = WindowKey(source, lane, cycle, (place - first) // self.shuffle_shards)
            start, stop = self._window_bounds(key)
            part = min(size, stop - begin - offset)
            at = begin + offset - start
            yield Span(key, at, at + part)
            offset, size = offset + part, size - part

    def _region(self, source: int, lane: int) -> tuple[int, int]:
        """Where a lane's part of a source's line begins and ends."""
        size = self.sizes[source]
        if self.choice is not None:
            return size * lane // self.lanes, size * (lane + 1) // self.lanes
        end = size if lane == self.lanes else self.per_lane * (lane + 1)
        return self.per_lane * lane, end

    def _window_bounds(self, key: WindowKey) -> tuple[int, int]:
        begin, end = self._region(key.source, key.lane)
        starts = self._line(key.source, key.cycle).starts
        first = int(np.searchsorted(starts, begin, "right")) - 1 + key.number * self.shuffle_shards
        last = min(first + self.shuffle_shards, len(starts) - 1)
        return max(begin, int(starts[first])), min(end, int(starts[last]))

    def _new_line(self, source: int, cycle: int) -> Line:
        shards = np.flatnonzero(self.counts[source])
        if self.shuffle:
            shards = shards[permutation(len(shards), *self.key, source, cycle, 0)]
        starts = np.concatenate(([0], np.cumsum(self.counts[source][shards])))
        return Line(shards, starts.astype(np.int64))


class Choices:
    """Which source each grain of a lane comes from."""

    def __init__(self, weights: tuple[float, ...]) -> None:
        quotas = _quotas(weights)
        # the k-th of q grains belongs at (k + 1/2) / q of the period: as even as it can be
        times = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
        sources = np.repeat(np.arange(len(quotas)), quotas)
        self.sources: NDArray[np.int64] = sources[np.argsort(times, kind="stable")]
        chosen = self.sources[:, None] == np.arange(len(quotas))
        self.before: NDArray[np.int64] = np.concatenate(
            (np.zeros((1, len(quotas)), np.int64), chosen.cumsum(0))
        )

    def at(self, lane: int, row: int) -> tuple[int, int]:
        """The source of a lane's grain `row`, and how many of its grains before that are that
        source's. Lanes begin at different phases, so that a step mixes the sources."""
        phase = lane * GOLDEN % (1 << 64) * PERIOD >> 64
        source = int(self.sources[(phase + row) % PERIOD])
        return source, self._count(source, phase + row) - self._count(source, phase)

    def _count(self, source: int, place: int) -> int:
        periods, rest = divmod(place, PERIOD)
        return int(periods * self.before[PERIOD, source] + self.before[rest, source])


choices = lru_cache(maxsize=8)(Choices)


def _quotas(weights: tuple[float, ...]) -> NDArray[np.int64]:
    """Whole numbers in proportion to `weights` that add up to PERIOD, by largest remainders, at
    least 1 each."""
    shares = np.array(weights, np.float64)
    exact = shares / shares.sum() * PERIOD
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    by_remainder = np.argsort(quotas - exact, kind="stable")
    for i in range(abs(missing := PERIOD - int(quotas.sum()))):
        quotas[by_remainder[i % len(quotas)] if missing > 0 else np.argmax(quotas)] += np.sign(
            missing
        )
    return quotas


class Reader(NamedTuple):
    """Who reads: worker `worker` of `workers` on rank `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1


class Share(NamedTuple):
    """One batch of one rank: samples `begin` to `end` of the order, and how far into the order all
    ranks are with this step: at its end after the last one, whatever that left out."""

    begin: int
    end: int
    after: int


def epoch_steps(samples: int, batch_size: int, world_size: int, drop_last: bool) -> int:
    """Batches that every rank gets of `samples` samples."""
    together = batch_size * world_size
    return samples // together if drop_last else -(-samples // together)


def check_steps(total: int, batch_size: int, world_size: int, drop_last: bool, urls: str) -> None:
    """Raises UsageError where the `total` samples of an epoch fill no step."""
    if not epoch_steps(total, batch_size, world_size, drop_last):
        raise UsageError(
            f"batch_size is {batch_size} on each of {world_size} ranks, but {urls} has only "
            f"{total} samples an epoch, which fill no step: choose at most {total} on all ranks "
            "together, or drop_last=False"
        )


def shares(
    start: int, total: int, batch_size: int, drop_last: bool, reader: Reader, taken: int = 0
) -> Iterator[Share]:
    """The batches of `reader` in an order of `total` samples that begins at `start`, without its
    first `taken`.

    Step k is of worker k % workers, which is how torch's DataLoader asks its workers. What a last
    step lacks it lacks on all ranks alike: they share what is left evenly.
    """
    together = batch_size * reader.world_size
    steps = epoch_steps(total - start, batch_size, reader.world_size, drop_last)
    for step in range(reader.worker + taken * reader.workers, steps, reader.workers):
        begin = start + step * together
        left = min(together, total - begin)
        after = total if step == steps - 1 else begin + together
        if left == together:
            first = begin + reader.rank * batch_size
            yield Share(first, first + batch_size, after)
        else:
            cuts = [begin + left * r // reader.world_size for r in (reader.rank, reader.rank + 1)]
            yield Share(cuts[0], cuts[1], after)


def check_counts(**values: tuple[object, int | None]) -> None:
    """Raises UsageError unless each value is a whole number that is at least as large as said."""
    for name, (value, least) in values.items():
        if type(value) is not int or (least is not None and value < least):
            bound = "" if least is None else f" from {least} on"
            raise UsageError(f"{name} is {value!r}: it must be a whole number{bound}")
