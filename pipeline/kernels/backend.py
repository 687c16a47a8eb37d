"""Kernel backends: what one offers; select.py chooses one.

A backend has two jobs: `render`, which autograd can go through, and the fused `loss_and_grad`,
which the fitting loop calls thousands of times and which never builds an autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig


@dataclass(frozen=True)
class LossAndGrad:
    """Mean squared error of B images and its gradient.

    loss      [B]        mean of (rendering - target)^2 over channels and pixels
    means     [B, N, 2]  d loss[b] / d means[b]; 0 where the mask is False
    cholesky  [B, N, 3]  d loss[b] / d cholesky[b]
    colors    [B, N, 3]  d loss[b] / d colors[b]
    """

    loss: Tensor
    means: Tensor
    cholesky: Tensor
    colors: Tensor


class Step(Protocol):
    """One step of the fit against a fixed target; the twin is `fit.TorchStep`.

    step(splats [B, N], (moment1, moment2) [B, N, 8], phase, moved_far, beta1, rate, correction2) ->
    splats after Adam at the gradient on the rows `phase`, `phase` + stride, ...; splats and moments
    may be changed in place. moved_far: the splats are not those of the last step
    """

    def step(
        self,
        splats: Splats,
        moments: tuple[Tensor, Tensor],
        phase: int,
        moved_far: bool,
        beta1: float,
        rate: float,
        correction2: float,
    ) -> Splats: ...


@dataclass(frozen=True)
class Backend:
    """A named pair of kernels on one device.

    render(splats, height, width, cutoff) -> [B, 3, H, W]
    loss_and_grad(splats, target [B, 3, H, W], cutoff) -> LossAndGrad

    and optionally, where the torch path or the CPU's kernel would be slow or on another device:

    make_step(target, config, stride) -> Step: the fused step of the fit on every `stride`-th row
    centroids(means [B, N, 2], rho [B, H, W]) -> [B, N, 2]: see `voronoi.centroids`
    blur(image [B, C, H, W], sigma) -> [B, C, H, W]: see `blur.blur`
    squared_errors(splats, target, behind, cutoff) -> [2, B]: see `quantise.squared_errors`
    color_change(splats, target, cutoff) -> [B, N, 3], [B], [B, N]: see `overlaps.color_change`
    """

    name: str
    device: torch.device
    render: Callable[[Splats, int, int, float], Tensor]
    loss_and_grad: Callable[[Splats, Tensor, float], LossAndGrad]
    make_step: Callable[[Tensor, FitConfig, int], Step] | None = None
    centroids: Callable[[Tensor, Tensor], Tensor] | None = None
    blur: Callable[[Tensor, float], Tensor] | None = None
    squared_errors: Callable[[Splats, Tensor, Tensor | None, float], Tensor] | None = None
    color_change: Callable[[Splats, Tensor, float], tuple[Tensor, Tensor, Tensor]] | None = None
