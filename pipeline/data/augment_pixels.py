"""The plan of augment.py done to pixels: the twin of `augment_with`, for models that read images.

    resample by the inverse map -> colours -> contrast

The same plan, so that arms of a comparison see the same crops and colours. Between pixel centres
the picture is interpolated (bilinear); like splats it is sampled at points, not low-pass filtered,
and black beyond its border. Values are not clamped, as those of splats are not.

Left out: dropout, which has no counterpart in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.data.augment import LUMA, Plan, changes_colors, constant
from splatshard.schemas.errors import UsageError
from splatshard.schemas.train import AugmentConfig


def check_pixels(config: AugmentConfig) -> None:
    """Raises UsageError for what cannot be done to pixels."""
    if config.dropout:
        raise UsageError(
            f"augment.dropout is {config.dropout}, but the model reads images, which have no "
            "Gaussians to leave out: set augment.dropout to 0"
        )


def augment_pixels(pixels: Tensor, plan: Plan, config: AugmentConfig) -> Tensor:
    """Images float [B, 3, H, W], white is 1, augmented by `plan` to [B, 3, config.height,
    config.width]. Raises UsageError for dropout."""
    check_pixels(config)
    places = sources(plan, config, pixels.shape[3], pixels.shape[2])
    pixels = F.grid_sample(pixels, places, "bilinear", "zeros", align_corners=False)
    if changes_colors(config):
        pixels = torch.einsum("bij,bjhw->bihw", plan.colors, pixels)
    if config.contrast:
        factor = plan.contrast[:, None, None, None]
        gray = pixels.mean((2, 3)) @ constant(LUMA, pixels)
        pixels = factor * pixels + (1 - factor) * gray[:, None, None, None]
    return pixels


def sources(plan: Plan, config: AugmentConfig, width: int, height: int) -> Tensor:
    """Where each pixel of the augmented images lies in those of `width` x `height` px:
    [B, config.height, config.width, 2], x and y from -1 to 1 between the borders."""
    kind = {"dtype": plan.matrix.dtype, "device": plan.matrix.device}
    y, x = torch.meshgrid(
        torch.arange(config.height, **kind) + 0.5,
        torch.arange(config.width, **kind) + 0.5,
        indexing="ij",
    )
    centres = torch.stack((x, y), -1).flatten(0, 1)  # [P, 2]
    inverse = torch.linalg.inv_ex(plan.matrix).inverse  # inv itself would wait for the GPU
    places = (centres - plan.offset[:, None]) @ inverse.mT
    places = 2 * places / constant((width, height), places) - 1
    return places.unflatten(1, (config.height, config.width))
