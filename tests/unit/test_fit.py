"""Starts, the optimisation loop, relocation and pruning, on small made pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splatshard.pipeline.codec.pack import pack, unpack
from splatshard.pipeline.fitting import fit as fit_module
from splatshard.pipeline.fitting.fit import energy, fit, largest_of_five, optimize, relocate
from splatshard.pipeline.fitting.prune import energy_mask, luminosity_mask, prune
from splatshard.pipeline.fitting.rows import PHASES, row_stride, squeezed
from splatshard.pipeline.fitting.start import (
    density,
    hilbert_order,
    initial_splats,
    sample_density,
    structure_tensor,
)
from splatshard.pipeline.kernels.blur import blur
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.kernels.solve_colors import solve_colors
from splatshard.pipeline.kernels.voronoi import centroids
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats, bounds
from splatshard.schemas.config import PRESETS, ConvertConfig, FitConfig, PruneConfig
from splatshard.schemas.splats import MAX_LOSS_DB

CPU = select_backend("cpu")
PLAIN = replace(CPU, make_step=None)  # with `fit.TorchStep`


def picture(batch=2, height=47, width=61) -> torch.Tensor:
    """Smooth waves with one sharp disc each, [B, 3, H, W] in 0..1."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    images = []
    for b in range(batch):
        waves = torch.stack(
            [0.5 + 0.4 * torch.sin(x / (4 + c + b) + y / (7 - c)) for c in range(3)]
        )
        disc = ((x - 20 - 9 * b) ** 2 + (y - 22) ** 2 < 90).float()
        images.append(waves * (1 - disc) + disc * torch.tensor([0.9, 0.2, 0.1])[:, None, None])
    return torch.stack(images)


def quality(splats, target, cutoff=3.0):
    return psnr(CPU.render(splats, *target.shape[2:], cutoff), target)


@pytest.mark.parametrize("init", ["adaptive", "grid", "random"])
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_every_start_is_a_valid_one(init, n):
    target = picture()
    splats = initial_splats(target, FitConfig(num_gaussians=n, init=init), CPU)
    assert splats.means.shape == (2, n, 2)
    assert splats.mask.all()
    for x in (splats.means, splats.cholesky, splats.colors):
        assert torch.isfinite(x).all()
    assert (splats.cholesky[..., [0, 2]] > 0).all()
    assert (splats.means >= 0).all()
    assert (splats.means <= torch.tensor([61, 47])).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_pictures_fit(value):
    target = torch.full((1, 3, 32, 32), value)
    splats, _ = fit(target, FitConfig(num_gaussians=20, steps=30), CPU)
    assert quality(splats, target).item() > 25


def test_grid_is_the_published_one():
    target = picture(1, 40, 40)
    splats = initial_splats(target, FitConfig(num_gaussians=16, init="grid"), CPU)
    assert splats.means[0, :5].tolist() == [[5, 5], [15, 5], [25, 5], [35, 5], [5, 15]]
    assert (splats.cholesky[0] == torch.tensor([5.0, 0, 5])).all()
    torch.testing.assert_close(splats.colors[0, 1], target[0, :, :10, 10:20].mean((1, 2)))


def test_adaptive_puts_gaussians_where_the_picture_changes():
    target = torch.full((1, 3, 64, 64), 0.5)
    target[:, :, 16:32, 40:56] = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    means = initial_splats(target, FitConfig(num_gaussians=100), CPU).means[0]
    inside = ((means - torch.tensor([48.0, 24.0])).abs() < 10).all(1)
    assert inside.sum() > 60  # 16x16 of 64x64 px hold the texture


def test_hilbert_order_visits_every_pixel_by_single_steps():
    order = hilbert_order(16, 16)
    assert sorted(order.tolist()) == list(range(256))
    y, x = order // 16, order % 16
    assert ((x.diff().abs() + y.diff().abs()) == 1).all()
    assert sorted(hilbert_order(5, 9).tolist()) == list(range(45))


def test_density_sums_to_n_and_samples_follow_it():
    rho = density(blur(structure_tensor(picture(1)), 1.4), 500)
    assert rho.sum().item() == pytest.approx(500, rel=1e-4)
    means = sample_density(rho, 500)[0]
    left = (means[:, 0] < 30).sum().item()
    assert abs(left - rho[0, :, :30].sum().item()) < 8


