"""Moved, cropped and flipped Gaussians render as the moved rendering, at any point, and exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splatshard.pipeline.data.augment import (
    affine,
    composed,
    crop,
    flip,
    hide,
    visible,
)
from splatshard.pipeline.kernels import reference
from splatshard.pipeline.splats import Splats, covariances
from tests.unit.augmented import (
    HEIGHT,
    WIDTH,
    _times,
    as_image,
    centers,
    close,
    matrices,
    picture,
    same_splats,
    some_points,
    some_splats,
)


def test_the_oracle_is_the_reference_renderer() -> None:
    splats = some_splats()
    values = picture(splats, centers(3, HEIGHT, WIDTH))
    close(as_image(values, HEIGHT, WIDTH), reference.render(splats, HEIGHT, WIDTH))


# Geometry


def test_affine_moves_the_picture() -> None:
    splats, points = some_splats(), some_points()
    matrix, offset = matrices()
    moved = points @ matrix.mT + offset[:, None]
    close(picture(affine(splats, matrix, offset), moved), picture(splats, points))


def test_affine_is_exact_on_means_and_covariances() -> None:
    splats = some_splats()
    matrix, offset = matrices()
    after = affine(splats, matrix, offset)
    close(after.means, torch.einsum("bij,bnj->bni", matrix, splats.means) + offset[:, None])
    for b in range(3):
        for n in range(0, 30, 7):
            l11, l21, l22 = splats.cholesky[b, n]
            lower = torch.tensor([[l11, 0], [l21, l22]], dtype=torch.float64)
            sigma = matrix[b] @ lower @ lower.T @ matrix[b].T
            found = covariances(after.cholesky[b, n])
            close(found, torch.stack((sigma[0, 0], sigma[0, 1], sigma[1, 1])))
    assert (after.cholesky[..., ::2] > 0).all()
    assert after.mask is splats.mask
    assert after.colors is splats.colors


def test_thin_gaussians_survive_float32() -> None:
    """Axis ratio 10,000: the smaller axis is below float32's resolution of the covariance."""
    splats = some_splats(1, 6, dtype=torch.float32)
    cholesky = splats.cholesky.new_tensor([100.0, 37.0, 0.01]).expand(1, 6, 3)
    matrix, offset = (x.float() for x in matrices(1))
    after = affine(replace(splats, cholesky=cholesky), matrix, offset).cholesky
    area = (after[..., 0] * after[..., 2]).double()
    wanted = torch.linalg.det(matrix.double()).abs() * 100 * 0.01
    torch.testing.assert_close(area, wanted.expand(1, 6).double(), rtol=1e-5, atol=0)


def test_flip_mirrors_the_pixels() -> None:
    splats = some_splats()
    widths = torch.full((3,), WIDTH)
    before = reference.render(splats, HEIGHT, WIDTH)
    close(reference.render(flip(splats, widths), HEIGHT, WIDTH), before.flip(-1))
    chosen = torch.tensor([True, False, True])
    found = reference.render(flip(splats, widths, chosen), HEIGHT, WIDTH)
    close(found, torch.where(chosen[:, None, None, None], before.flip(-1), before))


def test_images_of_a_batch_may_have_several_widths() -> None:
    splats = some_splats()
    after = flip(splats, torch.tensor([10, 20, 30]))
    for i, width in enumerate((10, 20, 30)):
        before = reference.render(splats[i : i + 1], HEIGHT, width)
        close(reference.render(after[i : i + 1], HEIGHT, width), before.flip(-1))


def test_whole_crop_cuts_out_the_pixels() -> None:
    splats = some_splats()
    boxes = torch.tensor([[4.0, 3, 16, 12], [0, 0, 16, 12], [12, 8, 16, 12]])
    after = crop(splats, boxes, 12, 16)
    before = reference.render(splats, HEIGHT, WIDTH)
    cut = [
        before[i, :, y : y + 12, x : x + 16] for i, (x, y) in enumerate([(4, 3), (0, 0), (12, 8)])
    ]
    close(reference.render(after, 12, 16), torch.stack(cut))
    assert (after.num_gaussians < splats.num_gaussians).all()


def test_zoom_to_three_times_the_size_keeps_every_third_pixel() -> None:
    splats = some_splats()
    boxes = torch.tensor([[4.0, 3, 16, 12]] * 3)
    before = reference.render(splats, HEIGHT, WIDTH)[:, :, 3:15, 4:20]
    close(reference.render(crop(splats, boxes, 36, 48), 36, 48)[:, :, 1::3, 1::3], before)


