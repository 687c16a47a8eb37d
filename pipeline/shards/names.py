"""What a shard may be called: its files can be written under that name and read, and are its own.

Looked at while a conversion is planned, so that no work is lost on a name that does not go.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable

from splatshard.pipeline.storage.fs import is_local, local_path
from splatshard.pipeline.storage.staging import staged
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardRef

SHARD_NAME = r"[^_./\\\0-\x1f\x7f][^/\\\0-\x1f\x7f]*"
"""Names with a leading underscore or dot are not shards (`_plan.json`, `_staging`)."""

MAX_BYTES = 160
"""Of a name. A file's may have 255 nearly everywhere; fingerprint, attempt and ending are added,
and host and process while it is written."""


def check_names(refs: Iterable[ShardRef], others: Collection[str], dst: str) -> None:
    """Raises UsageError for a shard that cannot be called as `refs` say, or would share files with
    another of them or with one of `others`, which are in `dst` already."""
    folded = {_folded(name): name for name in others}
    for ref in refs:
        if ref.name not in others and (reason := refused(ref)):
            raise UsageError(reason)
        other = folded.setdefault(_folded(ref.name), ref.name)
        if other != ref.name and is_one_file(dst, ref.name, other):
            raise UsageError(
                f"shards {other} and {ref.name} ({ref.root or ref.urls[0]}) would be one file in "
                f"{dst}, which does not tell their names apart: rename the source of one, or "
                "convert them into two destinations"
            )


def refused(ref: ShardRef) -> str:
    """Why no shard can be called so, and what to do; empty where it can."""
    place = printable(ref.root or ref.urls[0])
    if place != (ref.root or ref.urls[0]):
        return f"{place}: that path is no UTF-8, in which markers are written: rename it"
    if len(ref.name.encode()) > MAX_BYTES:
        return (
            f"{place}: its name has {len(ref.name.encode())} bytes, and that of a shard may have "
            f"{MAX_BYTES}: rename it, or give a link with a shorter name"
        )
    if not is_shard_name(ref.name):
        return (
            f"{place}: shard name {ref.name!r} would clash with splatshard's own files: rename it"
        )
    return ""


def is_shard_name(name: str) -> bool:
    """Whether the files of a shard of that name are told from others."""
    return re.fullmatch(SHARD_NAME, name) is not None and not name.endswith(".failed")


def printable(text: str) -> str:
    """`text` with the bytes that are no UTF-8 as `\\udc80` and the like."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_one_file(dst: str, name: str, other: str) -> bool:
    """Whether files of these names are one in the folder `dst`. Raises StorageError."""
    if not is_local(dst):
        return False
    with staged(local_path(dst), name) as path:
        return os.path.exists(path.with_name(other + path.name.removeprefix(name)))


def _folded(name: str) -> str:
    """The same for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
