"""Nanoseconds per forward+backward evaluation and thread of the CPU kernel, beside its twins.

    python -m benchmarks.cpu_kernel

An evaluation is one Gaussian at one pixel within the cutoff; counted exactly by the dense
reference. The splats are fitted ones (100 steps of the default recipe on photographs), so sizes
and overlaps are those of a conversion. Beside it in the same run: the plain loop (the same windows
and formulas, scalar, left to numba's automatic vectorisation) and the dense reference through
autograd. Best of several repeats. Beside the speed: the gradient's largest difference to the
float64 reference, relative to its largest value, and the same for the float32 reference (near a
fit's end residuals cancel, so both lose digits, and a pixel on the very rim of the cutoff may fall
to either side).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from benchmarks.record import sample_images, save
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.kernels import cpu, reference
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig


@dataclass(frozen=True)
class Args:
    gaussians: tuple[int, ...] = (400, 900, 1600, 3136, 4900)
    images: int = 4
    repeats: int = 15


@njit(fastmath=True, error_model="numpy", cache=True)
def plain_loop(means, cholesky, colors, target, cutoff, g_means, g_cholesky, g_colors):
    """The obvious windowed loop: forward, then the gradient of the mean squared error."""
    height, width = target.shape[1:]
    residual = -target
    k2 = np.float32(cutoff * cutoff)
    half = np.float32(0.5)
    for backward in range(2):
        for i in range(len(means)):
            l11, l21, l22 = cholesky[i]
            a, c = np.float32(1) / l11, np.float32(1) / l22
            rx, ry = cutoff * l11, cutoff * math.sqrt(l21 * l21 + l22 * l22)
            x0, x1 = max(0, int(means[i, 0] - rx)), min(width, int(means[i, 0] + rx) + 1)
            y0, y1 = max(0, int(means[i, 1] - ry)), min(height, int(means[i, 1] + ry) + 1)
            r, g, b = colors[i]
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
            for y in range(y0, y1):
                dy = np.float32(y) + half - means[i, 1]
                for x in range(x0, x1):
                    z1 = (np.float32(x) + half - means[i, 0]) * a
                    z2 = (dy - l21 * z1) * c
                    q = z1 * z1 + z2 * z2
                    if q > k2:
                        continue
                    w = math.exp(-half * q)
                    if backward:
                        e0, e1, e2 = residual[0, y, x], residual[1, y, x], residual[2, y, x]
                        p = w * (e0 * r + e1 * g + e2 * b)
                        s0, s1, s2 = s0 + w * e0, s1 + w * e1, s2 + w * e2
                        s3, s4 = s3 + p * z1, s4 + p * z2
                        s5, s6, s7 = s5 + p * z1 * z1, s6 + p * z1 * z2, s7 + p * z2 * z2
                    else:
                        residual[0, y, x] += w * r
                        residual[1, y, x] += w * g
                        residual[2, y, x] += w * b
            if backward:
                scale = np.float32(2 / (3 * height * width))
                g_colors[i, 0], g_colors[i, 1], g_colors[i, 2] = scale * s0, scale * s1, scale * s2
                g_means[i, 0], g_means[i, 1] = scale * (s3 - l21 * s4 * c) * a, scale * s4 * c
                g_cholesky[i, 0] = scale * (s5 - l21 * s6 * c) * a
                g_cholesky[i, 1], g_cholesky[i, 2] = scale * s6 * c, scale * s7 * c
    return np.mean(residual * residual)


def run_plain_loop(splats: Splats, target: torch.Tensor) -> list[torch.Tensor]:
    arrays = [x.numpy() for x in (splats.means, splats.cholesky, splats.colors)]
    gradients = [np.zeros_like(a) for a in arrays]
    for b in range(len(target)):
        plain_loop(*(a[b] for a in arrays), target[b].numpy(), 3.0, *(g[b] for g in gradients))
    return [torch.from_numpy(g) for g in gradients]


def run_kernel(splats: Splats, target: torch.Tensor) -> list[torch.Tensor]:
    result = cpu.loss_and_grad(splats, target, 3.0)
    return [result.means, result.cholesky, result.colors]


def run_reference(splats: Splats, target: torch.Tensor) -> list[torch.Tensor]:
    result = reference.loss_and_grad(splats, target, 3.0)
    return [result.means, result.cholesky, result.colors]


def count_evaluations(splats: Splats, height: int, width: int) -> int:
    """Gaussian-pixel pairs within the cutoff, from the dense definition in float64."""
    total = 0
    y_all, x = torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5
    for mean, (l11, l21, l22) in zip(
        splats.means.double().flatten(0, 1), splats.cholesky.double().flatten(0, 1), strict=True
    ):
        z1 = (x - mean[0]) / l11
        z2 = ((y_all - mean[1])[:, None] - l21 * z1) / l22
        total += int((z1 * z1 + z2 * z2 <= 9).sum())
    return total


def best_time(function: Callable, splats: Splats, target: torch.Tensor, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that is not counted."""
    function(splats, target)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(splats, target)
        times.append(time.perf_counter() - start)
    return min(times)


def largest_error(gradients: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Over means, cholesky and colors: the largest difference relative to the largest value."""
    pairs = zip(gradients, exact, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def main() -> None:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    target = sample_images(args.images)
    height, width = target.shape[2:]
    rows = []
    print(
        "    N  evaluations/px   kernel ns  plain loop ns  reference ns  gradient error (reference)"
    )
    for n in args.gaussians:
        config = FitConfig(num_gaussians=n)
        splats, _ = fit(target, config, select_backend("cpu"))
        count = count_evaluations(splats, height, width)
        one, first = splats[:1], target[:1]
        exact = run_reference(
            Splats(*(x.double() for x in (one.means, one.cholesky, one.colors)), one.mask),
            first.double(),
        )
        row = {
            "num_gaussians": n,
            "evaluations_per_px": count / (len(target) * height * width),
            "kernel_ns": best_time(run_kernel, splats, target, args.repeats) / count * 1e9,
            "plain_loop_ns": best_time(run_plain_loop, splats, target, 3) / count * 1e9,
            "reference_ns": best_time(run_reference, one, first, 1)
            / count_evaluations(one, height, width)
            * 1e9,
            "gradient_error": largest_error(run_kernel(one, first), exact),
            "reference_gradient_error": largest_error(run_reference(one, first), exact),
        }
        rows.append(row)
        print(
            "{num_gaussians:5}  {evaluations_per_px:14.2f} {kernel_ns:11.2f} {plain_loop_ns:14.2f} "
            "{reference_ns:13.0f} {gradient_error:16.1e} ({reference_gradient_error:.1e})".format(
                **row
            ),
            flush=True,
        )
    save("cpu_kernel", rows)


if __name__ == "__main__":
    main()