def test_centroids_match_the_plain_definition():
    rho = torch.rand(1, 23, 31) + 0.2
    rho *= 12 / rho.sum()
    means = torch.rand(1, 12, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [31, 23]
    )
    y, x = torch.meshgrid(torch.arange(23) + 0.5, torch.arange(31) + 0.5, indexing="ij")
    pixels = torch.stack((x, y), -1).reshape(-1, 2)
    owner = torch.cdist(pixels, means[0]).argmin(1)
    got = centroids(means, rho * 1e-2)  # a low density makes the search radius cover the picture
    for i in range(12):
        mass = rho[0].reshape(-1)[owner == i, None]
        expected = (pixels[owner == i] * mass).sum(0) / mass.sum() if len(mass) else means[0, i]
        torch.testing.assert_close(got[0, i], expected, rtol=1e-4, atol=1e-3)


def test_blur_keeps_constants_and_mass():
    assert torch.allclose(blur(torch.full((1, 2, 9, 7), 3.0), 2.0), torch.tensor(3.0))
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    wide = blur(point, 2.0)[0, 0]
    assert wide.sum().item() == pytest.approx(1, abs=1e-5)
    y = torch.arange(31) - 15.0
    assert (wide.sum(1) * y * y).sum().item() == pytest.approx(4, rel=0.03)


def test_solved_colors_are_the_least_squares_ones():
    target = picture(1, 20, 22)
    start = initial_splats(target, FitConfig(num_gaussians=6, init="random"), CPU)
    solved = solve_colors(start, target, 40, 3.0, CPU)
    units = Splats(
        start.means.expand(6, 6, 2),
        start.cholesky.expand(6, 6, 3),
        torch.eye(6)[..., None].expand(6, 6, 3).contiguous(),
        torch.ones(6, 6).bool(),
    )
    weights = CPU.render(units, 20, 22, 3.0)[:, 0].reshape(6, -1).T
    exact = torch.linalg.lstsq(weights, target[0].reshape(3, -1).T).solution
    torch.testing.assert_close(solved.colors[0], exact, rtol=1e-2, atol=1e-3)


def test_default_recipe_beats_the_published_loop_in_a_thirtieth_of_its_steps():
    target = picture()
    ours, _ = fit(target, FitConfig(num_gaussians=60, steps=100), CPU)
    paper = replace(PRESETS["paper"].fit, num_gaussians=60, steps=1000)
    theirs, _ = fit(target, paper, CPU)
    assert quality(ours, target).mean() > quality(theirs, target).mean()


def test_fit_is_deterministic_and_independent_of_the_batch():
    target, config = picture(3), FitConfig(num_gaussians=40, steps=70)
    together, again = fit(target, config, CPU)[0], fit(target, config, CPU)[0]
    alone = fit(target[1:2], config, CPU)[0]
    for name in ("means", "cholesky", "colors"):
        assert torch.equal(getattr(together, name), getattr(again, name))
    assert abs(quality(together, target)[1] - quality(alone, target[1:2])[0]) < 0.2


def test_cpu_and_reference_backends_agree_on_a_fit():
    target, config = picture(1, 24, 20), FitConfig(num_gaussians=12, steps=15)
    fast = fit(target, config, CPU)[0]
    slow = fit(target, config, select_backend("reference"))[0]
    torch.testing.assert_close(fast.means, slow.means, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(24, 20), (9, 13), (5, 31)])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_fused_steps_are_the_torch_steps(preset, stride, shape):
    """Four steps with a masked Gaussian, one off the picture, one wide, one thin, one NaN, an L1
    penalty and steps into the bounds."""
    target = picture(2, *shape)
    config = replace(
        PRESETS[preset].fit, num_gaussians=14, row_stride=stride, l1_colors=1e-4, relocate=False
    )
    start = initial_splats(target, config, CPU)
    start.mask[:, 5] = False
    start.means[0, 1], start.means[0, 2], start.means[0, 3] = -1e4, 1e4, torch.nan
    start.cholesky[1, 4] = torch.tensor([500.0, -300.0, 500.0])
    start.cholesky[1, 6] = torch.tensor([0.8, 3.0, 0.7])
    before = start.means.clone()
    fused, _ = optimize(start, target, 4, config, CPU)
    plain, _ = optimize(start, target, 4, config, PLAIN)
    assert torch.equal(start.means.nan_to_num(), before.nan_to_num())  # in place, but a copy
    for name in ("means", "cholesky", "colors"):
        ours, twin = getattr(fused, name)[start.mask], getattr(plain, name)[start.mask]
        torch.testing.assert_close(ours, twin, rtol=2e-3, atol=2e-3, equal_nan=True)
    assert fused.means[0, 3].isnan().all()


