"""The resampler: tokens of N Gaussians, any N, to T tokens by cross-attention from T latents.

    B images, N Gaussians, T latents, H heads, E width of a head, D width, J bias features

After the Perceiver (arXiv 2103.03206), as arXiv 2509.22615 has it. Ours: a latent has an anchor,
a place on an even grid over the image, and attention falls with the distance from it:

    logit(t, n) = q_t k_n / sqrt(E) - slope_h |anchor_t - mean_n|^2

with a slope per head, learned, in units of the anchors' spacing. Without it, which Gaussians are
near a place must be learned from data, and little data do not teach it.

The bias never exists as [B, H, T, N] (at N = 3136 and a batch of 256 that would be 2.5 GB in
bfloat16). It is a sum of J products of a number of the latent and a number of the Gaussian,

    -|a - m|^2 = -|a|^2 + (2 a_x, 2 a_y, 1) . (m_x, m_y, -|m|^2)    the first is equal for all n,

so it goes into the dot product as J more columns of queries and keys, and the mask of padding
with it: -1e4 in the column that meets the 1. exp(-1e4) is exactly 0. PyTorch's fused attention
then runs without a mask. In 16-bit floats each number is split in two (hi + lo, three products of
four), which keeps the error near 2^-16; one rounding alone moves a logit by 0.2.

`dense_bias` is the readable twin.

To its latents are added the local tokens of local.py, a patch embedding of the splats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splatshard.pipeline.models.local import LocalTokens
from splatshard.pipeline.splats import Splats, covariances
from splatshard.schemas.model import ResamplerConfig

MASKED = -1e4  # logit of padding; float16 holds it
LATENT_STD = 0.1  # of the latents at the start; more outweighs what the Gaussians say


class Resampler(nn.Module):
    """Cross-attention layers from anchored latents; see the module's docstring."""

    anchors: Tensor
    spacing: Tensor

    def __init__(self, config: ResamplerConfig, width: int, tokens: int) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(LATENT_STD * position_codes(tokens, width))
        self.norm = nn.LayerNorm(width)
        layers = (ResamplerLayer(config, width) for _ in range(config.layers))
        self.layers = nn.ModuleList(layers)
        self.local: LocalTokens | None = None
        if config.neighbours:
            self.local = LocalTokens(config.neighbours, config.frequencies, width)
        self.register_buffer("anchors", anchors(tokens), persistent=False)
        self.register_buffer("spacing", 2 / torch.tensor(grid(tokens)), persistent=False)

    def forward(
        self,
        tokens_BND: Tensor,
        splats: Splats,
        means_BN2: Tensor,
        sizes_B2: Tensor,
        tokens: int | None = None,
    ) -> Tensor:
        """[B, T, D]. `means_BN2` in [-1, 1], `sizes_B2` the images' width and height in px;
        `tokens` fewer latents than there are, evenly chosen."""
        latents_TD, anchors_T2, spacing_2 = self.latents, self.anchors, self.spacing
        if tokens is not None and tokens != len(latents_TD):
            chosen = evenly(tokens, len(latents_TD), latents_TD.device)
            spacing_2 = spacing_2 * math.sqrt(len(latents_TD) / tokens)
            latents_TD, anchors_T2 = latents_TD[chosen], anchors_T2[chosen]
        with torch.autocast(means_BN2.device.type, enabled=False):
            places_T2, means_BN2 = anchors_T2 / spacing_2, means_BN2 / spacing_2
            cov_BN3 = in_spacings(covariances(splats.cholesky), sizes_B2, spacing_2)
            latent_TJ, gaussian_BNJ = bias_features(
                self.config.bias, places_T2, means_BN2, cov_BN3, splats.mask
            )
        x_BTD = latents_TD.expand(len(tokens_BND), -1, -1)
        if self.local is not None:
            x_BTD = x_BTD + self.local(splats.colors, places_T2, means_BN2, cov_BN3)
        tokens_BND = self.norm(tokens_BND)
        for layer in self.layers:
            x_BTD = layer(x_BTD, tokens_BND, latent_TJ, gaussian_BNJ)
        return x_BTD

    @torch.no_grad()
    def silence(self) -> None:
        """Set the layers' last weights to 0: latents and local tokens go through unchanged."""
        for layer in cast("Iterable[ResamplerLayer]", self.layers):
            last = [layer.out_proj] if layer.mlp is None else [layer.out_proj, layer.mlp[-1]]
            for values in nn.ModuleList(last).parameters():
                values.zero_()


class ResamplerLayer(nn.Module):
    """Pre-norm cross-attention and MLP."""

    def __init__(self, config: ResamplerConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.log_slope: nn.Parameter | None = None
        if config.bias != "none":
            self.log_slope = nn.Parameter(torch.linspace(0.7, -3.5, config.heads))
        self.mlp: nn.Sequential | None = None
        if config.mlp_ratio:
            hidden = round(width * config.mlp_ratio)
            self.norm2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, x_BTD: Tensor, tokens_BND: Tensor, latent_TJ: Tensor, gaussian_BNJ: Tensor
    ) -> Tensor:
        """[B, T, D]; the last two as `bias_features` gives them."""
        x_BTD = x_BTD + self.attend(self.norm1(x_BTD), tokens_BND, latent_TJ, gaussian_BNJ)
        if self.mlp is not None:
            x_BTD = x_BTD + self.mlp(self.norm2(x_BTD))
        return x_BTD

    def attend(
        self, x_BTD: Tensor, tokens_BND: Tensor, latent_TJ: Tensor, gaussian_BNJ: Tensor
    ) -> Tensor:
        """Attention from latents to Gaussians, [B, T, D]."""
        q, k, v = self.q_proj(x_BTD), self.k_proj(tokens_BND), self.v_proj(tokens_BND)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        size = q.shape[-1]
        # scaled by sqrt(size), as attention divides by it
        latent_HTJ = latent_TJ * math.sqrt(size) * self.slopes(latent_TJ)
        q_bias, k_bias = split(latent_HTJ, gaussian_BNJ, q.dtype)
        pad = -(size + q_bias.shape[-1]) % 8  # fused kernels want multiples of 8
        q = torch.cat((q, F.pad(q_bias, (0, pad)).expand(len(q), -1, -1, -1)), -1)
        k = torch.cat((k, F.pad(k_bias, (0, pad))[:, None].expand(-1, self.heads, -1, -1)), -1)
        v = F.pad(v, (0, k.shape[-1] - size))
        y = F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def slopes(self, latent_TJ: Tensor) -> Tensor:
        """[H, 1, J]: the learned slope, but 1 for the last feature, the mask's."""
        one = latent_TJ.new_ones(self.heads, 1, latent_TJ.shape[-1])
        if self.log_slope is None:
            return one
        return torch.cat(
            (self.log_slope.float().exp()[:, None, None] * one[..., :-1], one[..., -1:]), -1
        )


