"""Rows to a shard file: Parquet or WebDataset tar. schemas/FORMAT.md specifies both.

    with open_writer(path, "parquet", metadata) as writer:
        writer.write(rows)

Rows are dicts with the keys of `schemas.splats.columns`; absent keys are null. Both writers hold at
most one row group, and the same rows always give the same bytes: no clock, no user, no host.

Parquet: zstd, but fp16 payloads as they are: level 3 would save 10 % of them and take half of a
reader's time. The planes of balanced and compact under level 15: they are symbols without
repetitions, where quick levels lose by looking for some (level 3 leaves 5 % more, level 1 2 to 4 %,
or 1 % in large pages). Pages are small, since zstd means another search by a level above 256 KiB,
which finds 1 to 3 % less and takes 3 times as long at 3136 Gaussians: 0.3 ms per image of 400
Gaussians, 1.3 of 1600 and 2.2 of 3136 as it is. Lengths of planes lie apart from the bytes, in
DELTA_LENGTH_BYTE_ARRAY, which saves 0.5 % at 400 Gaussians. Payloads have neither dictionary nor
statistics, which would store large values twice. Pages carry checksums.

WebDataset: written with tarfile. webdataset.TarWriter sorts the members of a sample and keeps the
header of every member in memory.
"""

from __future__ import annotations

import io
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from splatshard.pipeline.codec.planes import join
from splatshard.pipeline.shards.commit import storage_errors
from splatshard.pipeline.source.tar import forget_headers
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import STATUSES
from splatshard.schemas.splats import (
    EXTENSIONS,
    METADATA_MEMBER,
    PLANAR,
    PLANES,
    arrow_schema,
    canonical_json,
    columns,
    payload_bytes,
    payload_columns,
    scalars,
    splat_columns,
    splat_suffix,
)

Row = dict[str, Any]

ROW_GROUP_BYTES = 32 << 20
ZSTD_LEVEL = 3
PLANES_ZSTD_LEVEL = 15
PAGE_BYTES = 232 << 10
PAGE_ROWS = 4
"""A page ends with the PAGE_ROWS rows that fill PAGE_BYTES: below 256 KiB up to 6,000 Gaussians."""
ROWS_TOGETHER = 256
"""Rows as Python's objects: those of a row group of small rows would take ten times its bytes."""
FURTHER_LEAVES = ("metadata", "members.list.element.name", "members.list.element.data")


@contextmanager
def open_writer(
    path: Path, format: str, metadata: dict[str, Any]
) -> Iterator[ParquetWriter | TarWriter]:
    """A writer of the local file `path`; `metadata` is that of `schemas.splats.shard_metadata`.

    The file is whole once the block ends without an error and worthless after one. Raises
    StorageError when `path` cannot be written and UsageError for an unknown format; `write` raises
    ValueError for a row that does not fit the schema.
    """
    if format not in EXTENSIONS:
        raise UsageError(f"--format {format}: choose {' or '.join(EXTENSIONS)}")
    with storage_errors(path):
        stream = path.open("wb")
    writer = None
    try:
        writer = (ParquetWriter if format == "parquet" else TarWriter)(path, stream, metadata)
        yield writer
        with storage_errors(path):
            writer.close()
            stream.close()
    except BaseException:
        if writer:
            writer.abandon()
        with suppress(OSError):
            stream.close()
        raise


class ParquetWriter:
    """Writes rows as row groups of ROW_GROUP_BYTES, counted before compression."""

    def __init__(self, path: Path, stream: BinaryIO, metadata: dict[str, Any]) -> None:
        self.path = path
        self._schema = arrow_schema(metadata)
        small = list(scalars(metadata))
        leaves = payload_leaves(metadata)
        levels = dict.fromkeys([*small, *FURTHER_LEAVES], ZSTD_LEVEL)
        levels |= dict.fromkeys(leaves, PLANES_ZSTD_LEVEL)
        options: dict[str, Any] = {
            "compression": dict.fromkeys(levels, "zstd"),  # none for the others: fp16 payloads
            "compression_level": levels,
            "use_dictionary": small,
            "write_statistics": small,
            "column_encoding": dict.fromkeys(leaves, "DELTA_LENGTH_BYTE_ARRAY"),
            "write_page_checksum": True,
            "data_page_size": PAGE_BYTES,
            "write_batch_size": PAGE_ROWS,
        }
        with storage_errors(path):
            self._file = pq.ParquetWriter(stream, self._schema, **options)
        self._rows: list[Row] = []
        self._tables: list[pa.Table] = []
        self._pending_bytes = 0

    def write(self, rows: list[Row]) -> None:
        """Append `rows`. Raises StorageError, and ValueError as `open_writer` says."""
        for row in (checked(row, self._schema.names) for row in rows):
            self._rows.append(row)
            self._pending_bytes += row_bytes(row)
            if self._pending_bytes >= ROW_GROUP_BYTES:
                self._flush()
            elif len(self._rows) >= ROWS_TOGETHER:
                self._put_together()

    def _put_together(self) -> None:
        self._tables.append(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def _flush(self) -> None:
        if self._rows:
            self._put_together()
        table = pa.concat_tables(self._tables).combine_chunks()  # in one piece: pages depend on it
        self._tables, self._pending_bytes = [], 0
        with storage_errors(self.path):
            self._file.write_table(table)

    def close(self) -> None:
        """Write what is pending and the footer."""
        if self._rows or self._tables:
            self._flush()
        self._file.close()

    def abandon(self) -> None:
        """Give the file up; what it holds is unreadable."""
        self._file.is_open = False  # or its __del__ would write a footer into a closed stream


class TarWriter:
    """Writes each row as the members of one WebDataset sample.

    `{key}.splat.json` (the scalar columns), `{key}.splat` and what other payloads there are (ok
    rows only), `{key}.txt`, `.cls` and `.json` (caption, label, metadata, where not null), then the
    further members as they came.
    """

    def __init__(self, path: Path, stream: BinaryIO, metadata: dict[str, Any]) -> None:
        self.path = path
        self._index = 0
        self._names = columns(metadata).names
        self._scalars = scalars(metadata)
        self._payloads = payload_columns(metadata)
        self._tar = tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT)
        self._add(METADATA_MEMBER, canonical_json(metadata).encode())

    def write(self, rows: list[Row]) -> None:
        """Append `rows`. Raises StorageError, and ValueError as `open_writer` says."""
        for row in (checked(row, self._names) for row in rows):
            base = member_base(row["key"])
            if row["status"] == "duplicate_key":
                base += f"%~{self._index}"
            for suffix, data in sample_members(row, self._scalars, self._payloads):
                self._add(f"{base}.{suffix}", data)
            self._index += 1

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # owner and time are 0 by default
        member.size = len(data)
        with storage_errors(self.path):
            self._tar.addfile(member, io.BytesIO(data))
        forget_headers(self._tar)

    def close(self) -> None:
        """Write the end of the archive."""
        self._tar.close()

    def abandon(self) -> None:
        """Give the file up; it has no end."""


