"""A source shard to samples, streamed: tar, Hugging Face Parquet or a folder of images.

One sample at a time is in memory (a few rows for Parquet), and the source's bytes go into a digest
as they pass. tar.py says how the members of an archive are grouped into samples.

Nothing is lost: caption, label, uid and JSON get columns of their own, every other member travels
as bytes, and so does a `.txt`, `.cls` or `.json` that its column could not give back exactly. A bad
sample carries its reason in `error`; only a source that cannot be read to its end raises.

Left out: columns of a Parquet file that hold bytes inside lists or structs (several images per row
have no place in a one-image sample); the names of a ClassLabel.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.tar import MAX_SAMPLE_BYTES, Group, read_groups, scan_groups
from schemas.errors import SampleError, SourceError
from schemas.shard import ShardRef

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
"""Extensions of images, any case; of several in one sample the first of this list is the image."""

SIDECAR_EXTENSIONS = ("txt", "json", "cls")
"""What joins an image of the same stem in a folder."""

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
"""Names of a Parquet file's image column, by preference."""

PARQUET_BATCH_ROWS = 16

Samples = Generator["RawSample", None, None]


@dataclass(frozen=True)
class RawSample:
    """One sample as the source holds it. With `error` set the image must not be used.

    `image` is the file's bytes, `image_name` its path for messages, `metadata` the JSON member as
    it came, `members` the further members as (extension, bytes). `label` is an integer as given.
    """

    key: str
    image: bytes = b""
    image_name: str = ""
    uid: str | None = None
    caption: str | None = None
    label: int | None = None
    metadata: str | None = None
    members: tuple[tuple[str, bytes], ...] = ()
    error: SampleError | None = None


def read(ref: ShardRef, digest: hashlib._Hash) -> Iterator[RawSample]:
    """The samples of `ref` in order, at most `ref.limit` of them.

    A whole read leaves in `digest` all bytes of the tar or Parquet file, or the names, sizes and
    bytes of a folder's files. A limited read leaves what it took: a prefix of the tar, the images
    of a Parquet file. Raises SourceError for what cannot be read to its end.
    """
    # 8 bytes of each key, not the key: a shard may have a million. Two of a million share a hash in
    # one of 37 million shards. Not Python's hash(), which differs from run to run.
    seen: set[int] = set()
    with closing(_READERS[ref.kind](ref, digest)) as samples:
        for sample in islice(samples, ref.limit):
            code = hashlib.blake2b(sample.key.encode(), digest_size=8).digest()
            number = int.from_bytes(code, "little")
            if number in seen:
                text = f"key {sample.key} occurs a second time in shard {ref.name}"
                sample = replace(sample, error=SampleError("duplicate_key", text))
            seen.add(number)
            yield sample


def count_samples(ref: ShardRef, at_most: int) -> int:
    """How many samples `ref` has, up to `at_most`; image data is passed over where possible.

    A damaged source counts as far as it can be read, with the sample in which it breaks; the
    conversion will report it.
    """
    count = 0
    try:
        for _ in islice(_COUNTERS[ref.kind](ref), at_most):
            count += 1
    except SourceError:
        return count + 1 if count else 0
    return count


# Tar


def _read_tar(ref: ShardRef, digest: hashlib._Hash) -> Samples:
    with storage.open_read(ref.urls[0]) as stream:
        yield from map(_assemble, read_groups(ref.urls[0], stream, digest))


def _count_tar(ref: ShardRef) -> Iterator[Group]:
    with storage.open_read(ref.urls[0]) as stream:
        yield from scan_groups(ref.urls[0], stream)


# From members to a sample


def _assemble(group: Group, default_label: int | None = None) -> RawSample:
    if group.error and group.error.status == "unsafe_path":
        return RawSample(group.key, error=group.error)
    images = [e for e in group.members if e.lower() in IMAGE_EXTENSIONS]
    image = min(images, key=lambda e: IMAGE_EXTENSIONS.index(e.lower()), default=None)
    error, fields, kept = group.error, {}, []
    if image is None:
        found = ", ".join(group.members)
        text = f"key {group.key} has no image ({' '.join(IMAGE_EXTENSIONS)}), only: {found}"
        error = error or SampleError("no_image", text)
    for extension, data in group.members.items():
        if extension == image or data is None:
            continue
        try:
            values, exact = _parse(extension.lower(), data, fields)
        except (ValueError, RecursionError) as e:
            text = f"{group.key}.{extension} cannot be parsed: {e}"
            error, values, exact = error or SampleError("bad_metadata", text), {}, False
        fields |= values
        if not exact or extension not in SIDECAR_EXTENSIONS:
            kept.append((extension, data))
    from_json = _json_fields(fields.get("metadata"))
    if from_json.get("label") is None:
        from_json["label"] = default_label
    return RawSample(
        key=group.key,
        image=group.members.get(image) or b"",
        image_name=f"{group.key}.{image}" if image else "",
        members=tuple(kept),
        error=error,
        **(from_json | fields),
    )


