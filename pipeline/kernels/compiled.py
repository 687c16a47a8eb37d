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

NO_PLACE = "no locator available"
"""What numba says then, in all of its versions."""


KERNELS: list[Any] = []
"""All of those that are imported."""


def inner(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator, of what only kernels call: it is kept within them, and has no entry for Python,
    which takes as long to compile."""
    import numba

    without = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(error_model="numpy", **without, **options)


def compiled() -> Callable[[Callable[..., Any]], Any]:
    """A decorator, of what Python calls: `numba.njit` that lets go of Python's lock and keeps what
    it compiled.

    A kernel is always called with the same types: processes that compile it at the same time may
    each give the number 1 to the first they meet, and load one in place of the other afterwards.
    """
    options = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}

    def compile_later(function: Callable[..., Any]) -> Any:
        kernel = with_cache(function)
        KERNELS.append(kernel)
        return kernel

    def with_cache(function: Callable[..., Any]) -> Any:
        import numba

        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError as error:
            if NO_PLACE not in str(error):
                raise
        folder = private_folder()
        if folder:
            os.environ["NUMBA_CACHE_DIR"] = str(folder)  # processes that this one starts take it
            numba.config.CACHE_DIR = str(folder)  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
        return numba.njit(cache=folder is not None, **options)(function)

    return compile_later


def load_compiler() -> None:
    """Let numba import what it imports when it first compiles, which takes it half a second."""
    import numba

    numba.njit(lambda: None)()


def cache_folder(source: Path) -> Path | None:
    """Where what was compiled of `source` is kept, by numba's rules: NUMBA_CACHE_DIR, else beside
    the source, else `private_folder`."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(named) if named else source.parent / "__pycache__"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return private_folder()
    return folder


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
