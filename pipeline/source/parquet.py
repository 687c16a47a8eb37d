"""Hugging Face image Parquet to samples, a few rows at a time.

columns.py says which column is what. Nothing is lost: those that no field of a sample gives back
become its members (bytes, also those of further image structs and within lists) or values of its
metadata JSON (the rest, see arrow_values.py), where an image struct leaves its other fields, such
as the file's path. A caption that is not UTF-8 is a member, too.

A ClassLabel's names are not in the samples: the listing tells and keeps them (`ShardRef.labels`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from splatshard.pipeline.source.arrow_values import NotText, plain, values_of
from splatshard.pipeline.source.columns import (
    Columns,
    class_names,
    columns_of,
    fields_of,
    image_columns,
    no_image_column,
)
from splatshard.pipeline.source.formats import HEAD_BYTES, disguised
from splatshard.pipeline.source.sample import RawSample
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import SampleError, SourceError
from splatshard.schemas.shard import ShardRef

PARQUET_BATCH_ROWS = 16
SCAN_ROWS = 4096

NOT_UTF8 = "write the texts of its dictionary columns in UTF-8, or as another type"
"""pyarrow checks dictionaries alone, and those with indices of 32 bits not even then."""


class Declared(NamedTuple):
    """What the schema of a Parquet file says: why it has no images, empty where it has some; and
    the names of its classes, by number."""

    no_images: str = ""
    classes: tuple[str, ...] = ()


def declared(url: str) -> Declared:
    """Nothing where a web server sends no ranges, so that all of the file had to be copied first.
    Raises SourceError when it cannot be opened."""
    with fs.open_read(url) as stream:
        if not stream.seekable():
            return Declared()
        with _parquet_errors(url, url), _parquet_file(stream) as file:
            schema = file.schema_arrow
            if images := image_columns(schema):
                return Declared(classes=class_names(schema, images[0]))
            return Declared(f"{url} {no_image_column(schema)}")


def read_parquet(ref: ShardRef, digest: fs.Digest) -> Iterator[RawSample]:
    (url,) = ref.urls
    if ref.limit is None:
        with fs.local_copy(url, digest) as path:
            yield from _parquet_samples(ref, path)
    else:  # a trial of a few samples should not transfer the whole file
        for sample in _parquet_samples(ref, url):
            digest.update(sample.image)
            yield sample


def _parquet_samples(ref: ShardRef, path: str) -> Iterator[RawSample]:
    (url,) = ref.urls
    with _open_parquet(url, path) as file:
        columns = columns_of(file, url)
        batches = file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False)
        for number, row in enumerate(r for batch in batches for r in _rows(batch, url)):
            yield _parquet_sample(row, columns, f"{ref.name}-{number:08d}")


def _rows(batch: pa.RecordBatch, url: str) -> Iterator[dict[str, Any]]:
    values = [_values(*column, url) for column in zip(batch.schema, batch.columns, strict=True)]
    for row in zip(*values, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _values(field: pa.Field, column: pa.Array, url: str) -> list[Any]:
    try:
        return values_of(column)
    except (pa.ArrowException, ValueError, OverflowError, LookupError) as e:
        raise SourceError(
            f"{url}: column {field.name} of type {field.type} has a value that Python cannot hold: "
            f"{e}; write the column as text, or leave it out"
        ) from e


def scan_parquet(ref: ShardRef) -> Iterator[RawSample]:
    """Keys, captions and labels alone, from their columns."""
    (url,) = ref.urls
    with _open_parquet(url, url) as file:
        columns = columns_of(file, url)
        if not columns.own:
            for number in range(file.metadata.num_rows):
                yield RawSample(f"{ref.name}-{number:08d}")
            return
        batches = file.iter_batches(SCAN_ROWS, columns=columns.own, use_threads=False)
        for number, row in enumerate(r for batch in batches for r in _rows(batch, url)):
            said = fields_of(row, columns, f"{ref.name}-{number:08d}")
            yield RawSample(said.key, uid=said.uid, caption=said.caption, label=said.label)


def count_parquet(ref: ShardRef) -> Iterator[int]:
    with _open_parquet(ref.urls[0], ref.urls[0]) as file:
        yield from range(file.metadata.num_rows)


@contextmanager
def _open_parquet(url: str, path: str) -> Iterator[pq.ParquetFile]:
    with (
        _parquet_errors(url, path),
        fs.open_anywhere(path) as stream,
        _parquet_file(stream) as file,
    ):
        yield file


def _parquet_file(stream: BinaryIO) -> pq.ParquetFile:
    """Buffered and not pre-fetched: pages pass one by one, not whole row groups."""
    return pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)


@contextmanager
def _parquet_errors(url: str, path: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:  # Arrow's, too, and no fault of the file
        raise
    except pa.ArrowNotImplementedError as e:
        columns = ", ".join(_of_128_bits(path)) or "one of its columns"
        raise SourceError(
            f"{url}: {columns} cannot be read by pyarrow: {e}; write it in another type (in Polars "
            ".cast(pl.Int64) or .cast(pl.String)), or leave it out"
        ) from e
    except UnicodeDecodeError as e:
        raise SourceError(f"{url}: the name of a column is not UTF-8: {e}; rename it") from e
    except (pa.ArrowException, OSError) as e:
        if kind := _disguised(url, path):
            raise SourceError(f"{url} is no Parquet, but {kind}") from e
        words = {"decrypt": "write it without encryption", "utf8": NOT_UTF8}
        found = (remedy for word, remedy in words.items() if word in str(e).lower())
        remedy = next(found, "download it again")
        raise SourceError(f"{url} is not readable as Parquet: {e}; {remedy}") from e


def _disguised(url: str, path: str) -> str:
    with suppress(OSError, SourceError), fs.open_read(path) as stream:
        return disguised(url, stream.read(HEAD_BYTES))
    return ""


def _of_128_bits(path: str) -> Iterator[str]:
    """The columns that may be integers of 128 bits, with which pyarrow opens no file: the footer
    without Arrow's schema has them as bytes."""
    with suppress(pa.ArrowException, OSError, ValueError), fs.open_anywhere(path) as stream:
        size = stream.seek(-8, io.SEEK_END) + 8
        footer = min(size, int.from_bytes(stream.read(4), "little") + 8)
        stream.seek(-footer, io.SEEK_END)
        tail = stream.read(footer).replace(b"ARROW:schema", b"ARROW_schema")
        schema = pq.ParquetFile(io.BytesIO(b"PAR1" + tail)).schema
        for column in (schema.column(i) for i in range(len(schema))):
            if column.length == 16 and column.logical_type.type == "NONE":
                yield f"column {column.path}"


