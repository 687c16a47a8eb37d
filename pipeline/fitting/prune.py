"""Which Gaussians to drop after the fit.

luminosity  the published rule (arXiv 2509.22615): an L1 penalty on the colours during the fit,
then drop
            |0.2126 R| + |0.7152 G| + |0.0722 B| < tau. It ignores how large a Gaussian is, and
            loses decibels; offered so that the claim has its base beside it.
energy      drop the share with the least sum w^2 |c|^2, the squared error that removing one alone
would
            add, then a short refit of the rest.

Both leave a different number of Gaussians per image: `mask` says which are left, and the shard
stores only those. An image always keeps at least one Gaussian.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from splatshard.pipeline.codec.pack import finite_images
from splatshard.pipeline.fitting.fit import energy, optimize
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import ConvertConfig

LUMINOSITY = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709 luma coefficients

RATES = ("lr_means", "lr_shape", "lr_colors")
REFIT_RATE = 0.3  # of the fit's step sizes: full steps from a fitted start first undo the fit


def prune(splats: Splats, target: Tensor, config: ConvertConfig, backend: Backend) -> Splats:
    """`splats` [B, N] with a smaller mask, by `config.prune`; energy also refits against `target`
    [B, 3, H, W], 0 to 1.

    Images with a Gaussian that is not finite keep all of them, as rows of a fit that diverged.
    """
    rule = config.prune
    if rule.prune == "none":
        return splats
    with torch.no_grad():
        diverged = splats.mask & ~finite_images(splats)[:, None]
        if rule.prune == "luminosity":
            kept = luminosity_mask(splats, rule.prune_threshold)
            return replace(splats, mask=kept | diverged)
        pruned = replace(splats, mask=energy_mask(splats, rule.prune_share) | diverged)
        rates = {n: REFIT_RATE * getattr(config.fit, n) for n in RATES}
        refit = replace(config.fit, relocate=False, target_psnr=None, **rates)
        return optimize(pruned, target, rule.refit_steps, refit, backend)[0]


def luminosity_mask(splats: Splats, threshold: float) -> Tensor:
    """[B, N] bool: Gaussians whose weighted absolute colour reaches `threshold`; at least the
    brightest."""
    weights = splats.colors.new_tensor(LUMINOSITY)
    luminosity = torch.where(splats.mask, splats.colors.abs() @ weights, -1)
    brightest = luminosity == luminosity.max(1, keepdim=True).values
    return splats.mask & ((luminosity >= threshold) | brightest)


def energy_mask(splats: Splats, share: float) -> Tensor:
    """[B, N] bool without the floor(share * num_gaussians) Gaussians of least energy."""
    rank = energy(splats).argsort(dim=1, stable=True).argsort(dim=1)
    drop = (splats.num_gaussians * share).long().clamp(max=splats.num_gaussians - 1)
    return splats.mask & (rank >= drop[:, None])
