"""Locks of open files, freed by the system when their process dies: flock, on Windows a lock of the
file's first byte."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

WAIT_S = 0.01


def lock(number: int, *, wait: bool) -> None:
    """Lock the file of the descriptor `number` for it alone.

    Raises BlockingIOError where another has it and this is not to `wait`, and OSErrors.
    """
    if fcntl:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    while True:
        os.lseek(number, 0, os.SEEK_SET)
        try:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
            return
        except PermissionError as e:
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock") from e
        time.sleep(WAIT_S)


def unlock(number: int) -> None:
    """The opposite of `lock`. Closing a file would not do while a process that was forked meanwhile
    has it open, too."""
    if fcntl:
        fcntl.flock(number, fcntl.LOCK_UN)
    else:
        os.lseek(number, 0, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_UNLCK, 1)
