"""The fused step of the fit on tensor cores: the host's side of tile_step.cu, which says how it
works and what is exact; the readable twin is `fit.TorchStep`, and `triton_backend.FusedStep` is the
same step without tensor cores.

Weights, colours and residuals are halves within a step: a fit ends some 0.01 dB from one in floats.
Two steps give the same bits, and an image does not depend on its batch. Nothing waits for the
device.
"""

from __future__ import annotations

import ctypes
import math
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from splatshard.pipeline.kernels import cuda, reference
from splatshard.pipeline.kernels.backend import Step as FitStep
from splatshard.pipeline.splats import MIN_SIGMA_PX, Splats, bounds
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import BackendError

SOURCE = Path(__file__).with_name("tile_step.cu")
HEADER = SOURCE.with_name("warp.cuh")
KERNELS = ("list_gaussians", "fit_tiles", "move_gaussians")
OLDEST = (8, 0)
"""Compute capability of the first devices that have all of its instructions."""
TILE = 8
WARPS = 4
THREADS = 32 * WARPS
"""Of a block, as in tile_step.cu."""
GAIN = 256
"""Of residuals, and so of the target, as in tile_step.cu."""

POINTERS = "means cholesky colors moment1 moment2 mask target seen bits sums"
INTEGERS = "batch n words rows columns width height whole_height stride phase whitened"
FLOATS = (
    "cutoff least squeeze scale keep1 keep2 correct2 rate_means rate_shape rate_colors l1_colors "
    "low_x high_x low_y high_y largest smallest"
)


class Step(ctypes.Structure):
    """What the kernels take: the twin of `Step` in tile_step.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS.split()),
        *((name, ctypes.c_int) for name in INTEGERS.split()),
        *((name, ctypes.c_float) for name in FLOATS.split()),
    )


_LOADED: dict[int, cuda.Launch | None] = {}
_LOADING = threading.Lock()


def make_step(target: Tensor, config: FitConfig, stride: int) -> FitStep:
    """The step of this module where the device of `target` [B, 3, H, W] can run it, else Triton's;
    the first time a line says why."""
    launch = loaded(target.device)
    if launch is not None:
        return TileStep(target, config, stride, launch)
    from splatshard.pipeline.kernels.triton_backend import FusedStep

    return FusedStep(target, config, stride)


def loaded(device: torch.device) -> cuda.Launch | None:
    """The kernels on a device, compiled, loaded and compared with the reference once; None where
    one of these failed."""
    with _LOADING:
        if device.index not in _LOADED:
            launch = None
            try:
                launch = load(device)
                compare(launch, device)
            except (BackendError, OSError) as error:
                launch = None
                warnings.warn(f"{device}: fitted without tensor cores: {error}", stacklevel=2)
            _LOADED[device.index] = launch
        return _LOADED[device.index]


def load(device: torch.device) -> cuda.Launch:
    """The kernels on a CUDA device. Raises BackendError where it is too old or has no compiler."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise BackendError(
            f"compute capability {'.'.join(map(str, capability))}, at least 8.0 needed"
        )
    code = cuda.machine_code(SOURCE, [HEADER], cuda.architecture(capability))
    return cuda.load(code, KERNELS, device)


def compare(launch: cuda.Launch, device: torch.device) -> None:
    """Raises BackendError unless the gradient of a small picture, taken twice, has the same bits
    and is that of the dense reference within 1 % (halves cost it some 0.1 %)."""
    random = torch.Generator().manual_seed(0)
    place = torch.rand(2, 40, 2, generator=random) * torch.tensor([45, 31])
    shape = torch.tensor([3.0, 0, 2]) + torch.rand(2, 40, 3, generator=random)
    color = torch.randn(2, 40, 3, generator=random)
    start = Splats(place, shape, color, torch.rand(2, 40, generator=random) < 0.9).to(device)
    target = torch.rand(2, 3, 31, 45, generator=random).to(device)
    config = FitConfig(num_gaussians=40, whitened=False)
    found = []
    for _ in range(2):
        moments = (target.new_zeros(2, 40, 8), target.new_zeros(2, 40, 8))
        step = TileStep(target, config, 1, launch)
        step.step(start.map(torch.clone), moments, 0, True, 0.0, 0.0, 1.0)
        found.append(moments[0])
    exact = reference.loss_and_grad(start, target, config.cutoff)
    expected = torch.cat((exact.means, exact.cholesky, exact.colors), -1)
    if not torch.equal(found[0], found[1]):
        raise BackendError("two steps of the tile kernel gave different bits")
    error = ((found[0] - expected).norm() / expected.norm()).item()
    if not error < 0.01:
        raise BackendError(f"the tile kernel's gradient is wrong by {100 * error:.2g} %")