def payload_leaves(metadata: dict[str, Any]) -> list[str]:
    """Paths of the planes' columns within a Parquet file; none for fp16."""
    if metadata["codec"] not in PLANAR:
        return []
    return [f"{name}.{plane}" for name in splat_columns(metadata["budgets"]) for plane in PLANES]


def checked(row: Row, names: Sequence[str]) -> Row:
    """`row` with its decibels rounded to float32 and nulls left out, so that both formats hold the
    same. Raises ValueError for what the columns `names` have no place for."""
    row = {name: value for name, value in row.items() if value is not None}
    if unknown := row.keys() - set(names):
        raise ValueError(f"row {row.get('key')!r}: no columns for {sorted(unknown)}")
    if missing := {"key", "status", "num_gaussians"} - row.keys():
        raise ValueError(f"row {row.get('key')!r}: columns {sorted(missing)} are null")
    if row["status"] not in STATUSES:
        raise ValueError(f"row {row['key']!r}: unknown status {row['status']!r}")
    for name in row:
        if name.startswith("psnr"):
            row[name] = float(np.float32(row[name]))
            if not math.isfinite(row[name]):
                raise ValueError(f"row {row['key']!r}: {name} is {row[name]}")
    return row


def row_bytes(row: Row) -> int:
    """Bytes of a row's large values, and some for the rest."""
    members = sum(len(member["data"]) for member in row.get("members", ()))
    texts = sum(len(row.get(name, "")) for name in ("caption", "error", "metadata"))
    return members + texts + payload_bytes(row) + len(row.get("teacher", b"")) + 128


def sample_members(
    row: Row, scalar_names: Sequence[str], payloads: Sequence[str]
) -> list[tuple[str, bytes]]:
    """The (suffix, bytes) of a checked row's tar members, in order.

    A further member keeps its name in lower case, escaped, unless another member of the sample
    has it: then `%~` and its place among the further members follow. The true names are in
    `splat.json`.
    """
    further = row.get("members", ())
    names = [member["name"] for member in further]
    values = {name: value for name, value in row.items() if name in scalar_names}
    document = canonical_json({**values, "members": names})
    result = [("splat.json", document.encode())]
    for name in payloads:
        if name in row:
            payload = row[name]
            data = join(payload) if isinstance(payload, dict) else payload
            result.append((splat_suffix(name), data))
    if "caption" in row and "txt" not in names:
        result.append(("txt", row["caption"].encode()))
    if "label" in row and "cls" not in names:
        result.append(("cls", str(row["label"]).encode()))
    if "metadata" in row:
        result.append(("json", row["metadata"].encode()))
    # suffixes a webdataset sample cannot have twice, or at all
    reserved = {splat_suffix(name) for name in payloads} | {"__key__", "__url__", "__local_path__"}
    taken = {suffix for suffix, _ in result} | reserved
    for i, member in enumerate(further):
        suffix = _UNSAFE.sub(_percent, member["name"]).replace("/", "%2F").lower()
        if suffix in taken:
            suffix += f"%~{i}"
        taken.add(suffix)
        result.append((suffix, member["data"]))
    return result


_UNSAFE = re.compile(r"[%\\\x00-\x1f\x7f\ud800-\udfff]")


def member_base(key: str) -> str:
    """A member name's part before its first dot for `key`; different keys give different ones.

    Percent-encodes what would make the name unsafe to unpack or webdataset group it wrongly: `%`,
    `\\`, control characters, dots of the last component, all of `.` and `..` components, and the
    first character of `__x__`, which is skipped as metadata. An empty component becomes `%`.
    """
    *folders, last = _UNSAFE.sub(_percent, key).split("/")
    parts = [re.sub(r"^\.{1,2}$", lambda m: "%2E" * len(m[0]), part) for part in folders]
    parts.append(last.replace(".", "%2E"))
    return "/".join(re.sub("^_(?=_.*__$)", "%5F", part) or "%" for part in parts)


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode(errors="surrogatepass"))
