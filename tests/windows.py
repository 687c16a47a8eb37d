"""A machine like Windows, for tests: run `become_windows` in a process of its own.

The modules of ABSENT cannot be imported and the attributes of LACKING are gone from `os` and
`signal`; `dir_fd`, descriptors of folders and file descriptors in os.utime do not work. Files that
are open can still be deleted, which the real one refuses.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

ABSENT = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline")
LACKING = {
    os: (
        *("getuid", "geteuid", "getgid", "getegid", "getpgid", "setsid", "fchmod", "fchown"),
        *("chown", "fork", "forkpty", "register_at_fork", "uname", "statvfs", "fstatvfs"),
        *("sched_getaffinity", "sched_setaffinity", "killpg", "mkfifo", "sysconf", "getloadavg"),
        *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "pread", "posix_fadvise"),
    ),
    signal: ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "setitimer"),
}
OF_OTHERS = (
    *("torch", "torch.utils.data", "numpy", "numba", "pyarrow.parquet", "PIL.Image"),
    *("fsspec.implementations.local", "fsspec.implementations.memory", "tempfile"),
    *("transformers.models.clip.modeling_clip", "filelock", "rich.console", "tyro", "yaml"),
)
"""They run on Windows by means of their own, so they come before."""


class Blocker:
    """Finds no module of ABSENT; stands before all finders."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def become_windows() -> None:
    """From now on this process is on a Windows machine, as far as our code can see."""
    for name in OF_OTHERS:
        importlib.import_module(name)
    import fcntl

    flock: Callable[[int, int], None] = fcntl.flock
    exclusive, at_once, off = fcntl.LOCK_EX, fcntl.LOCK_NB, fcntl.LOCK_UN
    for name in ABSENT:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    for module, names in LACKING.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.modules["msvcrt"] = _msvcrt(flock, exclusive | at_once, off)
    _refuse_descriptors()


def _msvcrt(flock: Callable[[int, int], None], take: int, give: int) -> Any:
    """Windows's module, of which `locking` locks bytes at the file's position, here by flock."""
    module = type(sys)("msvcrt")

    def locking(number: int, mode: int, count: int) -> None:
        assert (os.lseek(number, 0, os.SEEK_CUR), count) == (0, 1), "all lock the first byte"
        if mode == module.LK_UNLCK:
            return flock(number, give)
        assert mode == module.LK_NBLCK
        try:
            flock(number, take)
        except BlockingIOError as e:
            raise PermissionError(13, "Permission denied") from e

    module.locking, module.LK_UNLCK, module.LK_LOCK, module.LK_NBLCK = locking, 0, 1, 2
    return module


def _refuse_descriptors() -> None:
    """As Windows does: dir_fd, and descriptors where it wants a path; os.kill ends processes."""
    opened, utime, listdir = os.open, os.utime, os.listdir

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("os.kill ends a process on Windows, or its console's")

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            raise NotImplementedError("dir_fd unavailable on this platform")
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, mode)

    def of_path(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, int):
                raise TypeError("path should be string, bytes or os.PathLike, not int")
            return function(path, *args, **kwargs)

        return call

    os.open, os.utime, os.listdir = open_, of_path(utime), of_path(listdir)
    os.kill = refuse
