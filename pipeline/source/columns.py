"""Which column of a Parquet file is what, and what a row says in them.

    image     struct<bytes, path>, or bytes under an image's name; where it is null, the next such
              column (`jpg`, `png`: WebDataset with images of several formats)
    key       `__key__`; or `key`, but where its values repeat it is none, and rows are numbered
    uid       `uid`, `json.uid`
    caption   `caption`, `text`, `txt`, `captions`, `json.caption`, `json.text`
    label     `label`, `cls`, `class`, those that Hugging Face declares as ClassLabel, `json.label`

Names are taken in any case (`TEXT`). Of several columns for a field one of the usual type (text,
integer, or a dictionary of these) is taken. Where there is none, a row takes the first whose value
will do (values.py), in whatever type it is: float, boolean, bytes, list. `json` is a struct, or the
text of one, as tars of WebDataset become columns. The other columns of a field are told, and those
that become members.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from textwrap import shorten
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from splatshard.pipeline.source.sample import (
    FEW,
    JSON,
    MEANT,
    NAMES,
    NEITHER,
    NO_FIELD,
    REPLACED,
    SPLATS,
    TAKES,
    by_name,
    inner,
    may_be,
    may_take,
    not_taken,
    of_class,
    spelled,
    unused_in,
)
from splatshard.pipeline.source.values import (
    caption_of,
    gives_back,
    is_null,
    not_utf8,
    says_nothing,
)
from splatshard.schemas.errors import SourceError
from splatshard.schemas.splats import METADATA_KEY

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
"""Names of a Parquet file's image column, by preference."""

FIELDS = {
    "uid": ("uid",),
    "caption": ("caption", "text", "txt", "captions"),
    "label": ("label", "cls", "class"),
}

DOCUMENTS = ("metadata", "meta", "info", "annotation", "annotations")
"""Columns whose text may be JSON."""

Path = tuple[str, ...]
"""A column, or a field of the column `json`."""

Notes = tuple[tuple[str, str], ...]
"""Columns that are not used, and why."""


@dataclass(frozen=True)
class Columns:
    """Which column of a Parquet file is what."""

    image: str
    images: tuple[str, ...]  # it, and others under an image's name, by preference
    key: str | None
    fields: dict[str, tuple[Path, ...]]  # by preference
    binary: tuple[str, ...]  # whose bytes become members, unless a field gives them back
    other: tuple[str, ...]  # the rest, for the metadata JSON
    types: str  # of all, for messages
    note: Notes = ()
    meant: tuple[tuple[str, str], ...] = ()  # others, and the field that they may be

    @cached_property
    def own(self) -> list[str]:
        """The columns of key and fields."""
        paths = (path for paths in self.fields.values() for path in paths)
        return list(dict.fromkeys(([self.key] if self.key else []) + [path[0] for path in paths]))


@dataclass(frozen=True)
class Fields:
    """What a row says of its sample; `given` are the columns that these give back."""

    key: str
    uid: str | None
    caption: str | None
    label: int | None
    given: frozenset[str]
    unused: Notes


def image_columns(schema: pa.Schema) -> tuple[str, ...]:
    """The columns of Hugging Face's struct<bytes, path>, or of bytes, with an image's name; where
    there are none, the first of the former."""
    structs = unnamed_images(schema)
    binaries = [f.name for f in schema if is_binary(f.type)]
    return tuple(spelled(IMAGE_COLUMNS, structs + binaries) or structs[:1])


def unnamed_images(schema: pa.Schema) -> list[str]:
    """The columns of Hugging Face's struct<bytes, path>, which sounds are as well: those that it
    declares as images, if there are any."""
    structs = [f.name for f in schema if is_image_struct(f.type)]
    declared = _declared(schema, "Image")
    return [name for name in structs if name in declared] or structs


def no_image_column(schema: pa.Schema) -> str:
    """What to say of a file where `image_columns` finds none."""
    if METADATA_KEY in (schema.metadata or {}):
        return SPLATS
    return (
        f"has no image column, only {types_of(schema)}; expected is one of type struct<bytes, "
        f"path>, or a binary one named {', '.join(IMAGE_COLUMNS)}: rename the one that is meant to "
        "image. Images that are only named, by a URL or path, are not fetched (is it img2dataset's "
        "metadata?)"
    )


def types_of(schema: pa.Schema) -> str:
    """`image (binary), text (string)`, of the first columns."""
    some = [f"{f.name} ({shorten(str(f.type), 60, placeholder=' ...>')})" for f in schema][:20]
    return ", ".join(some) + ", ..." * (len(schema) > len(some))


