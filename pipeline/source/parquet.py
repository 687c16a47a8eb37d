"""Hugging Face image Parquet to samples, a few rows at a time.

The columns are told apart by name and type (`_columns`). Nothing is lost: those that are none of a
sample's fields become its members (bytes, and the bytes of further image structs) or values of its
metadata JSON (the rest), where an image struct leaves its other fields, such as the file's path.

JSON has no form for some of Arrow's values, at any depth:

    NaN, infinity                 text: nan, inf, -inf
    dates, times, decimals, UUID  text, as Python prints them; nanoseconds with all nine digits
    durations                     text, as Python prints them; nanoseconds as their number
    bytes in lists or structs     base64
    maps                          lists of [key, value]

Left out: the names of a ClassLabel.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from splatshard.pipeline.source.sample import RawSample
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import SampleError, SourceError
from splatshard.schemas.shard import ShardRef

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
"""Names of a Parquet file's image column, by preference."""

PARQUET_BATCH_ROWS = 16
SCAN_ROWS = 4096


@dataclass(frozen=True)
class _Columns:
    """Which column of a Parquet file is what."""

    image: str
    key: str | None
    uid: str | None
    caption: str | None
    label: str | None
    binary: tuple[str, ...]  # become members
    other: tuple[str, ...]  # become the metadata JSON


def has_images(url: str) -> bool:
    """Whether a Parquet file has an image column. Raises SourceError when it cannot be opened."""
    with _open_parquet(url, url) as file:
        return image_column(file.schema_arrow) is not None


def image_column(schema: pa.Schema) -> str | None:
    """The column of Hugging Face's struct<bytes, path>, or a binary one with an image's name."""
    found = [f.name for f in schema if _is_image_struct(f.type)]
    found += [f.name for f in schema if f.name in IMAGE_COLUMNS and _is_binary(f.type)]
    named = [name for name in IMAGE_COLUMNS if name in found]
    return next(iter(named + found), None)


def read_parquet(ref: ShardRef, digest: hashlib._Hash) -> Iterator[RawSample]:
    (url,) = ref.urls
    if ref.limit is None:
        with fs.local_copy(url, digest) as path:
            yield from _parquet_samples(ref, path)
    else:  # a trial of a few samples should not transfer the whole file
        for sample in _parquet_samples(ref, url):
            digest.update(sample.image)
            yield sample


def _parquet_samples(ref: ShardRef, path: str) -> Iterator[RawSample]:
    with _open_parquet(ref.urls[0], path) as file:
        columns = _columns(file.schema_arrow, ref.urls[0])
        batches = file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False)
        for number, row in enumerate(r for batch in batches for r in _rows(batch, ref.urls[0])):
            yield _parquet_sample(row, columns, f"{ref.name}-{number:08d}")


def _rows(batch: pa.RecordBatch, url: str) -> Iterator[dict[str, Any]]:
    values = [_values(*column, url) for column in zip(batch.schema, batch.columns, strict=True)]
    for row in zip(*values, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _values(field: pa.Field, column: pa.Array, url: str) -> list[Any]:
    kind = _exact(field.type)
    try:
        return (column if kind == field.type else column.cast(kind)).to_pylist()
    except UnicodeDecodeError:
        raise  # a damaged file
    except (OverflowError, LookupError, ValueError) as e:  # year 20000, unknown time zones
        raise SourceError(
            f"{url}: column {field.name} of type {field.type} has a value that Python cannot hold: "
            f"{e}; write the column as text, or leave it out"
        ) from e


def scan_parquet(ref: ShardRef) -> Iterator[RawSample]:
    """Keys, captions and labels alone, from their columns."""
    (url,) = ref.urls
    with _open_parquet(url, url) as file:
        columns = _columns(file.schema_arrow, url)
        fields = [name for name in (columns.key, columns.caption, columns.label) if name]
        if not fields:
            for number in range(file.metadata.num_rows):
                yield RawSample(f"{ref.name}-{number:08d}")
            return
        batches = file.iter_batches(SCAN_ROWS, columns=fields, use_threads=False)
        for number, row in enumerate(r for batch in batches for r in batch.to_pylist()):
            key = row.get(columns.key)
            yield RawSample(
                key=f"{ref.name}-{number:08d}" if key is None else str(key),
                caption=row.get(columns.caption),
                label=_int64(row.get(columns.label)),
            )


def count_parquet(ref: ShardRef) -> Iterator[int]:
    with _open_parquet(ref.urls[0], ref.urls[0]) as file:
        yield from range(file.metadata.num_rows)


@contextmanager
def _open_parquet(url: str, path: str) -> Iterator[pq.ParquetFile]:
    try:
        # buffered and not pre-fetched: pages pass one by one, not whole row groups
        with (
            fs.open_read(path) as stream,
            pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False) as file,
        ):
            yield file
    except MemoryError:  # Arrow's, too, and no fault of the file
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise SourceError(f"{url} is not readable as Parquet: {e}; download it again") from e


