"""The step of the fit on tensor cores, run on a CPU over an emulated warp: gradient, bits, whole
fits. What it compiles to is in test_cuda.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from splatshard.pipeline.fitting import fit as fit_module
from splatshard.pipeline.fitting.fit import TorchStep, fit
from splatshard.pipeline.fitting.start import initial_splats
from splatshard.pipeline.kernels import tile_step
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.kernels.tile_step import Step, TileStep
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats, bounds
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import BackendError
from tests.emulator import LANES, Emulator
from tests.unit.test_fit import picture
from tests.unit.test_kernels import NAMES, make_splats, to_float32
from tests.unit.tile_bounds import gradient_and_bound

CPU = select_backend("cpu")
PLAIN = FitConfig(num_gaussians=14, steps=16)
PAPER = replace(PLAIN, whitened=False, relocate=False, schedule="cosine", beta2=0.999,
                lr_means=0.1, lr_shape=0.05, l1_colors=1e-3)  # fmt: skip
SHAPES = [  # batch, gaussians, height, width, size in px, spread
    (1, 1, 5, 3, 2.0, 0.3),
    (2, 7, 13, 17, 3.0, 1.0),
    (2, 30, 31, 45, 2.0, 2.0),
    (1, 3, 9, 9, 100.0, 1.0),  # windows larger than the picture
    (1, 40, 33, 8, 0.2, 1.0),  # smaller than a pixel
    (2, 300, 19, 33, 4.0, 0.5),  # more in a tile than its list holds
]


def gradient(
    splats: Splats, target, config: FitConfig, stride=1, phase=0, emulator: Emulator | None = None
):
    """The gradient [B, N, 8] of one step, as Adam's first moment is it; the splats stay."""
    one = TileStep(target, config, stride, (emulator or Emulator()).launch)
    moments = tuple(torch.zeros(*splats.mask.shape, 8) for _ in range(2))
    one.step(splats.map(torch.clone), moments, phase, True, 0.0, 0.0, 1.0)
    return moments[0]


def random_picture(batch, height, width):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


def quality(splats, target):
    return psnr(CPU.render(splats, *target.shape[2:], 3.0), target)


def test_both_sides_mean_the_same_step():
    assert Emulator().library.size_of_step() == ctypes.sizeof(Step)


@pytest.mark.parametrize("cutoff", [2.5, 3.0, 6.0])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_exact_but_for_halves(shape, stride, cutoff):
    if stride > shape[2] or (cutoff != 3.0 and stride > 1):
        return
    splats = to_float32(make_splats(*shape))
    target = random_picture(shape[0], *shape[2:4])
    config = FitConfig(num_gaussians=shape[1], cutoff=cutoff)
    for phase in {0, stride - 1}:
        exact, bound = gradient_and_bound(splats, target, cutoff, stride, phase)
        found = gradient(splats, target, config, stride, phase)
        excess = (found - exact).abs() / bound
        assert found.isfinite().all()
        assert excess.max() <= 1, (excess.amax((0, 1)), excess.argmax())
        assert not found[~splats.mask].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_device_finds_the_gradient_that_is_exact_but_for_halves(shape):
    device = torch.device("cuda", torch.cuda.current_device())
    launch = tile_step.load(device)
    splats = to_float32(make_splats(*shape))
    target = random_picture(shape[0], *shape[2:4])
    config = FitConfig(num_gaussians=shape[1])
    for stride in range(1, 5):
        exact, bound = gradient_and_bound(splats, target, 3.0, stride, stride - 1)
        found = [on_device(splats, target, config, stride, launch, device) for _ in range(2)]
        assert torch.equal(*found)
        assert ((found[0].cpu() - exact).abs() <= bound).all()


def on_device(splats, target, config, stride, launch, device):
    one = TileStep(target.to(device), config, stride, launch)
    moments = tuple(torch.zeros(*splats.mask.shape, 8, device=device) for _ in range(2))
    one.step(splats.to(device), moments, stride - 1, True, 0.0, 0.0, 1.0)
    return moments[0]


def test_the_bound_means_something():
    """It is a few percent of the gradient, where a wrong fragment is off by all of it."""
    splats, target = to_float32(make_splats(2, 30, 31, 45, 2.0, 2.0)), random_picture(2, 31, 45)
    exact, bound = gradient_and_bound(splats, target, 3.0, 1, 0)
    assert (bound.norm(dim=1) / exact.norm(dim=1)).max() < 0.1
    error = gradient(splats, target, FitConfig(num_gaussians=30)) - exact
    assert (error.norm(dim=1) / exact.norm(dim=1)).max() < 0.005


@pytest.mark.parametrize("option", ["-DSWAP_A", "-DSWAP_B", "-DSWAP_HALF"])
def test_a_wrong_fragment_is_found(option):
    splats, target = to_float32(make_splats(1, 20, 14, 21)), random_picture(1, 14, 21)
    exact, bound = gradient_and_bound(splats, target, 3.0, 1, 0)
    wrong = gradient(splats, target, PLAIN, emulator=Emulator(None, LANES, option))
    assert ((wrong - exact).abs() > 3 * bound).any()


