"""`README.md` of DST: the card, headed as Hugging Face's hub and `datasets` read it.

    load_dataset("splats/")          the shards of a folder, or of a repository they were pushed to

Without it `datasets` takes markers for data. The head names the data files, and where all shards
have the same columns their types; labels are numbers of classes where class folders or a ClassLabel
number them.
Whoever changes the file owns it (pipeline/storage/signed.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from splatshard.pipeline.source.classes import numbered_by
from splatshard.pipeline.storage.signed import write_unless_changed
from splatshard.schemas.shard import ShardManifest
from splatshard.schemas.splats import (
    EXTENSIONS,
    columns,
    metadata_of,
    payload_columns,
    scalars,
    splat_suffix,
)

README_FILE = "README.md"
TAGS = ("gaussian-splatting", "2d-gaussians", "splatshard")
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12)
NAMES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""Of the hub's size categories."""

NAMES_OF_KINDS = {"float": "float32", "extension<arrow.json>": "json"}
"""Arrow's name for a type: the name in YAML, where that is another one."""


def write_readme(dst: str, card: str, manifests: Sequence[ShardManifest]) -> None:
    """Write the file anew, unless somebody has changed it. Raises StorageError and others."""
    write_unless_changed(f"{dst}/{README_FILE}", head(dst, manifests) + card)


def head(dst: str, manifests: Sequence[ShardManifest]) -> str:
    """The YAML; quoted texts are JSON's, which is YAML."""
    recipes = {id(m.inputs["recipe"]): m.inputs["recipe"] for m in manifests}.values()
    formats = sorted({recipe["pack"]["format"] for recipe in recipes})
    lines = [
        "---",
        "# license: that of the images, as the hub names it (cc-by-4.0, other, ...)",
        f"pretty_name: {_quoted(dst.rpartition('/')[2])}",
        f"tags: [{', '.join(TAGS)}]",
        f"size_categories: [{_quoted(size_category(sum(m.samples for m in manifests)))}]",
        "configs:",
    ]
    for format in formats:
        name = "default" if len(formats) == 1 else format
        lines += [f"- config_name: {name}", f'  data_files: "*.{EXTENSIONS[format]}"']
    kinds = {columns(metadata): metadata for metadata in map(metadata_of, recipes)}
    if len(formats) == len(kinds) == 1:
        ((schema, metadata),) = kinds.items()
        described = schema if formats == ["parquet"] else tar_schema(metadata)
        lines += ["dataset_info:", "  features:"]
        lines += [f"  {line}" for line in features(described, classes_of(dst, manifests))]
    return "\n".join([*lines, "---", "", ""])


def size_category(samples: int) -> str:
    """As the hub has it, `10K<n<100K`."""
    place = next((i for i, most in enumerate(SIZES) if samples < most), len(SIZES))
    if place == 0:
        return f"n<{NAMES[0]}"
    return f"n>{NAMES[-1]}" if place == len(SIZES) else f"{NAMES[place - 1]}<n<{NAMES[place]}"


def classes_of(dst: str, manifests: Sequence[ShardManifest]) -> tuple[str, ...]:
    """The classes that number the labels of all shards; none where another list, or none, does, or
    a name is there twice, which `datasets` refuses."""
    lists = {(m.inputs["source"] or {}).get("labels") for m in manifests}
    digest = lists.pop() if len(lists) == 1 else None
    names = numbered_by(dst, digest) if digest else ()
    return names if len({*names}) == len(names) else ()


def tar_schema(metadata: dict[str, Any]) -> pa.Schema:
    """The members of a tar's samples, as `datasets` decodes them: left to itself it takes those of
    the first five, and refuses the tar where one is skipped or has no caption."""
    schema = columns(metadata)
    small = [schema.field(name) for name in scalars(metadata)]
    row = pa.struct([*small, pa.field("members", pa.list_(pa.string()))])
    payloads = [(splat_suffix(name), pa.binary()) for name in payload_columns(metadata)]
    texts = [("txt", pa.string()), ("cls", pa.int64()), ("json", pa.json_())]
    place = [("__key__", pa.string()), ("__url__", pa.string())]
    return pa.schema([("splat.json", row), *payloads, *texts, *place])


def features(schema: pa.Schema, classes: Sequence[str]) -> Iterator[str]:
    """The columns, in YAML as `datasets` writes its Features."""
    for field in schema:
        yield f"- name: {field.name}"
        if field.name in ("label", "cls") and classes:
            yield from ("  dtype:", "    class_label:", "      names:")
            yield from (f"        '{i}': {_quoted(name)}" for i, name in enumerate(classes))
        else:
            yield from (f"  {line}" for line in _kind(field.type))


def _kind(kind: pa.DataType) -> Iterator[str]:
    if pa.types.is_list(kind) and not pa.types.is_struct(kind.value_type):
        yield f"list: {kind.value_type}"
    elif pa.types.is_list(kind):
        yield "list:"
        yield from _fields(kind.value_type)
    elif pa.types.is_struct(kind):
        yield "struct:"
        yield from _fields(kind)
    else:
        yield f"dtype: {NAMES_OF_KINDS.get(str(kind), kind)}"


def _fields(struct: Any) -> Iterator[str]:
    for i in range(struct.num_fields):
        field = struct.field(i)
        yield f"- name: {field.name}"
        yield from (f"  {line}" for line in _kind(field.type))


def _quoted(text: str) -> str:
    return json.dumps(text)
