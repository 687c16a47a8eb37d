"""The run-level manifest `_manifest.json`: a whole dataset in one file.

    {"manifest_version": 1, "fingerprint": ..., "content": ..., "totals": ..., "schema": ...,
     "provenance": ...,           (all on the first line)
    "recipes":{
    digest: recipe,
    },
    "shards":{
    name: the fields of its done marker, with the recipe's digest in the recipe's place; and
          marker_bytes, the marker's size
    }}

It says what a dataset is and where it comes from, and it is the compacted catalog of all done
markers: who reads it need not read 100,000 small files. It is JSON, and these are its lines: a
shard on each, so that it can be read without holding all of it. Markers stay the truth: this file
may be old, incomplete or deleted at any time, and `pipeline.shards.markers` tells which of its
entries still hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from splatshard.schemas.config import recipe_digest
from splatshard.schemas.document import strict_json
from splatshard.schemas.errors import CorruptShardError, FormatVersionError
from splatshard.schemas.shard import MARKER_FIELDS, ShardManifest, manifest_of
from splatshard.schemas.splats import canonical_json

MANIFEST_FILE = "_manifest.json"
MANIFEST_VERSION = 1


class Entry(NamedTuple):
    """A done marker and its size in bytes."""

    manifest: ShardManifest
    marker_bytes: int


def dataset_fingerprint(manifests: Iterable[ShardManifest]) -> str:
    """SHA-256 (hex) of the sorted fingerprints of all shards, a line each."""
    lines = sorted(f"{manifest.fingerprint}\n" for manifest in manifests)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def dataset_content(manifests: Iterable[ShardManifest]) -> str:
    """SHA-256 (hex) of the sorted names, data files and their digests of all shards, a line
    each."""
    lines = sorted(f"{m.name} {m.data_file} {m.sha256}\n" for m in manifests)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest_lines(head: Mapping[str, Any], entries: Mapping[str, Entry]) -> Iterator[str]:
    """The file's text, piece by piece; `head` is what stands before recipes and shards."""
    recipes: dict[int, dict[str, Any]] = {}
    for entry in entries.values():
        recipe: dict[str, Any] = entry.manifest.inputs["recipe"]
        recipes[id(recipe)] = recipe
    digests = {number: recipe_digest(recipe) for number, recipe in recipes.items()}
    texts = {digests[number]: canonical_json(recipe) for number, recipe in recipes.items()}
    first = json.dumps({"manifest_version": MANIFEST_VERSION, **head}, allow_nan=False)
    yield f'{first[:-1]},\n"recipes":{{\n'
    yield ",\n".join(f'"{digest}":{text}' for digest, text in sorted(texts.items()))
    yield '\n},\n"shards":{\n'
    separator = ""
    for name in sorted(entries):
        manifest, marker_bytes = entries[name]
        values = {field: getattr(manifest, field) for field in MARKER_FIELDS if field != "name"}
        values["inputs"] = manifest.inputs | {"recipe": digests[id(manifest.inputs["recipe"])]}
        values["marker_bytes"] = marker_bytes
        yield f"{separator}{canonical_json(name)}:{canonical_json(values)}"
        separator = ",\n"
    yield "\n}}\n"


def read_head(line: bytes) -> dict[str, Any]:
    """What a manifest says before its recipes and shards, from its first line; empty for damage."""
    try:
        return _parse(line.rstrip(b",") + b"}")
    except (ValueError, RecursionError):
        return {}


def read_entries(lines: Iterable[bytes], name: str) -> dict[str, Entry]:
    """The shards in a manifest; `name` (a path or URL) goes into error messages.

    Line by line: its whole text, and all of it as parsed JSON, would be more than the shards.
    Raises FormatVersionError for a newer version and CorruptShardError for anything malformed.
    """
    try:
        return dict(_entries(iter(lines), name))
    except FormatVersionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"{type(e).__name__}: {e}"
    except CorruptShardError as e:
        reason = str(e)
    raise CorruptShardError(
        f"{name} cannot be read ({reason}); delete it, the markers hold the same and the next "
        "convert writes it anew"
    )


def _entries(lines: Iterator[bytes], name: str) -> Iterator[tuple[str, Entry]]:
    head = _parse(next(lines, b"").rstrip(b",") + b"}")
    version: int = head["manifest_version"]
    if version > MANIFEST_VERSION:
        raise FormatVersionError(
            f"{name} has manifest version {version}, this build reads up to {MANIFEST_VERSION}: "
            "upgrade splatshard"
        )
    recipes = dict(_section(lines, b'"recipes":{', b"},"))
    for shard, values in _section(lines, b'"shards":{', b"}}"):
        marker_bytes = values.pop("marker_bytes")
        if type(marker_bytes) is not int:
            raise TypeError(f"marker_bytes of {shard} is {marker_bytes!r}")
        values["inputs"]["recipe"] = recipes[values["inputs"]["recipe"]]
        values["name"] = shard
        yield shard, Entry(manifest_of(values, f"of {shard}"), marker_bytes)


def _section(lines: Iterator[bytes], first: bytes, last: bytes) -> Iterator[tuple[str, Any]]:
    """The members of the object between the lines `first` and `last`, one on each line."""
    if next(lines, b"") != first:
        raise ValueError(f"{first.decode()} is not where it should be")
    for line in lines:
        if line == last:
            return
        yield from _parse(b"{" + line.removesuffix(b",") + b"}").items()
    raise ValueError("its end is missing")


def _parse(text: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", strict_json(text))