def test_two_runs_give_the_same_bits_in_any_order_of_tiles_and_lanes():
    splats, target = to_float32(make_splats(2, 70, 40, 33, 3.0, 1.5)), random_picture(2, 40, 33)
    first = gradient(splats, target, PLAIN)
    mixed = np.random.default_rng(0).permutation(32)
    for emulator in (Emulator(1), Emulator(2), Emulator(3, LANES[::-1]), Emulator(None, mixed)):
        assert torch.equal(first, gradient(splats, target, PLAIN, emulator=emulator))


def test_an_image_does_not_depend_on_its_batch():
    splats, target = to_float32(make_splats(3, 20, 19, 23)), random_picture(3, 19, 23)
    together = gradient(splats, target, PLAIN, 2, 1)
    assert torch.equal(together[1:2], gradient(splats[1:2], target[1:2], PLAIN, 2, 1))


@pytest.mark.parametrize("stride", [1, 3])
def test_a_tile_lists_the_gaussians_whose_ellipse_meets_it(stride):
    """All that light a pixel, and none whose ellipse, a little larger, lies beside its pixels."""
    splats, target = to_float32(make_splats(2, 45, 37, 45, 3.0, 1.5)), random_picture(2, 37, 45)
    one = TileStep(target, FitConfig(num_gaussians=45), stride, Emulator().launch)
    moments = tuple(torch.zeros(2, 45, 8) for _ in range(2))
    argument = one.argument(splats, moments, stride - 1, 0.0, 0.0, 1.0)
    one.launch("list_gaussians", 1, 128, argument)
    assert one.scratch is not None
    rows, columns = one.tiles
    words = one.scratch[2].numpy().view(np.uint32)[: 2 * rows * columns * 2]
    bits = (words.reshape(2, rows, columns, 2, 1) >> np.arange(32, dtype=np.uint32)) & 1
    listed = torch.from_numpy(bits.reshape(2, rows, columns, 64)[..., :45].astype(bool))
    for fine, expected in ((1, None), (16, listed)):
        # points of the tile, from its first pixel's centre to its last one's
        step = torch.arange(7 * fine + 1) / fine + 0.5
        x = (torch.arange(columns)[:, None] * 8 + step).double()
        y = (torch.arange(rows)[:, None] * 8 + step).double()
        grown = 1.0 if fine == 1 else 1.01
        l11, l21, l22 = (splats.cholesky.double() / torch.tensor([1, stride, stride])).unbind(-1)
        mean_y = (splats.means[..., 1].double() - 0.5 - (stride - 1)) / stride + 0.5
        z1 = (x - splats.means[..., 0, None, None]) / l11[..., None, None]
        dy = y - mean_y[..., None, None]
        z1, dy = z1[:, :, None, :, None], dy[:, :, :, None, :, None]
        z2 = (dy - l21[..., None, None, None, None] * z1) / l22[..., None, None, None, None]
        inside = (z1 * z1 + z2 * z2 <= (3 * grown) ** 2).any(-1).any(-1)
        inside = (inside & splats.mask[..., None, None]).permute(0, 2, 3, 1)
        if expected is None:
            assert not (inside & ~listed).any()
        else:
            near = (listed & ~inside).sum() / listed.sum()  # the margin is 0.01 px
            assert near < 0.01


