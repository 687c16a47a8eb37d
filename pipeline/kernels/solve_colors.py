"""Colours for Gaussians that stay where they are: least squares, by any backend's gradient."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.splats import Splats


def solve_colors(
    splats: Splats,
    target: Tensor,
    steps: int,
    cutoff: float,
    backend: Backend,
    gradient: Tensor | None = None,
) -> Splats:
    """Splats [B, N] with least-squares colours for `target` [B, 3, H, W], of fixed geometry, by
    `steps` of preconditioned conjugate gradients; `gradient` [B, N, 3] is that of the loss, where
    it is known.

    The rendering is A c, so the loss gradient at c is 2/(3HW) A^T (A c - I), and A^T A p is the
    gradient at p for a black target: the fused kernel is all that is needed. Preconditioner: the
    squared norm of each Gaussian, pi l11 l22 (Saad, Iterative Methods for Sparse Linear Systems,
    alg. 9.1).
    """
    height, width = target.shape[2:]
    black = target.new_zeros(target.shape)
    norm = square_norm(splats.cholesky)[..., None] * (2 / (3 * height * width))
    colors = splats.colors.clone()
    if gradient is None:
        gradient = backend.loss_and_grad(splats, target, cutoff).colors
    residual = -gradient
    direction = residual / norm
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        applied = backend.loss_and_grad(replace(splats, colors=direction), black, cutoff).colors
        step = energy / (direction * applied).sum(1, keepdim=True).clamp(min=1e-30)
        colors += step * direction
        residual -= step * applied
        scaled = residual / norm
        previous, energy = energy, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + energy / previous.clamp(min=1e-30) * direction
    return replace(splats, colors=colors)


def square_norm(cholesky: Tensor) -> Tensor:
    """Integral of a Gaussian's squared weight over the plane, pi l11 l22 in px^2: [..., 3] to
    [...]."""
    return math.pi * cholesky[..., 0] * cholesky[..., 2]
