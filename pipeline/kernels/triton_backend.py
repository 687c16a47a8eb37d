"""The Triton backend: `render` with autograd, `loss_and_grad`, and the fused step of the fit.

The host's side of triton_lists.py and triton_kernels.py: shapes, buffers, launches. Nothing here
waits for the device. Lists are fresh for every `render` and `loss_and_grad`; the fused step
rebuilds them with a margin every LISTS_EVERY steps.

Without a CUDA device the same kernels run in Triton's interpreter (TRITON_INTERPRET=1 in the
environment before Triton is imported): thousands of times slower, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from splatshard.pipeline.kernels import triton_kernels
from splatshard.pipeline.kernels.backend import LossAndGrad
from splatshard.pipeline.kernels.triton_launch import WARP, cdiv, launch
from splatshard.pipeline.kernels.triton_lists import RATIO, TILE, TileLists, tile_lists
from splatshard.pipeline.splats import Splats, bounds
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import BackendError

LISTS_EVERY = 2
"""Steps that one set of tile lists serves. Building both levels costs a fifth of a step's
instructions at N = 400 and a third at 4900 (benchmarks/gpu_counts.py).
Replayed over CPU fits of three photographs (400 to 4900 Gaussians, 10 to 100 steps): with the
margin of STALE_GROW, 0.1 % to 4 % of the Gaussians overhang their listed box (average over steps; a
third right after the start), none where its weight is above exp(-2.5^2 / 2) = 4 %. Serving 4 steps
with a margin of 1.25, up to 15 % do."""

ORDER_EVERY = 8
"""Steps that one order of the Gaussians serves. Windows change slowly: an order of up to 8 steps
ago costs the backward kernel 3 % more instructions than one of the same step, up to 16 steps 6 %
(replayed over CPU fits; benchmarks/gpu_counts.py). What a sort costs a GPU is not measured."""


def device() -> torch.device:
    """Where the kernels run: the CUDA device, or the CPU under Triton's interpreter.

    Raises BackendError where there is neither.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    raise BackendError("--backend triton: no CUDA device: use --backend cpu")


def render(splats: Splats, height: int, width: int, cutoff: float = 3.0) -> Tensor:
    """The sum of the Gaussians, float32 [B, 3, H, W], differentiable in means, cholesky and colors;
    see `reference.render`, the twin of this."""
    return _Render.apply(
        splats.means, splats.cholesky, splats.colors, splats.mask, height, width, cutoff
    )


def loss_and_grad(splats: Splats, target: Tensor, cutoff: float = 3.0) -> LossAndGrad:
    """See `LossAndGrad` and `reference.loss_and_grad`. `target` is float32 [B, 3, H, W]."""
    splats, target = _ready(splats), target.detach().contiguous()
    residual = _channels_last(target)
    height, width = target.shape[2:]
    lists = tile_lists(splats, height, width, cutoff)
    loss = _loss(splats, lists, cutoff, residual, target)
    gradient = splats.means.new_empty(*splats.mask.shape, 8)
    order = by_window(splats, height, width, cutoff)
    _backward(splats, residual, order, cutoff, 2 / target.shape[1:].numel(), False, gradient)
    means, cholesky, colors = gradient.split((2, 3, 3), -1)
    return LossAndGrad(loss=loss, means=means, cholesky=cholesky, colors=colors)


