"""What a recipe does to a batch of images of one size: fit them, in one of three ways, then prune.

fit          --num-gaussians, or --gaussians-per-megapixel
fit_nested   --nested
fit_growing  --target-psnr with --max-gaussians
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.fitting.grow import fit_growing
from splatshard.pipeline.fitting.nested import fit_nested
from splatshard.pipeline.fitting.prune import prune
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import ConvertConfig, FitConfig


def fit_and_prune(target: Tensor, config: ConvertConfig, backend: Backend) -> tuple[Splats, Tensor]:
    """Splats [B, N] of `target` [B, 3, H, W] (0 to 1, on the backend's device), and the steps
    taken, int64 [B]. An image has those of its Gaussians that the mask says."""
    config = replace(config, fit=config.fit.sized(*target.shape[2:]))
    splats, steps = fit_images(target, config.fit, backend)
    return prune(splats, target, config, backend), steps


def fit_images(target: Tensor, config: FitConfig, backend: Backend) -> tuple[Splats, Tensor]:
    """As `fit_and_prune`, without pruning: `target` [B, 3, H, W] to splats [B, N] and steps [B]."""
    config = config.sized(*target.shape[2:])
    if config.nested:
        return fit_nested(target, config.budgets, config, backend)
    if config.max_gaussians is not None:
        return fit_growing(target, config, backend)
    return fit(target, config, backend)