class TileStep:
    """See `backend.Step`; `target` is float32 [B, 3, H, W] on the device on which `launch` runs."""

    def __init__(self, target: Tensor, config: FitConfig, stride: int, launch: cuda.Launch) -> None:
        batch, _, height, width = target.shape
        self.config, self.stride, self.launch = config, stride, launch
        self.size = height, width
        self.target = target.new_zeros(batch, height, width, 4)
        self.target[..., :3] = target.permute(0, 2, 3, 1) * GAIN
        self.tiles = cdiv(cdiv(height, stride), TILE), cdiv(width, TILE)
        self.scratch: tuple[Tensor, Tensor, Tensor] | None = None

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
        batch, n = splats.mask.shape
        if not batch * n:
            return splats
        argument = self.argument(splats, moments, phase, beta1, rate, correction2)
        per_gaussian = cdiv(batch * n, THREADS)
        self.launch("list_gaussians", per_gaussian, THREADS, argument)
        self.launch("fit_tiles", cdiv(batch * math.prod(self.tiles), WARPS), THREADS, argument)
        self.launch("move_gaussians", per_gaussian, THREADS, argument)
        return splats

    def argument(
        self,
        splats: Splats,
        moments: tuple[Tensor, Tensor],
        phase: int,
        beta1: float,
        rate: float,
        correction2: float,
    ) -> Step:
        """What the three kernels take for a step of splats [B, N] and moments [B, N, 8]."""
        config, (whole, width) = self.config, self.size
        batch, n = splats.mask.shape
        words = cdiv(n, 32)
        height = cdiv(whole - phase, self.stride)
        seen, bits, sums = self.memory(batch, n, words)
        tensors = (splats.means, splats.cholesky, splats.colors, *moments, splats.mask)
        assert all(x.is_contiguous() for x in tensors)
        assert all(x.dtype == torch.float32 for x in tensors[:-1])
        low_x, high_x, low_y, high_y, largest = bounds(whole, width)
        return Step(
            *(x.data_ptr() for x in (*tensors, self.target, seen, bits, sums)),
            *(batch, n, words, *self.tiles),
            *(width, height, whole, self.stride, phase, config.whitened),
            *(config.cutoff, math.exp(-0.5 * config.cutoff**2), 1 / self.stride),
            *(2 / (3 * height * width), beta1, config.beta2, 1 / correction2),
            *(rate * config.lr_means, rate * config.lr_shape, rate * config.lr_colors),
            config.l1_colors,
            *(low_x, high_x, low_y, high_y, largest, MIN_SIGMA_PX),
        )

    def memory(self, batch: int, n: int, words: int) -> tuple[Tensor, Tensor, Tensor]:
        """What tiles read of the Gaussians, unset; their bits, and the sums [B, N, 8], both 0."""
        if self.scratch is None:
            count = batch * math.prod(self.tiles) * words
            zero = self.target.new_empty(8 * batch * n + cdiv(count, 2), dtype=torch.int64)
            seen = self.target.new_empty(batch, n, 8)
            self.scratch = zero, seen, zero[8 * batch * n :]
        zero, seen, bits = self.scratch
        zero.zero_()
        return seen, bits, zero


def cdiv(number: int, size: int) -> int:
    """How many blocks of `size` hold `number`."""
    return -(-number // size)
