"""SRC as text to paths and globs, and what a path says by its name.

`::` joins sources, braces are expanded, list files (.txt) are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from splatshard.pipeline.source.values import text_of
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import UsageError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


SYSTEM_FOLDERS = frozenset(
    (
        "__MACOSX",
        "@eaDir",
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
    )
)
"""Folders that systems make beside those of people, for thumbnails and what was deleted."""


def patterns_of(source: str, in_list: bool = False) -> list[str]:
    """Paths and globs: lists read, braces expanded."""
    if not source:
        raise UsageError("SRC is empty: give a tar, a pattern, a folder or a list file")
    if source.endswith(".txt") and in_list:
        raise UsageError(f"{source}: a list file cannot name another list file")
    if source.endswith(".txt"):
        return _read_list(source)
    if "{" not in source or fs.exists(source):
        return [source]
    return _expand(source)


def _expand(pattern: str) -> list[str]:
    try:
        from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as e:
        raise UsageError(
            f"{pattern}: braces are expanded by braceexpand, which is not installed: pip install "
            "braceexpand, or give a glob (*.tar), a folder or a list file"
        ) from e
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as e:
        raise UsageError(f"{pattern}: unbalanced braces; write {{00000..00009}}.tar") from e


def _read_list(url: str) -> list[str]:
    if not fs.exists(url):
        raise UsageError(f"{url}: no such list file")
    with fs.open_read(url) as stream:
        lines = text_of(stream.read()).splitlines()
    folder = fs.absolute(url).rpartition("/")[0]
    told = (re.split(r"(?:^|\s)#", line)[0] for line in lines)  # `a#1.tar` is a name
    sources = [source.strip() for line in told for source in line.split("::")]
    sources = [s if re.match(r"/|~|\w+://", s) else f"{folder}/{s}" for s in sources if s]
    if not sources:
        raise UsageError(f"{url}: the list names no source; write one per line")
    return [pattern for source in sources for pattern in patterns_of(source, in_list=True)]


def is_archive(path: str) -> bool:
    return path.lower().endswith((".tar", *COMPRESSED))


def refuse_compressed(url: str) -> None:
    if url.endswith(COMPRESSED):
        raise UsageError(f"{url}: compressed archives are not read; unpack it to a .tar first")


def is_glob(pattern: str) -> bool:
    return bool(re.search(r"[*?\[]", path_of(pattern))) and not fs.exists(pattern)


def above(pattern: str) -> str:
    """The folder that a glob begins in: it holds all that the glob can match."""
    folder = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    return folder or ("/" if pattern.startswith("/") else ".")


def folders_of(pattern: str) -> list[str]:
    """Folders that a glob matches, sorted, without hidden ones."""
    found = set[str]()
    fs.glob(pattern.rstrip("/"), found)
    return sorted(folder for folder in found if not is_hidden(folder.rpartition("/")[2]))


PARTITION = re.compile(r"(?<=/)(\w+)=[^/]*(?=/.*\.parquet$)", re.IGNORECASE)
"""A folder as Spark, pandas and Polars name it, of rows with one value in a column."""


def of_partitions(urls: Iterable[str]) -> list[str]:
    """What to say of values that the names of folders hold."""
    named = next(filter(None, map(PARTITION.search, urls)), None)
    said = "stands in the names of folders alone"
    remedy = "which are not read: write it into the Parquet files as a column, too"
    return [f"{named[1]} {said} ({named[0]}), {remedy}"] if named else []


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in path.split("/"))


def path_of(url: str) -> str:
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def kind_of(url: str) -> str:
    """ ".tar", ".parquet" or empty, by its extension in any case."""
    path = path_of(url).lower()
    return next((kind for kind in (".tar", ".parquet") if path.endswith(kind)), "")


def stem_of(url: str) -> str:
    return path_of(url)[: -len(kind_of(url)) or None]
