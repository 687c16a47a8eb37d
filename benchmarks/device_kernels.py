"""The parts of `benchmarks.device_check` about fitting: right or wrong, ceilings, kernels, fits.

check      against the dense float64 reference, twice, in memory that was filled with NaN
ceilings   what the device can do: products, a copy, its clock
kernels    microseconds per image of each kernel and its variants, and of a fit's other pieces
fit        one N at two batch sizes, peak memory, where the time goes
fits       whole fits beside the published loop
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.device_record import Size, Tell, pictures
from benchmarks.device_tiles import kernels_on, steps_of, tiles_checked
from benchmarks.gpu_fit import fill, mean_psnr, measure_ceilings, seconds, wait
from splatshard.pipeline.fitting.fit import RELOCATE_SHARE, fit, optimize, relocate
from splatshard.pipeline.fitting.start import BLUR_PX, COLOR_STEPS, initial_splats, structure_tensor
from splatshard.pipeline.kernels import (
    reference,
    tile_step,
    triton_backend,
    triton_kernels,
    voronoi,
)
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.kernels.solve_colors import solve_colors
from splatshard.pipeline.kernels.triton_lists import tile_lists
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import PRESETS, FitConfig

CUTOFF = 3.0
NAMES = ("means", "cholesky", "colors")
SHAPES = ((4, 32), (2, 16), (1, 32), (8, 4))
"""Other numbers of Gaussians and pixels per program of the backward kernel."""


def check(size: Size, tell: Tell) -> None:
    """Values and gradients of splats at random, some outside of the picture and some masked, and
    the whole step of a fit."""
    backend = select_backend("triton")
    device, side = backend.device, size.image
    equal, seen, worst = [], [], 0.0
    for n in size.gaussians:
        splats = random_splats(size.checked, n, side, side, seed=n)
        target = torch.rand(size.checked, 3, side, side, dtype=torch.float64)
        exact = outputs(reference.loss_and_grad, reference.render, splats, target, device)
        inputs = (to_float(splats), target.float(), device)
        own = outputs(reference.loss_and_grad, reference.render, *inputs)
        found = outputs(backend.loss_and_grad, backend.render, *inputs)
        again = outputs(backend.loss_and_grad, backend.render, *inputs)
        for name, value in found.items():
            wanted = exact[name]
            floor = 1e-7 * wanted.norm().item()
            ratio = (value.double() - wanted).norm().item()
            ratio /= (own[name].double() - wanted).norm().item() + floor
            worst = ratio if not ratio <= worst else worst  # NaN is the worst
            tell(f"error of {name}, N={n}", ratio, "of float32's own", shape=list(value.shape))
        equal += [torch.equal(value, again[name]) for name, value in found.items()]
        seen.append((inputs, found, exact))
    tell("error over float32's own", worst, "ratio")
    tell("fused step against torch", step_difference(size, backend), "relative")
    tell("Lloyd step against numba", lloyd_difference(size, backend), "px")
    target = pictures(size)[:2].to(device)
    config = FitConfig(num_gaussians=size.gaussians[0], steps=size.steps)
    one, two = (fit(target, config, backend)[0] for _ in range(2))
    equal += [torch.equal(getattr(one, name), getattr(two, name)) for name in NAMES]
    tell("equal bits", sum(equal) / len(equal), "share of checks", checks=len(equal))
    written = []
    with poisoned():
        for inputs, found, _ in seen:
            again = outputs(backend.loss_and_grad, backend.render, *inputs)
            written += [torch.equal(value, again[name]) for name, value in found.items()]
        one, _ = fit(target, config, backend)
    written += [bool(getattr(one, name).isfinite().all()) for name in NAMES]
    tell("written", sum(written) / len(written), "share of checks", checks=len(written))
    assert backend.make_step is not None
    used = backend.make_step(target, config, 1)
    tell("tiles are used", float(isinstance(used, tile_step.TileStep)), "1 is yes")
    launch = kernels_on(device)  # what follows needs them
    errors, equal = [], []
    for (splats, target, _), _, exact in seen:
        found = tiles_checked(splats.to(device), target.to(device), exact, launch)
        tell(f"tiles: error, N={splats.mask.shape[1]}", found[0], "of the gradient")
        errors.append(found[0])
        equal.append(found[1])
    tell("tiles: error", max(errors, key=lambda e: (e != e, e)), "of the gradient")
    tell("tiles: equal bits", sum(equal) / len(equal), "share of checks")


def ceilings(size: Size, tell: Tell) -> None:
    """fp32 and bf16 products, a copy, and the clock while the device is busy."""
    device = select_backend("triton").device
    bound = measure_ceilings(device)
    tell("fp32 product", bound.flops / 1e12, "TFLOP/s")
    side = size.product
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    took = seconds(lambda: a @ a, 10, device)
    tell("bf16 product", 2 * side**3 / took / 1e12, "TFLOP/s")
    tell("copy", bound.bytes_per_s / 1e12, "TB/s")
    a = torch.randn(side, side, device=device)
    for _ in range(size.busy_products):
        a @ a
    clock = smi("clocks.sm")
    wait(device)
    if clock:
        tell("clock under load", clock[0], "MHz")


def kernels(size: Size, tell: Tell) -> None:
    """Median times on splats in the middle of a fit."""
    backend = select_backend("triton")
    images = pictures(size).to(backend.device)
    target = fill(images, size.batch)
    for n in size.gaussians:
        kernels_of(n, images, target, size, backend, tell)
    assert backend.blur is not None
    tensor, blur = structure_tensor(target), backend.blur
    took = median_s(lambda: blur(tensor, BLUR_PX), size.repeats, backend.device)
    tell("blur, 3 planes", 1e6 * took / size.batch, "us per image", batch=size.batch)


def kernels_of(
    n: int, images: Tensor, target: Tensor, size: Size, backend: Backend, tell: Tell
) -> None:
    """The figures of one N."""
    device, side, batch = backend.device, size.image, len(target)
    config = FitConfig(num_gaussians=n, steps=size.steps)
    splats = repeated(half_fitted(images, config, backend), batch)
    moments = tuple(torch.rand(*splats.mask.shape, 8, device=device) for _ in range(2))
    residual = torch.rand(batch, side, side, 3, device=device)
    gradient = splats.means.new_empty(batch, n, 8)
    order = triton_backend.by_window(splats, side, side, CUTOFF)
    given = torch.arange(n, dtype=torch.int32, device=device).expand_as(order).contiguous()
    lists = tile_lists(splats, side, side, CUTOFF, True)
    field = torch.rand_like(residual)
    gain = torch.rand(batch, side * side, device=device)
    moved = min(side * side, max(1, int(RELOCATE_SHARE * n)))
    rates = ((side, side), 0.8, 1e-6, 0.9)  # steps so small that the splats stay

    def backward(order: Tensor) -> None:
        triton_backend._backward(splats, field, order, CUTOFF, 1.0, True, gradient)

    works: dict[str, Callable[[], Any]] = {
        "lists": lambda: tile_lists(splats, side, side, CUTOFF, True, lists),
        "forward": lambda: triton_backend._loss(splats, lists, CUTOFF, residual, target),
        "backward": lambda: backward(order),
        "backward, as given": lambda: backward(given),
        **{f"backward {a} x {b}": lambda: backward(order) for a, b in SHAPES},
        "order": lambda: triton_backend.by_window(splats, side, side, CUTOFF),
        "adam": lambda: triton_backend._adam(splats, gradient, moments, config, *rates),
        "start": lambda: initial_splats(target, config, backend),
        "relocation": lambda: relocate(splats, target, moments, CUTOFF, backend),
        "colours": lambda: solve_colors(splats, target, COLOR_STEPS, CUTOFF, backend),
        "topk": lambda: gain.topk(moved),
        **steps_of(config, splats, moments, target),
    }
    shapes = {f"backward {a} x {b}": (a, b) for a, b in SHAPES}
    for name, work in works.items():
        with shape(*shapes.get(name, (triton_kernels.SHARED, triton_kernels.PIXELS))):
            took = median_s(work, size.repeats, device)
        tell(f"{name}, N={n}", 1e6 * took / batch, "us per image", batch=batch)


def one_fit(size: Size, tell: Tell) -> None:
    """One N at two batch sizes: rate, memory, and by torch's profiler where the time goes."""
    backend = select_backend("triton")
    device = backend.device
    images = pictures(size).to(device)
    n = size.gaussians[0]
    config = FitConfig(num_gaussians=n, steps=size.steps)
    for batch in (size.batch, 2 * size.batch)[: 1 if size.toy else 2]:
        target = fill(images, batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        took = fit_s(target, config, backend)
        tell(f"images/s, N={n}, batch {batch}", batch / took, "images/s")
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            tell(f"peak memory, N={n}, batch {batch}", peak / 1e9, "GB")
    target = fill(images, size.batch)
    took = fit_s(target, config, replace(backend, make_step=triton_backend.FusedStep))
    name = f"images/s, Triton's step, N={n}, batch {size.batch}"
    tell(name, size.batch / took, "images/s")
    if device.type == "cuda":
        profile(target, config, backend, tell)


def fit_s(target: Tensor, config: FitConfig, backend: Backend) -> float:
    """Seconds of a fit: the faster of two after one that compiles; on a CPU of the only one."""
    work = lambda: fit(target, config, backend)  # noqa: E731
    if target.device.type == "cuda":
        return seconds(work, 2, target.device)
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def profile(target: Tensor, config: FitConfig, backend: Backend, tell: Tell) -> None:
    """Shares of the device's time by kernel, and the share in which it was idle."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):  # the first one takes a while to begin
        fit(target, config, backend)
        wait(target.device)
    with torch.profiler.profile(activities=activities) as profiler:
        begin = time.perf_counter()
        fit(target, config, backend)
        wait(target.device)
        passed = time.perf_counter() - begin
    spent = {e.key: e.self_device_time_total / 1e6 for e in profiler.key_averages()}
    busy = sum(spent.values())
    if not busy:
        raise RuntimeError("the profiler saw nothing on the device")
    ours = (*tile_step.KERNELS, "forward_kernel", "backward_kernel", "_list_kernel")
    tell(
        "time in steps",
        sum(spent.get(name, 0) for name in ours) / busy,
        "share of the device's",
        top={k: v / busy for k, v in sorted(spent.items(), key=lambda x: -x[1])[:20]},
    )
    tell("device idle in a fit", max(0.0, 1 - busy / passed), "share of the time")


def half_fitted(images: Tensor, config: FitConfig, backend: Backend) -> Splats:
    """Splats of `images` after half of the steps."""
    return fit(images, replace(config, steps=config.steps // 2), backend)[0]


def fits(size: Size, tell: Tell) -> None:
    """Whole fits, beside the published loop on the same backend and pictures."""
    backend = select_backend("triton")
    device = backend.device
    images = pictures(size).to(device)
    ours: dict[int, float] = {}
    for n in size.gaussians:
        config = FitConfig(num_gaussians=n, steps=size.steps)
        ours[n] = mean_psnr(fit(images, config, backend)[0], images, backend, len(images))
        tell(f"PSNR, N={n}", ours[n], "dB", images=len(images), steps=size.steps)
        for batch in size.batches:
            target = fill(images, batch)
            tell(
                f"images/s, N={n}, batch {batch}",
                batch / fit_s(target, config, backend),
                "images/s",
            )
    n = size.gaussians[0]
    config = FitConfig(num_gaussians=n, steps=size.steps)
    tell(f"images/s, N={n}, batch 1", 1 / fit_s(images[:1], config, backend), "images/s")
    batch = size.batches[0]
    target = fill(images, batch)
    for n in size.gaussians:
        paper = replace(PRESETS["paper"].fit, num_gaussians=n, steps=size.paper_steps)
        if not size.toy:  # so that nothing compiles while it is timed
            fit(target, replace(paper, steps=2), backend)
        wait(device)
        begin = time.perf_counter()
        splats, _ = fit(target, paper, backend)
        wait(device)
        took = time.perf_counter() - begin
        tell(f"published loop, N={n}, batch {batch}", batch / took, "images/s")
        quality = mean_psnr(splats, target, backend, len(images))
        tell(f"above the published loop, N={n}", ours[n] - quality, "dB", published_psnr=quality)


def random_splats(batch: int, n: int, height: int, width: int, seed: int) -> Splats:
    """Float64 splats of a fit's sizes, a fifth outside of the picture, a tenth masked."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    spacing = (height * width / n) ** 0.5
    means = torch.rand(batch, n, 2, generator=random, dtype=torch.float64) * 1.4 - 0.2
    diagonal = 0.42 * spacing * (0.5 * normal(2, batch, n)).exp()
    cholesky = torch.stack((diagonal[0], 0.4 * spacing * normal(batch, n), diagonal[1]), -1)
    mask = torch.rand(batch, n, generator=random) < 0.9
    return Splats(means * torch.tensor([width, height]), cholesky, normal(batch, n, 3), mask)


def to_float(splats: Splats) -> Splats:
    return Splats(*(getattr(splats, name).float() for name in NAMES), splats.mask)


def outputs(
    loss_and_grad: Callable, render: Callable, splats: Splats, target: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Loss and gradient; of the last image, for which the dense reference has the memory, the
    rendering and its gradient for a field."""
    splats, target = splats.to(device), target.to(device)
    result = loss_and_grad(splats, target, CUTOFF)
    found = {name: getattr(result, name) for name in ("loss", *NAMES)}
    splats = splats[-1:]
    leaves = [getattr(splats, name).clone().requires_grad_() for name in NAMES]
    image = render(Splats(*leaves, splats.mask), *target.shape[2:], CUTOFF)
    field = torch.cos(torch.arange(image.numel(), device=device)).to(image.dtype)
    gradients = torch.autograd.grad((image * field.reshape(image.shape)).sum(), leaves)
    named = {f"d rendering / d {name}": g for name, g in zip(NAMES, gradients, strict=True)}
    return found | {"rendering": image.detach()} | named


def step_difference(size: Size, backend: Backend) -> float:
    """Largest relative difference of the parameters after three fused steps to three of torch."""
    config = FitConfig(num_gaussians=size.gaussians[0], steps=size.steps, relocate=False)
    target = pictures(size)[:2].to(backend.device)
    with torch.no_grad():
        start = initial_splats(target, config, backend)
        with mock.patch.object(triton_backend, "LISTS_EVERY", 1):
            ours = replace(backend, make_step=triton_backend.FusedStep)
            fused, _ = optimize(start, target, 3, config, ours)
        plain, _ = optimize(start, target, 3, config, replace(backend, make_step=None))
    pairs = [(getattr(fused, name), getattr(plain, name)) for name in NAMES]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def lloyd_difference(size: Size, backend: Backend) -> float:
    """Largest distance between the centroids of the GPU's Lloyd step and the CPU's, in px."""
    side, n = size.image, size.gaussians[0]
    random = torch.Generator().manual_seed(1)
    means = torch.rand(2, n, 2, generator=random) * side
    rho = torch.rand(2, side, side, generator=random) + 0.1
    rho *= n / rho.sum((1, 2), keepdim=True)
    assert backend.centroids is not None
    found = backend.centroids(means.to(backend.device), rho.to(backend.device)).cpu()
    return (found - voronoi.centroids(means, rho)).abs().max().item()


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are filled with NaN, or the largest integer, instead of what was in memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def shape(shared: int, pixels: int) -> Iterator[None]:
    """The backward kernel with other numbers of Gaussians and pixels per program."""
    with (
        mock.patch.object(triton_kernels, "SHARED", shared),
        mock.patch.object(triton_kernels, "PIXELS", pixels),
    ):
        yield


def repeated(splats: Splats, batch: int) -> Splats:
    index = torch.arange(batch, device=splats.means.device) % len(splats)
    return splats[index]


def median_s(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds of `repeats` calls after two, by the device's own events."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    times = []
    for i in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def smi(fields: str) -> list[float]:
    """Figures of nvidia-smi; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return [float(x) for x in done.stdout.splitlines()[0].split(",")]
    except (IndexError, ValueError):
        return []
