"""Each stencil against the convolution of `reference.blur` in float64, odd sizes and wide radii."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from splatshard.pipeline.fitting.fit import fit, relocates_at
from splatshard.pipeline.fitting.nested import fit_nested
from splatshard.pipeline.kernels import reference
from splatshard.pipeline.kernels.blur import blur, half_taps
from splatshard.pipeline.kernels.select import select_backend
from splatshard.schemas.config import FitConfig
from tests.unit.test_fit import picture

ON_GPU = [pytest.mark.gpu] * torch.cuda.is_available()  # there, `make test-gpu` runs triton's
SHAPES = [(1, 1, 1, 1), (2, 1, 1, 9), (1, 3, 9, 1), (2, 3, 5, 3), (3, 2, 37, 45), (1, 1, 16, 64)]


@pytest.fixture(params=["cpu", pytest.param("triton", marks=ON_GPU)])
def blurred(request):
    """A kernel for tensors on the CPU; triton's runs in the interpreter where there is no GPU."""
    if request.param == "cpu":
        return blur
    if not find_spec("triton"):
        pytest.skip("Triton is not installed (extra: gpu)")
    backend = select_backend("triton")
    return lambda image, sigma: backend.blur(image.to(backend.device), sigma).cpu()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.3, 6.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stencil_is_the_convolution(blurred, shape, sigma):
    image = noise(*shape)
    expected = reference.blur(image.double(), sigma)
    torch.testing.assert_close(blurred(image, sigma).double(), expected, rtol=0, atol=2e-6)


def test_a_radius_may_be_larger_than_a_block_and_the_picture(blurred):
    image = noise(1, 2, 40, 27)
    expected = reference.blur(image.double(), 16.0)
    torch.testing.assert_close(blurred(image, 16.0).double(), expected, rtol=0, atol=2e-6)


def test_a_constant_stays_constant(blurred):
    for sigma in (0.5, 1.3, 9.0):
        image = torch.full((1, 2, 11, 7), 0.7)
        torch.testing.assert_close(blurred(image, sigma), image, rtol=2e-6, atol=0)


def test_values_and_their_mirror_image_give_the_same_bits(blurred):
    image = noise(1, 2, 13, 18)
    for axis in (2, 3):
        assert torch.equal(blurred(image.flip(axis), 1.3).flip(axis), blurred(image, 1.3))


def test_two_runs_give_the_same_bits(blurred):
    image = noise(2, 3, 37, 45)
    before = image.clone()
    assert torch.equal(blurred(image, 1.3), blurred(image, 1.3))
    assert torch.equal(image, before)


def test_an_image_does_not_depend_on_its_batch(blurred):
    image = noise(3, 2, 21, 33)
    assert torch.equal(blurred(image, 0.8)[1:2], blurred(image[1:2], 0.8))


def test_memory_in_another_order_makes_no_difference(blurred):
    image = noise(2, 12, 10, 3)
    assert torch.equal(
        blurred(image.permute(0, 3, 1, 2), 1.0),
        blurred(image.permute(0, 3, 1, 2).contiguous(), 1.0),
    )


@pytest.mark.parametrize("shape", [(0, 3, 8, 6), (2, 0, 8, 6)])
def test_nothing_to_blur(blurred, shape):
    assert blurred(torch.zeros(shape), 1.3).shape == shape


def test_what_is_not_a_number_stays_in_its_neighbourhood(blurred):
    image = noise(1, 1, 15, 15)
    image[..., 7, 7] = torch.nan
    bad = blurred(image, 1.0).isnan()[0, 0]
    assert bad[4:11, 4:11].all()
    assert bad.sum() == 49


def test_taps_sum_to_one():
    for sigma in (0.3, 0.5, 1.3, 16.0):
        half = half_taps(sigma)
        assert half[0] + 2 * sum(half[1:]) == pytest.approx(1, abs=1e-12)
        assert half == sorted(half, reverse=True)


def test_the_reference_is_the_plain_sum():
    """At the middle of a picture, tap by tap; at a corner all taps beyond it fall on its pixel."""
    image = noise(1, 1, 9, 9).double()
    k = torch.arange(-3, 4)
    weights = torch.exp(-0.5 * k.double() ** 2)
    weights /= weights.sum()
    for at in (4, 0):
        places = (at + k).clamp(0, 8)
        expected = weights @ image[0, 0, places][:, places] @ weights
        torch.testing.assert_close(reference.blur(image, 1.0)[0, 0, at, at], expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_fit_blurs_with_what_its_backend_offers(nested):
    """The structure tensor of the start, the residual of each relocation, and the two pictures of a
    nested increment's start."""
    sigmas = []

    def recording(image, sigma):
        sigmas.append(sigma)
        return blur(image, sigma)

    backend = replace(select_backend("cpu"), blur=recording)
    target, config = picture(1, 24, 20), FitConfig(num_gaussians=9, steps=20)
    moves = sum(relocates_at(step, 20) for step in range(20))
    assert moves
    if not nested:
        fit(target, config, backend)
        assert len(sigmas) == 1 + moves
    else:
        fit_nested(target, (9, 15), config, backend)
        later = sum(relocates_at(step, 12) for step in range(12))
        assert len(sigmas) == 1 + moves + 2 + later
