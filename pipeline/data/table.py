"""SplatTable: samples of splat shards by number or by key, for debugging, retrieval and notebooks.

    number -> shard -> row group -> block, kept in memory -> sample, or batch

Its order is the one in which SplatDataset reads with shuffle=False. What it costs: to open it, the
markers, and with a filter the filter's columns; the first sample of a shard, the file's SHA-256
(unless `checksum` is off), and that a remote one is fetched; any sample whose row group is not in
memory, that row group, 32 MiB before compression (a whole tar); the first key, the keys of all
shards, which are a column of a Parquet file, and the whole of a tar. So samples in a random order
are slow as soon as their row groups are more than fit in memory: SplatDataset is for training.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from splatshard.pipeline.data.batch import TrainBatch
from splatshard.pipeline.data.block import Block, assemble
from splatshard.pipeline.data.cache import ShardCache
from splatshard.pipeline.data.catalog import (
    Location,
    Shard,
    Source,
    check_sizes,
    checked_columns,
    open_source,
    pools,
)
from splatshard.pipeline.data.files import ShardFiles, default_cache_dir, shard_errors
from splatshard.pipeline.data.filters import (
    SCANNERS,
    apply_filter,
    checked_filter,
    is_ok,
    scalars_of,
)
from splatshard.pipeline.data.read_parquet import ok_rows, parquet_blocks
from splatshard.pipeline.data.read_tar import tar_blocks
from splatshard.pipeline.data.windows import Choice
from splatshard.schemas.errors import UsageError

NEAREST = 2
"""Keys before and after one that is not there, in order, that an error names."""


class Groups(NamedTuple):
    """A shard's row groups, as far as its samples go: `kept`, the rows that are samples, as packed
    bits (None for all); `begins` int64 [groups + 1], which sample each begins with."""

    kept: NDArray[np.uint8] | None
    begins: NDArray[np.int64]


class SplatTable(Dataset[dict[str, Any]]):
    """Samples of the shards of `src` by number or key.

    `table[3]` and `table["cat/0001"]` are samples: dictionaries of tensors and texts, as torch's
    default collate takes them. They are `TrainBatch.as_dict` without the dimension of batches, and
    have key and caption (empty for none); a DataLoader gets those of a batch as long as the longest
    of them, `mask` False behind. `table[3:7]` and `table[[3, "cat/0001"]]` are batches, TrainBatch.

    src             folders or URLs that convert wrote to, one or several
    num_gaussians, columns, filter, checksum, cache_dir, cache_bytes  as SplatDataset has them
    memory_bytes    of row groups that stay in memory; at least one does

    Raises what SplatDataset raises, IndexError and KeyError.
    """

    def __init__(
        self,
        src: Location | Sequence[Location],
        *,
        num_gaussians: int | None = None,
        columns: Sequence[str] = (),
        filter: Sequence[Sequence[Any]] = (),
        checksum: bool = True,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 100 << 30,
        memory_bytes: int = 1 << 30,
    ) -> None:
        if isinstance(src, Mapping):
            raise UsageError(
                f"src weighs {', '.join(map(str, src))}, which a table cannot: give a list"
            )
        self.num_gaussians = num_gaussians
        self.memory_bytes = memory_bytes
        cache = ShardCache(Path(cache_dir) if cache_dir else default_cache_dir(), cache_bytes)
        self.files: ShardFiles = ShardFiles(cache, checksum)
        conditions = checked_filter(filter)
        (urls,), _ = pools(src)
        self.source: Source[Shard] = open_source(urls, num_gaussians, checked_columns(columns))
        if conditions:
            apply_filter(self.source, conditions, self.files)
        check_sizes([self.source], None, 1, None)
        self._starts = np.concatenate(([0], np.cumsum(self.source.counts)))
        self._groups: dict[int, Groups] = {}
        self._loaded: dict[tuple[int, int], list[Block]] = {}  # the one last used is last
        self._loaded_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without what is in memory."""
        return self.__dict__ | {"_loaded": {}, "_loaded_bytes": 0}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        return self._keys.to_pylist()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bool(self._numbers_of(key))

    @overload
    def __getitem__(self, index: int | str) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice | Iterable[int | str]) -> TrainBatch: ...
    def __getitem__(self, index: Any) -> dict[str, Any] | TrainBatch:
        if isinstance(index, slice):
            return self._batch(range(len(self))[index])
        if isinstance(index, str) or (hasattr(index, "__index__") and not np.ndim(index)):
            return _samples(self._batch([self._number(index)]))[0]
        several = index.tolist() if hasattr(index, "tolist") else index
        return self._batch([self._number(each) for each in several])

    def __getitems__(self, indices: Iterable[int | str]) -> list[dict[str, Any]]:
        """Samples for torch's DataLoader, all as long as the longest of them: it stacks them."""
        return _samples(self[list(indices)])

    def _batch(self, numbers: Sequence[int]) -> TrainBatch:
        """The samples `numbers`, each below the number of samples, in this order."""
        if not numbers:
            raise UsageError(f"these are none of the {len(self)} samples: name at least one")
        chosen: list[Choice[Block]] = []
        for _, same in groupby(map(self._find, numbers), key=lambda found: id(found[0])):
            blocks, places = zip(*same, strict=True)
            chosen.append((blocks[0], np.array(places)))
        valid = torch.ones(len(numbers), dtype=torch.bool)
        return assemble(chosen, self.num_gaussians, valid, None)

    # Which sample is meant

    def _number(self, index: int | str) -> int:
        if isinstance(index, str):
            return self._number_of(index)
        if isinstance(index, bool):
            raise UsageError("a table takes numbers, not a mask: give numpy.flatnonzero(mask)")
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{number} is not among the {len(self)} samples")
        return number % len(self)

    def _number_of(self, key: str) -> int:
        numbers = self._numbers_of(key)
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            raise UsageError(
                f"{len(numbers)} samples have the key {key!r}: give one of their numbers, "
                f"{', '.join(map(str, numbers[:10]))}"
            )
        place = self._place(key)
        near = self._order[max(0, place - NEAREST) : place + NEAREST]
        raise KeyError(
            f"no sample has the key {key!r}; those nearest in order are "
            f"{', '.join(self._keys.take(pa.array(near)).to_pylist())}"
        )

    def _numbers_of(self, key: str) -> list[int]:
        """The numbers of the samples that have this key."""
        numbers: list[int] = []
        for number in self._order[self._place(key) :]:
            if self._keys[number].as_py() != key:
                break
            numbers.append(int(number))
        return numbers

    def _place(self, key: str) -> int:
        """Where `key` is among the sorted keys, or would be."""
        return bisect_left(self._order, key, key=lambda number: self._keys[number].as_py())

    @cached_property
    def _keys(self) -> pa.LargeStringArray:
        """The keys of all samples, in order."""
        with ThreadPoolExecutor(SCANNERS, thread_name_prefix="keys") as pool:
            found = list(pool.map(self._keys_of, range(len(self.source.shards))))
        return pa.concat_arrays(found)

    def _keys_of(self, number: int) -> pa.LargeStringArray:
        shard, kept = self.source.shards[number], self.source.kept.get(number)
        table = scalars_of(shard, ["key", "status"], self.files)
        rows = is_ok(table) if kept is None else np.unpackbits(kept, count=len(table)).astype(bool)
        keys = table.column("key").combine_chunks().cast(pa.large_string())
        return keys.filter(pa.array(rows))

    @cached_property
    def _order(self) -> NDArray[np.uint64]:
        """The numbers of all samples by key, uint64 [samples]."""
        return pc.call_function("sort_indices", [self._keys]).to_numpy()

    # Its row group

    def _find(self, number: int) -> tuple[Block, int]:
        """The block with the sample `number`, and its place in it."""
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        place = number - int(self._starts[shard])
        begins = self._groups_of(shard).begins
        group = int(np.searchsorted(begins, place, "right")) - 1
        place -= int(begins[group])
        for block in self._blocks(shard, group):
            if place < len(block):
                return block, place
            place -= len(block)
        raise AssertionError("a row group has fewer samples than rows that are samples")

    def _groups_of(self, number: int) -> Groups:
        if number not in self._groups:
            shard, kept = self.source.shards[number], self.source.kept.get(number)
            if shard.format == "webdataset":
                begins = np.array([0, self.source.counts[number]])
                self._groups[number] = Groups(kept, begins)
            else:
                self._groups[number] = self._parquet_groups(shard, kept)
        return self._groups[number]

    def _parquet_groups(self, shard: Shard, kept: NDArray[np.uint8] | None) -> Groups:
        with shard_errors(shard), self.files.open(shard) as stream:
            file = pq.ParquetFile(stream)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if kept is None and shard.ok < shard.samples:
                kept = np.packbits(np.isin(np.arange(shard.samples), ok_rows(file, shard)))
        begins = np.concatenate(([0], np.cumsum(sizes)))
        return Groups(kept, begins if kept is None else rows_of(kept, shard).searchsorted(begins))

    def _blocks(self, number: int, group: int) -> list[Block]:
        """A row group, from memory if it is there."""
        blocks = self._loaded.pop((number, group), None)
        if blocks is None:
            blocks = self._read(number, group)
            self._loaded_bytes += sum(map(bytes_of, blocks))
        self._loaded[number, group] = blocks
        while self._loaded_bytes > self.memory_bytes and len(self._loaded) > 1:
            oldest = self._loaded.pop(next(iter(self._loaded)))
            self._loaded_bytes -= sum(map(bytes_of, oldest))
        return blocks

    def _read(self, number: int, group: int) -> list[Block]:
        shard, (packed, begins) = self.source.shards[number], self._groups_of(number)
        kept = None if packed is None else rows_of(packed, shard)
        begin, end = int(begins[group]), int(begins[group + 1])
        with shard_errors(shard), self.files.open(shard) as stream:
            if shard.format == "webdataset":
                return tar_blocks(stream, shard, kept, begin, end)
            return parquet_blocks(stream, shard, kept, begin, end, threads=True)


def _samples(batch: TrainBatch) -> list[dict[str, Any]]:
    """The samples of a batch one by one, with its padding."""
    fields = {"key": batch.keys, "caption": [caption or "" for caption in batch.captions]}
    fields |= {name: values for name, values in batch.as_dict().items() if name != "valid"}
    return [{name: values[i] for name, values in fields.items()} for i in range(len(batch))]


def rows_of(kept: NDArray[np.uint8], shard: Shard) -> NDArray[np.int64]:
    """The rows whose bits are set in `kept`, int64 [K]."""
    return np.flatnonzero(np.unpackbits(kept, count=shard.samples))


def bytes_of(block: Block) -> int:
    """What a block holds in memory."""
    columns = (block.keys, block.captions, *block.further.values())
    payloads = (plane.data.nbytes for part in block.parts for plane in part.planes.values())
    return sum(payloads) + sum(column.nbytes for column in columns)
