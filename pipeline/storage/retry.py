"""Remote reads that go on where they broke, for a minute, and never end early.

What a stream returns before its end is all there is, or an error: never a shorter file. A driver
that answers with less than a file's size, without a complaint, counts as a cut connection.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, TypeVar

from splatshard.pipeline.storage.errors import as_error, driver_errors, is_transient
from splatshard.schemas.errors import SourceError

T = TypeVar("T")

RETRY_FOR_S = 60.0


def with_retries(call: Callable[[], T]) -> T:
    """`call()`, again and again for RETRY_FOR_S while the reason why it fails may pass."""
    end = time.monotonic() + RETRY_FOR_S
    for attempt in count():
        try:
            return call()
        except driver_errors() as e:
            if not is_transient(e) or time.monotonic() > end:
                raise
        time.sleep(min(0.2 * 2**attempt, 8) * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


class RetryingStream(io.RawIOBase):
    """A remote file: reads go on where they broke, and raise SourceError or UnavailableError. So
    does `seekable`, which may ask."""

    def __init__(self, url: str, raw: Any) -> None:
        self._url, self._raw = url, raw

    def read(self, size: int | None = -1) -> bytes:
        left = -1 if size is None else size
        blocks: list[bytes] = []
        while left and (block := self._asked(partial(self._block, left))):
            blocks.append(block)
            left -= len(block) if left > 0 else 0
        return b"".join(blocks)

    def _asked(self, call: Callable[[], T]) -> T:
        try:
            return with_retries(call)
        except driver_errors() as e:
            place = f"cannot read {self._url} at byte {self._raw.tell()}"
            raise as_error(e, place, SourceError) from e

    def _block(self, size: int) -> bytes:
        data = self._raw.read(size)
        if not data and self._raw.tell() < (self._raw.size or 0):
            raise ConnectionError(f"the data ended there, short of {self._raw.size} bytes")
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._asked(self._raw.seekable)

    def close(self) -> None:
        self._raw.close()
        super().close()
