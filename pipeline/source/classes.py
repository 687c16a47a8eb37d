"""By which lists of classes the labels of SRC are numbered, and where one number may mean several:
class folders, the ClassLabels of Parquet files, and numbers that stand beside images (a `.cls`, the
JSON, a column) without any list."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from splatshard.pipeline.source.folder import few
from splatshard.pipeline.source.read import scan
from splatshard.pipeline.storage import fs
from splatshard.schemas.config import class_list
from splatshard.schemas.errors import SourceError
from splatshard.schemas.shard import ShardRef

CLASSNAMES = "classnames.txt"
"""A name per line, in the order of the labels; beside shards, or images in CLIP_benchmark's
layout."""
LOOKED_AT = 16
"""So many shards are looked into for labels, and so many samples of each."""


def notes_on_classes(refs: Sequence[ShardRef]) -> list[str]:
    """What to say of the lists that number the labels of shards."""
    lists: dict[tuple[str, ...], str] = {}
    for ref in refs:
        if ref.labels:
            lists.setdefault(ref.labels, ref.root or ref.urls[0])
    if len(lists) > 1:
        (a, first), (b, second), *_ = lists.items()
        return [
            f"the labels of {first} ({few(a, 3)}) and {second} ({few(b, 3)}) are numbered by "
            "different lists of classes, so that one number means several: convert them into "
            "several DST, or cast ClassLabels to one (cast_column of Hugging Face's datasets)"
        ]
    notes = [
        f"{len(names):,} class{'es' * (len(names) != 1)} by ClassLabel: {few(names)}"
        for names in dict.fromkeys(ref.labels for ref in refs if ref.kind == "parquet")
        if names
    ]
    if lists and (other := _labelled([ref for ref in refs if not ref.labels])):
        ((names, place),) = lists.items()
        notes.append(
            f"the labels of {place} are numbered by its classes ({few(names, 3)}), and {other} has "
            "numbers of its own, so that one number may mean several classes: convert them into "
            "several DST, or see to it that both count alike"
        )
    return notes


def _labelled(refs: Sequence[ShardRef]) -> str:
    """The first file with a label of some of the shards, spread over all; empty where none has."""
    for ref in refs[:: -(-len(refs) // LOOKED_AT) or 1]:
        try:
            found = [sample.label for sample in islice(scan(ref), LOOKED_AT)]
        except SourceError:  # it will fail later
            continue
        if any(label is not None and label >= 0 for label in found):
            return ref.urls[0]
    return ""


def numbered_by(folder: str, digest: str) -> tuple[str, ...]:
    """The names of CLASSNAMES in `folder`, if they are those by which labels are numbered
    (`class_list`); empty where they are others, or there are none. Raises UnavailableError."""
    url = f"{folder.rstrip('/')}/{CLASSNAMES}"
    try:
        if not fs.exists(url):
            return ()
        names = tuple(fs.read_bytes(url).decode("utf-8", "replace").splitlines())
    except SourceError:
        return ()
    return names if class_list(names) == digest else ()
