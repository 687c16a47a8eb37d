"""Augmentation whose random numbers belong to the sample, not to its place in a batch: splats and
the images that they are of get the same.

`pipeline.data.augment` draws for a whole batch from one generator. Which row of which batch a
sample is in depends on the number of processes, so here each sample has a seed, and its numbers are
hashed from that (data/random_numbers.py).
"""

from __future__ import annotations

from torch import Tensor

from splatshard.pipeline.data.augment import DRAWS, augment_with, draw_plan
from splatshard.pipeline.data.augment_pixels import augment_pixels
from splatshard.pipeline.data.random_numbers import uniform
from splatshard.pipeline.splats import Splats
from splatshard.schemas.train import AugmentConfig

START = 0x5851F42D4C957F2D
"""What tells the two uses of a sample's seed apart: any 63 bits."""


def start_seeds(seeds: Tensor) -> Tensor:
    """Seeds [B] of the Gaussians that GViT starts from: `uniform` of them has nothing to do with
    the numbers that augment the same samples."""
    return seeds ^ START


def augmented(
    splats: Splats,
    heights: Tensor,
    widths: Tensor,
    config: AugmentConfig,
    seeds: Tensor,
    cutoff: float,
) -> Splats:
    """As `pipeline.data.augment.augment`, with `seeds` (int64 [B]) in place of a generator."""
    numbers = uniform(seeds, DRAWS + splats.mask.shape[1] * bool(config.dropout))
    draws, chance = numbers[:, :DRAWS], numbers[:, DRAWS:]
    plan = draw_plan(draws.to(splats.means), heights, widths, config)
    return augment_with(splats, plan, config, chance, cutoff)


def augmented_pixels(
    pixels: Tensor, heights: Tensor, widths: Tensor, config: AugmentConfig, seeds: Tensor
) -> Tensor:
    """Images float [B, 3, H, W] by the plans that `augmented` has for the same seeds."""
    draws = uniform(seeds, DRAWS).to(pixels)
    return augment_pixels(pixels, draw_plan(draws, heights, widths, config), config)
