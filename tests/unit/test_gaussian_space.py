"""The space of GViT's Gaussians: its maps, gradients, draws and starts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.kernels import reference
from splatshard.pipeline.kernels.gsplat_alpha import reference_alpha
from splatshard.pipeline.models.gaussian_space import (
    MARGIN,
    NUMBERS,
    colored,
    drawn,
    gaussians_of,
    grid,
    render,
    splats_from_parameters,
)
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import scales_and_angles
from splatshard.schemas.model import GViTConfig

SPACE = GViTConfig()
SIDE = 21
RENDERERS = ("sum", "alpha")
NAMES = ("x", "y", "log s1", "log s2", "angle", "red", "green", "blue", "opacity")


def any_g(batch: int, k: int, seed: int = 0) -> Tensor:
    """Far more varied than the start, some of it beyond the image."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, k, NUMBERS, generator=g, dtype=torch.float64) * 1.2


@pytest.mark.parametrize("size", [(21, 21), (17, 40)])
def test_any_numbers_are_gaussians_near_the_image(size: tuple[int, int]) -> None:
    height, width = size
    for scale in (1, 30):
        splats, opacities = gaussians_of(scale * any_g(2, 50), height, width, SPACE)
        low, high = -MARGIN * splats.means.new_tensor((width, height)), 1 + MARGIN
        assert (splats.means >= low - 1e-9).all()
        assert (splats.means[..., 0] <= high * width + 1e-9).all()
        assert (splats.means[..., 1] <= high * height + 1e-9).all()
        scales, _ = scales_and_angles(splats.cholesky)
        assert scales.min() >= SPACE.min_scale * (1 - 1e-6)
        assert scales.max() <= math.sqrt(height * width) * (1 + 1e-6)
        assert splats.colors.abs().max() <= 1
        assert splats.colors.min() < 0
        assert opacities.min() >= 0
        assert opacities.max() <= 1
        assert all(x.isfinite().all() for x in (splats.means, splats.cholesky, splats.colors))


def test_alpha_has_colours_of_light() -> None:
    splats, _ = gaussians_of(any_g(2, 50), SIDE, SIDE, replace(SPACE, renderer="alpha"))
    assert splats.colors.min() >= 0
    assert splats.colors.max() <= 1


@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_number_has_the_references_gradient(renderer: Any) -> None:
    """Of the picture, float32 through the kernels against float64 through the dense twin."""
    config = replace(SPACE, renderer=renderer)
    height, width = 19, 26
    weights = torch.randn(2, 3, height, width, dtype=torch.float64)
    g = any_g(2, 11)
    exact = g.clone().requires_grad_()
    if renderer == "sum":
        splats = splats_from_parameters(exact, height, width, config)
        picture = reference.render(splats, height, width, config.cutoff)
    else:
        picture = reference_alpha(*gaussians_of(exact, height, width, config), height, width)
    (picture * weights).sum().backward()
    ours = g.float().requires_grad_()
    (render(ours, height, width, config) * weights.float()).sum().backward()
    assert exact.grad is not None
    assert ours.grad is not None
    for i, name in enumerate(NAMES):
        wanted, found = exact.grad[..., i], ours.grad[..., i].double()
        assert wanted.abs().max() > 1e-3, name
        assert (wanted - found).abs().max() < 2e-4 * wanted.abs().max(), name


@pytest.mark.parametrize("size", [(21, 21), (12, 40), (40, 12)])
@pytest.mark.parametrize("k", [1, 2, 13, 16, 50, 196])
def test_the_grid_is_even_and_fills_the_image(size: tuple[int, int], k: int) -> None:
    centers, cells = grid(k, *size)
    assert centers.shape == cells.shape == (k, 2)
    assert cells.prod(1).sum().item() == pytest.approx(1, abs=1e-5)
    assert (centers - cells / 2 >= -1e-6).all()
    assert (centers + cells / 2 <= 1 + 1e-6).all()
    rows = centers[:, 1].unique(return_counts=True)[1]
    assert rows.max() - rows.min() <= 1


@pytest.mark.parametrize("k", [16, 49, 196])
def test_the_start_is_a_grey_picture(k: int) -> None:
    g = drawn(torch.arange(4), k, 40, 40, SPACE)
    picture = render(g, 40, 40, SPACE)[:, :, 6:-6, 6:-6]
    assert 0.35 < picture.mean() < 0.55
    assert picture.min() > 0
    assert picture.max() < 1.1


@pytest.mark.parametrize("renderer", RENDERERS)
def test_the_start_shows_the_image_blurred(renderer: Any) -> None:
    config = replace(SPACE, renderer=renderer)
    plain = torch.tensor((0.9, 0.5, 0.1))[:, None, None].expand(2, 3, 40, 40)
    g = colored(drawn(torch.arange(2), 49, 40, 40, config), plain, config)
    middle = render(g, 40, 40, config)[..., 8:-8, 8:-8].mean((2, 3))
    share = middle / plain[..., 0, 0]
    # opaque discs do not cover all of what lies behind them, a sum is made to
    low, high = (0.9, 1.1) if renderer == "sum" else (0.75, 0.9)
    assert low < share.min()
    assert share.max() < high
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(small, (40, 40), mode="bilinear")
    qualities = []
    for k in (9, 25, 100):
        grey = drawn(torch.arange(2), k, 40, 40, config)
        pictures = [render(x, 40, 40, config) for x in (grey, colored(grey, image, config))]
        qualities.append([psnr(picture, image).mean().item() for picture in pictures])
    assert all(seen > grey + 1 for grey, seen in qualities), qualities


def test_a_start_has_the_colours_under_its_means() -> None:
    """Beside a window over all pixels at once; whatever precision autocast asks for."""
    height, width, pixels = 17, 30, torch.rand(2, 3, 17, 30)
    g = drawn(torch.arange(2), 11, height, width, SPACE)
    found = colored(g, pixels, SPACE)
    splats, opacities = gaussians_of(found, height, width, SPACE)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    dx, dy = (splats.means[..., i, None, None] - p for i, p in enumerate((x, y)))
    deviation = 0.25 * math.sqrt(height * width / 11)
    weights = (-(dx * dx + dy * dy) / (2 * deviation**2)).exp()
    seen = (weights[:, :, None] * pixels[:, None]).sum((3, 4)) / weights.sum((2, 3))[..., None]
    torch.testing.assert_close(splats.colors * 0.8, seen / (math.pi / 2), atol=1e-5, rtol=1e-4)
    assert (opacities - 0.8).abs().max() < 0.05
    others = [0, 1, 2, 3, 4, 8]
    assert torch.equal(found[..., others], g[..., others])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(colored(g, pixels, SPACE), found)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_pictures_are_float32_whatever_autocast_says(renderer: Any) -> None:
    config = replace(SPACE, renderer=renderer)
    g = drawn(torch.arange(2), 5, 12, 15, config)
    wanted = render(g, 12, 15, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(render(g, 12, 15, config), wanted)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_augmented_colours_beyond_white_and_black_are_no_nan(renderer: Any) -> None:
    config = replace(SPACE, renderer=renderer)
    for value in (-3.0, 0.0, 1.0, 3.0):
        pixels = torch.full((1, 3, 12, 12), value)
        assert colored(drawn(torch.tensor([1]), 5, 12, 12, config), pixels, config).isfinite().all()