def columns_of(file: pq.ParquetFile, url: str) -> Columns:
    """Raises SourceError for a file without images, or with two columns of one name."""
    schema = file.schema_arrow
    images = image_columns(schema)
    if not images:
        raise SourceError(f"{url} {no_image_column(schema)}")
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise SourceError(f"{url} has several columns named {', '.join(twice)}; rename them")
    keys = spelled(("__key__", "key"), schema.names)
    key = keys[0] if keys else None
    notes = dict(_others(schema, images))
    if key and key != "__key__" and _repeats(file, key):
        notes[key] = "its values repeat, so rows are numbered"
        key = None
    notes |= {name: f"the key is taken from {key}" for name in keys[1:] if key}
    fields = {field: tuple(_paths(field, schema, images[0])) for field in FIELDS}
    fields_left = [f for f in schema if f.name != images[0]]
    binary = [f.name for f in fields_left if _holds_bytes(f)]
    other = [f.name for f in fields_left if f.name not in binary]
    own = {key, *images, *(path[0] for paths in fields.values() for path in paths)}
    lacking = _lacking(file, key, fields)
    meant = dict(_may_be_meant(file, {*own, *notes}, lacking))
    if lacking - set(meant.values()) >= {"caption", "label"} and "json" not in other:
        rest = (n for n in other if n not in (*own, *notes, *meant) and n[:2] != "__")
        notes |= dict.fromkeys(islice(rest, FEW), NEITHER)
    notes = {n: NO_FIELD for n in binary if n not in own and n not in meant} | notes
    return Columns(
        image=images[0],
        images=images,
        key=key,
        fields=fields,
        binary=tuple(binary),
        other=tuple(other),
        types=types_of(schema),
        note=tuple(notes.items()),
        meant=tuple(meant.items()),
    )