def _parquet_sample(row: dict[str, Any], columns: Columns, default_key: str) -> RawSample:
    said = fields_of(row, columns, default_key)
    absent = {name for name in columns.own if row[name] is None}
    own_image = _image_of(row, columns)
    kept = row.keys() - said.given - absent - {own_image}
    undecoded = {n for n in columns.own if n in kept and isinstance(row[n], NotText)}
    other = {n: row[n] for n in columns.other if n in kept - undecoded}
    members: dict[str, bytes] = {}
    rests = {n: _without_bytes(n, row[n], members) for n in columns.binary if n in kept}
    members |= {n: bytes(row[n]) for n in columns.own if n in undecoded}
    image, rest = _split_image(row[own_image])
    path, error = rest.get("path"), None
    if image is None:
        hint = f"; it names {path}, but only embedded images can be read" if path else ""
        error = SampleError(
            "no_image",
            f"row {said.key} has no image bytes in {' or '.join(columns.images)}{hint}; if another "
            f"column has the images, rename it to image: there are {columns.types}",
        )
    further = {own_image: rest} | rests
    other |= {name: rest for name, rest in further.items() if rest not in (None, {})}
    return RawSample(
        key=said.key,
        image=image or b"",
        image_name=plain(path) or said.key,
        uid=said.uid,
        caption=said.caption,
        label=said.label,
        metadata=json.dumps(plain(other), ensure_ascii=False) if other else None,
        members=tuple(members.items()),
        error=error,
        unused=(*said.unused, *_further_images(row, columns, own_image)),
    )


def _further_images(row: dict[str, Any], columns: Columns, own: str) -> Iterator[tuple[str, str]]:
    """Those of the row beside its own, and why they are not used."""
    for name in columns.images:
        if name != own and _split_image(row[name])[0] is not None:
            yield name, f"the image is taken from {own}"


def _image_of(row: dict[str, Any], columns: Columns) -> str:
    """The column that has the row's image."""
    found = (name for name in columns.images if _split_image(row[name])[0] is not None)
    return next(found, columns.image)


def _without_bytes(name: str, value: Any, members: dict[str, bytes]) -> Any:
    """The value of a column without its bytes: these go to `members`, by the place where they are
    (`frames.0`), those of an image struct by its own. Null where nothing else is there."""
    if isinstance(value, bytes) and not isinstance(value, NotText):
        members[name] = bytes(value)
        return None
    if isinstance(value, dict):
        places = ((n, name if n == "bytes" else f"{name}.{n}", v) for n, v in value.items())
        rests = {n: _without_bytes(place, v, members) for n, place, v in places}
        return {n: rest for n, rest in rests.items() if rest is not None} or None
    if isinstance(value, list):
        parts = [_without_bytes(f"{name}.{i}", each, members) for i, each in enumerate(value)]
        return parts if not value or any(part is not None for part in parts) else None
    return value


def _split_image(value: Any) -> tuple[bytes | None, dict[str, Any]]:
    """The bytes of a binary or an image struct, and the struct's other fields, unless null."""
    if not isinstance(value, dict):
        return value, {}
    rest = {name: v for name, v in value.items() if name != "bytes" and v is not None}
    return value["bytes"], rest