class FusedStep:
    """The fast twin of `fit.TorchStep`: every buffer is kept, splats and moments are updated in
    place."""

    def __init__(self, target: Tensor, config: FitConfig, stride: int) -> None:
        self.target, self.config, self.stride = target.contiguous(), config, stride
        self.lists: TileLists | None = None
        self.order: Tensor | None = None
        self.lists_age = self.order_age = 0
        self.gradient: Tensor | None = None

    def step(
        self,
        splats: Splats,
        moments: tuple[Tensor, Tensor],
        phase: int,
        moved_far: bool,
        beta1: float,
        rate: float,
        correction2: float,
    ) -> Splats:
        """One Adam step, in place, of contiguous splats [B, N] and moments [B, N, 8]; see
        `fit.TorchStep.step`."""
        config, (whole, width) = self.config, self.target.shape[2:]
        height = cdiv(whole - phase, self.stride)
        if self.lists is None or moved_far or self.lists_age >= LISTS_EVERY:
            # as many tiles for every phase: of the tallest of their pictures
            size = (cdiv(whole, self.stride), width)
            self.lists = tile_lists(
                splats, *size, config.cutoff, True, self.lists, self.stride, phase
            )
            self.lists_age = 0
        if self.order is None or moved_far or self.order_age >= ORDER_EVERY:
            self.order = by_window(splats, whole, width, config.cutoff)
            self.order_age = 0
        self.lists_age += 1
        self.order_age += 1
        if self.gradient is None:
            self.gradient = splats.means.new_empty(*splats.mask.shape, 8)
        residual = self.target.new_empty(len(splats), height, width, 3)
        rows = (self.stride, phase)
        _forward(splats, self.lists, config.cutoff, residual, self.target, rows)
        scale = 2 / (3 * height * width)
        _backward(
            splats, residual, self.order, config.cutoff, scale, config.whitened, self.gradient, rows
        )
        size = (whole, width)
        _adam(splats, self.gradient, moments, config, size, beta1, rate, correction2)
        return splats


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, cholesky, colors, mask, height, width, cutoff):
        splats = _ready(Splats(means, cholesky, colors, mask))
        image = splats.means.new_empty(len(splats), 3, height, width)
        _forward(splats, tile_lists(splats, height, width, cutoff), cutoff, image, None)
        ctx.save_for_backward(splats.means, splats.cholesky, splats.colors, splats.mask)
        ctx.cutoff = cutoff
        return image

    @staticmethod
    def backward(ctx, grad):
        splats = Splats(*ctx.saved_tensors)
        gradient = splats.means.new_empty(*splats.mask.shape, 8)
        field = grad.permute(0, 2, 3, 1).contiguous()
        height, width = field.shape[1:3]
        order = by_window(splats, height, width, ctx.cutoff)
        _backward(splats, field, order, ctx.cutoff, 1.0, False, gradient)
        return (*gradient.split((2, 3, 3), -1), None, None, None, None)


def _ready(splats: Splats) -> Splats:
    floats = (splats.means, splats.cholesky, splats.colors)
    means, cholesky, colors = (x.detach().float().contiguous() for x in floats)
    return Splats(means, cholesky, colors, splats.mask.contiguous())


def _loss(
    splats: Splats, lists: TileLists, cutoff: float, residual: Tensor, target: Tensor
) -> Tensor:
    """The loss [B]; the residual is put into `residual` [B, H, W, 3]."""
    squares = _forward(splats, lists, cutoff, residual, target)
    loss = residual.new_empty(len(squares))
    scale = 1 / target.shape[1:].numel()
    launch(
        triton_kernels.loss_kernel, len(squares),
        squares, loss, lists.tiles, scale, BLOCK=128, **WARP,
    )  # fmt: skip
    return loss


def _forward(
    splats: Splats,
    lists: TileLists,
    cutoff: float,
    out: Tensor,
    target: Tensor | None,
    rows: tuple[int, int] = (1, 0),
) -> Tensor:
    """Draw into `out` [B, 3, H, W]; with a target, put the residual into `out` [B, H, W, 3] and
    return each tile's sum of its squares [B, tiles]. `rows`: stride and phase of those that `out`
    has."""
    batch, n = splats.mask.shape
    size = out.shape[2:] if target is None else out.shape[1:3]
    whole = size[0] if target is None else target.shape[2]
    squares = out.new_empty(batch, lists.tiles)
    launch(
        triton_kernels.forward_kernel, batch * lists.tiles,
        splats.means, splats.cholesky, splats.colors, splats.mask,
        out if target is None else target, out, squares, *lists.arguments,
        n, *size, cutoff, whole, *rows,
        TILE=TILE, RATIO=RATIO, CAPACITY=lists.fine.shape[2], COARSE_CAPACITY=lists.coarse.shape[2],
        GROUP=triton_kernels.GROUP, RESIDUAL=target is not None, **WARP,
    )  # fmt: skip
    return squares


