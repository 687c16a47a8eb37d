"""The keys of a shard, so that the second of two is known: 12 bytes for each, of a million or more.

A dictionary of so many numbers takes ten times as much, and the keys themselves more.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

RECENT = 1 << 15
"""Keys in a dictionary, until they are sorted into the others."""
MAX_KINDS = 1 << 16
"""Different sets of extensions that are kept; nearly all samples of a shard have the same one."""


class SeenKeys:
    """Keys by 8 bytes of their hash, with the extensions of their members.

    Two of a million keys share these in one of 37 million shards. Not Python's hash(), which
    differs from run to run.
    """

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._numbers: NDArray[np.uint64] = np.empty(0, np.uint64)  # sorted
        self._kinds_of: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._kinds: list[frozenset[str]] = [frozenset()]
        self._number_of = {frozenset[str](): 0}

    def before(self, key: str, extensions: frozenset[str]) -> frozenset[str] | None:
        """The extensions that came with `key` before (none, where MAX_KINDS others came first);
        None for a new one, which is kept."""
        code = hashlib.blake2b(key.encode(), digest_size=8).digest()
        number = int.from_bytes(code, "little")
        if (kind := self._find(number)) is not None:
            return self._kinds[kind]
        if extensions not in self._number_of and len(self._kinds) < MAX_KINDS:
            self._number_of[extensions] = len(self._kinds)
            self._kinds.append(extensions)
        self._recent[number] = self._number_of.get(extensions, 0)
        if len(self._recent) >= RECENT:
            self._sort_in()
        return None

    def _find(self, number: int) -> int | None:
        if number in self._recent:
            return self._recent[number]
        place = int(self._numbers.searchsorted(np.uint64(number)))
        if place < len(self._numbers) and int(self._numbers[place]) == number:
            return int(self._kinds_of[place])
        return None

    def _sort_in(self) -> None:
        size = len(self._recent)
        numbers = np.fromiter(self._recent, np.uint64, size)
        kinds = np.fromiter(self._recent.values(), np.uint32, size)
        numbers = np.concatenate((self._numbers, numbers))
        order = np.argsort(numbers, kind="stable")
        self._numbers = numbers[order]
        self._kinds_of = np.concatenate((self._kinds_of, kinds))[order]
        self._recent = {}
