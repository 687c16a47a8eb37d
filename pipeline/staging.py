"""Files that are being written, on a local disk: `{folder}/_staging/{name}-{host}-{pid}-{random}`.

Nobody else looks at them. The name tells whose they are, so that what a killed process left can be
deleted by the next one on that host.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.store_errors import storage_errors

STAGING = "_staging"


@contextmanager
def staged(folder: Path, name: str) -> Iterator[Path]:
    """A new empty file in `folder`'s staging folder, deleted at the end unless it was moved away.

    Raises StorageError when it cannot be created.
    """
    unique = f"{name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    path = folder / STAGING / unique
    try:
        with storage_errors(path):
            _create(path)
        yield path
    finally:
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):  # others are still using it
            path.parent.rmdir()


def _create(path: Path) -> None:
    """An empty new file, and its folder, which another process may be deleting meanwhile."""
    for _ in range(100):
        with suppress(FileExistsError):  # mkdir met the folder, then found it gone
            path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("xb").close()
    raise FileNotFoundError(errno.ENOENT, "the folder vanishes again and again", str(path.parent))


def sweep(folder: Path) -> None:
    """Delete what dead processes of this host left in `folder`'s staging folder. A process id that
    was given to a new process keeps its leftovers until a later call. Raises OSErrors."""
    staging, suffix = folder / STAGING, f"-{socket.gethostname()}"
    files: list[str] = []
    with suppress(FileNotFoundError):  # another process may delete it at any time
        files = sorted(os.listdir(staging))
    for file in files:
        name, _, pid = file.rpartition("-")[0].rpartition("-")
        if name.endswith(suffix) and pid.isdecimal() and not _is_alive(int(pid)):
            (staging / file).unlink(missing_ok=True)
    with suppress(OSError):  # others are still using it
        staging.rmdir()


def scratch() -> Path:
    """A folder for `staged` files on a local disk (below TMPDIR), swept of dead processes'."""
    folder = Path(tempfile.gettempdir()) / f"splatshard-{os.getuid()}"
    with storage_errors(folder):
        sweep(folder)
    return folder


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
