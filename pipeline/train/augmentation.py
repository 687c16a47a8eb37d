"""Augmentation whose random numbers belong to the sample, not to its place in a batch.

`pipeline.data.augment` draws for a whole batch from one generator. Which row of which batch a
sample is in depends on the number of processes, so here each sample has a seed, and its numbers are
hashed from that (splitmix64's steps, on any device, all of a batch at once).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from pipeline.data import augment as space
from pipeline.data.augment import Augment
from pipeline.splats import Splats
from schemas.train import AugmentConfig

DRAWS = 15
"""Random numbers per sample but for dropout, which takes one per Gaussian."""


def augment_of(config: AugmentConfig, cutoff: float) -> Augment:
    """`config` for shards with this cutoff. Raises UsageError for values it does not take."""
    return Augment(**asdict(config), cutoff=cutoff)


def sample_seeds(keys: Sequence[str], *numbers: int) -> Tensor:
    """int64 [B]: for each key and all of `numbers` 64 bits of their own."""
    prefix = repr(numbers)
    digests = (hashlib.blake2b(f"{prefix}{key}".encode(), digest_size=8).digest() for key in keys)
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)


def augmented(
    splats: Splats, heights: Tensor, widths: Tensor, config: Augment, seeds: Tensor
) -> Splats:
    """As `pipeline.data.augment.augment`, with `seeds` [B] in place of a generator."""
    numbers = uniform(seeds, DRAWS + splats.mask.shape[1] * bool(config.dropout))
    draws, chance = numbers[:, :DRAWS], numbers[:, DRAWS:]
    kind = {"dtype": splats.means.dtype, "device": splats.means.device}
    boxes = space._random_boxes(draws[:, :4], heights.to(**kind), widths.to(**kind), config)
    placed = space._box_map(boxes, config.height, config.width)
    turned = space._random_map(draws[:, 4:10], config)
    splats = space.affine(splats, *space.composed(turned, placed))
    shown = space.visible(splats, config.height, config.width, config.cutoff)
    splats = space.hide(splats, shown)
    if config.dropout and splats.mask.shape[1]:
        kept = space._not_none(chance >= config.dropout, chance, splats.mask)
        splats = space.drop(splats, kept, 1 - config.dropout if config.rescale else 1.0)
    return space._recolored(splats, draws[:, 10:], config)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Numbers from 0 to below 1, float32 [B, count], the first of each seed whatever `count` is."""
    z = seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * _signed(
        0x9E3779B97F4A7C15
    )
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z ^ _shifted(z, 31), 40).float() * 2**-24


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right with zeros, which torch has no operator for."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64)
