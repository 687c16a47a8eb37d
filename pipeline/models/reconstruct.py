"""How far a rendering is from its image: L1, SSIM, and the features of a CLIP.

    B images, H x W px, T tokens, D width

SSIM is that of Wang et al. 2004 (doi 10.1109/TIP.2003.819861): a Gaussian window of 11 x 11 and
deviation 1.5, K1 = 0.01, K2 = 0.03, for each channel. At the border the window is cut off and its
weights scaled to a sum of 1: zero padding would see a dark frame around both images, and leaving
the border out needs images of 11 px.

The window is separable: a matrix for the rows and one for the columns. Their products are float32
whatever the precision of the rest, since variances are differences of squares; a convolution would
be TF32 by torch's default, whose rounding is as large as SSIM's constants.

Left out: LPIPS, whose weights want torchvision's networks; a CLIP's tokens stand for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.models.encoder import block_states
from splatshard.pipeline.models.patches import PatchEncoder, normalised
from splatshard.pipeline.models.pretrained import Activation, load_clip
from splatshard.schemas.errors import UsageError

RADIUS = 5
DEVIATION = 1.5
C1, C2 = 0.01**2, 0.03**2
"""For images whose white is 1."""


def reconstruction_loss(image: Tensor, target: Tensor, dssim: float) -> Tensor:
    """(1 - dssim) L1 + dssim (1 - SSIM) of [B, 3, H, W], 0 to 1: the mean over the batch. Where
    `dssim` is 0, SSIM is not computed."""
    l1 = (image - target).abs().mean()
    return l1 if dssim == 0 else (1 - dssim) * l1 + dssim * (1 - ssim(image, target).mean())


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Structural similarity [B] of [B, C, H, W] whose white is 1; 1 for equal images."""
    with torch.autocast(image.device.type, enabled=False):
        x, y = image.float(), target.float()
        mean_x, mean_y = blurred(x), blurred(y)
        var_x = blurred(x * x) - mean_x * mean_x
        var_y = blurred(y * y) - mean_y * mean_y
        cov = blurred(x * y) - mean_x * mean_y
        light = (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
        return (light * (2 * cov + C2) / (var_x + var_y + C2)).mean((1, 2, 3))


def blurred(x: Tensor) -> Tensor:
    """[B, C, H, W] under SSIM's window."""
    rows, columns = (window(n, x.device) for n in x.shape[-2:])
    return rows @ x @ columns.mT


def window(size: int, device: torch.device) -> Tensor:
    """[size, size]: row i holds the weights of pixels around i; they sum to 1."""
    i = torch.arange(size, dtype=torch.float32, device=device)
    distance = i[:, None] - i
    weights = torch.exp(-0.5 * (distance / DEVIATION) ** 2) * (distance.abs() <= RADIUS)
    return weights / weights.sum(1, keepdim=True)


def load_tower(source: str, activation: Activation | None = None) -> PatchEncoder:
    """The vision tower of a CLIP, frozen, for `perceptual_loss`; `source` and `activation` as in
    `pipeline.models.pretrained.load_clip`. Raises UsageError where it cannot be loaded."""
    tower = load_clip(source, activation=activation).vision
    if not isinstance(tower, PatchEncoder):
        raise UsageError(f"{source}: reads splats: the perceptual loss wants an RGB model")
    return tower.eval().requires_grad_(False)


def perceptual_loss(tower: PatchEncoder, image: Tensor, target: Tensor) -> Tensor:
    """|a - b|^2 of the tokens' unit vectors, the mean over batch, blocks and tokens. Images
    [B, 3, H, W], 0 to 1, are resized to what the tower wants."""
    with torch.no_grad():
        wanted = _features(tower, target)
    found = _features(tower, image)
    pairs = zip(found, wanted, strict=True)
    return torch.stack([(a - b).square().sum(-1).mean() for a, b in pairs]).mean()


def _features(tower: PatchEncoder, image: Tensor) -> list[Tensor]:
    side = tower.config.image_size
    if image.shape[-2:] != (side, side):
        image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
    states = block_states(tower, tower.embeddings(normalised(image)), False)
    return [F.normalize(x_BTD.float(), dim=-1) for x_BTD in states]
