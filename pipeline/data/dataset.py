"""SplatDataset: splat shards to training batches. Start here.

    markers -> shards -> order -> windows (loaded ahead) -> blocks -> batch

    catalog.py  which shards there are        filters.py  which of their rows are read
    base.py     the order of samples, and how far it was read: the same for images (images.py)
    files.py    opened and checked            cache.py    remote ones by way of a local disk
    read_parquet.py, read_tar.py              rows in memory, packed (block.py)
    batch.py    what comes out

Unlike the datasets of torch examples it makes whole batches: one pass over packed payloads into one
tensor costs next to nothing per sample, collating samples does. Give it to
`DataLoader(dataset, batch_size=None, num_workers=...)`, to torchdata's StatefulDataLoader, or just
iterate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack, cast

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from splatshard.pipeline.data.base import OrderedDataset
from splatshard.pipeline.data.batch import Position, TrainBatch
from splatshard.pipeline.data.block import Block, assemble
from splatshard.pipeline.data.cache import ShardCache
from splatshard.pipeline.data.catalog import Location, Shard, Source, checked_columns, open_source
from splatshard.pipeline.data.epoch_order import Ordering, Piece
from splatshard.pipeline.data.files import ShardFiles, default_cache_dir, shard_errors
from splatshard.pipeline.data.filters import Filter, apply_filter
from splatshard.pipeline.data.read_parquet import parquet_blocks
from splatshard.pipeline.data.read_tar import tar_blocks
from splatshard.pipeline.data.windows import Choice
from splatshard.pipeline.shards.rows import read_rows


class SplatDataset(OrderedDataset[Shard, TrainBatch]):
    """Batches of the samples in the shards of `src`: folders or URLs that convert wrote to. The
    arguments that are not named here, such as batch_size and seed, are those of OrderedDataset.

    num_gaussians   how many per sample. Nested shards have several budgets and only the bytes of
                    this one are read; None takes all there are, padded to the batch's largest
    columns         further columns by the names that the shards have for them, such as uid, psnr,
                    metadata, members: they are read, too, and are in `TrainBatch.columns`
    as_dict         batches are dictionaries, those of `TrainBatch.as_dict`
    checksum        compare SHA-256 of each file when this process first opens it (that of remote
                    ones is always compared as they are fetched)
    cache_dir, cache_bytes  where and how many bytes of remote shards are kept

    Raises UsageError for arguments that do not fit each other or the shards, CorruptShardError for
    shards that are not what their markers say (also while reading), FormatVersionError,
    StorageError, SourceError and UnavailableError.
    """

    def __init__(
        self,
        src: Location | Sequence[Location] | Mapping[str, float],
        *,
        num_gaussians: int | None = None,
        columns: Sequence[str] = (),
        as_dict: bool = False,
        checksum: bool = True,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 100 << 30,
        **ordering: Unpack[Ordering],
    ) -> None:
        self.num_gaussians = num_gaussians
        self.as_dict = as_dict
        self.columns: tuple[str, ...] = checked_columns(columns)
        cache = ShardCache(Path(cache_dir) if cache_dir else default_cache_dir(), cache_bytes)
        self.files: ShardFiles = ShardFiles(cache, checksum)
        super().__init__(src, **ordering)

    def open_source(self, urls: Sequence[str], conditions: Filter) -> Source[Shard]:
        source = open_source(urls, self.num_gaussians, self.columns)
        if conditions:
            apply_filter(source, conditions, self.files)
        return source

    def read(self, source: Source[Shard], piece: Piece) -> list[Block]:
        shard = source.shards[piece.shard]
        kept = None
        if piece.shard in source.kept:
            kept = np.flatnonzero(np.unpackbits(source.kept[piece.shard], count=shard.samples))
        threads = get_worker_info() is None  # Arrow's, beside which those of other workers run
        with shard_errors(shard), self.files.open(shard) as stream:
            if shard.format == "webdataset":
                return tar_blocks(stream, shard, kept, piece.begin, piece.end)
            return parquet_blocks(stream, shard, kept, piece.begin, piece.end, threads=threads)

    def assemble(
        self, chosen: Sequence[Choice[Block]], valid: Tensor, position: Position
    ) -> TrainBatch:
        """See `block.assemble`; `valid` bool [B]."""
        batch = assemble(chosen, self.num_gaussians, valid, position)
        return cast(TrainBatch, batch.as_dict()) if self.as_dict else batch

    def keys_of(self, shard: Shard) -> Iterator[str]:
        return (row["key"] for row in read_rows(shard.url, shard.format))
