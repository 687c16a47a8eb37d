"""Rows to a shard file: Parquet or WebDataset tar. schemas/FORMAT.md specifies both.

    with open_writer(path, "parquet", metadata) as writer:
        writer.write(rows)

Rows are dicts with the keys of `schemas.splats.COLUMNS`; absent keys are null. Both writers hold at
most one row group, and the same rows always give the same bytes: no clock, no user, no host.

Parquet: payloads are a BINARY column under zstd level 3. (On packed splats level 1 leaves 6 % more
bytes; levels 6 to 15 save 2 % at a fifth of the speed or less.) They have neither dictionary nor
statistics, which would store large values twice. Pages carry checksums.

WebDataset: written with tarfile. webdataset.TarWriter sorts the members of a sample, refuses names
beyond USTAR's limit and keeps the header of every member in memory.
"""

from __future__ import annotations

import io
import math
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import storage_errors
from schemas.errors import UsageError
from schemas.shard import STATUSES
from schemas.splats import (
    BULKY,
    EXTENSIONS,
    METADATA_MEMBER,
    NAMES,
    SCALARS,
    arrow_schema,
    canonical_json,
)

Row = dict[str, Any]

ROW_GROUP_BYTES = 32 << 20
ZSTD_LEVEL = 3


@contextmanager
def open_writer(
    path: Path, format: str, metadata: dict[str, object]
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

    def __init__(self, path: Path, stream: BinaryIO, metadata: dict[str, object]) -> None:
        self.path = path
        self._schema = arrow_schema(metadata)
        with storage_errors(path):
            self._file = pq.ParquetWriter(
                stream,
                self._schema,
                compression="zstd",
                compression_level=ZSTD_LEVEL,
                use_dictionary=list(SCALARS),
                write_statistics=list(SCALARS),
                write_page_checksum=True,
            )
        self._rows: list[Row] = []
        self._pending_bytes = 0

    def write(self, rows: list[Row]) -> None:
        """Append `rows`. Raises StorageError, and ValueError as `open_writer` says."""
        for row in map(checked, rows):
            self._rows.append(row)
            self._pending_bytes += row_bytes(row)
            if self._pending_bytes >= ROW_GROUP_BYTES:
                self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._rows, self._pending_bytes = [], 0
        with storage_errors(self.path):
            self._file.write_table(table)

    def close(self) -> None:
        """Write what is pending and the footer."""
        if self._rows:
            self._flush()
        self._file.close()

    def abandon(self) -> None:
        """Give the file up; what it holds is unreadable."""
        self._file.is_open = False  # or its __del__ would write a footer into a closed stream


class TarWriter:
    """Writes each row as the members of one WebDataset sample.

    `{key}.splat.json` (the scalar columns), `{key}.splat` (ok rows only), `{key}.txt`, `.cls` and
    `.json` (caption, label, metadata, where not null), then the further members as they came.
    """

    def __init__(self, path: Path, stream: BinaryIO, metadata: dict[str, object]) -> None:
        self.path = path
        self._index = 0
        self._tar = tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT)
        self._add(METADATA_MEMBER, canonical_json(metadata).encode())

    def write(self, rows: list[Row]) -> None:
        """Append `rows`. Raises StorageError, and ValueError as `open_writer` says."""
        for row in map(checked, rows):
            base = member_base(row["key"])
            if row["status"] == "duplicate_key":
                base += f"%~{self._index}"
            for suffix, data in sample_members(row):
                self._add(f"{base}.{suffix}", data)
            self._index += 1

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # owner and time are 0 by default
        member.size = len(data)
        with storage_errors(self.path):
            self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # tarfile would keep every header until the end

    def close(self) -> None:
        """Write the end of the archive."""
        self._tar.close()

    def abandon(self) -> None:
        """Give the file up; it has no end."""


def checked(row: Row) -> Row:
    """`row` with its PSNR rounded to float32 and nulls left out, so that both formats hold the
    same. Raises ValueError for what the schema has no place for."""
    row = {name: value for name, value in row.items() if value is not None}
    if unknown := row.keys() - set(NAMES):
        raise ValueError(f"row {row.get('key')!r}: no columns for {sorted(unknown)}")
    if missing := {"key", "status", "num_gaussians"} - row.keys():
        raise ValueError(f"row {row.get('key')!r}: columns {sorted(missing)} are null")
    if row["status"] not in STATUSES:
        raise ValueError(f"row {row['key']!r}: unknown status {row['status']!r}")
    if "psnr" in row:
        row["psnr"] = float(np.float32(row["psnr"]))
        if not math.isfinite(row["psnr"]):
            raise ValueError(f"row {row['key']!r}: PSNR is {row['psnr']}")
    return row


def row_bytes(row: Row) -> int:
    """Bytes of a row's large values, and some for the rest."""
    members = sum(len(member["data"]) for member in row.get("members", ()))
    texts = sum(len(row.get(name, "")) for name in ("caption", "error", "metadata", "splats"))
    return members + texts + 128


def sample_members(row: Row) -> list[tuple[str, bytes]]:
    """The (suffix, bytes) of a checked row's tar members, in order.

    A further member keeps its name in lower case, escaped, unless another member of the sample
    has it: then `%~` and its place among the further members follow. The true names are in
    `splat.json`.
    """
    further = row.get("members", ())
    names = [member["name"] for member in further]
    scalars = {name: value for name, value in row.items() if name not in BULKY}
    document = canonical_json({**scalars, "members": names})
    result = [("splat.json", document.encode())]
    if "splats" in row:
        result.append(("splat", row["splats"]))
    if "caption" in row and "txt" not in names:
        result.append(("txt", row["caption"].encode()))
    if "label" in row and "cls" not in names:
        result.append(("cls", str(row["label"]).encode()))
    if "metadata" in row:
        result.append(("json", row["metadata"].encode()))
    # suffixes a webdataset sample cannot have twice, or at all
    taken = {suffix for suffix, _ in result} | {"splat", "__key__", "__url__", "__local_path__"}
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