def bias_features(
    kind: str, places_T2: Tensor, means_BN2: Tensor, cov_BN3: Tensor, mask_BN: Tensor
) -> tuple[Tensor, Tensor]:
    """[T, J] and [B, N, J] whose products, summed over J, are the bias up to a constant of the
    latent; the last feature is the mask's. Lengths in units of the anchors' spacing."""
    one_T = torch.ones_like(places_T2[:, 0])
    mask_BN = torch.where(mask_BN, 0.0, MASKED)
    if kind == "none":
        return one_T[:, None], mask_BN[..., None]
    ax, ay = places_T2.unbind(-1)
    mx, my = means_BN2.unbind(-1)
    if kind == "distance":
        latent = (2 * ax, 2 * ay, one_T, one_T)
        gaussian = (mx, my, -(mx * mx + my * my), mask_BN)
    else:
        a, b, c = window_conics(cov_BN3).unbind(-1)
        latent = (-ax * ax, -2 * ax * ay, -ay * ay, 2 * ax, 2 * ay, one_T, one_T)
        far = -(a * mx * mx + 2 * b * mx * my + c * my * my)
        gaussian = (a, b, c, a * mx + b * my, b * mx + c * my, far, mask_BN)
    return torch.stack(latent, -1), torch.stack(gaussian, -1)


def dense_bias(kind: str, places_T2: Tensor, means_BN2: Tensor, cov_BN3: Tensor) -> Tensor:
    """What `bias_features` stands for, [B, T, N], before slopes and mask: the twin that tests
    compare."""
    dx, dy = (places_T2[None, :, None] - means_BN2[:, None]).unbind(-1)
    if kind == "none":
        return torch.zeros_like(dx)
    if kind == "distance":
        return -(dx * dx + dy * dy)
    a, b, c = window_conics(cov_BN3)[:, None].unbind(-1)
    return -(a * dx * dx + 2 * b * dx * dy + c * dy * dy)


def window_conics(cov_BN3: Tensor) -> Tensor:
    """[B, N, 3] inverses of the covariances plus a unit circle."""
    xx, xy, yy = cov_BN3.unbind(-1)
    xx, yy = xx + 1, yy + 1
    return torch.stack((yy, -xy, xx), -1) / (xx * yy - xy * xy)[..., None]


def in_spacings(cov_BN3: Tensor, sizes_B2: Tensor, spacing_2: Tensor) -> Tensor:
    """Covariances [B, N, 3] in px^2 to units of the anchors' spacing, of images of `sizes_B2`
    px."""
    sx, sy = (2 / (sizes_B2 * spacing_2)).unbind(-1)
    return cov_BN3 * torch.stack((sx * sx, sx * sy, sy * sy), -1)[:, None]


def split(q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns in `dtype` whose dot product is that of `q` [..., J] and `k` [..., J], float32."""
    if dtype == torch.float32:
        return q, k
    q_hi, k_hi = q.to(dtype), k.to(dtype)
    q_lo, k_lo = (q - q_hi.float()).to(dtype), (k - k_hi.float()).to(dtype)
    return torch.cat((q_hi, q_hi, q_lo), -1), torch.cat((k_hi, k_lo, k_hi), -1)


def grid(count: int) -> tuple[int, int]:
    """Columns and rows of the most nearly square grid of `count` cells."""
    rows = next(r for r in range(math.isqrt(count), 0, -1) if count % r == 0)
    return count // rows, rows


def anchors(count: int) -> Tensor:
    """[count, 2] centres of the cells of `grid(count)` over [-1, 1], row by row."""
    columns, rows = grid(count)
    i = torch.arange(count)
    x, y = (i % columns + 0.5) / columns, (i // columns + 0.5) / rows
    return torch.stack((x, y), -1) * 2 - 1


def position_codes(count: int, width: int) -> Tensor:
    """[count, width] near deviation 1: a random projection of waves over the anchors' places, so
    that latents differ by where they are from the first step on."""
    waves = 0.5 * math.pi * 2.0 ** torch.arange(math.ceil(math.log2(count) / 2) + 1)
    phase = (anchors(count)[..., None] * waves).flatten(1)
    codes = torch.cat((phase.sin(), phase.cos()), 1)
    return codes @ torch.randn(codes.shape[1], width) / math.sqrt(codes.shape[1] / 2)


def evenly(count: int, total: int, device: torch.device) -> Tensor:
    """Indices [count] at even steps through `total`."""
    assert 1 <= count <= total, f"{count} tokens of {total} latents"
    return torch.arange(count, device=device) * total // count
