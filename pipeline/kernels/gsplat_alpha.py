"""Alpha compositing through gsplat's batched CUDA rasteriser, for models with opacities.

    I(p) = sum_i c_i a_i(p) T_i(p) + background * T_N(p),    T_i = prod_{j < i} (1 - a_j)
    a_i(p) = min(0.999, o_i exp(-1/2 (p - mu_i)^T Sigma_i^-1 (p - mu_i)))

The first Gaussian of an image is in front. Not the rendering of our shards, which is a sum with a
cutoff; the rules here are gsplat's (rasterize_to_pixels_3dgs_fwd_kernel, version 1.5): no cutoff,
but alpha below 1/255 is skipped; alpha is at most 0.999, without gradient beyond; the Gaussian that
would leave a pixel a transmittance of 1e-4 or less is not drawn there, nor is any after it.

`reference_alpha` is the dense twin with the same rules, on any device and in any float dtype.

gsplat's 3D half is left out: means, conics and opacities go to its rasteriser directly, and the
depth that it sorts by is the index. gsplat is optional (`pip install gsplat`) and compiles its
kernels on first use unless its wheel holds them; where that cannot work `load_gsplat` says why.
"""

from __future__ import annotations

import contextlib
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from splatshard.pipeline.splats import Splats, conics
from splatshard.schemas.errors import BackendError

TILE_SIZE = 16
MAX_ALPHA = 0.999
MIN_ALPHA = 1 / 255
MIN_TRANSMITTANCE = 1e-4
KEY_BITS = 32
"""Of gsplat's sort keys, for the numbers of image and tile together."""

WHEELS = "https://docs.gsplat.studio/whl"


def render_alpha(
    splats: Splats,
    opacities: Tensor,
    height: int,
    width: int,
    background: Tensor | None = None,
) -> Tensor:
    """The Gaussians composited in index order, the first in front: float32 [B, 3, H, W].

    opacities [B, N] in 0..1; background [B, 3], black if None. Differentiable with respect to
    means, cholesky, colors, opacities and background. Everything on one CUDA device. Raises
    BackendError where gsplat cannot run, ValueError for a batch that its sort keys cannot number.
    """
    gsplat = load_gsplat()
    batch, count = splats.mask.shape
    columns, rows = -(-width // TILE_SIZE), -(-height // TILE_SIZE)
    if batch.bit_length() + (columns * rows).bit_length() > KEY_BITS:
        raise ValueError(
            f"{batch} images of {columns * rows} tiles: more than gsplat can number; use fewer"
        )
    if batch * count == 0:
        return _empty(batch, height, width, background, splats.colors)
    means = splats.means.float()
    depths = torch.arange(count, dtype=torch.float32, device=means.device).expand(batch, count)
    reach = reach_px(splats, opacities)
    _, keys, order = gsplat.isect_tiles(
        means.detach(), reach, depths.contiguous(), TILE_SIZE, columns, rows
    )
    offsets = gsplat.isect_offset_encode(keys, batch, columns, rows)
    image, _ = gsplat.rasterize_to_pixels(
        means,
        conics(splats.cholesky).float(),
        splats.colors.float(),
        opacities.float(),
        width,
        height,
        TILE_SIZE,
        offsets,
        order,
        backgrounds=None if background is None else background.float(),
    )
    return image.permute(0, 3, 1, 2)


def reference_alpha(
    splats: Splats,
    opacities: Tensor,
    height: int,
    width: int,
    background: Tensor | None = None,
) -> Tensor:
    """The twin of `render_alpha`: [B, 3, H, W], dense, by autograd, in the splats' dtype and on
    their device."""
    if splats.mask.numel() == 0:
        return _empty(len(splats), height, width, background, splats.colors)
    kind = {"dtype": splats.means.dtype, "device": splats.means.device}
    x = torch.arange(width, **kind) + 0.5
    y = torch.arange(height, **kind) + 0.5
    l11, l21, l22 = splats.cholesky.unbind(-1)
    z1 = ((x - splats.means[..., 0, None]) / l11[..., None])[:, :, None, :]
    dy = (y - splats.means[..., 1, None])[:, :, :, None]
    z2 = (dy - l21[..., None, None] * z1) / l22[..., None, None]
    alpha = opacities[..., None, None] * torch.exp(-0.5 * (z1 * z1 + z2 * z2))  # [B, N, H, W]
    alpha = alpha.clamp(max=MAX_ALPHA)
    alpha = torch.where((alpha >= MIN_ALPHA) & splats.mask[:, :, None, None], alpha, 0)
    with torch.no_grad():
        drawn = (1 - alpha).cumprod(1) > MIN_TRANSMITTANCE
    alpha = torch.where(drawn, alpha, 0)
    behind = (1 - alpha).cumprod(1)
    before = torch.cat((torch.ones_like(behind[:, :1]), behind[:, :-1]), 1)
    image = torch.einsum("bnyx,bnc->bcyx", alpha * before, splats.colors)
    if background is None:
        return image
    return image + behind[:, -1:] * background[:, :, None, None]


def reach_px(splats: Splats, opacities: Tensor) -> Tensor:
    """How far from its mean, in x and y, a Gaussian's alpha reaches 1/255: int32 [B, N, 2] px.

    0 where it never does, and where the mask is False: gsplat skips those.
    """
    _, l21, l22 = splats.cholesky.unbind(-1)
    sigma = torch.stack((splats.cholesky[..., 0], torch.hypot(l21, l22)), -1)
    deviations = (2 * (opacities.clamp(max=1) / MIN_ALPHA).log()).clamp(min=0).sqrt()
    reach = (deviations[..., None] * sigma).ceil() * splats.mask[..., None]
    return reach.detach().nan_to_num(0).clamp(0, 1e6).int()


def _empty(batch: int, height: int, width: int, background: Tensor | None, like: Tensor) -> Tensor:
    image = like.new_zeros(batch, 3, height, width)
    return image if background is None else image + background[:, :, None, None]


@cache
def load_gsplat() -> Any:
    """The gsplat package with its kernels ready; may compile them, which takes minutes, once.

    Raises BackendError with what is missing and what to do.
    """
    try:
        import gsplat
    except Exception as e:  # an incompatible torch raises more than ImportError
        raise BackendError(f"gsplat cannot be imported ({e}): pip install gsplat") from e
    version = getattr(gsplat, "__version__", "of no version")
    if not hasattr(gsplat, "isect_offset_encode"):  # before 1.0, and forks of that
        raise BackendError(f"gsplat {version} has no batched rasteriser: pip install 'gsplat>=1.5'")
    if not torch.cuda.is_available():
        raise BackendError(
            f"gsplat {version} renders on CUDA only, and torch {torch.__version__} sees "
            "no CUDA device: install a CUDA build of torch on a machine with an NVIDIA GPU, or "
            "use reference_alpha"
        )
    remedy = (
        "install a CUDA toolkit with nvcc and a C++ compiler (set CUDA_HOME), of the version of "
        f"torch's CUDA, {torch.version.cuda}, or a gsplat wheel with kernels from {WHEELS}"
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it reports on standard output
            from gsplat.cuda._backend import _C  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
        raise BackendError(f"gsplat's CUDA kernels do not compile ({reason}): {remedy}") from e
    if _C is None:
        raise BackendError(
            f"gsplat {version} holds no compiled CUDA kernels, and there is no nvcc to "
            f"compile them: {remedy}"
        )
    return gsplat
