"""Augmentation in training: of a sample, whatever batch it is in."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from splatshard.pipeline.data.augment import Augment, augment
from splatshard.pipeline.data.random_numbers import sample_seeds, uniform
from splatshard.pipeline.train.augmentation import augment_of, augmented
from splatshard.schemas.plain import to_dict
from splatshard.schemas.train import AugmentConfig
from tests.rows import HEIGHT, WIDTH, random_splats
from tests.unit.train_steps import ALL


def test_the_same_options_as_the_augmentation_itself() -> None:
    ours = {f.name: f.default for f in fields(AugmentConfig)}
    theirs = {f.name: f.default for f in fields(Augment) if f.name != "cutoff"}
    assert ours == theirs
    assert augment_of(ALL, 2.5) == Augment(**to_dict(ALL), cutoff=2.5)


def test_it_is_augment_with_other_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    splats, config, seeds = random_splats(5, 12), augment_of(ALL, 3.0), torch.arange(5)
    side = torch.tensor([HEIGHT] * 5), torch.tensor([WIDTH] * 5)
    numbers = uniform(seeds, 15 + 12)
    draws = iter((numbers[:, :15], numbers[:, 15:]))
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: next(draws))
    expected = augment(splats, *side, config, torch.Generator())
    found = augmented(splats, *side, config, seeds)
    for name in ("means", "cholesky", "colors", "mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_samples_augmentation_is_its_own() -> None:
    """Whatever batch it is in, and however far that is padded."""
    config = augment_of(replace(ALL, contrast=0), 3.0)
    splats, seeds = random_splats(6, 9), sample_seeds("abcdef", 1, 2)
    sides = torch.full((6,), HEIGHT), torch.full((6,), WIDTH)
    whole = augmented(splats, *sides, config, seeds)
    order = torch.tensor([4, 1])
    part = augmented(splats[order], *(s[order] for s in sides), config, seeds[order])
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
