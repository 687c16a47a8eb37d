"""What SplatDataset and ImageDataset share: batches of samples in an order that can be resumed.

    shards -> order -> windows (loaded ahead) -> blocks -> batch

    epoch_order.py  in which order            state.py    how far it was read
    windows.py      what is loaded when

What counts as read is what was delivered, though workers read ahead: every batch carries its place
in the order, and `state_after(batch)` is the state to save with the checkpoint of its step. It fits
any number of ranks and workers and any batch size. `state_dict()` is the same where no worker is
between, and StatefulDataLoader asks its workers for it batch by batch.

A dataset says what its sources are, how a piece of a shard is read, and how chosen samples become a
batch: `open_source`, `read`, `assemble`. The order depends on the shards' counts alone, so splats
and the images that they were fitted to come in the same order.
"""

from __future__ import annotations

import logging
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from splatshard.pipeline.data import catalog, loaders, ranks
from splatshard.pipeline.data.batch import AnyBatch, Position, position_of
from splatshard.pipeline.data.catalog import S, Source, check_sizes, numbered_otherwise, pools
from splatshard.pipeline.data.epoch_order import (
    EpochOrder,
    Piece,
    Reader,
    Share,
    check_counts,
    check_steps,
    epoch_steps,
    shares,
)
from splatshard.pipeline.data.filters import Filter, checked_filter
from splatshard.pipeline.data.place import Place, crowded, doubts, place_of
from splatshard.pipeline.data.state import (
    LAST_WORKER,
    LOADED,
    NAMED,
    UNREAD,
    WORKERS,
    Start,
    ended_cells,
    left_state,
    made_anew,
    nothing_left,
    start_of,
    state_of,
    worker_state_of,
)
from splatshard.pipeline.data.windows import Choice, Loader
from splatshard.schemas.errors import UsageError

log = logging.getLogger(__name__)

Batch = TypeVar("Batch", bound=AnyBatch)


