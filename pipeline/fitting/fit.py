"""The optimisation loop: Adam on the mean squared error of a whole batch of images, any backend.

How this differs from the published loop (Adam 0.9/0.999 on raw parameters, thousands of steps):

- whitened coordinates: a step moves a Gaussian by L d and multiplies its factor by (I + T), so one
  step size suits every size and shape. The diagonal of T acts through exp: factors stay positive.
- beta2 = 0.9: steps follow the gradient's current size. The largest single gain at 100 steps.
- relocation: the Gaussians that contribute least move to where the error would fall most, found by
  a matched filter: a small Gaussian of size s with its best colour lowers the squared error by
  4 pi s^2 |blur_s(residual)|^2. A move happens only if it wins more than it costs.
- a step looks at one row in 2 to 4 of the picture, the next one at others (rows.py). At equal cost
  worth 0.5 dB at 100 full steps, 2 dB at 10.
- the step size holds, then falls linearly to 1 %.
- means and sizes stay where a shard can hold them (`splats.bounds`). At 100 steps and 400 Gaussians
  nothing gets there; of long fits, or a handful of Gaussians, another picture would be stored.

`whitened=False, relocate=False, row_stride=1, schedule="cosine"` is the published loop (`--preset
paper`).

Left out, measured without gain: periodic colour solves, warm-up, L-BFGS and Levenberg-Marquardt,
Gauss-Newton blocks per Gaussian as preconditioner (-0.6 dB), Nesterov momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.fitting.rows import PHASES, row_stride, squeezed
from splatshard.pipeline.fitting.start import circles, initial_splats
from splatshard.pipeline.kernels.backend import Backend, LossAndGrad
from splatshard.pipeline.kernels.blur import blur
from splatshard.pipeline.kernels.solve_colors import square_norm
from splatshard.pipeline.splats import MIN_SIGMA_PX, Splats, bounds
from splatshard.schemas.config import ENCODER, FitConfig

CHECK_EVERY = 10  # steps between looks at the target PSNR

HOLD = 0.4  # share of the budget at the full step size

NEAR_STEPS = 10
"""From an encoder's prediction shorter fits take smaller steps, in proportion: it is nearer to the
image than the other starts, and a few full steps would lead away. 1 / 3 steps from 19.0 dB, 64
Gaussians: 15.9 / 18.1 dB with full ones, 19.1 / 19.5 so; from 10 on full ones are the best."""

RELOCATE_UNTIL = 0.68  # share of the budget after which nothing moves
RELOCATE_SHARE = 0.35  # of the Gaussians, at most, each time
RELOCATE_SIGMA = 0.07  # of the mean spacing, at least half a pixel
RELOCATE_COLOR = 0.6  # share of the best colour to start with
RELOCATE_MARGIN = 0.3  # move if gain > margin * cost: neighbours make up for part of the cost


def fit(target: Tensor, config: FitConfig, backend: Backend) -> tuple[Splats, Tensor]:
    """Fit `target` [B, 3, H, W] (0 to 1, on the backend's device): splats and steps taken, int64
    [B]."""
    with torch.no_grad():
        splats = initial_splats(target, config, backend)
        return optimize(splats, target, config.steps, config, backend)


def optimize(
    splats: Splats, target: Tensor, steps: int, config: FitConfig, backend: Backend
) -> tuple[Splats, Tensor]:
    """At most `steps` steps from `splats` [B, N] towards `target` [B, 3, H, W]: splats and steps
    taken, int64 [B] in main memory. With `config.target_psnr` an image may finish earlier.

    Finished images leave the batch, so they cost nothing, and an image's result does not depend on
    the others in its batch.
    """
    if config.target_psnr is None:
        return _optimize(splats, target, steps, config, backend), torch.full((len(splats),), steps)
    goal = 10 ** (-config.target_psnr / 10)
    taken = torch.full((len(splats),), steps)
    finished = splats
    remaining = torch.arange(len(splats), device=target.device)

    def drop_finished(splats: Splats, loss: Tensor, step: int) -> Tensor | None:
        """Indices within the current batch of those that go on, or None if all do."""
        nonlocal remaining, finished
        done = loss <= goal
        if not done.any():
            return None
        finished = replaced(finished, remaining[done], splats[done])
        taken[remaining[done].cpu()] = step
        remaining = remaining[~done]
        return (~done).nonzero()[:, 0]

    last = _optimize(splats, target, steps, config, backend, drop_finished)
    return replaced(finished, remaining, last), taken


def _optimize(
    splats: Splats,
    target: Tensor,
    steps: int,
    config: FitConfig,
    backend: Backend,
    drop_finished: Callable[[Splats, Tensor, int], Tensor | None] | None = None,
) -> Splats:
    """The loop; returns the splats of the images that were never dropped."""
    beta1 = config.beta1 if config.beta1 is not None else default_beta1(steps)
    make_step = backend.make_step or partial(TorchStep, backend=backend)
    if backend.make_step:  # it updates in place: the caller's splats stay as they are
        splats = splats.map(lambda x: x.clone(memory_format=torch.contiguous_format))
    moments = (target.new_zeros(*splats.mask.shape, 8), target.new_zeros(*splats.mask.shape, 8))
    height, width = target.shape[2:]
    stride = row_stride(config, height, width)
    one = make_step(target, config, stride)
    size = min(1.0, steps / NEAR_STEPS) if config.init.startswith(ENCODER) else 1.0
    moved_far = True
    for step in range(steps):
        if config.relocate and relocates_at(step, steps):
            splats = relocate(splats, target, moments, config.cutoff, backend)
            moved_far = True
        if drop_finished and step % CHECK_EVERY == 0:
            image = backend.render(splats, height, width, config.cutoff)
            keep = drop_finished(splats, (image - target).square().mean((1, 2, 3)), step)
            if keep is not None:
                splats, target = splats[keep], target[keep]
                moments = (moments[0][keep], moments[1][keep])
                if not len(keep):
                    break
                one = make_step(target, config, stride)
                moved_far = True
        rate = size * step_size(step / steps, config.schedule) / (1 - beta1 ** (step + 1))
        phase = PHASES[stride][step % stride]
        correction2 = 1 - config.beta2 ** (step + 1)
        splats = one.step(splats, moments, phase, moved_far, beta1, rate, correction2)
        moved_far = False
    return splats


class TorchStep:
    """One step for a backend that has only `loss_and_grad`, and the readable twin of those that
    bring their own; see `backend.Step`."""

    def __init__(self, target: Tensor, config: FitConfig, stride: int, backend: Backend) -> None:
        self.target, self.config, self.stride, self.backend = target, config, stride, backend
        rates = [config.lr_means] * 2 + [config.lr_shape] * 3 + [config.lr_colors] * 3
        self.rates = target.new_tensor(rates)

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
        """Adam (Kingma and Ba, 2015, algorithm 1) at the gradient on the rows `phase`, `phase` +
        stride, ...: moments [B, N, 8] in place, splats [B, N] moved.

        `rate` is the schedule's factor over 1 - beta1^t, `correction2` is 1 - beta2^t.
        """
        rows = self.target[:, :, phase :: self.stride].contiguous()
        seen = squeezed(splats, self.stride, phase)
        result = self.backend.loss_and_grad(seen, rows, self.config.cutoff)
        moment1, moment2 = moments
        gradient = parameter_gradient(seen, result, self.config, self.stride)
        moment1.lerp_(gradient, 1 - beta1)
        moment2.lerp_(gradient.square_(), 1 - self.config.beta2)
        root = (moment2 / correction2).sqrt_().add_(1e-12)
        splats = moved(splats, (moment1 / root).mul_(self.rates * -rate), self.config.whitened)
        return bounded(splats, *self.target.shape[2:])


def step_size(progress: float, schedule: str) -> float:
    """Factor on the learning rates at `progress` in 0..1; from 1 down to 0.01."""
    if schedule == "cosine":
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
    return 0.01 + 0.99 * min(1.0, (1 - progress) / (1 - HOLD))


def parameter_gradient(
    splats: Splats, result: LossAndGrad, config: FitConfig, stride: int = 1
) -> Tensor:
    """Gradient [B, N, 8] for (position 2, shape 3, colour 3), whitened if the config says so, at
    splats that are `squeezed` by `stride`.

    With mu = mu0 + L d and L = L0 (I + T), T lower triangular: g_d = L^T g_mu, g_T = lower(L^T
    g_L). Both are the same for squeezed splats.
    """
    colors = result.colors
    if config.l1_colors:
        colors = colors + config.l1_colors * splats.colors.sign()
    if not config.whitened:
        raw = torch.cat((result.means, result.cholesky, colors), -1)
        return raw / raw.new_tensor([1, stride, 1, stride, stride, 1, 1, 1])
    l11, l21, l22 = splats.cholesky.unbind(-1)
    gx, gy = result.means.unbind(-1)
    g11, g21, g22 = result.cholesky.unbind(-1)
    position = (l11 * gx + l21 * gy, l22 * gy)
    shape = (l11 * g11 + l21 * g21, l22 * g21, l22 * g22)
    return torch.stack((*position, *shape, *colors.unbind(-1)), -1)


def moved(splats: Splats, step: Tensor, whitened: bool) -> Splats:
    """`splats` after `step` [B, N, 8], in the coordinates of `parameter_gradient`."""
    colors = splats.colors + step[..., 5:]
    if not whitened:
        cholesky = splats.cholesky + step[..., 2:5]
        cholesky[..., 0].clamp_(min=MIN_SIGMA_PX)
        cholesky[..., 2].clamp_(min=MIN_SIGMA_PX)
        return Splats(splats.means + step[..., :2], cholesky, colors, splats.mask)
    l11, l21, l22 = splats.cholesky.unbind(-1)
    dx, dy, t11, t21, t22 = step[..., :5].unbind(-1)
    means = splats.means + torch.stack((l11 * dx, l21 * dx + l22 * dy), -1)
    grow = t11.exp()
    cholesky = torch.stack((l11 * grow, l21 * grow + l22 * t21, l22 * t22.exp()), -1)
    return Splats(means, cholesky, colors, splats.mask)


def bounded(splats: Splats, height: int, width: int) -> Splats:
    """`splats` [B, N] of images of `height` x `width` px, in place, within `bounds`. NaN stays
    NaN."""
    *sides, largest = bounds(height, width)
    splats.means[..., 0].clamp_(*sides[:2])
    splats.means[..., 1].clamp_(*sides[2:])
    splats.cholesky.clamp_(-largest, largest)
    return splats


def default_beta1(steps: int) -> float:
    """Momentum by budget: 0.56 for 10 steps, 0.74 for 30, 0.86 for 100, 0.92 for 300 steps."""
    return min(0.95, max(0.0, 1 - 1.4 / math.sqrt(max(1, steps))))


def relocates_at(step: int, steps: int) -> bool:
    """Whether Gaussians move before `step`: from 2 sqrt(steps) on, every 2 sqrt(steps)."""
    start = every = max(1, round(2 * math.sqrt(steps)))
    return start <= step <= RELOCATE_UNTIL * steps and (step - start) % every == 0


def relocate(
    splats: Splats,
    target: Tensor,
    moments: tuple[Tensor, ...],
    cutoff: float,
    backend: Backend,
) -> Splats:
    """Move the Gaussians of least energy, of splats [B, N] for `target` [B, 3, H, W], to the peaks
    of the matched filter; zero their moments, [B, N, 8] each, in place."""
    height, width = target.shape[2:]
    count = max(1, int(RELOCATE_SHARE * splats.mask.shape[1]))
    residual = target - backend.render(splats, height, width, cutoff)
    spacing = math.sqrt(height * width / splats.mask.shape[1])
    sigma = max(0.5, RELOCATE_SIGMA * spacing)
    smooth = (backend.blur or blur)(residual, sigma)
    gain = smooth.square().sum(1, keepdim=True) * (4 * math.pi * sigma * sigma)
    peaks = gain == largest_of_five(largest_of_five(gain, 2), 3)
    count = min(count, height * width)
    gain, pixel = torch.where(peaks, gain, 0).flatten(1).topk(count)
    cost, moving = energy(splats).topk(count, largest=False)
    wins = (gain > RELOCATE_MARGIN * cost) & splats.mask.gather(1, moving)

    def put(old: Tensor, new: Tensor) -> Tensor:
        index = moving[..., None].expand(-1, -1, old.shape[-1])
        return old.scatter(1, index, torch.where(wins[..., None], new, old.gather(1, index)))

    x, y = pixel % width, torch.div(pixel, width, rounding_mode="floor")
    best = 2 * smooth.flatten(2).gather(2, pixel[:, None].expand(-1, 3, -1)).transpose(1, 2)
    for moment in moments:
        moment.copy_(put(moment, torch.zeros_like(moment[:, :count])))
    return Splats(
        put(splats.means, torch.stack((x, y), -1) + 0.5),
        put(splats.cholesky, circles(target, sigma, *x.shape)),
        put(splats.colors, RELOCATE_COLOR * best),
        splats.mask,
    )


def largest_of_five(values: Tensor, dim: int) -> Tensor:
    """The largest of 5 neighbours along `dim`, 2 or 3, of `values` [B, 1, H, W] of at least 0;
    [B, 1, H, W]. Several times as fast as max_pool2d on a CPU."""
    size = values.shape[dim]
    padded = F.pad(values, (0, 0, 2, 2) if dim == 2 else (2, 2))
    two = torch.maximum(padded.narrow(dim, 0, size + 3), padded.narrow(dim, 1, size + 3))
    four = torch.maximum(two.narrow(dim, 0, size + 1), two.narrow(dim, 2, size + 1))
    return torch.maximum(four.narrow(dim, 0, size), padded.narrow(dim, 4, size))


def energy(splats: Splats) -> Tensor:
    """Squared error [B, N] that removing a Gaussian alone would add: sum w^2 |c|^2; inf where
    masked out.

    In closed form over the plane (a Gaussian that hangs over the border counts in full).
    """
    value = square_norm(splats.cholesky) * splats.colors.square().sum(-1)
    return torch.where(splats.mask, value, torch.inf)


def replaced(splats: Splats, index: Tensor, new: Splats) -> Splats:
    """`splats` with the images at `index` [K] replaced by the K images of `new`."""
    pairs = zip(splats.fields, new.fields, strict=True)
    return Splats(*(old.index_copy(0, index, x) for old, x in pairs))
