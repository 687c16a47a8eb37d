"""A file of a web server: by ranges, or front to back where the server sends none.

Some servers send the whole file where a part is asked for (python -m http.server, simple hosts), or
do not say how long it is. Then one answer is read as it comes. Where that breaks, the next read
begins a new one and passes over what it has, if it is still the same file; so does a way back.
"""

from __future__ import annotations

import io
from typing import Any

from splatshard.pipeline.storage.options import redact
from splatshard.schemas.errors import SourceError

SKIP_BYTES = 1 << 20
IDENTITY = ("ETag", "Last-Modified", "Content-Length")
"""Headers that say which file an answer holds."""


class WebFile:
    """What `retry.RetryingStream` reads through fsspec's HTTP driver `fs`, whose own files need
    ranges as soon as a block is behind them.

    `size` is None while it is not known.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        info = fs.info(path)
        self.size: int | None = info["size"] or None
        by_ranges = self.size is not None and info.get("partial", True)
        self._ranges = fs.open(path, size=self.size) if by_ranges else None
        self._answer: Any = None
        self._identity: tuple[str, ...] = ()
        self._place = self._answered = 0  # `_answered`: of the answer's bytes

    def read(self, size: int = -1) -> bytes:
        """Some of the next `size` bytes, all that are left for -1; none at the end."""
        if self._ranges is not None:
            try:
                self._ranges.seek(self._place)
                data = self._ranges.read(size)
            except ValueError:  # the driver got the whole file for a part
                self._no_ranges()
            else:
                self._place += len(data)
                return data
        try:
            return self._read_answer(size)
        except BaseException:
            self._hang_up()
            raise

    def seekable(self) -> bool:
        """Whether the server sends ranges; asks it for the last byte."""
        if self._ranges is not None and self.size is not None and self.size > 1:
            try:
                self._ranges.seek(self.size - 1)
                self._ranges.read(1)
            except ValueError:
                self._no_ranges()
        return self._ranges is not None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self.size is None:
            raise SourceError(redact(f"{self._path}: the server does not say how long the file is"))
        start = (0, self._place, self.size or 0)[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        self._no_ranges()
        self._hang_up()

    def _no_ranges(self) -> None:
        if self._ranges is not None:
            self._ranges.close()
        self._ranges = None

    def _read_answer(self, size: int) -> bytes:
        if self.size is not None and self._place >= self.size:
            return b""
        behind = self._answered > self._place
        answer = self._ask() if behind or self._answer is None else self._answer
        while self._answered < self._place:
            skipped = answer.read(min(self._place - self._answered, SKIP_BYTES))
            self._answered += len(skipped)
            if not skipped:
                return self._ended()
        data = answer.read(size)
        self._answered += len(data)
        self._place = self._answered
        return data if data or not size else self._ended()

    def _ended(self) -> bytes:
        """At the end of the answer. Where it is short of the size, another read begins anew."""
        self._hang_up()
        self.size = self.size or self._answered
        return b""

    def _ask(self) -> Any:
        """Begin an answer. Raises SourceError where it holds another file than the one before."""
        self._hang_up()
        headers = self._fs.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
        # with any size the driver does not ask for it
        answer = self._fs.open(self._path, block_size=0, size=1, headers=headers)
        self._answer, self._answered = answer, 0
        said = answer.r.headers
        identity = tuple(said.get(name, "") for name in IDENTITY)
        if self._identity not in ((), identity):
            raise SourceError(redact(f"{self._path} was replaced while it was read; begin again"))
        self._identity = identity
        if "Content-Length" in said and said.get("Content-Encoding", "identity") == "identity":
            self.size = int(said["Content-Length"])
        return answer

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._answer = None
