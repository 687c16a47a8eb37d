"""Windows of the order, loaded ahead of the batches that use them, and batches out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.batch import Position, TrainBatch
from pipeline.data.block import Block, Choice, assemble
from pipeline.data.catalog import Source
from pipeline.data.files import ShardFiles, shard_errors
from pipeline.data.order import EpochOrder, Piece, Share, Span, WindowKey
from pipeline.data.read_parquet import parquet_blocks
from pipeline.data.read_tar import tar_blocks
from pipeline.prefetch import map_ahead, prefetch

FETCHERS = 8
"""Files of a window that are fetched at once from a remote store."""


class Loaded(NamedTuple):
    """A window in memory. `starts` [blocks + 1]: which of its places, before the permutation, are
    in which block."""

    key: WindowKey
    permutation: NDArray[np.int64]
    blocks: list[Block]
    starts: NDArray[np.int64]

    def choose(self, begin: int, end: int) -> list[Choice]:
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


class Loader:
    """Reads windows of `sources`. `threads`: whether Arrow may use more than one."""

    def __init__(self, sources: Sequence[Source], files: ShardFiles, threads: bool) -> None:
        self.sources, self.files, self.threads = sources, files, threads

    def batches(
        self,
        order: EpochOrder,
        shares: Callable[[], Iterator[Share]],
        batch_size: int,
        num_gaussians: int | None,
        epoch: int,
        ahead: int,
    ) -> Iterator[TrainBatch]:
        """The batches of `shares`, with up to `ahead` windows loaded before they are needed.

        Raises CorruptShardError for whatever is wrong with a file, naming it, and what ShardFiles
        raises.
        """
        windows = self._windows(order, shares())
        with closing(prefetch(windows, ahead) if ahead else windows) as loaded:
            held: dict[tuple[int, int], Loaded] = {}
            for share in shares():
                chosen: list[Choice] = []
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
                yield assemble(_padded(chosen, batch_size), num_gaussians, valid, position)

    def _windows(self, order: EpochOrder, plans: Iterable[Share]) -> Iterator[Loaded]:
        """All windows that `plans` need, in the order in which they are first needed."""
        latest: dict[tuple[int, int], WindowKey] = {}
        for share in plans:
            for span in _spans(order, share):
                if latest.get(span.window.stream) != span.window:
                    latest[span.window.stream] = span.window
                    yield self._load(order, span.window)

    def _load(self, order: EpochOrder, key: WindowKey) -> Loaded:
        window = order.window(key)
        source = self.sources[window.source]
        remote = not storage.is_local(source.urls[0])
        read = partial(self._read, source)
        found = map_ahead(read, window.pieces, min(FETCHERS, len(window.pieces)) if remote else 0)
        with closing(found):
            blocks = [block for blocks in found for block in blocks]
        starts = np.concatenate(([0], np.cumsum([len(block) for block in blocks])))
        return Loaded(key, window.permutation, blocks, starts)

    def _read(self, source: Source, piece: Piece) -> list[Block]:
        shard = source.shards[piece.shard]
        kept = None
        if piece.shard in source.kept:
            kept = np.flatnonzero(np.unpackbits(source.kept[piece.shard], count=shard.samples))
        with shard_errors(shard), self.files.open(shard) as stream:
            if shard.format == "webdataset":
                return tar_blocks(stream, shard, kept, piece.begin, piece.end)
            return parquet_blocks(stream, shard, kept, piece.begin, piece.end, threads=self.threads)


def _spans(order: EpochOrder, share: Share) -> list[Span]:
    """Where a batch's samples are. A batch that has none, since a last step has fewer samples than
    there are ranks, shows the last sample of the order."""
    if share.begin == share.end:
        return order.spans(order.total - 1, order.total)
    return order.spans(share.begin, share.end)


def _padded(chosen: list[Choice], size: int) -> list[Choice]:
    """`chosen`, again and again, until there are `size` samples."""
    missing = size - sum(len(places) for _, places in chosen)
    result = list(chosen)
    while missing:
        for block, places in chosen:
            result.append((block, places[:missing]))
            missing -= len(places[:missing])
    return [(block, places) for block, places in result if len(places)]