def test_rows_are_a_picture_of_squeezed_gaussians():
    target = picture(1)
    splats = initial_splats(target, FitConfig(num_gaussians=30), CPU)
    whole = CPU.render(splats, 47, 61, 3.0)
    for stride in (2, 3, 4):
        for phase in range(stride):
            rows = whole[:, :, phase::stride]
            drawn = CPU.render(squeezed(splats, stride, phase), *rows.shape[2:], 3.0)
            torch.testing.assert_close(drawn, rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_every_row_is_looked_at_before_one_is_again(stride):
    assert sorted(PHASES[stride]) == list(range(stride))


def test_stride_follows_the_spacing():
    sizes = [(1, 224), (400, 224), (900, 224), (1600, 224), (3136, 224), (4900, 224), (65536, 224)]
    found = [row_stride(FitConfig(num_gaussians=n), side, side) for n, side in sizes]
    assert found == [4, 4, 3, 3, 2, 2, 1]
    assert row_stride(FitConfig(num_gaussians=64), 64, 64) == 3
    assert row_stride(FitConfig(num_gaussians=400, row_stride=1), 224, 224) == 1
    assert row_stride(FitConfig(num_gaussians=1), 2, 500) == 2


def test_few_of_the_rows_are_as_good_as_all():
    """In as many steps, and ahead at the same cost."""
    target, config = picture(), FitConfig(num_gaussians=60, steps=80)
    few, whole = (fit(target, replace(config, row_stride=k), CPU)[0] for k in (3, 1))
    cheap, _ = fit(target, replace(config, row_stride=1, steps=27), CPU)
    assert quality(few, target).mean() > quality(whole, target).mean() - 1
    assert quality(few, target).mean() > quality(cheap, target).mean()


def test_target_psnr_stops_each_image_on_its_own():
    target = torch.cat((torch.full((1, 3, 40, 40), 0.4), picture(1, 40, 40)))
    config = FitConfig(num_gaussians=60, steps=100, target_psnr=27.0)
    splats, steps = fit(target, config, CPU)
    assert steps[0] < steps[1]
    assert (quality(splats, target)[steps < 100] >= 27.0).all()
    assert (steps[steps < 100] % 10 == 0).all()
    unreachable = replace(config, target_psnr=90.0)
    assert fit(target, unreachable, CPU)[1].tolist() == [100, 100]


def test_zero_steps_is_the_start():
    target, config = picture(1), FitConfig(num_gaussians=9, steps=0)
    splats, steps = fit(target, config, CPU)
    assert torch.equal(splats.means, initial_splats(target, config, CPU).means)
    assert steps.tolist() == [0]


def test_gaussians_stay_where_a_shard_can_hold_them(monkeypatch):
    """One Gaussian for a slope wants to be endlessly wide and far away."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(33.0), indexing="ij")
    target = ((x + y) / 60).expand(1, 3, -1, -1).contiguous()
    config = FitConfig(num_gaussians=1, steps=300, init="grid", lr_means=2.0)
    low_x, high_x, low_y, high_y, largest = bounds(24, 33)
    assert (low_x, high_x, low_y, high_y) == (16.5 - 33, 16.5 + 33, 12 - 33, 12 + 33)

    def within(splats):
        x, y = splats.means[0, 0].tolist()
        wide = splats.cholesky.abs().max() > largest
        return low_x <= x <= high_x and low_y <= y <= high_y and not wide

    assert within(fit(target, config, CPU)[0])
    assert within(fit(target, config, PLAIN)[0])
    monkeypatch.setattr(fit_module, "bounded", lambda splats, *size: splats)
    assert not within(fit(target, config, PLAIN)[0])


@pytest.mark.parametrize("codec", ["balanced", "compact"])
def test_what_is_stored_of_a_long_fit_is_what_was_fitted(codec):
    target = picture(2, 32, 32)
    splats, _ = fit(target, FitConfig(num_gaussians=24, steps=600), CPU)
    stored = unpack(pack(splats, target, codec, 3.0, CPU), 32, 32, codec)
    lost = quality(splats, target) - quality(stored, target)
    assert (lost <= MAX_LOSS_DB[codec] + 1e-3).all(), lost


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (9, 4), (13, 17)])
def test_largest_of_five_is_a_pooled_maximum(shape):
    values = torch.rand(2, 1, *shape)
    pooled = torch.nn.functional.max_pool2d(values, 5, stride=1, padding=2)
    assert torch.equal(largest_of_five(largest_of_five(values, 2), 3), pooled)


def test_relocation_moves_the_useless_to_the_error():
    target = torch.zeros(1, 3, 40, 40)
    target[:, :, 28:33, 8:13] = 1.0
    n = 12
    splats = Splats(torch.rand(1, n, 2) * 10 + 25, torch.tensor([2.0, 0, 2]).expand(1, n, 3),
                    torch.full((1, n, 3), 1e-3), torch.ones(1, n).bool())  # fmt: skip
    moments = (torch.ones(1, n, 8), torch.ones(1, n, 8))
    moved = relocate(splats, target, moments, 3.0, CPU)
    changed = (moved.means != splats.means).any(-1)[0]
    assert 1 <= changed.sum() <= fit_module.RELOCATE_SHARE * n
    bright = moved.colors[0].abs().amax(-1) > 0.1  # all that is worth drawing lies on the square
    assert bright.any()
    assert ((moved.means[0, bright] - torch.tensor([10.5, 30.5])).abs() < 4).all()
    assert not moments[0][0, changed].any()
    assert moments[0][0, ~changed].all()
    drawn = CPU.render(splats, 40, 40, 3.0)  # no residual: nothing to win, nothing moves
    assert torch.equal(relocate(splats, drawn, moments, 3.0, CPU).means, splats.means)


def test_masked_gaussians_stay_out():
    target = picture(1)
    splats = initial_splats(target, FitConfig(num_gaussians=30), CPU)
    splats = replace(splats, mask=torch.arange(30)[None] < 17)
    fitted, _ = optimize(splats, target, 80, FitConfig(num_gaussians=30), CPU)
    assert fitted.num_gaussians.tolist() == [17]
    assert torch.equal(fitted.means[:, 17:], splats.means[:, 17:])


def test_energy_is_the_error_of_removal():
    splats = Splats(torch.tensor([[[20.3, 20.9]]]), torch.tensor([[[3.0, 1.0, 2.5]]]),
                    torch.tensor([[[0.5, -0.2, 0.1]]]), torch.ones(1, 1).bool())  # fmt: skip
    removed = CPU.render(splats, 40, 40, 6.0).square().sum().item()
    assert energy(splats).item() == pytest.approx(removed, rel=1e-3)


def test_luminosity_pruning_follows_the_published_rule():
    colors = torch.tensor([[[0.05, 0, 0], [0, 0.08, 0], [0, -0.08, 0], [0.0, 0, 0.5]]])
    splats = Splats(torch.zeros(1, 4, 2), torch.ones(1, 4, 3), colors, torch.ones(1, 4).bool())
    assert luminosity_mask(splats, 0.05).tolist() == [[False, True, True, False]]
    assert luminosity_mask(splats, 9.0).sum() >= 1  # never empty
    config = ConvertConfig(prune=PruneConfig(prune="luminosity"))
    assert prune(splats, torch.zeros(1, 3, 4, 4), config, CPU).num_gaussians.tolist() == [2]


def test_energy_pruning_beats_luminosity_at_equal_number():
    target = picture(2)
    config = ConvertConfig(
        fit=FitConfig(num_gaussians=80, steps=60),
        prune=PruneConfig(prune="energy", prune_share=0.25, refit_steps=0),
    )
    splats, _ = fit(target, config.fit, CPU)
    by_energy = prune(splats, target, config, CPU)
    assert by_energy.num_gaussians.tolist() == [60, 60]
    luminosity = splats.colors.abs() @ torch.tensor([0.2126, 0.7152, 0.0722])
    rank = luminosity.argsort(1).argsort(1)
    by_luminosity = replace(splats, mask=rank >= 20)
    assert quality(by_energy, target).mean() > quality(by_luminosity, target).mean()
    refit = prune(splats, target, replace(config, prune=replace(config.prune, refit_steps=20)), CPU)
    assert refit.num_gaussians.tolist() == [60, 60]
    assert quality(refit, target).mean() > quality(by_energy, target).mean() + 0.5
    assert energy_mask(splats, 0.0).all()
