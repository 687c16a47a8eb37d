"""Committed shards, read back: the rows of both formats and a shard's constants.

Front to back, one row at a time. Left out: order, batches, prefetching and columns by choice, which
are the training reader's; the check of a shard, which is verify.py's. Nothing is unpickled, and
whatever is wrong with a file raises CorruptShardError.

A tar that was cut between two members reads like a shorter one: trust the marker's count.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from splatshard.pipeline.source.tar import forget_headers
from splatshard.pipeline.storage import fs
from splatshard.schemas.document import is_text
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    SourceError,
)
from splatshard.schemas.splats import (
    CODECS,
    EXTENSIONS,
    FORMAT_VERSION,
    MAX_TEACHER_DIM,
    METADATA_KEY,
    METADATA_MEMBER,
    PLANAR,
    TEACHER,
    columns,
    payload_columns,
    scalars,
    splat_suffix,
)

Row = dict[str, Any]

BATCH_ROWS = 64
BATCH_BYTES = 64 << 20
LARGE = ("metadata", "members", "splats", TEACHER)
"""What the names of columns with large values begin with."""
MAX_FLOAT = (2 - 2**-23) * 2.0**127
"""The largest finite single."""


def read_rows(url: str, format: str | None = None) -> Iterator[Row]:
    """The rows of the shard at `url` (path or URL), one dict each with the names of its columns.

    Payloads are bytes, or a dict of planes (see `schemas.splats.PLANAR`). `format` is that of the
    file's extension if None. Raises CorruptShardError for a missing, damaged or foreign file and
    FormatVersionError for a newer one.
    """
    with reading(url) as stream:
        yield from rows_from(stream, url, format_of(url, format))


def rows_from(stream: BinaryIO, url: str, format: str, start: int = 0) -> Iterator[Row]:
    """As `read_rows`, of an open shard, from row `start` on: row groups before it are not read.
    Raises also what the libraries raise on bad bytes."""
    if format == "parquet":
        return _parquet_rows(stream, url, start)
    return islice(_tar_rows(stream, url), start, None)


def shard_metadata_of(url: str, format: str | None = None) -> dict[str, Any]:
    """The constants of the shard at `url`, see `schemas.splats.shard_metadata`; raises as
    `read_rows`."""
    with reading(url) as stream:
        if format_of(url, format) == "parquet":
            return parquet_metadata(pq.ParquetFile(stream), url)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            return tar_metadata(tar_members(tar), url)


def is_shard(url: str) -> bool:
    """Whether splatshard wrote the file at `url`, by the constants in it. Raises
    UnavailableError."""
    try:
        return bool(shard_metadata_of(url))
    except (CorruptShardError, FormatVersionError):
        return False


def format_of(url: str, format: str | None) -> str:
    by_extension = {extension: name for name, extension in EXTENSIONS.items()}
    format = format or by_extension.get(url.rpartition(".")[2], "")
    if format not in EXTENSIONS:
        raise CorruptShardError(f"{url} is neither a .parquet nor a .tar file")
    return format


@contextmanager
def reading(url: str) -> Iterator[BinaryIO]:
    """A stream over `url`; whatever the libraries raise on bad bytes becomes CorruptShardError."""
    try:
        with fs.open_read(url) as stream:
            yield stream
    except SourceError as e:
        raise CorruptShardError(str(e)) from e
    except FormatVersionError:
        raise
    except CorruptShardError as e:
        if url in str(e):
            raise  # `from e` would make it its own cause
        raise CorruptShardError(f"{url}: {e}") from e
    except (pa.ArrowException, tarfile.TarError, OSError, ValueError, RecursionError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())  # Arrow's may have several lines
        raise CorruptShardError(f"{url} cannot be read: {reason}") from e


def _parquet_rows(stream: BinaryIO, url: str, start: int) -> Iterator[Row]:
    file = pq.ParquetFile(stream, page_checksum_verification=True)
    parquet_metadata(file, url)
    end = 0
    for group in range(file.num_row_groups):
        begin, end = end, end + file.metadata.row_group(group).num_rows
        if end <= start:
            continue
        rows = _batch_rows(file, group)
        for batch in file.iter_batches(rows, [group], use_threads=False):
            for row in batch.slice(min(len(batch), max(0, start - begin))).to_pylist():
                yield row | {"members": row["members"] or []}
            begin += len(batch)


def _batch_rows(file: pq.ParquetFile, group: int) -> int:
    """Rows of that group to read at once: fewer where they are large, and one where large values
    come from a dictionary, by which a small file can have any number of copies of them."""
    names = [name for name in file.schema_arrow.names if name.startswith(LARGE)]
    # pyarrow's column() ends the process where this raises: its C++ exception is not caught
    next(file.iter_batches(1, [group], names, use_threads=False), None)
    footer = file.metadata.row_group(group)
    large = [i for i in range(len(file.schema)) if file.schema.column(i).path.startswith(LARGE)]
    if any(footer.column(i).has_dictionary_page for i in large):
        return 1
    return max(1, min(BATCH_ROWS, BATCH_BYTES * footer.num_rows // max(1, footer.total_byte_size)))


def parquet_metadata(file: pq.ParquetFile, url: str) -> dict[str, Any]:
    """The constants of an open Parquet shard. Raises CorruptShardError and FormatVersionError."""
    schema = file.schema_arrow
    metadata = checked_metadata((schema.metadata or {}).get(METADATA_KEY), url)
    wanted = columns(metadata)
    if schema.equals(wanted):
        return metadata
    if schema.names != wanted.names:
        raise CorruptShardError(f"{url} has the columns {schema.names}, not {wanted.names}")
    own, right = next(
        pair for pair in zip(schema, wanted, strict=True) if not pair[0].equals(pair[1])
    )
    raise CorruptShardError(
        f"{url} has the column {field_text(own)}, not {field_text(right)}, as if another program "
        f"had written it anew: run splatshard repair {url.rpartition('/')[0]}"
    )


def field_text(field: pa.Field) -> str:
    """`teacher (binary)`, `key (string, never null)`."""
    return f"{field.name} ({field.type}{'' if field.nullable else ', never null'})"


def checked_metadata(text: bytes | None, url: str) -> dict[str, Any]:
    """A shard's constants from their JSON. Raises as `parquet_metadata`, and ValueError."""
    if text is None:
        raise CorruptShardError(f"{url} is not a splat shard: it has no splatshard metadata")
    metadata = json.loads(text)
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{url} has format version {version}, this build reads up to {FORMAT_VERSION}: "
            "upgrade splatshard"
        )
    codecs = CODECS if version != 1 else ("fp16", "q11")
    budgets = metadata.get("budgets", []) if isinstance(metadata, dict) else None
    known = (
        type(version) is int
        and version >= 1
        and metadata.get("codec") in codecs
        and isinstance(budgets, list)
        and all(type(b) is int and a < b for a, b in zip([0, *budgets], budgets, strict=False))
        and (TEACHER not in metadata or _is_teacher(metadata[TEACHER]))
    )
    if not known:
        raise CorruptShardError(f"{url} is not a splat shard: its metadata are {str(text)[:200]}")
    return metadata


