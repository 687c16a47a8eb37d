"""Kernel backends: what one offers, and choosing one.

A backend has two jobs: `render`, which autograd can go through, and the fused `loss_and_grad`,
which the fitting loop calls thousands of times and which never builds an autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.splats import Splats
from schemas.errors import BackendError


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


@dataclass(frozen=True)
class Backend:
    """A named pair of kernels on one device.

    render(splats, height, width, cutoff) -> [B, 3, H, W]
    loss_and_grad(splats, target [B, 3, H, W], cutoff) -> LossAndGrad
    """

    name: str
    device: torch.device
    render: Callable[[Splats, int, int, float], Tensor]
    loss_and_grad: Callable[[Splats, Tensor, float], LossAndGrad]


def select_backend(name: str) -> Backend:
    """auto is triton where there is a CUDA device and cpu elsewhere; a named backend never falls
    back.

    Raises BackendError when the named backend cannot run here.
    """
    if name == "auto":
        name = "cpu"  # the Triton backend is a later step; auto will prefer it on CUDA
    if name == "cpu":
        from pipeline.kernels import cpu

        return Backend(name, torch.device("cpu"), cpu.render, cpu.loss_and_grad)
    if name == "reference":
        from pipeline.kernels import reference

        return Backend(name, torch.device("cpu"), reference.render, reference.loss_and_grad)
    if name == "triton":
        raise BackendError("--backend triton: not in this version yet; use --backend cpu")
    raise BackendError(f"--backend {name}: choose auto, cpu, triton or reference")