class OrderedDataset(IterableDataset[Batch], Generic[S, Batch]):
    """Batches of the samples of `src`.

    src             one source or several (a sequence, or joined by `::`), which are one pool; a
                    mapping from each to its weight is a mixture
    batch_size      samples per batch of one rank
    rank, world_size  which of all batches are this process's; None: as torch.distributed says where
                    it runs, or torchrun's environment, else one process has them all (place.py)
    seed            of the order, which is a function of seed and epoch
    shuffle         False for evaluation: shards by name, samples as they were
    shuffle_shards  shards whose samples are mixed. They are in memory together, beside the next as
                    many (of every lane that a reader reads)
    lanes           parts of the shards that are read side by side. A multiple of world_size x
                    workers lets every worker read only shards of its own; with fewer, each shard is
                    read by several
    drop_last       what a last step cannot fill for all ranks is left out; else it is padded with
                    samples that are there a second time, `valid` False. An epoch that would be
                    left out whole is refused
    filter          conditions (column, operator, number) that samples must fulfil: see filters.py
    epoch_samples   length of a mixture's epoch; as many samples as there are by default
    prefetch_windows  loaded ahead on a thread; 0 for none
    on_rank_zero    opens the sources in one process for all, by what it is given; None: each does

    Raises UsageError for arguments that do not fit, and what opening and reading raise.
    """

    def __init__(
        self,
        src: catalog.Location | Sequence[catalog.Location] | Mapping[str, float],
        *,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_shards: int = 2,
        lanes: int = 1,
        drop_last: bool = True,
        filter: Sequence[Sequence[Any]] = (),
        epoch_samples: int | None = None,
        prefetch_windows: int = 1,
        on_rank_zero: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            batch_size=(batch_size, 1),
            world_size=(1 if world_size is None else world_size, 1),
            rank=(rank or 0, 0),
            shuffle_shards=(shuffle_shards, 1),
            lanes=(lanes, 1),
            prefetch_windows=(prefetch_windows, 0),
            seed=(seed, None),
        )
        self._given = rank, world_size
        self._parent: Place | None = None  # of a DataLoader worker
        if self.rank >= self.world_size:
            raise UsageError(f"rank is {rank}: it must be below world_size, {world_size}")
        conditions = checked_filter(filter)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.shuffle_shards = shuffle_shards
        self.lanes = lanes
        self.drop_last = drop_last
        self.prefetch_windows = prefetch_windows
        self.weights: tuple[float, ...] | None
        groups, self.weights = pools(src)

        def opened() -> list[Source[S]]:
            return [self.open_source(urls, conditions) for urls in groups]

        self.sources: list[Source[S]] = on_rank_zero(opened) if on_rank_zero else opened()
        if len(lists := self.class_lists) > 1:
            log.warning("%s", numbered_otherwise(lists))
        self.epoch_samples = epoch_samples
        check_sizes(self.sources, self.weights, lanes, epoch_samples)
        self._check_steps()
        self._settings = {
            "seed": seed,
            "shuffle": shuffle,
            "shuffle_shards": shuffle_shards,
            "filter": " and ".join(" ".join(map(str, c)) for c in conditions),
            "data": " ".join(source.content for source in self.sources),
            "weights": "" if self.weights is None else " ".join(map(repr, self.weights)),
            "epoch_samples": epoch_samples or 0,
        }
        # Shared with DataLoader workers, so that persistent ones see `set_epoch`, too: see state.py
        self._shared = torch.zeros(9, dtype=torch.int64).share_memory_()
        self._owner = os.getpid()  # whose iterations move it
        self._in_order = 0  # the worker beside which all loaders were found to be in order
        self._looks = 0  # iterators that were left after a batch of their epoch
        self._out = 0  # batches that the newest iterator of this process gave out of its epoch
        self._own: tuple[Start, int] | None = None  # a DataLoader worker's, of StatefulDataLoader
        self._progress: dict[str, Any] | None = None
        self._taker: loaders.Taker | None = None  # of the newest iterator's batches
        told = {k: v for k, v in vars(self).items() if isinstance(v, int | str | tuple)}
        self._ended = ended_cells((type(self).__name__, told, self._settings))
        self._compared = False  # with the other ranks
        self._begin(Start(0, 0, lanes, batch_size))
        self._compare()

    def __getstate__(self) -> dict[str, Any]:
        """A DataLoader worker that is not forked knows nothing of its parent's process group."""
        loaders.check_divided_once(self.world_size)
        return self.__dict__ | {"_parent": self.place, "_taker": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy shares its place with DataLoader workers, too; neither copy.deepcopy nor pickle
        keeps a tensor in shared memory."""
        self.__dict__.update(state)
        self._shared.share_memory_()
        self._ended.share_memory_()

    @abstractmethod
    def open_source(self, urls: Sequence[str], conditions: Filter) -> Source[S]:
        """The shards of `urls` as one pool, with the rows that `conditions` leave."""

    @abstractmethod
    def read(self, source: Source[S], piece: Piece) -> list[Any]:
        """A piece of a shard in memory, as blocks; several threads call it."""

    @abstractmethod
    def assemble(self, chosen: Sequence[Choice[Any]], valid: Tensor, position: Position) -> Batch:
        """The B chosen samples of blocks as a batch; `valid` bool [B], see TrainBatch."""

    @abstractmethod
    def keys_of(self, shard: S) -> Iterator[str]:
        """The keys in a shard, to say which one has a bad sample."""

    @property
    def class_lists(self) -> dict[str, str]:
        """Digests of the lists of classes by which labels are numbered, each with a shard."""
        return {k: url for source in self.sources for k, url in source.class_lists.items()}

    @property
    def place(self) -> Place:
        """Which of all processes this one is, now. Raises UsageError where only half is known."""
        return place_of(*self._given, self._parent)

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return int(self._shared[0])

    def set_epoch(self, epoch: int) -> None:
        """Read `epoch` next, from its beginning, unless a state was loaded that is within it.

        Call it before each epoch, as one does with torch's samplers: DataLoader workers do not
        know what the last ones read. Raises UsageError for what is no epoch, and for one before
        that of a state that was loaded and not read.
        """
        check_counts(epoch=(epoch, 0))
        self._part()
        self._compare()
        loaded, unread = int(self._shared[LOADED]) - 1, bool(self._shared[UNREAD])
        if epoch != self.epoch:
            if loaded >= 0 and (said := left_state(epoch, loaded, unread, self.steps_left)):
                log.warning("%s", said)
            self._begin(Start(epoch, 0, self.lanes, self.batch_size))
        if epoch != loaded or not unread:
            self._shared[LOADED] = 0
        self._shared[WORKERS] = self._out = 0
        self._shared[NAMED] = 1

    def __len__(self) -> int:
        """Batches of this rank in an epoch, some of which may be read: Lightning counts on."""
        return self._steps_from(0)

    @property
    def steps_left(self) -> int:
        """Batches of this rank in the next iteration: what is left of the epoch."""
        return self._steps_from(self._start().samples)

    def _steps_from(self, samples: int) -> int:
        left = self._total() - samples
        return epoch_steps(left, self.batch_size, self.world_size, self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        self._check_steps()
        loaders.check_not_collated(sys._getframe(1))
        self._part()
        self._compare()
        reader = self._reader()
        start, taken = self._own or (self._start(), 0)
        self._note(start, reader)
        self._note_workers(reader)
        self._own = None
        self._shared[UNREAD] = 0
        self._progress = self._state(start, reader, taken)
        return self._batches(start, reader, taken)

    def _batches(self, start: Start, reader: Reader, taken: int) -> Iterator[Batch]:
        order = self._order(start)
        loader = Loader(self.sources, self.read, self.assemble)
        total, drop_last = order.total, self.drop_last

        def mine() -> Iterator[Share]:
            return shares(start.samples, total, self.batch_size, drop_last, reader, taken)

        in_worker = get_worker_info() is not None
        self._taker = loaders.taker_of()
        following = Start(start.epoch + 1, 0, self.lanes, self.batch_size)
        steps = epoch_steps(total - start.samples, self.batch_size, reader.world_size, drop_last)
        if not in_worker and not steps:
            self._begin(following)
        batches = loader.batches(order, mine, self.batch_size, start.epoch, self.prefetch_windows)
        with closing(batches):
            for batch in batches:
                taken += 1
                self._out += 1
                if in_worker:
                    self._progress = self._state(start, reader, taken)
                else:
                    if taken == steps:  # who counts to len(dataset) does not ask once more
                        self._ended[0].clamp_(min=following.epoch)
                        self._begin(following)
                    self._progress = self.state_after(batch)
                yield batch
        if in_worker:
            self._ended[0].clamp_(min=following.epoch)
        else:
            self._progress = None

    def state_after(self, batch: AnyBatch | Mapping[str, Any]) -> dict[str, Any]:
        """The state once all ranks have taken their batches of the same step as `batch`.

        After the last step nothing of the epoch is left, and `set_epoch` begins the next one.
        Raises UsageError where a DataLoader hands out batches in another order: no step says then
        which of them were read.
        """
        position = position_of(batch)
        if position is None:
            raise UsageError("the batch has no position: give one as the dataset made it")
        worker = int(self._shared[LAST_WORKER])
        if worker != self._in_order and get_worker_info() is None:
            loaders.check_in_order(self)
            self._in_order = worker
        return state_of(Start(*position), self._settings)

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that the newest iterator gave out.

        Raises UsageError where DataLoader workers gave them out: then `state_after(batch)` knows.
        """
        in_workers = get_worker_info() is None and self._shared[WORKERS]
        if self._progress is not None and not in_workers:
            asker = sys._getframe(1).f_globals.get("__name__", "")
            loaders.check_not_ahead(self._taker, asker)
            return self._progress
        if in_workers:
            raise UsageError(
                "state_dict() was asked of a dataset that DataLoader workers read: use "
                "dataset.state_after(batch), or torchdata's StatefulDataLoader"
            )
        return state_of(self._start(), self._settings)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken, with any number of ranks and workers.

        Raises UsageError for a state of other data or settings, naming the field.
        """
        start, taken = start_of(state, self._settings, self._reader(), self.batch_size)
        if start.samples > self._total():
            raise UsageError(
                f"the state says samples {start.samples}, the epoch has {self._total()}"
            )
        self._part()
        self._shared[LOADED], self._shared[UNREAD] = start.epoch + 1, 1
        self._shared[NAMED] = 1
        if get_worker_info() is None:
            self._begin(start)
        else:
            self._own = start, taken
            self._progress = self._state(start, self._reader(), taken)

    def _note_workers(self, reader: Reader) -> None:
        """Note for other processes that DataLoader workers read, and say it when they, or this
        process, do so again from where they began. The first of them speaks for all; one batch is
        only a look, but not a third time."""
        again = f"epoch {self.epoch} is read again"
        remedy = "call set_epoch before each epoch"
        if get_worker_info() is None:
            self._looks += self._out == 1
            if (self._out > 1 or self._looks > 2) and self.shuffle:
                left = f"since its last iterator was left after {self._out} batches"
                log.warning("%s, %s: %s", again, left, remedy)
            self._shared[WORKERS] = self._out = 0
            return
        self._shared[LAST_WORKER] = os.getpid()
        if reader.worker == 0:
            if self._shared[WORKERS] and self.shuffle and self._own is None:
                log.warning("%s: %s", again, remedy)
            self._shared[WORKERS] = 1

    def _note(self, start: Start, reader: Reader) -> None:
        """Refuse, or say, what speaks against the iteration that begins; once a run, where it
        begins, what is so for all of it. The first worker speaks for all."""
        loaders.check_divided_once(self.place.world_size)
        loaders.check_all_workers_read()
        if reader.worker:
            return
        said = [nothing_left(start.epoch, self._steps_from(start.samples))]
        if start.epoch == start.samples == 0:
            shards = sum(len(source.shards) for source in self.sources)
            said.append(crowded(reader, start.lanes, shards))
            said.append(doubts(self.place, self._given, self.shuffle))
        if self.shuffle and not (start.samples or self._shared[NAMED] or self._shared[WORKERS]):
            said.append(made_anew(start.epoch, self._ended))
        for text in filter(None, said):
            log.warning("%s", text)

    def _compare(self) -> None:
        """Refuse what is not the same on all ranks, once, when the process group is known."""
        if self._compared:
            return
        ordering = {"batch_size": self.batch_size, "lanes": self.lanes, "drop_last": self.drop_last}
        self._compared = ranks.compare(self.place, self._settings | ordering, self.sources)

    def _part(self) -> None:
        """Leave the memory of another process, which gave this dataset to its ranks."""
        if self._owner != os.getpid() and get_worker_info() is None:
            self._shared = self._shared.clone().share_memory_()
            self._ended = self._ended.clone().share_memory_()
            self._owner = os.getpid()

    def _begin(self, start: Start) -> None:
        self._shared[:5] = torch.tensor([*start, 0])
        self._out = self._looks = 0
        self._progress = None

    def _start(self) -> Start:
        return Start(*self._shared[:4].tolist())

    def _reader(self) -> Reader:
        info = get_worker_info()
        return Reader(*self.place, *((info.id, info.num_workers) if info else (0, 1)))

    def _state(self, start: Start, reader: Reader, taken: int) -> dict[str, Any]:
        if get_worker_info() is None:
            return state_of(start, self._settings)
        return worker_state_of(start, self._settings, reader, self.batch_size, taken)

    def _total(self) -> int:
        return self.epoch_samples or sum(int(source.counts.sum()) for source in self.sources)

    def _order(self, start: Start) -> EpochOrder:
        return EpochOrder(
            [source.counts for source in self.sources],
            start.epoch,
            seed=self.seed,
            lanes=start.lanes,
            grain=start.grain,
            shuffle=self.shuffle,
            shuffle_shards=self.shuffle_shards,
            weights=self.weights,
            epoch_samples=self.epoch_samples,
        )

    def shard_of(self, batch: AnyBatch, key: str, together: int) -> str:
        """URL of the shard that has the sample `key` of `batch`, which is one of a step of
        `together` samples; looks into the few shards that the step is read from."""
        position = position_of(batch)
        assert position is not None, "the dataset makes batches with positions"
        order = self._order(Start(*position))
        end = min(position.samples, order.total // together * together)
        parts = order.shards(end - together, end)
        shards = {s.url: s for s in (self.sources[source].shards[i] for source, i in parts)}
        found = (url for url, shard in shards.items() if key in self.keys_of(shard))
        return next(found, " or ".join(shards))

    def _check_steps(self) -> None:
        urls = " and ".join("::".join(source.urls) for source in self.sources)
        check_steps(self._total(), self.batch_size, self.world_size, self.drop_last, urls)