def _is_teacher(value: object) -> bool:
    dim = value.get("dim") if isinstance(value, dict) else None
    return type(dim) is int and 0 < dim <= MAX_TEACHER_DIM


def tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        if not member.isreg() or member.issparse() or member.size < 0:  # holes may be of any size
            raise ValueError(f"member {member.name} is not a regular file")
        yield member.name, cast("BinaryIO", tar.extractfile(member)).read()
        forget_headers(tar)


def tar_metadata(members: Iterator[tuple[str, bytes]], url: str) -> dict[str, Any]:
    name, data = next(members, ("", b""))
    return checked_metadata(data if name == METADATA_MEMBER else None, url)


def _tar_rows(stream: BinaryIO, url: str) -> Iterator[Row]:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        members = tar_members(tar)
        metadata = tar_metadata(members, url)
        base, group = "", list[tuple[str, bytes]]()
        for name, data in members:
            folder, slash, last = name.rpartition("/")
            stem, _, suffix = last.partition(".")
            if suffix == "splat.json":
                if group:
                    yield tar_row(base, group, metadata)
                base, group = folder + slash + stem, []
            if folder + slash + stem != base or (not group and suffix != "splat.json"):
                raise ValueError(f"member {name} belongs to no sample")
            group.append((suffix, data))
        if group:
            yield tar_row(base, group, metadata)


def tar_row(base: str, group: list[tuple[str, bytes]], metadata: dict[str, Any]) -> Row:
    """A row from the members (suffix, bytes) of one sample, in file order. Raises ValueError and
    CorruptShardError."""
    from splatshard.pipeline.codec.planes import split

    document = json.loads(group[0][1])
    names = document.pop("members", None) if isinstance(document, dict) else None
    if not isinstance(names, list) or not all(map(is_text, names)):
        raise ValueError(f"{base}.splat.json has no list of members")
    own, further = group[1 : len(group) - len(names)], group[len(group) - len(names) :]
    if len(names) > len(group) - 1 or document.keys() - set(scalars(metadata)):
        raise ValueError(f"{base}.splat.json does not fit its sample")
    found = dict(own)
    schema = columns(metadata)
    row: Row = dict.fromkeys(schema.names) | document
    for name in scalars(metadata):
        if not _is_of(row[name], schema.field(name)):
            raise ValueError(f"{base}.splat.json: {name} is {row[name]!r}")
    row["metadata"] = found["json"].decode() if "json" in found else None
    planar = metadata["codec"] in PLANAR
    for name in payload_columns(metadata):
        data = found.get(splat_suffix(name))
        row[name] = split(data) if planar and name != TEACHER and data is not None else data
    row["members"] = [
        {"name": name, "data": data} for name, (_, data) in zip(names, further, strict=True)
    ]
    return row


def _is_of(value: Any, column: pa.Field) -> bool:
    if value is None:
        return column.nullable
    if pa.types.is_string(column.type):
        return is_text(value)
    if pa.types.is_floating(column.type):
        return type(value) in (int, float) and not MAX_FLOAT < abs(value) < math.inf
    limit = 1 << (column.type.bit_width - 1)
    return type(value) is int and -limit <= value < limit