def _parse(extension: str, data: bytes, fields: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The fields a member gives, and whether they alone would give its bytes back.

    Raises ValueError or RecursionError for a `.cls` or `.json` that cannot be parsed.
    """
    if extension == "txt":
        caption = data.decode(errors="replace")
        return {"caption": caption}, caption.encode() == data
    if extension == "cls":
        if not re.fullmatch(rb"\s*[+-]?\d{1,18}\s*", data):
            raise ValueError(f"{data[:40]!r} is not an integer")
        return {"label": int(data)}, str(int(data)).encode() == data
    if extension in ("json", "meta.json"):
        text = data.decode()
        json.loads(text.removeprefix("\ufeff"))
        return ({} if extension != "json" and "metadata" in fields else {"metadata": text}), True
    return {}, False


def _json_fields(metadata: str | None) -> dict[str, Any]:
    """uid, caption and label as DataComp and timm name them in a sample's JSON."""
    values = json.loads(metadata.removeprefix("\ufeff")) if metadata else None
    if not isinstance(values, dict):
        return {}
    uid, label = values.get("uid"), values.get("label")
    captions = [values.get(name) for name in ("caption", "text")]
    caption = next((c for c in captions if isinstance(c, str)), None)
    integer = isinstance(label, int) and not isinstance(label, bool) and abs(label) < 1 << 63
    return {
        "uid": None if uid is None else _storable(str(uid)),
        "caption": None if caption is None else _storable(caption),
        "label": label if integer else None,
    }


def _storable(text: str) -> str:
    r"""Lone surrogates (JSON escapes, file names) as \udNNN: UTF-8 has no bytes for them."""
    return text.encode("utf-8", "backslashreplace").decode()


# Parquet


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


def _read_parquet(ref: ShardRef, digest: hashlib._Hash) -> Samples:
    (url,) = ref.urls
    if ref.limit is None:
        with storage.local_copy(url, digest) as path:
            yield from _parquet_samples(ref, path)
    else:  # a trial of a few samples should not transfer the whole file
        for sample in _parquet_samples(ref, url):
            digest.update(sample.image)
            yield sample


def _parquet_samples(ref: ShardRef, path: str) -> Samples:
    with _open_parquet(ref.urls[0], path) as file:
        columns = _columns(file.schema_arrow, ref.urls[0])
        batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=columns.names, use_threads=False)
        for number, row in enumerate(r for batch in batches for r in batch.to_pylist()):
            yield _parquet_sample(row, columns, f"{ref.name}-{number:08d}")


def _count_parquet(ref: ShardRef) -> Iterator[int]:
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


# Folder


def split_stem(path: str) -> tuple[str, str]:
    """Key and extension of a file in a folder, parted at the last dot: names there hold dates."""
    folder, slash, base = path.rpartition("/")
    stem, _, extension = base.rpartition(".")
    return folder + slash + stem, extension


def _read_folder(ref: ShardRef, digest: hashlib._Hash) -> Samples:
    label_of = {name: i for i, name in enumerate(ref.labels)}
    for key, urls in _folder_groups(ref):
        group = Group(_storable(key))
        for url in urls:
            with storage.open_read(url) as stream:
                data = stream.read(MAX_SAMPLE_BYTES + 1 - group.size_bytes)
            digest.update(f"{group.key}\0{split_stem(url)[1]}\0{len(data)}\0".encode() + data)
            group.size_bytes += len(data)
            group.members[split_stem(url)[1]] = data
        if group.size_bytes > MAX_SAMPLE_BYTES:
            text = f"the files of {group.key} exceed {MAX_SAMPLE_BYTES} bytes"
            group = Group(group.key, error=SampleError("too_large", text))
        yield _assemble(group, label_of.get(key.partition("/")[0]))


def _folder_groups(ref: ShardRef) -> Iterator[tuple[str, Iterator[str]]]:
    return groupby(ref.urls, lambda url: split_stem(url[len(ref.root) :].lstrip("/"))[0])


_READERS = {"tar": _read_tar, "parquet": _read_parquet, "folder": _read_folder}
_COUNTERS = {"tar": _count_tar, "parquet": _count_parquet, "folder": _folder_groups}
