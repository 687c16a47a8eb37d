"""Colours and dropout of Gaussians are those of the rendering."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splatshard.pipeline.data.augment import (
    affine,
    augment,
    brightness_matrix,
    contrast,
    drop,
    hide,
    hue_matrix,
    mean_color,
    recolor,
    saturation_matrix,
)
from splatshard.pipeline.kernels import reference
from splatshard.schemas.train import AugmentConfig
from tests.unit.augmented import (
    HEIGHT,
    WIDTH,
    _times,
    centers,
    close,
    picture,
    some_points,
    some_splats,
)

COLOR_MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": brightness_matrix,
    "saturation": saturation_matrix,
    "hue": hue_matrix,
}


@pytest.mark.parametrize("name", COLOR_MATRICES)
def test_colours_of_the_picture_change_as_those_of_the_gaussians(name: str) -> None:
    splats, points = some_splats(), some_points()
    matrix = COLOR_MATRICES[name](torch.tensor([0.4, 1.0, -1.7], dtype=torch.float64))
    wanted = torch.einsum("bij,bpj->bpi", matrix, picture(splats, points))
    close(picture(recolor(splats, matrix), points), wanted)


def test_color_matrices_mean_what_they_are_called() -> None:
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    gray = torch.ones(3, dtype=torch.float64)
    factor = torch.tensor([0.0, 0.3, 1.0, 2.0], dtype=torch.float64)
    color = torch.tensor([0.9, 0.2, 0.4], dtype=torch.float64)
    torch.testing.assert_close(brightness_matrix(factor) @ color, factor[:, None] * color)
    for matrices in (saturation_matrix(factor), hue_matrix(factor)):
        torch.testing.assert_close(matrices @ gray, gray.expand(4, 3))
        torch.testing.assert_close(matrices @ color @ luma, (color @ luma).expand(4))
    torch.testing.assert_close(saturation_matrix(factor)[0] @ color, gray * (color @ luma))
    torch.testing.assert_close(saturation_matrix(factor)[2], torch.eye(3, dtype=torch.float64))
    turn = 2 * math.pi / 5
    fifth = hue_matrix(torch.tensor([turn], dtype=torch.float64))[0]
    full = torch.linalg.matrix_power(fifth, 5)
    torch.testing.assert_close(full, torch.eye(3, dtype=torch.float64))
    # from red (0 degrees of a usual colour wheel) a third of the way round, the strongest changes
    third = hue_matrix(torch.tensor([2 * math.pi / 3, -2 * math.pi / 3], dtype=torch.float64))
    red = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    assert {int((m @ red).argmax()) for m in third} == {1, 2}


def test_contrast_is_exact_with_one_gaussian_more() -> None:
    splats, points = some_splats(), centers(3, HEIGHT, WIDTH)
    factor = torch.tensor([0.5, 1.0, 1.6], dtype=torch.float64)
    after = contrast(splats, factor, HEIGHT, WIDTH)
    gray = mean_color(splats, HEIGHT, WIDTH) @ torch.tensor([0.299, 0.587, 0.114]).double()
    wanted = factor[:, None, None] * picture(splats, points) + ((1 - factor) * gray)[:, None, None]
    close(picture(after, points), wanted, 1e-7)
    assert (after.num_gaussians - splats.num_gaussians).tolist() == [1, 0, 1]
    single = contrast(some_splats(dtype=torch.float32), factor.float(), HEIGHT, WIDTH)
    flat = replace(single, mask=torch.zeros_like(single.mask))
    flat.mask[:, -1] = True
    rendered = reference.render(flat, HEIGHT, WIDTH)
    wanted = single.colors[:, -1, :, None, None]
    assert torch.equal(rendered, wanted.expand_as(rendered)), "constant to the last bit in float32"


def test_contrast_without_gaussians_adds_none() -> None:
    splats = hide(some_splats(), torch.zeros(3, 30, dtype=torch.bool))
    after = contrast(splats, torch.full((3,), 0.5, dtype=torch.float64), HEIGHT, WIDTH)
    assert not after.mask.any()
    assert after.colors.isfinite().all()


def test_mean_color_is_that_of_the_rendering() -> None:
    splats = some_splats(3, 12)
    inside = replace(splats, means=splats.means / 4 + torch.tensor([WIDTH, HEIGHT]) / 2.6)
    small = replace(inside, cholesky=inside.cholesky / 3)
    factor = 8
    drawn = reference.render(affine(small, *_times(3, factor)), HEIGHT * factor, WIDTH * factor)
    torch.testing.assert_close(
        mean_color(small, HEIGHT, WIDTH), drawn.mean((2, 3)), rtol=2e-3, atol=2e-5
    )


# Dropout


def test_what_is_dropped_and_what_is_kept_make_up_the_picture() -> None:
    splats, points = some_splats(), some_points()
    keep = torch.rand(splats.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    kept, dropped = drop(splats, keep), drop(splats, ~keep)
    close(picture(kept, points) + picture(dropped, points), picture(splats, points))
    close(picture(drop(splats, keep, 0.6), points) * 0.6, picture(kept, points))


@pytest.mark.parametrize("rescale", [False, True])
def test_dropout_on_average(rescale: bool) -> None:
    """The mean of 3,000 draws against the picture; deviations fall with their square root."""
    one, points = some_splats(1, 8), some_points(1, 50)
    many = one[torch.zeros(3000, dtype=torch.long)]
    config = AugmentConfig(height=HEIGHT, width=WIDTH, dropout=0.25, rescale=rescale)
    sizes = torch.full((3000,), HEIGHT), torch.full((3000,), WIDTH)
    after = augment(many, *sizes, config, torch.Generator().manual_seed(5), 1e3)
    assert abs(float(after.mask.sum() / many.mask.sum()) - 0.75) < 0.02
    found = picture(after, points.expand(3000, -1, -1)).mean(0, keepdim=True)
    close(found, picture(one, points) * (1.0 if rescale else 0.75), atol=0.08)


def test_dropout_always_keeps_one() -> None:
    splats = some_splats(3, 5)
    config = AugmentConfig(dropout=0.999)
    sizes = torch.full((3,), HEIGHT), torch.full((3,), WIDTH)
    for seed in range(20):
        after = augment(splats, *sizes, config, torch.Generator().manual_seed(seed), 1e3)
        assert (after.num_gaussians >= 1).all()
        assert not (after.mask & ~splats.mask).any()
