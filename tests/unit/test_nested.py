"""Nested fits: every prefix is an image by itself, near to a fit of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splatshard.pipeline.fitting import nested
from splatshard.pipeline.fitting.fit import TorchStep, fit
from splatshard.pipeline.fitting.nested import Tier, detail_splats, error_of, fit_nested, sweep
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import PRESETS, FitConfig
from splatshard.schemas.errors import UsageError
from tests.unit.test_fit import picture

CPU = select_backend("cpu")
BUDGETS = (20, 45, 100)
CONFIG = FitConfig(steps=60)


def prefix(splats: Splats, n: int) -> Splats:
    return Splats(*(x[:, :n] for x in splats.fields))


def qualities(splats: Splats, target: torch.Tensor, budgets: tuple[int, ...]) -> torch.Tensor:
    """PSNR [budgets, B] of the prefixes."""
    pictures = [CPU.render(prefix(splats, n), *target.shape[2:], 3.0) for n in budgets]
    return torch.stack([psnr(image, target) for image in pictures])


@pytest.fixture(scope="module")
def fitted() -> tuple[torch.Tensor, Splats, torch.Tensor]:
    target = picture(3, 64, 64)
    return target, *fit_nested(target, BUDGETS, CONFIG, CPU)


def test_every_budget_is_near_its_own_fit(fitted):
    target, splats, _ = fitted
    assert splats.means.shape == (3, 100, 2)
    assert splats.mask.all()
    got = qualities(splats, target, BUDGETS)
    for n, own in zip(BUDGETS, got, strict=True):
        apart, _ = fit(target, replace(CONFIG, num_gaussians=n), CPU)
        lost = qualities(apart, target, (n,))[0] - own
        assert lost.mean() < 0.7, n
        assert lost.max() < 1.5, n


def test_a_larger_budget_is_a_better_image(fitted):
    target, splats, _ = fitted
    got = qualities(splats, target, BUDGETS)
    assert (got[1:] > got[:-1] + 1.5).all()


def test_steps_are_those_of_all_tiers(fitted):
    _, _, steps = fitted
    assert steps.dtype == torch.int64
    assert steps.tolist() == [60 + (48 + 2 * 18) + (48 + 3 * 18)] * 3


def test_the_result_is_repeatable_and_independent_of_the_batch(fitted):
    target, splats, _ = fitted
    for a, b in zip(splats.fields, fit_nested(target, BUDGETS, CONFIG, CPU)[0].fields, strict=True):
        assert torch.equal(a, b)
    alone, _ = fit_nested(target[1:2], BUDGETS, CONFIG, CPU)
    for a, b in zip(splats.fields, alone.fields, strict=True):
        assert torch.equal(a[1:2], b)


def test_one_budget_is_the_plain_fit():
    target = picture(2, 30, 33)
    config = FitConfig(num_gaussians=7, steps=12)  # its own number does not count
    splats, steps = fit_nested(target, (24,), config, CPU)
    plain, plain_steps = fit(target, replace(config, num_gaussians=24), CPU)
    for a, b in zip(splats.fields, plain.fields, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(steps, plain_steps)


def test_a_config_with_budgets_of_its_own_gives_the_same():
    """FitConfig(nested=...) sets num_gaussians to the last budget, whatever it is replaced by."""
    target = picture(1, 24, 20)
    config = FitConfig(nested="5,11", steps=10)
    a, _ = fit_nested(target, config.budgets, config, CPU)
    b, _ = fit_nested(target, (5, 11), FitConfig(steps=10), CPU)
    assert a.means.shape == (1, 11, 2)
    assert all(torch.equal(x, y) for x, y in zip(a.fields, b.fields, strict=True))


@settings(max_examples=60, deadline=None)
@example(height=8, width=8, budgets=[78, 79], steps=5, seed=5)
@given(
    height=st.integers(8, 19),
    width=st.integers(8, 19),
    budgets=st.lists(st.integers(1, 90), min_size=2, max_size=4, unique=True).map(sorted),
    steps=st.integers(0, 12),
    seed=st.integers(0, 9),
)
def test_any_rising_budgets_at_tiny_sizes(height, width, budgets, steps, seed):
    """More Gaussians than pixels, increments of one, no steps: finite, as many as asked for, and no
    budget worse than the one below it by more than the sweeps may shift. Where the lower one has a
    Gaussian for every pixel there is next to nothing to win (the example's second image loses 0.34
    dB of 39): there it only has to stay good."""
    target = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    splats, _ = fit_nested(target, tuple(budgets), FitConfig(steps=steps), CPU)
    assert splats.means.shape == (2, budgets[-1], 2)
    assert all(torch.isfinite(x).all() for x in splats.fields[:3])
    assert (splats.cholesky[..., [0, 2]] > 0).all()
    got = qualities(splats, target, tuple(budgets))
    crowded = torch.tensor(budgets[:-1])[:, None] >= height * width
    lowest = torch.where(crowded, (got[:-1] - 0.3).clamp(max=35), got[:-1] - 0.3)
    assert (got[1:] > lowest).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_pictures_fit(value):
    target = torch.full((1, 3, 21, 21), value)
    splats, _ = fit_nested(target, (8, 16), FitConfig(steps=30), CPU)
    got = qualities(splats, target, (8, 16))
    assert got.min() > 25
    assert got[1] >= got[0] - 0.1  # black: both infinite


def test_sweeps_lower_the_error_of_all_budgets_together():
    target = picture(2, 48, 48)
    first, _ = fit(target, replace(CONFIG, num_gaussians=30), CPU)
    image = CPU.render(first, 48, 48, 3.0)
    own = replace(CONFIG, num_gaussians=40)
    tiers = [Tier(first, image, torch.ones(2), 40)]
    tiers.append(nested.detail_tier(error_of(tiers, target), 70, own, CPU))
    before = torch.stack([nested.root_mean_square(error_of(tiers[:n], target)) for n in (1, 2)])
    sweep(tiers, target, CONFIG, CPU)
    after = torch.stack([nested.root_mean_square(error_of(tiers[:n], target)) for n in (1, 2)])
    for tier in tiers:  # what a tier says it adds is what it adds
        torch.testing.assert_close(tier.image, CPU.render(tier.splats, 48, 48, 3.0))
    weighted = (after.square() / before).sum(0) / before.sum(0)  # as the sweep weights them
    assert (weighted < 0.99).all()
    assert (after[0] / before[0]).max() < 1.06


def test_details_start_where_the_error_is_and_lower_it():
    error = torch.zeros(1, 3, 40, 40)
    error[:, :, 4:14, 24:36] = torch.randn(10, 12, generator=torch.Generator().manual_seed(0)) / 5
    splats = detail_splats(error, 200, FitConfig(num_gaussians=60), CPU)
    x, y = splats.means[0].unbind(-1)
    inside = (x > 23) & (x < 37) & (y > 3) & (y < 15)
    assert inside.float().mean() > 0.75
    left = error - CPU.render(splats, 40, 40, 3.0)
    assert left.square().mean() < 0.8 * error.square().mean()


def test_a_diverged_image_leaves_the_others_alone(monkeypatch):
    target = picture(2, 24, 24)

    def poisoned(target, config, backend):
        splats, steps = fit(target, config, backend)
        splats.colors[0, 3] = torch.nan
        return splats, steps

    clean, _ = fit_nested(target[1:], (9, 20), FitConfig(steps=20), CPU)
    monkeypatch.setattr(nested, "fit", poisoned)
    splats, _ = fit_nested(target, (9, 20), FitConfig(steps=20), CPU)
    assert not torch.isfinite(splats.colors[0]).all()
    difference = (
        qualities(splats, target, (9, 20))[:, 1] - qualities(clean, target[1:], (9, 20))[:, 0]
    )
    assert difference.abs().max() < 0.3


class InPlace(TorchStep):
    """As fused steps: updates the splats it is given in place."""

    def step(self, splats, *args):
        for old, new in zip(splats.fields, super().step(splats, *args).fields, strict=True):
            old.copy_(new)
        return splats


@pytest.mark.parametrize("name", ["reference", "in place"])
def test_other_backends_agree(name):
    target = picture(1, 22, 26)
    backend = select_backend("reference")
    plain = Backend(name, CPU.device, CPU.render, CPU.loss_and_grad)
    if name == "in place":
        backend = replace(plain, make_step=partial(InPlace, backend=plain))
    config = FitConfig(steps=15)
    other, _ = fit_nested(target, (8, 20), config, backend)
    splats, _ = fit_nested(target, (8, 20), config, plain)
    difference = qualities(other, target, (8, 20)) - qualities(splats, target, (8, 20))
    assert difference.abs().max() < (1e-4 if name == "in place" else 0.3)


def test_the_published_loop_can_be_nested():
    target = picture(1, 32, 32)
    config = replace(PRESETS["paper"].fit, steps=60)
    splats, _ = fit_nested(target, (16, 40), config, CPU)
    got = qualities(splats, target, (16, 40))
    assert got[1] > got[0] + 0.5


@pytest.mark.parametrize("budgets", [(), (0,), (0, 5), (5, 5), (9, 4)])
def test_budgets_that_do_not_rise_are_refused(budgets):
    with pytest.raises(UsageError, match="rising"):
        fit_nested(picture(1, 16, 16), budgets, FitConfig(), CPU)


def test_a_target_psnr_needs_a_single_budget():
    target = picture(1, 16, 16)
    config = FitConfig(target_psnr=15, steps=20)
    assert len(fit_nested(target, (30,), config, CPU)[0]) == 1
    with pytest.raises(UsageError, match=r"--target-psnr 15: .*leave one out"):
        fit_nested(target, (10, 30), config, CPU)