def windows(splats: Splats, height: int, width: int, cutoff: float) -> Tensor:
    """Pixels [B, N] that the backward kernel visits for each Gaussian, 0 for one that draws
    nothing: its window as the kernel has it."""
    x, y = splats.means.unbind(-1)
    l11, l21, l22 = splats.cholesky.unbind(-1)
    sy = torch.hypot(l21, l22)
    half_x, half_y = cutoff * l11 * (l22 / sy) + 1e-3, cutoff * sy + 1e-3
    high = (y - 0.5 - half_y).clamp(min=0).ceil()
    low = (y - 0.5 + half_y).clamp(max=height - 1).floor()
    columns = (2 * half_x).floor().add(1).clamp(1, width)
    drawn = splats.mask & (l11 > 0) & (l22 > 0) & (low >= high)
    drawn &= (x - cutoff * l11 < width) & (x + cutoff * l11 > 0)
    return torch.where(drawn, (low - high + 1) * columns, 0)


def by_window(splats: Splats, height: int, width: int, cutoff: float) -> Tensor:
    """Each image's Gaussians by falling window, int32 [B, N]: those that share a program of the
    backward kernel end together, and the longest programs begin first."""
    size = windows(splats, height, width, cutoff)
    return size.argsort(dim=1, descending=True).to(torch.int32)


def _backward(
    splats: Splats,
    field: Tensor,
    order: Tensor,
    cutoff: float,
    scale: float,
    whitened: bool,
    out: Tensor,
    rows: tuple[int, int] = (1, 0),
) -> None:
    """scale * the vector-Jacobian product with `field` [B, H, W, 3] into `out` [B, N, 8]; `order`:
    see `by_window`; `rows`: stride and phase of those that the field has."""
    batch, n = splats.mask.shape
    groups = cdiv(n, triton_kernels.SHARED)
    squeeze, phase = 1 / rows[0], rows[1]
    launch(
        triton_kernels.backward_kernel, batch * groups,
        splats.means, splats.cholesky, splats.colors, splats.mask, field, out, order,
        n, groups, *field.shape[1:3], cutoff, scale, squeeze, (phase + 0.5) * squeeze - 0.5,
        SHARED=triton_kernels.SHARED, PIXELS=triton_kernels.PIXELS, WHITENED=whitened, **WARP,
    )  # fmt: skip


def _adam(
    splats: Splats,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    config: FitConfig,
    size: Sequence[int],
    beta1: float,
    rate: float,
    correction2: float,
) -> None:
    """One Adam step of the splats and moments in place; `size` is the image's height and width."""
    state = (splats.means, splats.cholesky, splats.colors, gradient, *moments)
    assert all(x.is_contiguous() for x in state)
    count = splats.mask.numel()
    launch(
        triton_kernels.adam_kernel, cdiv(count, triton_kernels.ADAM_BLOCK),
        *state, count, beta1, config.beta2, correction2,
        rate * config.lr_means, rate * config.lr_shape, rate * config.lr_colors,
        config.l1_colors, *bounds(*size),
        BLOCK=triton_kernels.ADAM_BLOCK, WHITENED=config.whitened, **(WARP | {"num_warps": 4}),
    )  # fmt: skip


def _channels_last(target: Tensor) -> Tensor:
    """Unset [B, H, W, 3] for the residual: the backward kernel reads a pixel from one address."""
    return target.new_empty(len(target), *target.shape[2:], 3)