def test_any_crop_is_the_picture_in_its_box() -> None:
    splats = some_splats()
    boxes = torch.tensor([[1.3, 2.7, 9.1, 14.2], [-3.5, -2.5, 40, 30], [20.25, 15, 5.5, 2.5]])
    boxes = boxes.double()
    inside = centers(3, 24, 18) / torch.tensor([18, 24]) * boxes[:, None, 2:] + boxes[:, None, :2]
    wanted = as_image(picture(splats, inside), 24, 18)
    close(reference.render(crop(splats, boxes, 24, 18), 24, 18), wanted)


@pytest.mark.parametrize("cutoff", [1.0, 3.0, 4.5])
def test_hidden_gaussians_are_those_that_render_nothing(cutoff: float) -> None:
    splats = some_splats(4, 60)
    seen = visible(splats, HEIGHT, WIDTH, cutoff)
    assert int((splats.mask & ~seen).sum()) > 0
    unseen = replace(splats, mask=splats.mask & ~seen)
    assert not reference.render(unseen, HEIGHT, WIDTH, cutoff).any()
    assert not (seen & ~splats.mask).any()
    # the box of an ellipse is tight: few that are counted as visible reach no pixel
    alone = Splats(*(x.flatten(0, 1)[:, None] for x in vars(splats).values()))
    # a Gaussian narrower than a pixel may be seen between pixel centres only
    drawn = reference.render(affine(alone, *_times(240, 8)), HEIGHT * 8, WIDTH * 8, cutoff)
    blank = ~(drawn != 0).flatten(1).any(1) & seen.flatten()
    assert blank.sum() < 0.1 * seen.sum()


def test_a_crop_of_nothing_keeps_its_gaussians_unseen() -> None:
    splats = some_splats()
    boxes = torch.tensor([[500.0, 500, 8, 8], [0, 0, WIDTH, HEIGHT], [-900, 0, 8, 8]])
    after = crop(splats, boxes, 8, 8)
    assert after.num_gaussians[0] == splats.num_gaussians[0]
    assert after.num_gaussians[2] == splats.num_gaussians[2]
    assert not reference.render(after, 8, 8)[[0, 2]].any()


def test_hidden_gaussians_are_padding() -> None:
    splats = some_splats()
    keep = torch.rand(splats.mask.shape) < 0.5
    after = hide(splats, keep)
    assert torch.equal(after.mask, splats.mask & keep)
    padding = ~after.mask
    assert not after.means[padding].any()
    assert not after.colors[padding].any()
    assert (after.cholesky[padding] == torch.tensor([1.0, 0, 1])).all()
    for name in ("means", "cholesky", "colors"):
        assert torch.equal(getattr(after, name)[after.mask], getattr(splats, name)[after.mask])


numbers = st.floats(-3, 3)
maps = st.tuples(numbers, numbers, numbers, numbers, numbers, numbers).filter(
    lambda m: abs(m[0] * m[3] - m[1] * m[2]) > 0.05
)


def as_map(values: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    flat = torch.tensor([values], dtype=torch.float64)
    return flat[:, :4].unflatten(1, (2, 2)), flat[:, 4:]


@given(maps, maps)
def test_two_maps_are_their_composition(first: tuple, second: tuple) -> None:
    splats = some_splats(1, 10)
    inner, outer = as_map(first), as_map(second)
    same_splats(affine(affine(splats, *inner), *outer), affine(splats, *composed(outer, inner)))


@given(maps)
def test_areas_grow_by_the_determinant(values: tuple) -> None:
    splats = some_splats(1, 10)
    matrix, offset = as_map(values)
    after = affine(splats, matrix, offset).cholesky
    before = splats.cholesky[..., 0] * splats.cholesky[..., 2]
    wanted = before * torch.linalg.det(matrix).abs()
    torch.testing.assert_close(after[..., 0] * after[..., 2], wanted, rtol=1e-9, atol=0)


@given(maps)
def test_a_map_can_be_undone(values: tuple) -> None:
    splats = some_splats(1, 10)
    matrix, offset = as_map(values)
    back = torch.linalg.inv(matrix)
    after = affine(affine(splats, matrix, offset), back, -(back @ offset[..., None])[..., 0])
    same_splats(after, splats)


@given(st.integers(1, 1000), st.integers(0, 100))
def test_flip_is_its_own_inverse(width: int, seed: int) -> None:
    splats = some_splats(2, 10, seed)
    widths = torch.tensor([width, width + 1])
    same_splats(flip(flip(splats, widths), widths), splats)
