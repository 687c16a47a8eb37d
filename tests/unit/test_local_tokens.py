"""Local tokens: the integrals, the patch embedding they stand for, a student at its teacher's
start."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splatshard.pipeline.models.encoder import SplatEncoder
from splatshard.pipeline.models.local import WINDOW, LocalTokens, coefficients, half_plane
from splatshard.pipeline.models.patches import PatchEncoder, normalised
from splatshard.pipeline.models.resampler import anchors
from splatshard.pipeline.models.stem import without_padding
from splatshard.pipeline.splats import Splats, covariances
from splatshard.schemas.model import ResamplerConfig
from tests.unit.toy_models import TOY, padded, sizes, toy_splats


def sum_of_gaussians(splats: Splats, p_P2: Tensor) -> Tensor:
    """[P, 3]: the first image of `splats`, without cutoff, at points in px."""
    l11, l21, l22 = splats.cholesky[0].unbind(-1)
    d = p_P2[:, None] - splats.means[0]
    u = d[..., 0] / l11
    v = (d[..., 1] - l21 * u) / l22
    return (-(u * u + v * v) / 2).exp() @ splats.colors[0]


def local_inputs(splats: Splats, side: float, cells: int) -> tuple[Tensor, ...]:
    """Colours, places, means and covariances in spacings, for a grid of cells x cells."""
    unit = side / cells
    places = anchors(cells * cells) * cells / 2 + cells / 2
    return splats.colors, places, splats.means / unit, covariances(splats.cholesky) / unit**2


def test_local_coefficients_are_the_windowed_integrals() -> None:
    """Against a fine sum over pixels, wide enough for window and Gaussians."""
    splats = toy_splats(1, 20, side=32)
    waves = half_plane(2)
    assert waves.shape == (13, 2)
    assert waves[0].tolist() == [0, 0]
    found = coefficients(*local_inputs(splats, 32, 4), waves, 20)[0]
    step = 0.25
    x = torch.arange(-64, 96, step) + step / 2
    yy, xx = torch.meshgrid(x, x, indexing="ij")
    p_P2 = torch.stack((xx, yy), -1).flatten(0, 1)
    picture = sum_of_gaussians(splats, p_P2)
    for t in (0, 6, 15):
        d = p_P2 / 8 - local_inputs(splats, 32, 4)[1][t]
        window = (-d.square().sum(-1, keepdim=True) / (2 * WINDOW**2)).exp()
        phase = d @ waves.T
        area = (step / 8) ** 2
        real = (phase.cos() * window).T @ picture * area
        imaginary = -(phase.sin() * window).T @ picture * area
        expected = torch.cat((real, imaginary[1:])).flatten()
        torch.testing.assert_close(found[t], expected, atol=2e-4, rtol=1e-3)


def test_far_gaussians_may_be_left_out() -> None:
    splats = without_padding(padded(toy_splats(2, 100, side=64), 120, math.nan))
    inputs = local_inputs(splats, 64, 8)
    exact = coefficients(*inputs, half_plane(2), 120)
    near = coefficients(*inputs, half_plane(2), 30)
    assert (near - exact).norm() < 0.03 * exact.norm()
    assert (coefficients(*inputs, half_plane(2), 3) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("smooth", [True, False])
def test_local_tokens_stand_for_a_patch_embedding(smooth: bool) -> None:
    """From a kernel to the tokens of the picture that the splats make, without rendering."""
    splats = toy_splats(1, 64, side=32)
    splats = replace(splats, cholesky=splats.cholesky * 0.5 + torch.tensor([2.0, 0.0, 2.0]))
    x = torch.arange(32) + 0.5
    yy, xx = torch.meshgrid(x, x, indexing="ij")
    picture = sum_of_gaussians(splats, torch.stack((xx, yy), -1).flatten(0, 1))
    picture = picture.T.unflatten(1, (32, 32))
    g = torch.Generator().manual_seed(0)
    kernel = torch.randn(16, 3, *((2, 2) if smooth else (8, 8)), generator=g)
    kernel = torch.nn.functional.interpolate(kernel, (8, 8), mode="bilinear")
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.3, 0.2, 0.25])
    pixels = (picture - mean[:, None, None]) / std[:, None, None]
    expected = torch.nn.functional.conv2d(pixels[None], kernel, stride=8).flatten(2)
    tokens = LocalTokens(64, 4, 16)
    tokens.init_from_kernel(kernel, mean, std)
    with torch.no_grad():
        found = tokens(*local_inputs(splats, 32, 4)).transpose(1, 2)
    spread = (expected - expected.mean(2, keepdim=True)).norm()
    assert (found - expected).norm() < (0.1 if smooth else 0.25) * spread


def test_a_student_with_local_tokens_starts_near_its_teacher() -> None:
    torch.manual_seed(0)
    config = replace(TOY, activation="gelu", tokens=16)
    teacher = PatchEncoder(replace(config, input="patches")).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 / math.sqrt(parameter[0].numel()))
    splats = toy_splats(12, 64, side=32)
    splats = replace(splats, cholesky=splats.cholesky * 0.5 + torch.tensor([2.0, 0.0, 2.0]))
    x = torch.arange(32) + 0.5
    yy, xx = torch.meshgrid(x, x, indexing="ij")
    p_P2 = torch.stack((xx, yy), -1).flatten(0, 1)
    images = [sum_of_gaussians(splats[i : i + 1], p_P2).T.unflatten(1, (32, 32)) for i in range(12)]
    with torch.no_grad():
        wanted = teacher(normalised(torch.stack(images)))
        wanted_from_mean = wanted - wanted.mean(0)
        near = {}
        for neighbours in (0, 64):
            resampler = ResamplerConfig(heads=4, neighbours=neighbours, frequencies=4)
            student = SplatEncoder(replace(config, resampler=resampler)).eval()
            student.init_from_patches(teacher.state_dict())
            found = student(splats, *sizes(12, 32)) - wanted.mean(0)
            cosine = torch.nn.functional.cosine_similarity(found, wanted_from_mean)
            near[neighbours] = cosine.mean().item()
    assert near[64] > 0.9
    assert near[0] < 0.5
