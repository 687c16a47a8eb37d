"""Augmentation whose random numbers belong to the sample, not to its place in a batch: splats and
the images that they are of get the same.

`pipeline.data.augment` draws for a whole batch from one generator. Which row of which batch a
sample is in depends on the number of processes, so here each sample has a seed, and its numbers are
hashed from that (splitmix64's steps, on any device, all of a batch at once).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from splatshard.pipeline.data.augment import DRAWS, Augment, augment_with, draw_plan
from splatshard.pipeline.data.augment_pixels import augment_pixels
from splatshard.pipeline.splats import Splats
from splatshard.schemas.train import AugmentConfig

START = 0x5851F42D4C957F2D
"""What tells the two uses of a sample's seed apart: any 63 bits."""


def augment_of(config: AugmentConfig, cutoff: float | None) -> Augment:
    """`config` for shards with this cutoff, or for images (None). Raises UsageError for values it
    does not take."""
    found = Augment(**asdict(config))
    return found if cutoff is None else replace(found, cutoff=cutoff)


def sample_seeds(keys: Sequence[str], *numbers: int) -> Tensor:
    """int64 [B]: for each key and all of `numbers` 64 bits of their own."""
    prefix = repr(numbers)
    digests = (hashlib.blake2b(f"{prefix}{key}".encode(), digest_size=8).digest() for key in keys)
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)


def start_seeds(seeds: Tensor) -> Tensor:
    """Seeds [B] of the Gaussians that GViT starts from: `uniform` of them has nothing to do with
    the numbers that augment the same samples."""
    return seeds ^ START


def augmented(
    splats: Splats, heights: Tensor, widths: Tensor, config: Augment, seeds: Tensor
) -> Splats:
    """As `pipeline.data.augment.augment`, with `seeds` [B] in place of a generator."""
    numbers = uniform(seeds, DRAWS + splats.mask.shape[1] * bool(config.dropout))
    draws, chance = numbers[:, :DRAWS], numbers[:, DRAWS:]
    plan = draw_plan(draws.to(splats.means), heights, widths, config)
    return augment_with(splats, plan, config, chance)


def augmented_pixels(
    pixels: Tensor, heights: Tensor, widths: Tensor, config: Augment, seeds: Tensor
) -> Tensor:
    """Images float [B, 3, H, W] by the plans that `augmented` has for the same seeds."""
    draws = uniform(seeds, DRAWS).to(pixels)
    return augment_pixels(pixels, draw_plan(draws, heights, widths, config), config)


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
