"""Learning rate, weight decay, freezing and the average of training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splatshard.pipeline.train.groups import Average, freeze, groups_of, make_optimizer
from splatshard.pipeline.train.schedule import learning_rate
from splatshard.schemas.train import (
    OptimConfig,
)
from tests.unit.train_steps import OPTIM, config_of, model_of


def test_the_learning_rate() -> None:
    config = OptimConfig(steps=110, lr=2.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(110, 110, config) == pytest.approx(0.2)
    assert learning_rate(0, 1, replace(config, warmup_steps=0)) == 2.0


def test_weight_decay_of_matrices_alone() -> None:
    config = config_of("contrast")
    model = model_of(config)
    optimizer = make_optimizer(model, groups_of(model, OPTIM), OPTIM)
    decayed, others = (group["params"] for group in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    plain = {id(p) for p in others}
    names = {name for name, p in model.named_parameters() if id(p) in plain}
    assert "logit_scale" in names
    assert all(p.ndim >= 2 for p in decayed)
    assert len(decayed) + len(others) == len(list(model.parameters()))
    assert {n.rsplit(".", 1)[-1] for n in names if "norm" in n} == {"weight", "bias"}


def test_no_weight_decay_of_learned_gaussians() -> None:
    config = config_of("gvit")
    assert config.model.gvit is not None
    learned = replace(config.model.gvit, start="learned")
    model = model_of(replace(config, model=replace(config.model, gvit=learned)))
    start = dict(model.named_parameters())["predictor.start"]
    decayed, others = (
        g["params"] for g in make_optimizer(model, groups_of(model, OPTIM), OPTIM).param_groups
    )
    assert any(p is start for p in others)
    assert not any(p is start for p in decayed)


def test_freezing_takes_gradients_away() -> None:
    model = model_of(config_of("contrast"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    groups = groups_of(model, replace(OPTIM, trainable=("vision.stem.*",), later=("logit_scale",)))
    assert groups.later_from == OPTIM.warmup_steps
    freeze(model, groups.at(3))
    kept = {name for name, p in model.named_parameters() if p.grad is not None}
    assert kept == {n for n, _ in model.named_parameters() if n.startswith("vision.stem.")}
    assert kept == {name for name, p in model.named_parameters() if p.requires_grad}
    freeze(model, groups.at(4))
    assert model.logit_scale.requires_grad  # type: ignore[union-attr]


def test_the_average_follows_the_weights() -> None:
    model = nn.Linear(2, 1)
    start = model.weight.detach().clone()
    average = Average(model, 0.9)
    with torch.no_grad():
        model.weight += 1
    average.update(model, 0)
    assert torch.allclose(average.values["weight"], start + 0.9)
    average.update(model, 10_000)
    assert torch.allclose(average.values["weight"], start + 0.9 + 0.1 * 0.1)


@given(st.integers(1, 400), st.integers(0, 50), st.floats(0, 1))
def test_the_learning_rate_stays_in_its_bounds(steps: int, warmup: int, final: float) -> None:
    config = OptimConfig(steps=steps, lr=1.0, warmup_steps=warmup, final_lr=final)
    for step in range(steps):
        rate = learning_rate(step, steps, config)
        assert 0 <= rate <= 1
        assert math.isfinite(rate)