def _others(schema: pa.Schema, images: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Columns that might have been meant, beside those taken, and which these are."""
    if not spelled(IMAGE_COLUMNS, images):
        for name in unnamed_images(schema)[1:]:
            yield name, f"the image is taken from {images[0]}; call the one that is meant image"
    for field in FIELDS:
        named = _named(field, schema, images[0])
        certain = _certain(field, named, schema)
        for name in (n for n in named if certain and n != certain[0]):
            why = f"the {field} is taken from {certain[0]}"
            usual = name in certain
            yield (
                name,
                f"{why}; call the one that is meant {field}" if usual else f"{why}, by its type",
            )


def _may_be_meant(
    file: pq.ParquetFile, own: set[str | None], lacking: set[str]
) -> Iterator[tuple[str, str]]:
    """Columns and what is within them, beside the `own`, that may be one of the `lacking` fields by
    their names, and which."""
    for column in file.schema_arrow:
        for path, kind in _within(column.name, column.type) if column.name != "json" else ():
            for field in lacking - ({"key"} if path != column.name else set()):
                if path not in own and _may_mean(field, path) and _suits(field, kind):
                    yield path, field
        for path, value in _first_document(file, column) if lacking else ():
            for field in lacking - {"key"}:
                if _may_mean(field, path) and may_take(field, value):
                    yield path, field


def _may_mean(field: str, path: str) -> bool:
    name = path.rpartition(".")[2]
    return may_be(field, name) or name.lower() in FIELDS.get(field, ())


def _first_document(file: pq.ParquetFile, column: pa.Field) -> Iterator[tuple[str, Any]]:
    """Paths and values of a column of JSON in its first row."""
    if column.name.lower() in DOCUMENTS and _is_text(column.type):
        rows = next(file.iter_batches(1, columns=[column.name], use_threads=False), None)
        document, _ = _document(rows.column(0)[0].as_py() if rows else None)
        yield from ((f"{column.name}.{path}", value) for path, _, value in inner(document))


def _lacking(
    file: pq.ParquetFile, key: str | None, fields: dict[str, tuple[Path, ...]]
) -> set[str]:
    """Those of key, caption and label for which there is no column, or an empty one. A uid is a key
    enough."""
    named = {field: {path[0] for path in paths} - {"json"} for field, paths in fields.items()}
    lacking = {f for f, names in named.items() if all(_is_empty(file, name) for name in names)}
    return (lacking - {"uid"}) | ({"key"} if key is None and "uid" in lacking else set())


def _is_empty(file: pq.ParquetFile, name: str) -> bool:
    """Whether all values of a column are null or texts of nothing or blanks, which are read where
    the file's statistics do not tell."""
    if pa.types.is_null(file.schema_arrow.field(name).type):
        return True
    places = (i for i in range(len(file.schema)) if file.schema.column(i).path == name)
    if (place := next(places, None)) is None:
        return False
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    last = {_last(group.column(place)) for group in groups}
    if last <= {""} or not all(text is not None and says_nothing(text) for text in last):
        return last <= {""}
    texts = file.read([name], use_threads=False).column(0).unique().to_pylist()
    return all(says_nothing(caption_of(text)) for text in texts)


def _last(part: pq.ColumnChunkMetaData) -> str | None:
    """The last by order of its texts, empty where all are null; None for what is not known."""
    said = part.statistics
    if said is None or said.null_count == part.num_values:
        return None if said is None else ""
    known = said.has_min_max and isinstance(said.max_raw, bytes)
    return said.max_raw.decode(errors="replace") if known else None


def _suits(field: str, kind: pa.DataType) -> bool:
    """Whether the field may be made of values of this type."""
    if field == "caption" and (pa.types.is_struct(kind) or pa.types.is_map(kind)):
        return True  # of a conversation, say
    if field == "label" and (pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return True
    if field == "label" and pa.types.is_struct(kind):  # a class as an object
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return any(of_class(f.name) and _suits(field, f.type) for f in fields)
    if field == "key" and is_binary(kind):
        return True
    return _is_usual("caption", kind) or (field != "caption" and _is_usual("label", kind))


def _within(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """A column and the fields within it, by path, with their types; of lists what they hold."""
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    while any(test(kind) for test in lists):
        kind = kind.value_type
    yield path, kind
    if pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            yield from _within(f"{path}.{kind.field(i).name}", kind.field(i).type)


def _holds_bytes(column: pa.Field) -> bool:
    return any(is_binary(kind) for _, kind in _within(column.name, column.type))


def _repeats(file: pq.ParquetFile, name: str) -> bool:
    column = file.read([name], use_threads=False).column(0)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.cast(column.type.storage_type)
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if not any(test(column.type) for test in (_is_text, is_binary, *numbers)):
        return False  # no value of it is a key
    distinct = len(column.drop_null().unique())
    return distinct < len(column) - column.null_count


def _named(field: str, schema: pa.Schema, image: str) -> list[str]:
    """The columns that may be a field, by preference."""
    declared = _declared(schema, "ClassLabel") if field == "label" else ()
    named = dict.fromkeys((*spelled(FIELDS[field], schema.names), *declared))
    return [name for name in named if name in schema.names and name != image]


def _certain(field: str, names: list[str], schema: pa.Schema) -> list[str]:
    """Those of the usual type."""
    return [name for name in names if _is_usual(field, schema.field(name).type)]


def _is_usual(field: str, kind: pa.DataType) -> bool:
    usual = pa.types.is_integer if field == "label" else _is_text
    return usual(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _paths(field: str, schema: pa.Schema, image: str) -> Iterator[Path]:
    """Where a field may be: a column of the usual type alone, else all of its names."""
    names = _named(field, schema, image)
    if certain := _certain(field, names, schema):
        yield (certain[0],)
        return
    yield from ((name,) for name in names)
    if "json" in schema.names and image != "json":
        yield from (("json", name) for name in NAMES[field])


def class_names(schema: pa.Schema, image: str) -> tuple[str, ...]:
    """What Hugging Face's schema metadata calls the classes of the label column, by number."""
    named = _named("label", schema, image)
    column = next(iter(_certain("label", named, schema) or named), "")
    names = _declared(schema, "ClassLabel").get(column, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _declared(schema: pa.Schema, kind: str) -> dict[str, dict[str, Any]]:
    """Columns that Hugging Face's schema metadata declares as `kind`: Image, ClassLabel."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"].items()
        return {name: f for name, f in features if f.get("_type") == kind}
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}  # somebody else's metadata


def fields_of(row: dict[str, Any], columns: Columns, default_key: str) -> Fields:
    """The fields of a row, by its values."""
    taken: dict[str, Any] = {}
    given, unused = set[str](), list(columns.note)
    if "json" in row:
        document, why = _document(row["json"])
        row = row | {"json": by_name(document)}
        unused += [("json", why)] if why else []
    paths_of: dict[str, tuple[Path, ...]] = {"key": ((columns.key,),) if columns.key else ()}
    for field, paths in (paths_of | columns.fields).items():
        values = [(path, _at(row, path)) for path in paths]
        found = [(path, value, TAKES[field][0](value)) for path, value in values]
        known = [f for f in found if f[2] is not None] or [((), None, None)]
        path, value, taken[field] = next((f for f in known if not says_nothing(f[2])), known[0])
        if taken[field] is None:
            refused = [(".".join(p), v) for p, v in values if not is_null(v)]
            unused += [(name, not_taken(field, value)) for name, value in refused]
        elif len(path) == 1 and gives_back(taken[field], value):
            given.add(path[0])
        if field == "caption" and not_utf8(value):
            unused.append((f"what is not UTF-8 in {'.'.join(path)}", REPLACED))
    unused += _meant(row.get("json"), columns, taken)
    key = taken.pop("key")
    key = default_key if key is None else key
    return Fields(key=key, given=frozenset(given), unused=tuple(dict(unused).items()), **taken)


def _document(value: Any) -> tuple[Any, str]:
    """What the column `json` holds, as text or as a struct, or why its text is none."""
    if not isinstance(value, str | bytes) or not value:
        return value, ""
    try:
        return json.loads(value), ""
    except (ValueError, RecursionError) as e:
        return None, f"it cannot be parsed: {e}"


def _at(row: dict[str, Any], path: Path) -> Any:
    value = row.get(path[0])
    if len(path) == 1:
        return value
    return value.get(path[1]) if isinstance(value, dict) else None


def _meant(document: Any, columns: Columns, taken: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What may be a field that the row lacks."""
    for name, why in unused_in(document, taken):
        yield (name if name == JSON else f"json.{name}"), why
    for name, field in columns.meant:
        if says_nothing(taken[field]) and (field != "key" or taken["uid"] is None):
            yield name, MEANT[field]


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return is_binary(kind.value_type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in (*tests, pa.types.is_fixed_size_binary))


def is_image_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return is_binary(kind.field("bytes").type)