def _columns(schema: pa.Schema, url: str) -> _Columns:
    image = image_column(schema)
    if image is None:
        raise SourceError(
            f"{url} has no image column, only {', '.join(schema.names)}; expected one of type "
            f"struct<bytes, path>, or a binary one named {', '.join(IMAGE_COLUMNS)}"
        )
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise SourceError(f"{url} has several columns named {', '.join(twice)}; rename them")

    def first(names: tuple[str, ...], *tests: Any) -> str | None:
        fits = (n for n in names if n in schema.names)
        return next((n for n in fits if any(t(schema.field(n).type) for t in tests)), None)

    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    key = first(("__key__", "key"), *texts, pa.types.is_integer)
    uid, caption = first(("uid",), *texts), first(("caption", "text"), *texts)
    label = first(("label", "cls", *_class_labels(schema)), pa.types.is_integer)
    rest = [f for f in schema if f.name not in (image, key, uid, caption, label)]
    binary = [f.name for f in rest if _is_binary(f.type) or _is_image_struct(f.type)]
    other = [f.name for f in rest if f.name not in binary]
    return _Columns(image, key, uid, caption, label, tuple(binary), tuple(other))


def _class_labels(schema: pa.Schema) -> tuple[str, ...]:
    """Columns that Hugging Face's schema metadata declares as ClassLabel."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"].items()
        return tuple(name for name, f in features if f.get("_type") == "ClassLabel")
    except (ValueError, KeyError, AttributeError, TypeError):
        return ()  # somebody else's metadata


def _parquet_sample(row: dict[str, Any], columns: _Columns, default_key: str) -> RawSample:
    key = row.get(columns.key)
    key = default_key if key is None else str(key)
    split = {name: _split_image(row[name]) for name in (columns.image, *columns.binary)}
    image, rest = split.pop(columns.image)
    path, error = rest.get("path"), None
    if image is None:
        hint = f"; it names {path}, but only embedded images can be read" if path else ""
        error = SampleError("no_image", f"row {key} has no image bytes{hint}")
    label = _int64(row.get(columns.label))
    other = {name: row[name] for name in columns.other}
    if columns.label and label != row[columns.label]:
        other[columns.label] = row[columns.label]
    further = {columns.image: rest} | {name: rest for name, (_, rest) in split.items()}
    other |= {name: rest for name, rest in further.items() if rest}
    return RawSample(
        key=key,
        image=image or b"",
        image_name=path or key,
        uid=row.get(columns.uid),
        caption=row.get(columns.caption),
        label=label,
        metadata=json.dumps(_plain(other), ensure_ascii=False) if other else None,
        members=tuple((name, data) for name, (data, _) in split.items() if data is not None),
        error=error,
    )


def _split_image(value: Any) -> tuple[bytes | None, dict[str, Any]]:
    """The bytes of a binary or an image struct, and the struct's other fields, unless null."""
    if not isinstance(value, dict):
        return value, {}
    rest = {name: v for name, v in value.items() if name != "bytes" and v is not None}
    return value["bytes"], rest


def _int64(label: int | None) -> int | None:
    """The label, unless an unsigned one is too large for its column."""
    return label if label is not None and label < 1 << 63 else None


def _plain(value: Any) -> Any:
    """A value of Arrow's as JSON has it; see the top of this file."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    special = isinstance(value, date | time | timedelta | Decimal | UUID)
    infinite = isinstance(value, float) and not math.isfinite(value)
    return str(value) if special or infinite else value


def _exact(kind: pa.DataType) -> pa.DataType:
    """The type from which Python gets all of a value: its own times end at microseconds, and only
    pandas has others."""

    def within(field: pa.Field) -> pa.Field:
        return field.with_type(_exact(field.type))

    types = pa.types
    if types.is_struct(kind):
        return pa.struct([within(kind.field(i)) for i in range(kind.num_fields)])
    if types.is_list(kind):
        return pa.list_(within(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(within(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(within(kind.value_field), kind.list_size)
    if types.is_map(kind):
        return pa.map_(within(kind.key_field), within(kind.item_field), kind.keys_sorted)
    if types.is_float16(kind):
        return pa.float32()  # older Arrow gives numpy's
    if not types.is_temporal(kind) or getattr(kind, "unit", "") != "ns":
        return kind
    return pa.int64() if types.is_duration(kind) else pa.string()


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_binary(kind.value_type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in (*tests, pa.types.is_fixed_size_binary))


def _is_image_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return _is_binary(kind.field("bytes").type)
