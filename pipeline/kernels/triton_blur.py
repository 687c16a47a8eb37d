"""Gaussian blur on the GPU; the twin is `blur.blur`.

The same taps and the same order of sums, so the result differs by rounding only: here weights are
exp2 of the distance, computed as they are needed, and their sum divides at the end. No tables, so
nothing that another stream would have to wait for. One kernel, launched along the rows and then
along the columns; a program has BLOCK successive pixels of one plane. No atomics: the result does
not depend on timing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from splatshard.pipeline.kernels.blur import radius
from splatshard.pipeline.kernels.triton_launch import cdiv, launch

BLOCK, WARPS = 1024, 4
"""Pixels per program, 8 per thread: some rows of a picture, so that along the columns few taps are
outside."""


def blur(image: Tensor, sigma: float) -> Tensor:
    """`image` [B, C, H, W] float32 blurred by `sigma` px, border repeated; a new tensor."""
    image = image.contiguous()
    rows, blurred = torch.empty_like(image), torch.empty_like(image)
    if not image.numel():
        return blurred
    batch, channels, height, width = image.shape
    blocks = cdiv(height * width, BLOCK)
    falloff = 0.5 * math.log2(math.e) / sigma**2
    for source, out, length, stride in ((image, rows, width, 1), (rows, blurred, height, width)):
        launch(
            blur_kernel, batch * channels * blocks,
            source, out, falloff, radius(sigma), height * width, blocks, length, stride,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return blurred


# sizes and radii vary: 1 and multiples of 16 are no versions of their own
@triton.jit(do_not_specialize=["radius", "size", "blocks", "length", "stride"])
def blur_kernel(image, blurred, falloff, radius, size, blocks, length, stride, BLOCK: tl.constexpr):
    """One pass over planes of `size` px, along an axis of `length` px that are `stride` apart; a
    pixel k px away weighs 2^(-falloff k^2)."""
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64) * size
    pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = pixel < size
    place = pixel // stride % length
    total = tl.load(image + plane + pixel, live, 0)
    whole = 1.0
    for k in range(1, radius + 1):
        weight = tl.exp2(-falloff * k * k)
        before = pixel - tl.minimum(k, place) * stride
        after = pixel + tl.minimum(k, length - 1 - place) * stride
        both = tl.load(image + plane + before, live, 0) + tl.load(image + plane + after, live, 0)
        total += weight * both
        whole += 2 * weight
    tl.store(blurred + plane + pixel, total / whole, live)
