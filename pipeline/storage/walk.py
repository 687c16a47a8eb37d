"""Files below a local folder: links are followed, and what cannot be read is an error.

`os.walk` and fsspec take what cannot be listed for empty, and pass links over: whole classes of a
dataset would be missing without a word.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from stat import S_ISDIR, S_ISREG

from splatshard.pipeline.storage.errors import source_errors
from splatshard.schemas.errors import SourceError


def walk(
    folder: str,
    wanted: Callable[[str], bool],
    depth: int | None = None,
    within: tuple[tuple[int, int], ...] = (),
) -> Iterator[tuple[str, os.stat_result]]:
    """The `wanted` files (by path) in `folder` and, where `depth` is not 1, in its wanted folders.

    None where there is no such folder. A link to a folder that it lies `within` is not followed.
    Raises SourceError for a folder that cannot be listed or a link that leads nowhere, and
    UnavailableError.
    """
    with source_errors(folder), suppress(FileNotFoundError):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in within:
            return
        within = (*within, (here.st_dev, here.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                info = _followed(entry) if wanted(entry.path) else None
                if info and S_ISREG(info.st_mode):
                    yield entry.path, info
                elif info and S_ISDIR(info.st_mode) and depth != 1:
                    yield from walk(entry.path, wanted, depth and depth - 1, within)


def _followed(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What is there, or where the link leads; None for what was deleted just now."""
    try:
        return entry.stat()
    except OSError as e:
        if entry.is_symlink():
            raise SourceError(
                f"cannot follow the link {entry.path}: {e.strerror}; fetch what is missing, or "
                "delete the link"
            ) from e
        if isinstance(e, FileNotFoundError):
            return None
        raise
