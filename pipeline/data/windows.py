"""Windows of the order, loaded ahead of the batches that use them, and batches out of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splatshard.pipeline.data.batch import Position
from splatshard.pipeline.data.catalog import Source
from splatshard.pipeline.data.epoch_order import EpochOrder, Piece, Share, Span, WindowKey
from splatshard.pipeline.runtime.prefetch import map_ahead, prefetch
from splatshard.pipeline.storage import fs

FETCHERS = 8
"""Files of a window that are fetched at once from a remote store."""


Block = TypeVar("Block", bound=Sized)
Batch = TypeVar("Batch")

Choice = tuple[Block, NDArray[np.int64]]
"""Some samples of a block, int64 [b]: places in its arrays."""


class Loaded(NamedTuple, Generic[Block]):
    """A window in memory. `starts` [blocks + 1]: which of its places, before the permutation, are
    in which block."""

    key: WindowKey
    permutation: NDArray[np.int64]
    blocks: list[Block]
    starts: NDArray[np.int64]

    def choose(self, begin: int, end: int) -> list[Choice[Block]]:
        """The samples at `begin` to `end` of the permutation, in the order in which they lie in
        the files: so a batch is decoded block by block and front to back."""
        places = np.sort(self.permutation[begin:end])
        cuts = np.searchsorted(places, self.starts)
        return [
            (block, places[first:last] - start)
            for block, start, first, last in zip(
                self.blocks, self.starts, cuts[:-1], cuts[1:], strict=False
            )
            if first < last
        ]


class Loader(Generic[Block, Batch]):
    """Windows of `sources`, whose shards are splats or images.

    read      a piece of a shard as blocks; several threads call it
    assemble  the chosen samples of blocks, and which of them are valid, as a batch
    """

    def __init__(
        self,
        sources: Sequence[Source[Any]],
        read: Callable[[Source[Any], Piece], list[Block]],
        assemble: Callable[[Sequence[Choice[Block]], Tensor, Position], Batch],
    ) -> None:
        self.sources = sources
        self.read = read
        self.assemble = assemble

    def batches(
        self,
        order: EpochOrder,
        shares: Callable[[], Iterator[Share]],
        batch_size: int,
        epoch: int,
        ahead: int,
    ) -> Generator[Batch]:
        """The batches of `shares`, with up to `ahead` windows loaded before they are needed.

        Raises what `read` and `assemble` raise.
        """
        windows = self._windows(order, shares())
        with closing(prefetch(windows, ahead) if ahead else windows) as loaded:
            held: dict[tuple[int, int], Loaded[Block]] = {}
            for share in shares():
                chosen: list[Choice[Block]] = []
                for span in _spans(order, share):
                    window = held.get(span.window.stream)
                    if window is None or window.key != span.window:
                        if span.window.lane == order.lanes:  # no lane comes after the rest
                            held.clear()
                        del window
                        held.pop(span.window.stream, None)
                        window = held[span.window.stream] = next(loaded)
                    chosen += window.choose(span.begin, span.end)
                valid = torch.arange(batch_size) < share.end - share.begin
                position = Position(epoch, share.after, order.lanes, order.grain)
                yield self.assemble(_padded(chosen, batch_size), valid, position)

    def _windows(self, order: EpochOrder, plans: Iterable[Share]) -> Generator[Loaded[Block]]:
        """All windows that `plans` need, in the order in which they are first needed."""
        latest: dict[tuple[int, int], WindowKey] = {}
        for share in plans:
            for span in _spans(order, share):
                if latest.get(span.window.stream) != span.window:
                    latest[span.window.stream] = span.window
                    yield self._load(order, span.window)

    def _load(self, order: EpochOrder, key: WindowKey) -> Loaded[Block]:
        window = order.window(key)
        source = self.sources[window.source]
        remote = not fs.is_local(source.urls[0])
        read = partial(self.read, source)
        found = map_ahead(read, window.pieces, min(FETCHERS, len(window.pieces)) if remote else 0)
        with closing(found):
            blocks = [block for blocks in found for block in blocks]
        starts = np.concatenate(([0], np.cumsum([len(block) for block in blocks])))
        return Loaded(key, window.permutation, blocks, starts)


def _spans(order: EpochOrder, share: Share) -> list[Span]:
    """Where a batch's samples are. A batch that has none, since a last step has fewer samples than
    there are ranks, shows the last sample of the order."""
    if share.begin == share.end:
        return order.spans(order.total - 1, order.total)
    return order.spans(share.begin, share.end)


def _padded(chosen: list[Choice[Block]], size: int) -> list[Choice[Block]]:
    """`chosen`, again and again, until there are `size` samples."""
    missing = size - sum(len(places) for _, places in chosen)
    result = list(chosen)
    while missing:
        for block, places in chosen:
            result.append((block, places[:missing]))
            missing -= len(places[:missing])
    return [(block, places) for block, places in result if len(places)]
