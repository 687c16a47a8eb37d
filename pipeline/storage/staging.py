"""Files that are being written, on a local disk:

    {folder}/_staging/{name}@{host}-{space}-{pid}-{random}

Nobody else looks at them. The name tells whose they are, so that what a killed process left can be
deleted by the next one on that host. `space` stands for the boot and the PID namespace in which
`pid` means that process: hosts of one name and containers share folders, too. What processes
elsewhere left, or this host before it was started anew, goes when nobody has written to it for
IDLE_S.

A folder below TMPDIR (`scratch`) is this user's alone, and a staging folder is never entered by a
link: whoever makes either first, in a place that all can write to, could otherwise replace what is
being staged, or have files deleted elsewhere. TMPDIR itself must be one in which others cannot
rename what is ours, as /tmp is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splatshard.pipeline.storage.errors import storage_errors
from splatshard.schemas.errors import StorageError

STAGING = "_staging"

ON_WINDOWS = not hasattr(os, "geteuid")
"""Where folders are not opened, and TMPDIR is the user's own."""

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
        with suppress(FileNotFoundError), opened(path.parent) as (here, number):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            return os.close(os.open(here + path.name, flags, 0o666, dir_fd=number))
    raise FileNotFoundError(errno.ENOENT, "the folder vanishes again and again", str(path.parent))


def sweep(folder: Path) -> None:
    """Delete what dead processes of this host left in `folder`'s staging folder, and what has been
    idle for IDLE_S. A process id that was given to a new process keeps its leftovers until a later
    call. Raises OSErrors."""
    staging, ours = folder / STAGING, _space()
    with suppress(FileNotFoundError), opened(staging) as (here, number):
        for file in sorted(os.listdir(staging if number is None else number)):
            pid = _pid_of(file, ours)
            if pid is not None:
                dead = not _is_alive(pid)
            else:
                dead = not file.endswith(".lock") and _is_idle(here + file, number)
            if dead:
                with suppress(FileNotFoundError):  # another process may delete it at any time
                    os.unlink(here + file, dir_fd=number)
    with suppress(OSError):  # not there, or others are still using it
        staging.rmdir()


@contextmanager
def opened(folder: Path) -> Iterator[tuple[str, int | None]]:
    """`folder` itself: what goes before the names of files in it, and the `dir_fd` for them.

    Raises StorageError where it is a link or no folder, and OSErrors.
    """
    if ON_WINDOWS:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise _not_ours(folder)
        yield f"{folder}{os.sep}", None
        return
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except NotADirectoryError as e:
        raise _not_ours(folder) from e
    try:
        yield "", number
    finally:
        os.close(number)


def _not_ours(folder: Path) -> StorageError:
    return StorageError(
        f"{folder} is a link, or no folder, and not of splatshard's making: delete it"
    )


def is_from_here(name: str) -> bool:
    """Whether the staged file `name` is of a process of which `sweep` knows if it lives."""
    return _pid_of(name, _space()) is not None


def _pid_of(name: str, space: str) -> int | None:
    """The process here whose file it is. On Windows nobody can ask whether one lives: os.kill ends
    it."""
    if ON_WINDOWS:
        return None
    found, _, pid = name.rpartition("@")[2].rpartition("-")[0].rpartition("-")
    return int(pid) if found == space and pid.isdecimal() else None


def scratch() -> Path:
    """A folder for `staged` files on a local disk (below TMPDIR), swept of dead processes'.

    Raises StorageError where it cannot be made, or others could write to it.
    """
    user = "" if ON_WINDOWS else f"-{os.geteuid()}"
    folder = temporary() / f"splatshard{user}"
    make_private(folder)
    with storage_errors(folder):
        sweep(folder)
    return folder


def temporary() -> Path:
    """TMPDIR, or what stands for it. Raises StorageError where there is none."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as e:
        raise StorageError(
            f"no folder for temporary files can be written ({e.strerror}): set TMPDIR to one"
        ) from e


def make_private(folder: Path) -> None:
    """See to it that `folder` is there and this user's alone, as on Windows all below TMPDIR is.
    Raises StorageError otherwise."""
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        with opened(folder) as (_, number):
            if number is None:
                return
            info = os.fstat(number)
            if info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise StorageError(
                    f"{folder} is not this user's alone (owner {info.st_uid}, mode "
                    f"{stat.S_IMODE(info.st_mode):o}), so what is in it may be anybody's: delete "
                    "it, or set TMPDIR to another folder"
                )
            os.fchmod(number, 0o700)


def _is_idle(name: str, folder: int | None) -> bool:
    with suppress(FileNotFoundError):
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        return stat.S_ISREG(info.st_mode) and time.time() - info.st_mtime > IDLE_S
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
