"""Random numbers that are a function of what they are for: splitmix64 (Steele, Lea and Flood, 2014,
doi 10.1145/2660193.2660195), on Python's integers, numpy's and torch's.

numpy and torch do not promise that their own generators stay as they are, nor that a GPU has the
CPU's numbers; an order of samples and an augmentation must outlive an upgrade, and a move.

    z += GOLDEN; z = (z ^ z >> 30) * FIRST; z = (z ^ z >> 27) * SECOND; z ^= z >> 31
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1


def hash64(*numbers: int) -> int:
    """64 bits of all of `numbers`."""
    z = 0
    for number in numbers:
        z = (z + GOLDEN + number) & MASK
        z = (z ^ (z >> 30)) * FIRST & MASK
        z = (z ^ (z >> 27)) * SECOND & MASK
        z ^= z >> 31
    return z


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of n places, int64 [n], that depends on `key` only."""
    seed = np.uint64(hash64(*key))
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN) + seed
        z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def sample_seeds(keys: Sequence[str], *numbers: int) -> Tensor:
    """int64 [B]: for each key and all of `numbers` 64 bits of their own."""
    prefix = repr(numbers)
    digests = (hashlib.blake2b(f"{prefix}{key}".encode(), digest_size=8).digest() for key in keys)
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Numbers from 0 to below 1, float32 [B, count], for seeds int64 [B] on any device; the first
    of each seed whatever `count` is."""
    z = seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    return _shifted(z ^ _shifted(z, 31), 40).float() * 2**-24


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right with zeros, which torch has no operator for."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64)
