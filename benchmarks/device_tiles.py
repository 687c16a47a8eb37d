"""What `benchmarks.device_check` says of the step on tensor cores, tile_step.cu: its gradient
beside the float64 reference, its bits, and its time beside that of Triton's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from splatshard.pipeline.fitting.rows import PHASES, row_stride
from splatshard.pipeline.kernels import cuda, tile_step
from splatshard.pipeline.kernels.backend import Step
from splatshard.pipeline.kernels.tile_step import TileStep
from splatshard.pipeline.kernels.triton_backend import FusedStep
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import BackendError


def kernels_on(device: torch.device) -> cuda.Launch:
    """Raises BackendError where a device cannot run them; toys run them over an emulated warp."""
    if device.type == "cuda":
        return tile_step.load(device)
    from tests.emulator import Emulator

    return Emulator().launch


def tiles_checked(
    splats: Splats, target: Tensor, exact: dict[str, Tensor], launch: cuda.Launch
) -> tuple[float, bool]:
    """The largest relative error of a column of the gradient of splats [B, N] for `target` [B, 3,
    H, W], in any image; and whether two steps give the same bits."""
    one, two = (raw_gradient(splats, target, launch) for _ in range(2))
    wanted = torch.cat([exact[name] for name in ("means", "cholesky", "colors")], -1)
    error = (one.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    return error.max().item(), torch.equal(one, two)


def raw_gradient(splats: Splats, target: Tensor, launch: cuda.Launch) -> Tensor:
    """The gradient [B, N, 8] of splats [B, N] for `target` [B, 3, H, W], in px."""
    batch, n = splats.mask.shape
    config = FitConfig(num_gaussians=n, whitened=False)
    moments = (target.new_zeros(batch, n, 8), target.new_zeros(batch, n, 8))
    step = TileStep(target, config, 1, launch)
    step.step(splats.map(torch.clone), moments, 0, True, 0.0, 0.0, 1.0)
    return moments[0]


def steps_of(
    config: FitConfig, splats: Splats, moments: tuple[Tensor, Tensor], target: Tensor
) -> dict[str, Callable[[], Any]]:
    """Whole steps on the rows that the recipe looks at, by name: Triton's, and this one where it
    can run. So small that the splats [B, N] stay where they are."""
    stride = row_stride(config, *target.shape[2:])
    steps: dict[str, Step] = {"step of Triton": FusedStep(target, config, stride)}
    try:
        steps["step on tensor cores"] = TileStep(target, config, stride, kernels_on(target.device))
    except BackendError as error:
        print(error, flush=True)
    taken = dict.fromkeys(steps, 0)

    def run(name: str) -> None:
        phase = PHASES[stride][taken[name] % stride]
        taken[name] += 1
        steps[name].step(splats, moments, phase, False, 0.8, 1e-6, 0.9)

    return {name: lambda name=name: run(name) for name in steps}
