"""The stem: each Gaussian's parameters to one token.

    B images, N Gaussians, K bands, F features, D width

    means, scales, angle, colours -> log, Fourier -> LayerNorm -> Linear, GELU, Linear -> tokens

After arXiv 2509.22615 (log transform, Fourier features, norm, linear), whose constants are not
published; ours: means to [-1, 1] by the image's size, 8 bands; log of the two standard deviations
over the image's side; (sin 2a, cos 2a) of the larger axis' angle a, which repeats after half a
turn, or with `angle` weighted these two by how far the Gaussian is from round; colours
standardised. So shards of 64 px and of 224 px are alike to the model.

Padding is replaced before anything is computed of it: whatever it holds, NaN too, nothing of it
goes on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from splatshard.pipeline.splats import Splats, covariances
from splatshard.schemas.model import StemConfig

Triple = tuple[float, float, float]


class SplatStem(nn.Module):
    """Gaussians to tokens; see the module's docstring."""

    def __init__(self, config: StemConfig, width: int) -> None:
        super().__init__()
        self.config = config
        features = 2 * (1 + 2 * config.bands) + 2 + 2 + 3
        self.norm = nn.LayerNorm(features)
        if config.hidden:
            self.projection: nn.Module = nn.Sequential(
                nn.Linear(features, config.hidden), nn.GELU(), nn.Linear(config.hidden, width)
            )
        else:
            self.projection = nn.Linear(features, width)

    def forward(self, splats: Splats, means_BN2: Tensor, side_B: Tensor) -> Tensor:
        """Tokens [B, N, D]. `splats` without padding's values (see `without_padding`), `means_BN2`
        in [-1, 1], `side_B` the images' side in px."""
        # Fourier features reach a phase of 128 pi: in bfloat16 they would be noise
        with torch.autocast(means_BN2.device.type, enabled=False):
            x_BNF = features(splats, means_BN2, side_B, self.config)
        return self.projection(self.norm(x_BNF))


def features(splats: Splats, means_BN2: Tensor, side_B: Tensor, config: StemConfig) -> Tensor:
    """float32 [B, N, F]: positions, their Fourier features, log scales, angle, colours."""
    waves_BN2K = means_BN2[..., None] * wavenumbers(config.bands, means_BN2)
    xx, xy, yy = covariances(splats.cholesky).unbind(-1)
    half, mean_variance = (xx - yy) / 2, (xx + yy) / 2
    # of a circle hypot has no gradient but NaN
    radius = (half * half + xy * xy + (1e-6 * mean_variance).square()).sqrt()
    major = mean_variance + radius
    determinant = (splats.cholesky[..., 0] * splats.cholesky[..., 2]).square()
    variances_BN2 = torch.stack((major, determinant / major), -1)
    log_scales_BN2 = variances_BN2.log() / 2 - side_B.log()[:, None, None]
    # a circle has no angle: there both go to 0 instead of to whatever rounding says
    length = mean_variance if config.angle == "weighted" else radius + 1e-6 * major
    angle_BN2 = torch.stack((xy / length, half / length), -1)
    colors_BN3 = standardised(splats.colors, config.color_mean, config.color_std, -1)
    return torch.cat(
        (
            means_BN2,
            waves_BN2K.sin().flatten(2),
            waves_BN2K.cos().flatten(2),
            (log_scales_BN2 - config.log_scale_mean) / config.log_scale_std,
            angle_BN2,
            colors_BN3,
        ),
        -1,
    )


def standardised(x: Tensor, mean: Triple, std: Triple, dim: int) -> Tensor:
    """(x - mean) / std of each of the three channels along `dim` of `x` [..., 3, ...], with numbers
    as Python has them: a tensor of them would be copied to the device at each call, and wait for a
    GPU's work."""
    channels = zip(x.unbind(dim), mean, std, strict=True)
    return torch.stack([(channel - m) / s for channel, m, s in channels], dim)


def wavenumbers(bands: int, like: Tensor) -> Tensor:
    """[bands]: pi 2^k for k below `bands`, in the dtype and on the device of `like`."""
    return math.pi * 2.0 ** torch.arange(bands, device=like.device, dtype=like.dtype)


def without_padding(splats: Splats) -> Splats:
    """Splats [B, N] as float32, every padding entry a black unit circle at the origin, whatever it
    was."""
    mask = splats.mask[..., None]
    circle = (torch.arange(3, device=mask.device) != 1).float()  # l11 and l22 are 1, l21 is 0
    return Splats(
        torch.where(mask, splats.means.float(), 0.0),
        torch.where(mask, splats.cholesky.float(), circle),
        torch.where(mask, splats.colors.float(), 0.0),
        splats.mask,
    )


def normalised_means(means_BN2: Tensor, heights_B: Tensor, widths_B: Tensor) -> Tensor:
    """Means [B, N, 2] in px to [-1, 1] over the image (beyond where Gaussians hang over the
    border), by the images' sizes in px, [B]."""
    size_B2 = torch.stack((widths_B, heights_B), -1).to(means_BN2.dtype)
    return 2 * means_BN2 / size_B2[:, None] - 1
