"""Files that are being written, on a local disk:

    {folder}/_staging/{name}@{host}-{space}-{pid}-{random}

Nobody else looks at them. The name tells whose they are, so that what a killed process left can be
deleted by the next one on that host. `space` stands for the boot and the PID namespace in which
`pid` means that process: hosts of one name and containers share folders, too. What processes
elsewhere left, or this host before it was started anew, goes when nobody has written to it for
IDLE_S.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splatshard.pipeline.storage.errors import storage_errors

STAGING = "_staging"

IDLE_S = 7 * 24 * 3600.0
"""After so long a file is nobody's; the slowest shard takes hours."""


@contextmanager
def staged(folder: Path, name: str) -> Iterator[Path]:
    """A new empty file in `folder`'s staging folder, deleted at the end unless it was moved away.

    Raises StorageError when it cannot be created.
    """
    unique = f"{name}@{_space()}-{os.getpid()}-{secrets.token_hex(4)}"
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


def _space() -> str:
    """Where a process id of this process means the same process. A host's name holds no `@`."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not on Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return f"{parts[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _create(path: Path) -> None:
    """An empty new file, and its folder, which another process may be deleting meanwhile."""
    for _ in range(100):
        with suppress(FileExistsError):  # mkdir met the folder, then found it gone
            path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("xb").close()
    raise FileNotFoundError(errno.ENOENT, "the folder vanishes again and again", str(path.parent))


def sweep(folder: Path) -> None:
    """Delete what dead processes of this host left in `folder`'s staging folder, and what has been
    idle for IDLE_S. A process id that was given to a new process keeps its leftovers until a later
    call. Raises OSErrors."""
    staging, ours = folder / STAGING, _space()
    files: list[str] = []
    with suppress(FileNotFoundError):  # another process may delete it at any time
        files = sorted(os.listdir(staging))
    for file in files:
        pid = _pid_of(file, ours)
        if pid is not None:
            dead = not _is_alive(pid)
        else:
            dead = not file.endswith(".lock") and _is_idle(staging / file)
        if dead:
            (staging / file).unlink(missing_ok=True)
    with suppress(OSError):  # others are still using it
        staging.rmdir()


def is_from_here(name: str) -> bool:
    """Whether the staged file `name` is of a process of which `sweep` knows if it lives."""
    return _pid_of(name, _space()) is not None


def _pid_of(name: str, space: str) -> int | None:
    found, _, pid = name.rpartition("@")[2].rpartition("-")[0].rpartition("-")
    return int(pid) if found == space and pid.isdecimal() else None


def scratch() -> Path:
    """A folder for `staged` files on a local disk (below TMPDIR), swept of dead processes'."""
    folder = Path(tempfile.gettempdir()) / f"splatshard-{os.getuid()}"
    with storage_errors(folder):
        sweep(folder)
    return folder


def _is_idle(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return path.is_file() and time.time() - path.stat().st_mtime > IDLE_S
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
