"""Blocks of a Parquet shard: the row groups that hold the samples asked for, as they come out of
Arrow. Payloads are not touched: their buffers are used where Arrow put them."""

from __future__ import annotations

from dataclasses import replace
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from splatshard.pipeline.codec import Plane
from splatshard.pipeline.data.block import Block, Part
from splatshard.pipeline.data.catalog import Shard, check_layout
from splatshard.pipeline.shards.rows import parquet_metadata
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.shard import OK
from splatshard.schemas.splats import TEACHER

SCALARS = ("key", "caption", "label", "num_gaussians", "width", "height")


def parquet_blocks(
    stream: BinaryIO,
    shard: Shard,
    kept: NDArray[np.int64] | None,
    begin: int,
    end: int,
    *,
    threads: bool = False,
) -> list[Block]:
    """Samples `begin` to `end` of a shard, counted among its rows `kept` (int64 [K], ascending), or
    if None among all that are ok. `threads`: whether Arrow may use more than one.

    Raises CorruptShardError, ValueError and pyarrow's errors.
    """
    file = pq.ParquetFile(stream)
    metadata = parquet_metadata(file, shard.url)
    check_layout(metadata, shard)
    layout = shard.layout
    if file.metadata.num_rows != shard.samples:
        raise CorruptShardError(
            f"{shard.url} has {file.metadata.num_rows} rows, its marker says "
            f"{shard.samples}: {shard.remedy}"
        )
    if kept is None:
        kept = ok_rows(file, shard)
    rows = kept[begin:end]
    columns = [*SCALARS, *(name for name, _, _ in layout.columns)]
    columns += [field.name for field in layout.further if field.name not in SCALARS]
    if TEACHER in file.schema_arrow.names:
        columns.append(TEACHER)
    blocks = []
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = np.concatenate(([0], np.cumsum(sizes)))
    for group in range(file.num_row_groups):
        start, stop = starts[group], starts[group + 1]
        first, last = np.searchsorted(rows, (start, stop))
        if first == last:
            continue
        table = file.read_row_group(group, columns, use_threads=threads)
        for batch in table.to_batches():
            first, last = np.searchsorted(rows, (start, start + len(batch)))
            if first < last:
                blocks.append(_block(batch, shard, rows[first:last] - start))
            start += len(batch)
    return blocks


def ok_rows(file: pq.ParquetFile, shard: Shard) -> NDArray[np.int64]:
    """Numbers of the rows that are samples, int64 [K], ascending. Raises CorruptShardError when
    they are not as many as the marker says."""
    if shard.ok == shard.samples:
        return np.arange(shard.samples)
    status = file.read(["status"], use_threads=False).column(0)
    rows = np.flatnonzero(pc.call_function("equal", [status, OK]).to_numpy())
    if len(rows) != shard.ok:
        raise CorruptShardError(
            f"{shard.url} has {len(rows)} ok rows, its marker says {shard.ok}: {shard.remedy}"
        )
    return rows


def _block(batch: pa.RecordBatch, shard: Shard, rows: NDArray[np.int64]) -> Block:
    every = len(rows) == len(batch)

    def column(name: str) -> pa.Array:
        array = batch.column(name)
        return array if every else array.take(pa.array(rows))

    def numbers(name: str, null: int) -> NDArray:
        return column(name).fill_null(null).to_numpy()

    block = Block(
        url=shard.url,
        codec=shard.layout.codec,
        parts=tuple(
            Part(begin, end, planes(batch.column(name), rows))
            for name, begin, end in shard.layout.columns
        ),
        rows=rows,
        counts=numbers("num_gaussians", 0),
        heights=numbers("height", 0),
        widths=numbers("width", 0),
        labels=numbers("label", -1),
        keys=column("key"),
        captions=column("caption"),
        teacher=teacher_of(column(TEACHER)) if TEACHER in batch.schema.names else None,
        further={field.name: column(field.name) for field in shard.layout.further},
    )
    return checked(block, shard)


def checked(block: Block, shard: Shard) -> Block:
    """`block` with its counts cut to the budget. Raises ValueError for values no sample can
    have."""
    for name, values, limit in (
        ("num_gaussians", block.counts, shard.layout.largest),
        ("height", block.heights, None),
        ("width", block.widths, None),
    ):
        if len(values) and (values.min() < 1 or (limit and values.max() > limit)):
            raise ValueError(f"{name} of an ok row is {values.min()} or {values.max()}")
    for column in (block.keys, block.captions, *block.further.values()):
        column.validate(full=True)
    budget = np.int32(shard.layout.columns[-1][2])
    return replace(block, counts=np.minimum(block.counts, budget))


def planes(column: pa.Array, rows: NDArray[np.int64]) -> dict[str, Plane]:
    """A column of payloads as the codec wants it: one plane for binary values, one for each field
    of a struct. Raises ValueError when one of `rows` (int64 [K]) is null."""
    if column.null_count and not column.is_valid().to_numpy(zero_copy_only=False)[rows].all():
        raise ValueError("an ok row has no splats")
    if not pa.types.is_struct(column.type):
        return {"": _plane(column)}
    return {
        column.type.field(i).name: _plane(column.field(i)) for i in range(column.type.num_fields)
    }


def _plane(column: pa.Array) -> Plane:
    """The bytes of a binary array where they are; no copy but of the offsets."""
    _, offsets, data = column.buffers()
    places = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    every = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return Plane(every, places.astype(np.int64))


def teacher_of(column: pa.Array) -> NDArray[np.float16]:
    """Embeddings [K, D] from binaries of halves. Raises ValueError unless all are there, and of one
    length."""
    if column.null_count:
        raise ValueError(f"{column.null_count} ok rows have no teacher embedding")
    plane = _plane(column)
    halves = plane.data[plane.offsets[0] : plane.offsets[-1]].view("<f2")
    if len(set(np.diff(plane.offsets).tolist())) > 1 or not len(halves):
        raise ValueError("the rows' teacher embeddings are not all of one length")
    return halves.reshape(len(column), -1)