def test_raw_parameters_have_the_whitened_gradient_in_pixels():
    splats, target = to_float32(make_splats(2, 20, 19, 23)), random_picture(2, 19, 23)
    raw = gradient(splats, target, replace(PAPER, l1_colors=0.0), 2, 1)
    d1, d2, t11, t21, t22, *_ = gradient(splats, target, PLAIN, 2, 1).double().unbind(-1)
    l11, l21, l22 = splats.cholesky.double().unbind(-1)
    a, c = 1 / l11, 1 / l22
    b = -l21 * a * c
    expected = (a * d1 + b * d2, c * d2, a * t11 + b * t21, c * t21, c * t22)
    torch.testing.assert_close(
        raw[..., :5].double(), torch.stack(expected, -1), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("config", [PLAIN, PAPER], ids=["plain", "paper"])
def test_adam_is_that_of_torch_steps(config, monkeypatch):
    """From the same moments and the same gradient, which the test above is about."""
    target = picture(1, 40, 40)[:, :, 14:29, 9:22].contiguous()
    start = initial_splats(target, config, CPU).map(torch.Tensor.contiguous)
    start = replace(start, mask=(torch.arange(14) != 5)[None])
    own = gradient(start, target, config, 2, 1)
    monkeypatch.setattr(fit_module, "parameter_gradient", lambda *_: own.clone())
    random = torch.Generator().manual_seed(1)
    moments = tuple(1e-3 * torch.rand(1, 14, 8, generator=random) for _ in range(2))
    found, expected = start.map(torch.clone), start.map(torch.clone)
    ours, theirs = (tuple(m.clone() for m in moments) for _ in range(2))
    TileStep(target, config, 2, Emulator().launch).step(found, ours, 1, True, 0.8, 1.3, 0.4)
    expected = TorchStep(target, config, 2, CPU).step(expected, theirs, 1, True, 0.8, 1.3, 0.4)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-9)
    for name in NAMES:
        assert not torch.equal(getattr(found, name), getattr(start, name))
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("config", [PLAIN, PAPER], ids=["plain", "paper"])
def test_bounds_are_those_of_torch_steps(config):
    """Far away, endlessly wide, and NaN, which must not become a number, nor touch the others."""
    target = picture(1, 40, 40)[:, :, 14:29, 9:22].contiguous()
    start = initial_splats(target, PLAIN, CPU).map(torch.Tensor.contiguous)
    start.means[0, 0], start.means[0, 1], start.means[0, 2] = -1e4, 1e4, torch.nan
    start.cholesky[0, 3] = torch.tensor([1e5, -1e5, 1e5])
    start.colors[0, 4, 1] = torch.inf
    start.cholesky[0, 5, 0] = 1e-6
    moments = tuple(torch.zeros(1, 14, 8) for _ in range(2))
    TileStep(target, config, 1, Emulator().launch).step(start, moments, 0, True, 0.5, 0.1, 0.1)
    low_x, high_x, low_y, high_y, largest = bounds(*target.shape[2:])
    assert start.means[0, 0].tolist() == [low_x, low_y]
    assert start.means[0, 1].tolist() == [high_x, high_y]
    assert start.means[0, 2].isnan().all()
    assert start.cholesky[0, 3].tolist() == [largest, -largest, largest]
    for name in NAMES:
        assert getattr(start, name)[0, 6:].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, 1e-30])
@pytest.mark.parametrize("name", NAMES)
def test_wild_parameters_touch_no_others(name, value):
    splats = to_float32(make_splats(1, 5, 9, 8))
    wild = getattr(splats, name).clone()
    wild[0, 1] = value
    target = random_picture(1, 9, 8)
    hidden = replace(splats, mask=splats.mask & (torch.arange(5) != 1))
    found = gradient(replace(splats, **{name: wild}), target, PLAIN)
    assert found.isfinite().all()
    if name != "means" or not abs(value) < 1:  # elsewhere it is drawn, and lights its pixels
        others = [0, 2, 3, 4]
        assert torch.equal(found[:, others], gradient(hidden, target, PLAIN)[:, others])


def test_nothing_to_draw():
    target = random_picture(2, 6, 5)
    empty = Splats(torch.zeros(2, 0, 2), torch.zeros(2, 0, 3), torch.zeros(2, 0, 3),
                   torch.zeros(2, 0, dtype=torch.bool))  # fmt: skip
    assert gradient(empty, target, PLAIN).shape == (2, 0, 8)
    splats = to_float32(make_splats(2, 4, 6, 5))
    masked = replace(splats, mask=torch.zeros(2, 4, dtype=torch.bool))
    outside = replace(splats, means=torch.full((2, 4, 2), 1e4))
    for splats in (masked, outside):
        assert not gradient(splats, target, PLAIN).any()


@pytest.mark.parametrize("n", [12, 60])
def test_a_fit_loses_nothing_in_the_mean(n):
    target = torch.cat(
        [picture(4, 40, 40)[:, :, y : y + 26, x : x + 30] for x, y in ((2, 5), (9, 13))]
    )
    config = FitConfig(num_gaussians=n, steps=40)
    ours = replace(CPU, make_step=partial(TileStep, launch=Emulator().launch))
    ours, theirs = (fit(target, config, b)[0] for b in (ours, replace(CPU, make_step=None)))
    lost = quality(theirs, target) - quality(ours, target)
    assert lost.mean() < 0.05, lost


def test_a_device_that_cannot_is_given_tritons_step_and_told_why_once(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed (extra: gpu)")
    from splatshard.pipeline.kernels.triton_backend import FusedStep

    def too_old(device):
        raise BackendError("compute capability 7.5, at least 8.0 needed")

    monkeypatch.setattr(tile_step, "_LOADED", {})
    monkeypatch.setattr(tile_step, "load", too_old)
    target = random_picture(1, 9, 8)
    with pytest.warns(UserWarning, match="fitted without tensor cores: compute capability 7.5"):
        step = tile_step.make_step(target, PLAIN, 1)
    assert isinstance(step, FusedStep)
    assert isinstance(tile_step.make_step(target, PLAIN, 1), FusedStep)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    device = torch.device("cpu")
    tile_step.compare(Emulator().launch, device)
    with pytest.raises(BackendError, match=r"gradient is wrong by \d+"):
        tile_step.compare(Emulator(None, LANES, "-DSWAP_A").launch, device)
    monkeypatch.setattr(tile_step, "_LOADED", {})
    monkeypatch.setattr(tile_step, "load", lambda device: Emulator().launch)
    assert isinstance(tile_step.make_step(random_picture(1, 9, 8), PLAIN, 1), TileStep)
