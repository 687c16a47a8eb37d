"""Every fast kernel against the dense reference: value and gradient, odd sizes, hard cases.

The bound is the reference's own error in float32 (against float64), a few times over.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from splatshard.pipeline.kernels import reference
from splatshard.pipeline.kernels.backend import Backend, LossAndGrad
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.splats import Splats, cholesky_from_scales_and_angles
from splatshard.schemas.errors import BackendError

NAMES = ("means", "cholesky", "colors")
SHAPES = [  # batch, gaussians, height, width, size in px, spread
    (1, 1, 5, 3, 2.0, 0.3),  # one Gaussian
    (2, 7, 13, 17, 3.0, 1.0),
    (2, 30, 31, 45, 2.0, 2.0),
    (1, 3, 9, 9, 100.0, 1.0),  # windows larger than the picture
    (1, 40, 33, 8, 0.2, 1.0),  # smaller than a pixel
    (2, 40, 19, 65, 3.0, 0.5),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


ON_GPU = [pytest.mark.gpu] * torch.cuda.is_available()  # there, `make test-gpu` runs triton's


@pytest.fixture(params=["cpu", pytest.param("triton", marks=ON_GPU)])
def backend(request) -> Backend:
    """triton: on the GPU where there is one, else in Triton's interpreter (see conftest.py)."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (extra: gpu)")
    return on_cpu(select_backend(request.param))


def on_cpu(backend: Backend) -> Backend:
    """`backend` for tensors on the CPU, so that the same tests serve every device."""
    cpu, device = torch.device("cpu"), backend.device
    if device == cpu:
        return backend

    def loss_and_grad(splats, target, cutoff):
        result = backend.loss_and_grad(splats.to(device), target.to(device), cutoff)
        return LossAndGrad(**{n: getattr(result, n).cpu() for n in ("loss", *NAMES)})

    def render(splats, height, width, cutoff):
        return backend.render(splats.to(device), height, width, cutoff).cpu()

    return Backend(backend.name, cpu, render, loss_and_grad)


def make_splats(batch, n, height, width, size=3.0, spread=1.0, seed=0) -> Splats:
    """Float64 splats, a fifth of them outside the picture, a tenth masked out."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    means = (uniform(batch, n, 2) * 1.4 - 0.2) * torch.tensor([width, height])
    diagonal = size * (0.4 * spread * normal(2, batch, n)).exp()
    cholesky = torch.stack((diagonal[0], size * spread * normal(batch, n), diagonal[1]), -1)
    mask = torch.rand(batch, n, generator=g) < 0.9
    mask[:, 0] = True
    return Splats(means, cholesky, normal(batch, n, 3), mask)


def to_float32(splats: Splats) -> Splats:
    return Splats(*(getattr(splats, n).float() for n in NAMES), splats.mask)


def assert_close(fast, ref32, ref64, factor=8.0):
    """Error of `fast` at most `factor` times float32's own, or 2e-6 of the largest value."""
    scale = ref64.abs().max().item() + 1e-30
    own = (ref32.double() - ref64).abs().max().item()
    error = (fast.double() - ref64).abs().max().item()
    assert error <= factor * own + 2e-6 * scale, (error / scale, own / scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_grad_match_reference(backend, shape):
    splats = make_splats(*shape)
    target = torch.rand(shape[0], 3, *shape[2:4], dtype=torch.float64)
    exact = reference.loss_and_grad(splats, target)
    single = reference.loss_and_grad(to_float32(splats), target.float())
    fast = backend.loss_and_grad(to_float32(splats), target.float(), 3.0)
    for name in ("loss", *NAMES):
        assert_close(getattr(fast, name), getattr(single, name), getattr(exact, name))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutoff", [2.5, 3.0, 6.0])
def test_render_and_its_gradient_match_reference(backend, shape, cutoff):
    splats = make_splats(*shape, seed=1)
    height, width = shape[2:4]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape[0], 3, height, width, generator=generator, dtype=torch.float64)
    images, gradients = [], []
    for render, s, w in (
        (reference.render, splats, weight),
        (reference.render, to_float32(splats), weight.float()),
        (backend.render, to_float32(splats), weight.float()),
    ):
        leaves = [getattr(s, n).clone().requires_grad_() for n in NAMES]
        image = render(Splats(*leaves, s.mask), height, width, cutoff)
        images.append(image.detach())
        gradients.append(torch.autograd.grad((image * w).sum(), leaves))
    assert_close(images[2], images[1], images[0])
    for exact, single, fast in zip(*gradients, strict=True):
        assert_close(fast, single, exact)


