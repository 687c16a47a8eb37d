"""Hugging Face image Parquet to samples, a few rows at a time.

The columns are told apart by name and type (`_columns`); those that are none of a sample's fields
become its members (bytes) or its metadata JSON (the rest).

Left out: columns that hold bytes inside lists or structs (several images per row have no place in a
one-image sample); the names of a ClassLabel.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.sample import RawSample
from schemas.errors import SampleError, SourceError
from schemas.shard import ShardRef

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

    @property
    def names(self) -> list[str]:
        single = (self.image, self.key, self.uid, self.caption, self.label)
        return [name for name in (*single, *self.binary, *self.other) if name]


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
        with storage.local_copy(url, digest) as path:
            yield from _parquet_samples(ref, path)
    else:  # a trial of a few samples should not transfer the whole file
        for sample in _parquet_samples(ref, url):
            digest.update(sample.image)
            yield sample


def _parquet_samples(ref: ShardRef, path: str) -> Iterator[RawSample]:
    with _open_parquet(ref.urls[0], path) as file:
        columns = _columns(file.schema_arrow, ref.urls[0])
        batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=columns.names, use_threads=False)
        for number, row in enumerate(r for batch in batches for r in batch.to_pylist()):
            yield _parquet_sample(row, columns, f"{ref.name}-{number:08d}")


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
                label=row.get(columns.label),
            )


def count_parquet(ref: ShardRef) -> Iterator[int]:
    with _open_parquet(ref.urls[0], ref.urls[0]) as file:
        yield from range(file.metadata.num_rows)


@contextmanager
def _open_parquet(url: str, path: str) -> Iterator[pq.ParquetFile]:
    try:
        # buffered and not pre-fetched: pages pass one by one, not whole row groups
        with (
            storage.open_read(path) as stream,
            pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False) as file,
        ):
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise SourceError(f"{url} is not readable as Parquet: {e}; download it again") from e


def _columns(schema: pa.Schema, url: str) -> _Columns:
    image = image_column(schema)
    if image is None:
        raise SourceError(
            f"{url} has no image column, only {', '.join(schema.names)}; expected one of type "
            f"struct<bytes, path>, or a binary one named {', '.join(IMAGE_COLUMNS)}"
        )

    def first(names: tuple[str, ...], *tests: Any) -> str | None:
        fits = (n for n in names if n in schema.names)
        return next((n for n in fits if any(t(schema.field(n).type) for t in tests)), None)

    texts = (pa.types.is_string, pa.types.is_large_string)
    key = first(("__key__", "key"), *texts, pa.types.is_integer)
    uid, caption = first(("uid",), *texts), first(("caption", "text"), *texts)
    label = first(("label", "cls", *_class_labels(schema)), pa.types.is_integer)
    rest = [f for f in schema if f.name not in (image, key, uid, caption, label)]
    binary = [f.name for f in rest if _is_binary(f.type) or _is_image_struct(f.type)]
    other = [f.name for f in rest if f.name not in binary and "binary" not in str(f.type)]
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
    image, path = _image_bytes(row[columns.image])
    error = None
    if image is None:
        hint = f"; it names {path}, but only embedded images can be read" if path else ""
        error = SampleError("no_image", f"row {key} has no image bytes{hint}")
    members = [(name, _image_bytes(row[name])[0]) for name in columns.binary]
    other = {name: _finite(row[name]) for name in columns.other}
    return RawSample(
        key=key,
        image=image or b"",
        image_name=path or key,
        uid=row.get(columns.uid),
        caption=row.get(columns.caption),
        label=row.get(columns.label),
        metadata=json.dumps(other, ensure_ascii=False, default=str) if other else None,
        members=tuple((name, data) for name, data in members if data is not None),
        error=error,
    )


def _image_bytes(value: Any) -> tuple[bytes | None, str | None]:
    return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)


def _finite(value: Any) -> Any:
    """NaN and infinity as strings: JSON has no numbers for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return _is_binary(kind.field("bytes").type)
