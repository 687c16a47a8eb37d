"""Choosing a kernel backend by name, and importing only that one."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from splatshard.pipeline.kernels.backend import Backend
from splatshard.schemas.config import BACKENDS
from splatshard.schemas.errors import BackendError


def select_backend(name: str) -> Backend:
    """auto is triton where there is a CUDA device and cpu elsewhere; a named backend never falls
    back.

    Raises BackendError when the named backend cannot run here.
    """
    if name == "auto":
        name = "triton" if torch.cuda.is_available() and find_spec("triton") else "cpu"
    if name == "cpu":
        from splatshard.pipeline.kernels import cpu, cpu_errors, cpu_step, overlaps

        return Backend(
            name,
            torch.device("cpu"),
            cpu.render,
            cpu.loss_and_grad,
            make_step=cpu_step.FusedStep,
            squared_errors=cpu_errors.squared_errors,
            color_change=overlaps.color_change,
        )
    if name == "reference":
        from splatshard.pipeline.kernels import reference

        return Backend(name, torch.device("cpu"), reference.render, reference.loss_and_grad)
    if name == "triton":
        return _triton()
    raise BackendError(f"--backend {name}: choose one of {', '.join(BACKENDS)}")


def _triton() -> Backend:
    try:
        from splatshard.pipeline.kernels import (
            tile_step,
            triton_backend,
            triton_blur,
            triton_voronoi,
        )
    except ImportError as error:
        raise BackendError(
            f"--backend triton: {error}: install splatshard[gpu], or use --backend cpu"
        ) from error
    device = triton_backend.device()
    return Backend(
        "triton",
        device,
        triton_backend.render,
        triton_backend.loss_and_grad,
        tile_step.make_step if device.type == "cuda" else triton_backend.FusedStep,
        triton_voronoi.centroids,
        triton_blur.blur,
    )
