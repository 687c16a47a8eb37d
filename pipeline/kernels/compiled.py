"""numba's compiler, and a place for what it has compiled.

numba keeps compiled code beside its source or in the home, and refuses to compile where it may
write to neither: in containers with a read-only root, or under a user id without a home. There the
code goes below TMPDIR, into a folder that nobody but this user can write to, since what lies in it
is run. Where there is no such place either, each process compiles for itself.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

NO_PLACE = "no locator available"
"""What numba says then, in all of its versions."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `numba.njit` that lets go of Python's lock and keeps what it compiled."""

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            if NO_PLACE not in str(error):
                raise
        folder = private_folder()
        if folder:
            os.environ["NUMBA_CACHE_DIR"] = str(folder)  # processes that this one starts take it
            numba.config.CACHE_DIR = str(folder)  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
        return numba.njit(cache=folder is not None, nogil=True, **options)(function)

    return compile_later


def private_folder() -> Path | None:
    """A folder below TMPDIR (on Windows the user's own) of this user alone; None where that cannot
    be written, or somebody else was first."""
    user = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / f"splatshard-numba-{'' if user is None else user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        others = user is not None and (found.st_uid != user or found.st_mode & 0o077)
        if others or folder.is_symlink():
            return None
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder
