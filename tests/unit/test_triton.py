"""What is special about the Triton backend; that it draws and differentiates right is tested in
test_kernels.py. Without a GPU all of this runs in Triton's interpreter, so pictures are tiny.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (extra: gpu)")

from splatshard.pipeline.fitting.fit import fit, optimize, relocate
from splatshard.pipeline.fitting.start import (
    BLUR_PX,
    density,
    initial_splats,
    sample_density,
    structure_tensor,
)
from splatshard.pipeline.kernels import triton_backend, triton_lists, voronoi
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats, bounds
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import BackendError
from tests.unit.test_fit import picture
from tests.unit.test_kernels import NAMES, make_splats, to_float32

pytestmark = [pytest.mark.gpu] * torch.cuda.is_available()

TRITON = replace(select_backend("triton"), make_step=triton_backend.FusedStep)
CPU = select_backend("cpu")
DEVICE = TRITON.device
PLAIN = FitConfig(num_gaussians=14, steps=16)
PAPER = replace(PLAIN, whitened=False, relocate=False, schedule="cosine", beta2=0.999,
                lr_means=0.1, lr_shape=0.05, l1_colors=1e-3)  # fmt: skip


def quality(splats, target):
    return psnr(CPU.render(splats.to(CPU.device), *target.shape[2:], 3.0), target.cpu())


def small_picture():
    return picture(1, 40, 40)[:, :, 14:29, 9:22].contiguous().to(DEVICE)


@pytest.mark.parametrize("stale", [False, True])
def test_lists_hold_the_gaussians_whose_window_touches_the_tile(stale):
    splats = to_float32(make_splats(2, 30, 37, 45, 2.0)).to(DEVICE)
    lists = triton_lists.tile_lists(splats, 37, 45, 3.0, stale)
    pad = triton_lists.STALE_PAD_PX if stale else triton_lists.PAD_PX
    grow = triton_lists.STALE_GROW if stale else triton_lists.GROW
    l11, l21, l22 = splats.cholesky.unbind(-1)
    half = torch.stack((3 * l11, 3 * torch.hypot(l21, l22)), -1) * grow + pad
    low, high = splats.means - half, splats.means + half
    for b in range(2):
        for tile in range(lists.tiles):
            corner = torch.tensor([tile % lists.columns, tile // lists.columns], device=DEVICE)
            first = corner * triton_lists.TILE + 0.5
            last = first + triton_lists.TILE - 1
            touches = ((high[b] >= first) & (low[b] <= last)).all(-1) & splats.mask[b]
            count = int(lists.fine_counts[b, tile])
            kept = lists.fine[b, tile, :count].to(torch.int32).tolist()
            assert kept == touches.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("coarse", [4, 64], ids=["to all", "to the coarse list"])
def test_full_lists_change_nothing(monkeypatch, coarse):
    splats = to_float32(make_splats(2, 20, 14, 21)).to(DEVICE)
    target = torch.rand(2, 3, 14, 21, device=DEVICE)
    whole = TRITON.loss_and_grad(splats, target, 3.0)
    monkeypatch.setattr(triton_lists, "CAPACITY", 2)
    monkeypatch.setattr(triton_lists, "COARSE_CAPACITY", coarse)
    lists = triton_lists.tile_lists(splats, 14, 21, 3.0)
    assert (lists.fine_counts > 2).any()
    assert (lists.coarse_counts > lists.coarse.shape[2]).any() == (coarse == 4)
    short = TRITON.loss_and_grad(splats, target, 3.0)
    for name in ("loss", *NAMES):
        torch.testing.assert_close(getattr(short, name), getattr(whole, name))


def test_the_gradient_has_the_same_bits_in_any_order():
    """Whatever Gaussians share a program: sorted by window, as given, or at random."""
    splats = to_float32(make_splats(2, 23, 31, 45, 2.0, 1.5)).to(DEVICE)
    field = torch.randn(2, 31, 45, 3, device=DEVICE)
    by_window = triton_backend.by_window(splats, 31, 45, 3.0)
    given = torch.arange(23, dtype=torch.int32, device=DEVICE).expand(2, 23).contiguous()
    mixed = torch.rand(2, 23, device=DEVICE).argsort(1).to(torch.int32)
    assert not torch.equal(by_window, given)
    found = []
    for order in (by_window, given, mixed):
        gradient = torch.full((2, 23, 8), torch.nan, device=DEVICE)
        triton_backend._backward(splats, field, order, 3.0, 1.0, True, gradient)
        found.append(gradient)
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_gaussians_are_ordered_by_the_pixels_that_they_visit():
    """Counted row by row here: a window is the least strip of equal rows that holds the ellipse."""
    height, width = 37, 45
    splats = make_splats(2, 60, height, width, 4.0, 1.0)
    got = triton_backend.windows(to_float32(splats), height, width, 3.0)
    l11, l21, l22 = splats.cholesky.unbind(-1)
    for b, i in product(range(2), range(60)):
        x, y = splats.means[b, i].tolist()
        sy = math.hypot(l21[b, i], l22[b, i])
        rows = sum(abs(row + 0.5 - y) <= 3 * sy for row in range(height))
        columns = min(width, int(6 * l11[b, i] * l22[b, i] / sy) + 1)
        beside = not -3 * l11[b, i] < x < width + 3 * l11[b, i]
        expected = 0 if beside or not splats.mask[b, i] else rows * columns
        assert got[b, i] == expected
    assert (got == 0).any()
    order = triton_backend.by_window(to_float32(splats), height, width, 3.0)
    assert (got.gather(1, order.long()).diff(dim=1) <= 0).all()
    assert (order.sort(1).values == torch.arange(60)).all()


def test_a_fit_orders_its_gaussians_and_keeps_the_bits(monkeypatch):
    """Every eighth step and after a relocation; the order decides nothing but speed."""
    target = small_picture()
    start = initial_splats(target.cpu(), PLAIN, CPU).to(DEVICE)
    seen = []

    def counted(*arguments):
        seen.append(arguments)
        return by_window(*arguments)

    by_window = triton_backend.by_window
    monkeypatch.setattr(triton_backend, "by_window", counted)
    kept, _ = optimize(start, target, 10, replace(PLAIN, relocate=False), TRITON)
    assert len(seen) == 2
    monkeypatch.setattr(triton_backend, "ORDER_EVERY", 1)
    fresh, _ = optimize(start, target, 10, replace(PLAIN, relocate=False), TRITON)
    assert len(seen) == 12
    assert all(torch.equal(getattr(kept, n), getattr(fresh, n)) for n in NAMES)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("config", [PLAIN, PAPER], ids=["plain", "paper"])
def test_fused_steps_are_the_torch_steps(config, stride, monkeypatch):
    """Ten steps, with a relocation among them for the plain recipe, and lists always fresh.

    A Gaussian that has just been moved is so small that it meets one row in three at most, in its
    middle: where it goes from there is a matter of rounding."""
    target, config = small_picture(), replace(config, row_stride=stride)
    config = replace(config, relocate=config.relocate and stride < 3)
    start = initial_splats(target.cpu(), config, CPU).to(DEVICE)
    start = replace(start, mask=(torch.arange(14) != 5).to(DEVICE)[None])
    before = start.means.clone()
    stale, _ = optimize(start, target, 10, config, TRITON)
    assert torch.equal(start.means, before)  # in place, but not the caller's
    monkeypatch.setattr(triton_backend, "LISTS_EVERY", 1)
    fused, _ = optimize(start, target, 10, config, TRITON)
    plain, _ = optimize(start, target, 10, config, replace(TRITON, make_step=None))
    for name in NAMES:
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-4, atol=1e-4)
    assert (quality(stale, target) - quality(fused, target)).abs().max() < 0.02


def test_fused_steps_have_the_bounds_of_torch_steps():
    """Far away, endlessly wide, and NaN, which must not become a number."""
    target = small_picture()
    start = initial_splats(target.cpu(), PLAIN, CPU).to(DEVICE)
    start.means[0, 0], start.means[0, 1], start.means[0, 2] = -1e4, 1e4, torch.nan
    start.cholesky[0, 3] = torch.tensor([1e5, -1e5, 1e5])
    config = replace(PLAIN, relocate=False)
    fused, _ = optimize(start, target, 1, config, TRITON)
    plain, _ = optimize(start, target, 1, config, replace(TRITON, make_step=None))
    height, width = target.shape[2:]
    low_x, high_x, low_y, high_y, largest = bounds(height, width)
    for found in (fused, plain):
        assert found.means[0, 0].tolist() == [low_x, low_y]
        assert found.means[0, 1].tolist() == [high_x, high_y]
        assert found.means[0, 2].isnan().all()
        assert found.cholesky[0, 3].tolist() == [largest, -largest, largest]


def test_a_fit_is_as_good_as_on_the_cpu():
    target = small_picture()
    ours, _ = fit(target, PLAIN, TRITON)
    theirs, _ = fit(target.cpu(), PLAIN, CPU)
    assert (quality(ours, target) - quality(theirs, target)).abs().max() < 0.1


def test_images_stop_each_on_its_own():
    target = torch.cat((torch.full_like(small_picture(), 0.4), small_picture()))
    config = replace(PLAIN, steps=12, target_psnr=30.0, relocate=False)
    splats, steps = fit(target, config, TRITON)
    assert steps[0] < steps[1] == 12
    assert quality(splats, target)[0] >= 30


def test_centroids_are_those_of_the_cpu():
    rho = density(structure_tensor(picture(2, 21, 30)), 25)
    means = sample_density(rho, 25) + torch.rand(2, 25, 2) * 0.3
    expected = voronoi.centroids(means, rho)
    got = TRITON.centroids(means.to(DEVICE), rho.to(DEVICE)).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_start_and_relocation_blur_on_the_device():
    target, sigmas = small_picture(), []

    def recording(image, sigma):
        sigmas.append(sigma)
        return TRITON.blur(image, sigma)

    backend = replace(TRITON, blur=recording)
    start = initial_splats(target, PLAIN, backend)
    moments = tuple(torch.zeros(1, 14, 8, device=DEVICE) for _ in range(2))
    relocate(start, target, moments, PLAIN.cutoff, backend)
    assert sigmas == [BLUR_PX, 0.5]


def test_two_fits_give_the_same_bits():
    target = small_picture()
    config = replace(PLAIN, steps=2)
    first, second = (fit(target, config, TRITON)[0] for _ in range(2))
    assert all(torch.equal(getattr(first, n), getattr(second, n)) for n in NAMES)


def test_threads_do_not_disturb_each_other():
    """Triton's launches do: the first one of a kernel, and all of the interpreter's."""
    target = small_picture()
    config = replace(PLAIN, steps=2)
    alone, _ = fit(target, config, TRITON)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: fit(target, config, TRITON)[0], range(4)))
    assert all(torch.equal(getattr(one, n), getattr(alone, n)) for one in found for n in NAMES)


def test_no_images_at_all():
    empty = Splats(*(torch.zeros(0, 3, k, device=DEVICE) for k in (2, 3, 3)),
                   torch.zeros(0, 3, dtype=torch.bool, device=DEVICE))  # fmt: skip
    assert TRITON.render(empty, 5, 4, 3.0).shape == (0, 3, 5, 4)
    assert TRITON.loss_and_grad(empty, torch.zeros(0, 3, 5, 4, device=DEVICE), 3.0).loss.shape == (
        0,
    )


def test_without_a_gpu_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="no CUDA device: use --backend cpu"):
        select_backend("triton")
    assert select_backend("auto").name == "cpu"


def test_without_triton_the_error_names_the_remedy(monkeypatch):
    monkeypatch.delattr("splatshard.pipeline.kernels.triton_voronoi")
    monkeypatch.setitem(sys.modules, "splatshard.pipeline.kernels.triton_voronoi", None)
    with pytest.raises(BackendError, match=r"install splatshard\[gpu\], or use --backend cpu"):
        select_backend("triton")


def test_auto_is_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend = select_backend("auto")
    assert (backend.name, backend.device.type) == ("triton", "cuda")


@pytest.mark.parametrize("version", ["pinned", "3.6.0"])
def test_every_kernel_compiles_for_an_h200_without_spilling(version):
    """In a process of its own: here the kernels may be interpreted ones. The process fails where a
    loop is not as long as it was when it was counted, or a size would be compiled in. 3.6.0 came
    with torch 2.11; it lays out tensors otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if version != "pinned":
        older = Path(sys.prefix, f"triton-{version}")
        if not (older / "triton").exists():
            pytest.skip(f"no {older}: `make test` puts it there")
        environment["PYTHONPATH"] = str(older)
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    version_line, *lines = done.stdout.splitlines()
    assert version in ("pinned", version_line.removeprefix("Triton "))
    assert len(lines) == 12
    assert all("stack 0" in line for line in lines), done.stdout
