"""Which rows a filter leaves: conditions on scalar columns, evaluated where the columns are.

    filter=(("psnr", ">=", 25), ("caption_length", ">", 5))

keeps the samples for which all conditions hold; a condition on a value that is not there does not
hold. Of a Parquet file only these columns are read, over the network, too, and later only the row
groups in which rows are left. A tar is read whole.

Left out: to skip row groups by their statistics. Next to payloads these columns are small, samples
are seldom sorted by them, and pyarrow ends the process where statistics of a damaged footer cannot
be read (1 % of random changes), while nothing has checked the file by then.
"""

from __future__ import annotations

import logging
import operator
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from splatshard.pipeline.data.catalog import S, Shard, Source
from splatshard.pipeline.data.files import ShardFiles, look_for, shard_errors
from splatshard.pipeline.data.read_tar import tar_rows
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.shard import OK

log = logging.getLogger(__name__)

Condition = tuple[str, str, float]
Filter = tuple[Condition, ...]

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
INTEGERS = ("label", "width", "height", "original_width", "original_height", "num_gaussians")
TEXTS = ("key", "uid", "caption", "status", "error")
PSNR = re.compile("psnr(_loss|_[0-9]+)?")
"""dB: of all Gaussians, what the codec took, of a nested budget."""

CAPTION_LENGTH = "caption_length"
"""Characters of the caption."""

SCANNERS = 16
REPORT_AFTER_S = 10.0
"""After so long the log tells how far the scan is, and again each time as much has passed."""


def checked_filter(conditions: Sequence[Sequence[Any]]) -> Filter:
    """`conditions` as a filter. Raises UsageError for one that is none."""
    found = []
    for condition in conditions:
        if isinstance(condition, str) or len(condition) != 3:
            raise UsageError(
                f"filter has {condition!r}: give (column, operator, number), as in "
                '("psnr", ">=", 25)'
            )
        column, comparison, value = condition
        if column not in (*INTEGERS, CAPTION_LENGTH) and not PSNR.fullmatch(column):
            raise UsageError(
                f"filter names the column {column!r}: choose one of "
                f"{', '.join((*INTEGERS, CAPTION_LENGTH))}, psnr, psnr_loss, or psnr_400 and so on"
            )
        if comparison not in OPERATORS:
            raise UsageError(
                f"filter has the operator {comparison!r}: choose one of {' '.join(OPERATORS)}"
            )
        if type(value) not in (int, float) or value != value:
            raise UsageError(f"filter compares {column} with {value!r}: give a number")
        found.append((column, comparison, value))
    return tuple(found)


def apply_filter(source: Source[Shard], conditions: Filter, files: ShardFiles) -> None:
    """Set `source.kept` and `source.counts` to the rows that `conditions` leave.

    Raises CorruptShardError, SourceError and UnavailableError.
    """
    keep(source, lambda shard: rows_left(shard, conditions, files))


def keep(source: Source[S], rows: Callable[[S], NDArray[np.bool_]]) -> None:
    """Set `source.kept` and `source.counts` to what `rows`, on several threads, says of each
    shard: bool [samples]."""
    begin = said = time.monotonic()
    with ThreadPoolExecutor(SCANNERS, thread_name_prefix="filter") as pool:
        found = pool.map(rows, source.shards)
        for i, kept in enumerate(found):
            source.counts[i] = int(kept.sum())
            source.kept[i] = np.packbits(kept)
            if time.monotonic() - said > REPORT_AFTER_S:
                said = time.monotonic()
                log.warning(
                    "filter: %d of %d shards read in %.0f s", i + 1, len(source.shards),
                    said - begin,
                )  # fmt: skip


def rows_left(shard: Shard, conditions: Filter, files: ShardFiles) -> NDArray[np.bool_]:
    """bool [samples]: which rows are samples and fulfil `conditions`. Raises as `apply_filter`."""
    table = scalars_of(shard, _stored(conditions), files)
    return is_ok(table) & fulfilled(table, conditions)


def scalars_of(shard: Shard, names: list[str], files: ShardFiles) -> pa.Table:
    """The columns `names`, for all rows of a shard. Raises as `apply_filter`."""
    if shard.format == "webdataset":
        with shard_errors(shard), files.open(shard) as stream:
            rows = tar_rows(np.frombuffer(stream.read(), np.uint8), shard)
        _check_there(names, {name for row in rows for name in row} | {"caption"}, shard)
        return _table_of(rows, names)
    look_for(shard)
    with shard_errors(shard), fs.open_read(shard.url) as stream:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        if file.metadata.num_rows != shard.samples:
            raise CorruptShardError(
                f"{shard.url} has {file.metadata.num_rows} rows, its marker says {shard.samples}: "
                f"{shard.remedy}"
            )
        _check_there(names, set(file.schema_arrow.names), shard)
        return file.read(names, use_threads=False)


def _stored(conditions: Filter) -> list[str]:
    """The columns that must be read."""
    names = {"caption" if column == CAPTION_LENGTH else column for column, _, _ in conditions}
    return sorted(names | {"status"})


def _check_there(names: list[str], found: set[str], shard: Shard) -> None:
    missing = [name for name in names if PSNR.fullmatch(name) and name not in found and shard.ok]
    if missing:
        raise UsageError(f"filter names the column {missing[0]!r}, which {shard.url} does not have")


def _table_of(rows: list[dict[str, Any]], names: list[str]) -> pa.Table:
    texts = dict.fromkeys(TEXTS, pa.string())
    types = {**texts, **dict.fromkeys(INTEGERS, pa.int64())}
    columns = {
        name: pa.array([row.get(name) for row in rows], types.get(name, pa.float64()))
        for name in names
    }
    return pa.table(columns)


def is_ok(table: pa.Table) -> NDArray[np.bool_]:
    """bool [rows]: which rows of `table`, by its column status, are samples."""
    return pc.call_function("equal", [table.column("status"), OK]).to_numpy()


def fulfilled(table: pa.Table, conditions: Filter) -> NDArray[np.bool_]:
    """bool [rows]: which rows of `table` fulfil all `conditions`; it has their columns, and
    `caption` for CAPTION_LENGTH."""
    left = np.ones(len(table), np.bool_)
    for column, comparison, value in conditions:
        if column == CAPTION_LENGTH:
            values = pc.call_function("utf8_length", [table.column("caption")])
        else:
            values = table.column(column)
        if PSNR.fullmatch(column):  # a tar has it as a double; compare the same in both
            values = pc.cast(values, pa.float64())
        there = values.is_valid().to_numpy()
        numbers = pc.fill_null(values, 0).to_numpy()
        left = left & there & OPERATORS[comparison](numbers, value)
    return left
