"""Augmentation in training: of a sample, whatever batch it is in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splatshard.pipeline.data.augment import DRAWS, augment, augment_with, draw_plan
from splatshard.pipeline.data.batch import TrainBatch
from splatshard.pipeline.data.random_numbers import sample_seeds, uniform
from splatshard.pipeline.train.augmentation import augmented
from splatshard.pipeline.train.batches import Feed
from splatshard.pipeline.train.distributed import World
from tests.rows import HEIGHT, WIDTH, random_splats
from tests.training import toy_config
from tests.unit.train_steps import ALL


@pytest.mark.parametrize("cutoff", [1.5, 3.0])
def test_the_cutoff_is_that_of_the_shards(shards: Path, cutoff: float) -> None:
    """It says which Gaussians still reach into the image, and how grey that is on average."""
    config = toy_config(shards, shards / "unused", augment=replace(ALL, dropout=0))
    feed = Feed(config, World(0, 1, torch.device("cpu")))
    assert feed.cutoff == 3.0
    assert config.augment
    plain = Feed(replace(config, augment=None), World(0, 1, torch.device("cpu")))
    step, feed.cutoff = next(iter(plain)), cutoff
    found, before = next(iter(feed)).batch, step.batch
    assert isinstance(found, TrainBatch)
    assert isinstance(before, TrainBatch)
    draws = uniform(step.seeds, DRAWS)
    plan = draw_plan(draws, before.heights, before.widths, config.augment)
    wanted = augment_with(before.splats, plan, config.augment, None, cutoff)
    for name in ("means", "cholesky", "colors", "mask"):
        assert torch.equal(getattr(found.splats, name), getattr(wanted, name))
    other = augment_with(before.splats, plan, config.augment, None, 4.5 - cutoff)
    assert not torch.equal(found.splats.colors, other.colors)


def test_it_is_augment_with_other_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    splats, config, seeds = random_splats(5, 12), ALL, torch.arange(5)
    side = torch.tensor([HEIGHT] * 5), torch.tensor([WIDTH] * 5)
    numbers = uniform(seeds, 15 + 12)
    draws = iter((numbers[:, :15], numbers[:, 15:]))
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: next(draws))
    expected = augment(splats, *side, config, torch.Generator())
    found = augmented(splats, *side, config, seeds, 3.0)
    for name in ("means", "cholesky", "colors", "mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_samples_augmentation_is_its_own() -> None:
    """Whatever batch it is in, and however far that is padded."""
    config = replace(ALL, contrast=0)
    splats, seeds = random_splats(6, 9), sample_seeds("abcdef", 1, 2)
    sides = torch.full((6,), HEIGHT), torch.full((6,), WIDTH)
    whole = augmented(splats, *sides, config, seeds, 3.0)
    order = torch.tensor([4, 1])
    part = augmented(splats[order], *(s[order] for s in sides), config, seeds[order], 3.0)
    for name in ("means", "cholesky", "colors"):
        a, b = getattr(part, name), getattr(whole, name)[order]
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.equal(part.mask, whole.mask[order])
    assert torch.equal(uniform(seeds, 5), uniform(seeds, 9)[:, :5])


def test_uniform_numbers() -> None:
    numbers = uniform(sample_seeds([str(i) for i in range(2000)], 3), 50)
    assert 0 <= numbers.min() < 1e-3
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(numbers.var() - 1 / 12) < 0.002
    assert len(numbers.unique()) > 0.99 * numbers.numel()
    both = torch.stack((numbers[:, :-1].flatten(), numbers[:, 1:].flatten()))
    assert abs(torch.corrcoef(both)[0, 1]) < 0.01
    assert not torch.equal(sample_seeds(["a"], 1, 2), sample_seeds(["a"], 1, 3))
