"""Nested budgets: one fit whose first 400, 900, 1600 Gaussians are good images by themselves.

A sum has no order and no occlusion, so what a prefix leaves over is just another picture to fit.
Method, for rising budgets b1 < b2 < ...; the Gaussians from one budget to the next are a tier:

1. The first tier is the plain fit of b1 Gaussians, all of `config.steps`.
2. Every further tier starts where the squared error of the prefix is (spacing as among all of its
   budget's Gaussians, so an increment of 700 on 900 covers 0.44 of the picture at a time, and a
   step costs as much less) and is fitted to the error by the same loop, for DETAIL_STEPS of the
   steps. The error is brought to the contrast of a picture first, since the loop's colour step is
   made for that: without this, tiers lose 0.1 to 0.3 dB more.
3. After each tier one sweep: all tiers so far in turn, each refitted with short careful steps to
   what serves every budget from its own on. The others fixed, tier t minimises sum_s v_s |e_s|^2,
   s >= t, which is again one picture to fit: its own rendering plus the mean of the errors e_s
   by v_s. v_s ~ 1 / rms(e_s), fixed within a sweep: equal v favour small budgets, 1 / mse large.

Every tier goes through the unmodified loop, so any backend serves, with its fused step.

Measured with 100 steps on all rows and 224 px, on 16 photographs of datacomp-sample that were tuned
on: mean dB against separate fits of 400 / 900 / 1600 / 3136 Gaussians, CPU time against theirs
together. Since steps look at some of the rows (rows.py) they are more: DETAIL_STEPS, SWEEP_STEPS.
benchmarks/nested.py has other photographs, benchmarks/notes/nested.md what else was tried.

    tiers of 100 steps, no sweeps                         0.00 -0.43 -0.61 -0.34   0.63
    the same with 130 steps after the first               0.00 -0.40 -0.56 -0.27   0.72
    tiers of 100 steps, one sweep of 20 at the end       -0.02 -0.34 -0.37 +0.17   0.70
    this: 100 steps, then 60 a tier, 20 in every sweep   -0.08 -0.16 -0.12 +0.22   0.67

Sweeps cost the small budgets little and give the large ones much; after every tier they do more
than at the end. Without them more steps per tier gain next to nothing.

Limits. A coarse Gaussian is worth little to a large budget, so the loss grows as fits converge: at
300 steps it was 0.1 / 0.5 / 0.8 / 0.9 dB. At 30 steps nesting gained 0.1 to 2 dB, since the steps
of all tiers add up. Means hide a spread: at 3136 a crowd before a white wall lost 2.3 dB of 36, and
a picture that fits to 43 dB gained 3.2.

Left out: all tiers moving at once (loses 1.6 dB at 400, or takes twice the time: what a tier should
do changes under its momentum); a joint solve of colours (sweeps move them); a relocation margin and
a shape step of their own for increments (0.05 dB together, for two more knobs in the loop).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from splatshard.pipeline.fitting.fit import fit, optimize
from splatshard.pipeline.fitting.rows import row_stride
from splatshard.pipeline.fitting.start import (
    BLUR_PX,
    SCALE,
    cholesky_along_edges,
    density,
    sample_density,
    structure_tensor,
    values_at,
)
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.blur import blur
from splatshard.pipeline.kernels.solve_colors import solve_colors
from splatshard.pipeline.kernels.voronoi import centroids
from splatshard.pipeline.splats import Splats, cat
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import UsageError

DETAIL_STEPS = 0.8  # of config.steps, for a tier after the first; 0.6 loses 0.06 dB
SWEEP_STEPS = 0.3  # of config.steps, for each tier in a sweep; 0.2 loses 0.04 dB
SWEEP_STRIDE = 2  # rows, at most; at 4 a picture of 37 dB lost 13 dB in 450 steps
SWEEP_RATE = 0.15  # of the step sizes; 0.07 and 0.3 lose 0.02 dB
CONTRAST = 0.1  # root mean square that errors are brought to; 0.07 loses 0.01 dB, 0.15 loses 0.03
DETAIL_COLOR_STEPS = 1  # conjugate-gradient steps of an increment's start; more: no gain
MIN_RMS = 1e-4  # errors below this are left as small as they are: 80 dB


@dataclass
class Tier:
    """The Gaussians from one budget to the next, and what they add to the picture.

    splats  [B, n]        n more Gaussians per image
    image   [B, 3, H, W]  their rendering
    gain    [B]           factor on the contrast at which they are fitted; 1 for the first tier
    budget                how many Gaussians there are with this tier's
    """

    splats: Splats
    image: Tensor
    gain: Tensor
    budget: int


def fit_nested(
    target: Tensor, budgets: tuple[int, ...], config: FitConfig, backend: Backend
) -> tuple[Splats, Tensor]:
    """Fit `target` [B, 3, H, W] (0 to 1, on the backend's device) for rising `budgets` at once.

    Returns splats [B, budgets[-1]] whose first n Gaussians, for every n in `budgets`, are an image
    by themselves, and the steps of all tiers together, int64 [B]. One budget is the plain `fit`.
    `config.num_gaussians` is not used; `config.init` is how the first tier starts.

    Raises UsageError for budgets that do not rise, and for a target PSNR with several of them.
    """
    check_budgets(budgets, config)
    config = replace(config, nested="", num_gaussians=budgets[0])
    if len(budgets) == 1:
        return fit(target, config, backend)
    with torch.no_grad():
        first, steps = fit(target, config, backend)
        image = rendering(first, target, config, backend)
        config = replace(config, init="adaptive")  # its smaller steps are for the first tier alone
        tiers = [Tier(first, image, target.new_ones(len(target)), budgets[0])]
        for below, budget in pairwise(budgets):
            own = replace(config, num_gaussians=budget - below)
            tiers.append(detail_tier(error_of(tiers, target), budget, own, backend))
            sweep(tiers, target, config, backend)
            steps += detail_steps(config) + len(tiers) * sweep_steps(config)
        return cat([tier.splats for tier in tiers], dim=1), steps


def check_budgets(budgets: Sequence[int], config: FitConfig) -> None:
    """Raise UsageError unless `budgets` rise from 1 or more and `config` can be met for them."""
    rising = all(a < b for a, b in zip((0, *budgets), budgets, strict=False))
    if not (budgets and rising):
        given = ",".join(map(str, budgets))
        raise UsageError(f"budgets {given}: choose rising numbers, as in 400,900,1600,3136")
    if len(budgets) > 1 and config.target_psnr is not None:
        raise UsageError(
            f"--target-psnr {config.target_psnr}: does not go with nested budgets; leave one out"
        )


def detail_steps(config: FitConfig) -> int:
    """Steps of a tier after the first."""
    return round(DETAIL_STEPS * config.steps)


def sweep_steps(config: FitConfig) -> int:
    """Steps of each tier in a sweep."""
    return round(SWEEP_STEPS * config.steps)


def detail_tier(error: Tensor, total: int, config: FitConfig, backend: Backend) -> Tier:
    """`config.num_gaussians` more Gaussians, that make `total`, for `error` [B, 3, H, W] =
    target - prefix."""
    gain = CONTRAST / root_mean_square(error).clamp(min=MIN_RMS)
    lifted = error * gain[:, None, None, None]
    start = detail_splats(lifted, total, config, backend)
    own = replace(config, row_stride=spacing_stride(total, error, config))
    splats, _ = optimize(start, lifted, detail_steps(config), own, backend)
    splats = replace(splats, colors=splats.colors / gain[:, None, None])
    return Tier(splats, rendering(splats, error, config, backend), gain, total)


def spacing_stride(budget: int, like: Tensor, config: FitConfig) -> int:
    """The stride of rows that suits the spacing of `budget` Gaussians in `like` [B, 3, H, W]."""
    return row_stride(replace(config, num_gaussians=budget), *like.shape[2:])


def detail_splats(error: Tensor, total: int, config: FitConfig, backend: Backend) -> Splats:
    """Start for an `error` [B, 3, H, W], signed and lifted: as `start.adaptive`, but dense where
    the squared error is, sized by the spacing of all `total` Gaussians, and colours from black."""
    n = config.num_gaussians
    smooth = backend.blur or blur
    squares = smooth(error.square().sum(1, keepdim=True), BLUR_PX)
    rho = density(squares.expand(-1, 3, -1, -1), n)  # of a tensor of which it takes the trace
    means = (backend.centroids or centroids)(sample_density(rho, n), rho)
    spacing = values_at(rho[:, None], means)[..., 0].mul(total / n).rsqrt()
    along = values_at(smooth(structure_tensor(error), BLUR_PX), means)
    cholesky = cholesky_along_edges(along, SCALE * spacing)
    mask = torch.ones(len(error), n, dtype=torch.bool, device=error.device)
    splats = Splats(means, cholesky, torch.zeros_like(cholesky), mask)
    return solve_colors(splats, error, DETAIL_COLOR_STEPS, config.cutoff, backend)


def sweep(tiers: list[Tier], target: Tensor, config: FitConfig, backend: Backend) -> None:
    """Refit every tier in turn, in place, to what serves all budgets from its own on, for `target`
    [B, 3, H, W]."""
    rates = {n: SWEEP_RATE * getattr(config, n) for n in ("lr_means", "lr_shape", "lr_colors")}
    careful = replace(config, relocate=False, **rates)
    errors = [error_of(tiers[: t + 1], target) for t in range(len(tiers))]
    weights = [1 / root_mean_square(error).clamp(min=MIN_RMS) for error in errors]
    for t, tier in enumerate(tiers):
        whole = sum(weights[t:])
        wanted = tier.image.clone()
        for weight, error in zip(weights[t:], errors[t:], strict=True):
            wanted.addcmul_((weight / whole)[:, None, None, None], error)
        gain = tier.gain[:, None, None]
        lifted = replace(tier.splats, colors=tier.splats.colors * gain)
        wanted *= gain[..., None]
        stride = min(SWEEP_STRIDE, spacing_stride(tier.budget, target, config))
        own = replace(careful, row_stride=stride)
        splats, _ = optimize(lifted, wanted, sweep_steps(config), own, backend)
        tier.splats = replace(splats, colors=splats.colors / gain)
        before, tier.image = tier.image, rendering(tier.splats, target, config, backend)
        change = before.sub_(tier.image)
        for error in errors[t:]:
            error += change


def error_of(tiers: list[Tier], target: Tensor) -> Tensor:
    """`target` [B, 3, H, W] minus the sum of the tiers' renderings; 0 for an image that diverged,
    whose further tiers then stay harmless."""
    error = target - tiers[0].image
    for tier in tiers[1:]:
        error -= tier.image
    finite = error.isfinite().flatten(1).all(1)
    return torch.where(finite[:, None, None, None], error, 0)


def root_mean_square(error: Tensor) -> Tensor:
    """[B, 3, H, W] to [B]."""
    return error.square().mean((1, 2, 3)).sqrt()


def rendering(splats: Splats, like: Tensor, config: FitConfig, backend: Backend) -> Tensor:
    """[B, 3, H, W] of `splats`, as large as `like`."""
    height, width = like.shape[2:]
    return backend.render(splats, height, width, config.cutoff)