def test_aspect_ratio_twenty(backend):
    angles = torch.linspace(0, 3.1, 13, dtype=torch.float64)[None]
    scales = torch.tensor([10.0, 0.5], dtype=torch.float64).expand(1, 13, 2)
    cholesky = cholesky_from_scales_and_angles(scales, angles)
    means = torch.rand(1, 13, 2, dtype=torch.float64) * 40
    mask = torch.ones(1, 13, dtype=torch.bool)
    splats = Splats(means, cholesky, torch.ones(1, 13, 3, dtype=torch.float64), mask)
    target = torch.rand(1, 3, 41, 39, dtype=torch.float64)
    exact = reference.loss_and_grad(splats, target)
    single = reference.loss_and_grad(to_float32(splats), target.float())
    fast = backend.loss_and_grad(to_float32(splats), target.float(), 3.0)
    for name in ("loss", *NAMES):
        assert_close(getattr(fast, name), getattr(single, name), getattr(exact, name))


def test_reference_gradient_is_right():
    """The oracle itself, by finite differences; strips of rows give the same as one piece."""
    splats = make_splats(1, 3, 7, 6, size=1.5, spread=0.5)
    splats = dataclasses.replace(splats, mask=torch.ones(1, 3, dtype=torch.bool))
    leaves = [getattr(splats, n).requires_grad_() for n in NAMES]
    # cutoff 30: finite differences must not step over the discontinuity at the ellipse
    assert torch.autograd.gradcheck(
        lambda *x: reference.render(Splats(*x, splats.mask), 7, 6, 30.0), leaves
    )


def test_strips_of_rows_add_up(monkeypatch):
    splats, target = make_splats(2, 9, 23, 11), torch.rand(2, 3, 23, 11, dtype=torch.float64)
    whole = reference.loss_and_grad(splats, target)
    monkeypatch.setattr(reference, "STRIP_ELEMENTS", 2 * 9 * 11 * 4)
    strips = reference.loss_and_grad(splats, target)
    for name in ("loss", *NAMES):
        torch.testing.assert_close(getattr(strips, name), getattr(whole, name))


def test_nothing_to_draw(backend):
    """No Gaussians at all, only masked ones, and only ones outside the picture."""
    target = torch.rand(2, 3, 6, 5)
    empty = Splats(torch.zeros(2, 0, 2), torch.zeros(2, 0, 3), torch.zeros(2, 0, 3),
                   torch.zeros(2, 0, dtype=torch.bool))  # fmt: skip
    masked = to_float32(make_splats(2, 4, 6, 5))
    masked = dataclasses.replace(masked, mask=torch.zeros(2, 4, dtype=torch.bool))
    outside = dataclasses.replace(
        to_float32(make_splats(2, 4, 6, 5)), means=torch.full((2, 4, 2), 1e4)
    )
    for splats in (empty, masked, outside):
        assert not backend.render(splats, 6, 5, 3.0).any()
        result = backend.loss_and_grad(splats, target, 3.0)
        torch.testing.assert_close(result.loss, target.square().mean((1, 2, 3)))
        assert not any(getattr(result, n).any() for n in NAMES)


# The interpreter is numpy: inf - inf warns there. A cast of NaN to an integer must not happen.
@pytest.mark.filterwarnings("ignore:(?!.* cast):RuntimeWarning")
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0, 1e-30]
)
@pytest.mark.parametrize("name", NAMES[:2])
def test_wild_parameters_do_not_crash(backend, name, value):
    columns = {"means": 2, "cholesky": 3}[name]
    splats = to_float32(make_splats(columns, 5, 9, 8))
    wild = getattr(splats, name).clone()
    wild[range(columns), 1, range(columns)] = value  # a column per image
    changed = dataclasses.replace(splats, **{name: wild})
    backend.loss_and_grad(changed, torch.rand(columns, 3, 9, 8), 3.0)
    backend.render(changed, 9, 8, 3.0)


def test_two_runs_give_the_same_bits(backend):
    splats, target = to_float32(make_splats(2, 50, 40, 33)), torch.rand(2, 3, 40, 33)
    first, second = (backend.loss_and_grad(splats, target, 3.0) for _ in range(2))
    assert all(torch.equal(getattr(first, n), getattr(second, n)) for n in ("loss", *NAMES))


def test_an_image_does_not_depend_on_its_batch(backend):
    splats, target = to_float32(make_splats(3, 20, 19, 23)), torch.rand(3, 3, 19, 23)
    together = backend.loss_and_grad(splats, target, 3.0)
    alone = backend.loss_and_grad(splats[1:2], target[1:2], 3.0)
    for name in ("loss", *NAMES):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))


def test_backends_by_name():
    assert select_backend("auto").name in ("cpu", "triton")
    with pytest.raises(BackendError, match="choose one of auto, cpu, triton, reference"):
        select_backend("opencl")
