"""Augmented Gaussians render as the augmented rendering, at any point, and exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splatshard.pipeline.data.augment import (
    Augment,
    affine,
    augment,
    brightness_matrix,
    composed,
    constant,
    contrast,
    crop,
    drop,
    flip,
    hide,
    hue_matrix,
    mean_color,
    recolor,
    saturation_matrix,
    visible,
)
from splatshard.pipeline.kernels import reference
from splatshard.pipeline.splats import Splats, covariances
from splatshard.schemas.errors import UsageError

HEIGHT, WIDTH = 20, 28
FULL = Augment(
    height=24,
    width=16,
    crop_scale=(0.2, 0.9),
    flip=0.5,
    rotation=30,
    shear=20,
    zoom=(0.7, 1.5),
    shift=0.2,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=40,
    grayscale=0.3,
    dropout=0.3,
)


def some_splats(batch: int = 3, n: int = 30, seed: int = 0, dtype=torch.float64) -> Splats:
    """Gaussians in, across and beyond the border, thin ones too; the last third of the entries of
    image 1 are padding that would show if it were rendered."""
    g = torch.Generator().manual_seed(seed)
    side = torch.tensor([WIDTH, HEIGHT])
    means = (torch.rand(batch, n, 2, generator=g, dtype=dtype) * 1.6 - 0.3) * side
    cholesky = torch.randn(batch, n, 3, generator=g, dtype=dtype)
    cholesky[..., ::2] = (cholesky[..., ::2] * 0.7).exp()
    colors = torch.randn(batch, n, 3, generator=g, dtype=dtype)
    mask = torch.ones(batch, n, dtype=torch.bool)
    mask[1 % batch, n - n // 3 :] = False
    return Splats(means, cholesky, colors, mask)


def picture(splats: Splats, points: Tensor, cutoff: float = 3.0) -> Tensor:
    """The oracle: I(p) [B, P, 3] at any points [B, P, 2], through the inverse covariance."""
    xx, xy, yy = covariances(splats.cholesky).unbind(-1)
    sigma = torch.stack((xx, xy, xy, yy), -1).unflatten(-1, (2, 2))
    d = points[:, None] - splats.means[:, :, None]  # [B, N, P, 2]
    q = (d * torch.linalg.solve(sigma[:, :, None], d[..., None])[..., 0]).sum(-1)
    weight = torch.exp(-q / 2) * ((q <= cutoff**2) & splats.mask[..., None])
    return torch.einsum("bnp,bnc->bpc", weight, splats.colors)


def some_points(batch: int = 3, number: int = 400, seed: int = 7) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    side = torch.tensor([WIDTH, HEIGHT])
    return (torch.rand(batch, number, 2, generator=g, dtype=torch.float64) * 2 - 0.5) * side


def centers(batch: int, height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack((x, y), -1).double() + 0.5).flatten(0, 1).expand(batch, -1, 2)


def as_image(values: Tensor, height: int, width: int) -> Tensor:
    return values.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def close(found: Tensor, wanted: Tensor, atol: float = 1e-9) -> None:
    assert wanted.abs().max() > 0.1, "nothing to see"
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-9)


def matrices(number: int = 3, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Maps that turn, mirror, stretch and shear, none of them nearly flat."""
    g = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(number, 2, 2, generator=g, dtype=torch.float64))
    slant = torch.randn(number, 2, 2, generator=g, dtype=torch.float64).triu(1)
    scale = torch.randn(number, 2, generator=g, dtype=torch.float64).mul(0.5).exp()
    offset = torch.randn(number, 2, generator=g, dtype=torch.float64) * 10
    return turn @ (slant + torch.diag_embed(scale)), offset


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


def _times(batch: int, factor: int) -> tuple[Tensor, Tensor]:
    matrix = torch.eye(2, dtype=torch.float64).mul(factor).expand(batch, 2, 2)
    return matrix, torch.zeros(batch, 2, dtype=torch.float64)


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


def same_splats(found: Splats, wanted: Splats) -> None:
    for name in ("means", "cholesky", "colors"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-7, atol=1e-7
        )
    assert torch.equal(found.mask, wanted.mask)


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


# Colours


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
    config = Augment(height=HEIGHT, width=WIDTH, dropout=0.25, rescale=rescale, cutoff=1e3)
    sizes = torch.full((3000,), HEIGHT), torch.full((3000,), WIDTH)
    after = augment(many, *sizes, config, torch.Generator().manual_seed(5))
    assert abs(float(after.mask.sum() / many.mask.sum()) - 0.75) < 0.02
    found = picture(after, points.expand(3000, -1, -1)).mean(0, keepdim=True)
    close(found, picture(one, points) * (1.0 if rescale else 0.75), atol=0.08)


def test_dropout_always_keeps_one() -> None:
    splats = some_splats(3, 5)
    config = Augment(dropout=0.999, cutoff=1e3)
    sizes = torch.full((3,), HEIGHT), torch.full((3,), WIDTH)
    for seed in range(20):
        after = augment(splats, *sizes, config, torch.Generator().manual_seed(seed))
        assert (after.num_gaussians >= 1).all()
        assert not (after.mask & ~splats.mask).any()


# All together


def drawn(config: Augment, batch: int = 6, seed: int = 1, dtype=torch.float64) -> Splats:
    splats = some_splats(batch, 40, dtype=dtype)
    sizes = torch.full((batch,), HEIGHT), torch.full((batch,), WIDTH)
    return augment(splats, *sizes, config, torch.Generator().manual_seed(seed))


def test_by_default_only_the_size_changes() -> None:
    splats = some_splats(6, 40)
    after = drawn(Augment(height=2 * HEIGHT, width=2 * WIDTH))
    inside = centers(6, 2 * HEIGHT, 2 * WIDTH) / 2
    close(
        reference.render(after, 2 * HEIGHT, 2 * WIDTH),
        as_image(picture(splats, inside), 2 * HEIGHT, 2 * WIDTH),
    )


GEOMETRY = replace(FULL, brightness=0, contrast=0, saturation=0, hue=0, grayscale=0, dropout=0)
COLORS = Augment(height=HEIGHT, width=WIDTH, brightness=0.4, saturation=0.4, hue=40, grayscale=0.3)


def test_random_geometry_is_one_affine_map_of_each_image() -> None:
    """The map is found from where the means went, and the whole picture must have gone there."""
    splats, after = some_splats(6, 40), drawn(GEOMETRY)
    seen = []
    for i in range(6):
        kept = after.mask[i].nonzero()[:, 0]
        assert len(kept) > 3
        old = torch.cat((splats.means[i, kept], torch.ones(len(kept), 1).double()), 1)
        solved = torch.linalg.lstsq(old, after.means[i, kept])
        matrix, offset = solved.solution[:2].T, solved.solution[2]
        seen.append(matrix)
        back = (centers(1, 24, 16) - offset) @ torch.linalg.inv(matrix).T
        wanted = as_image(picture(splats[i : i + 1], back), 24, 16)
        close(reference.render(after[i : i + 1], 24, 16), wanted, 1e-7)
    determinants = torch.linalg.det(torch.stack(seen))
    assert determinants.min() < 0 < determinants.max(), "some are flipped, some are not"
    assert len({round(float(d), 6) for d in determinants}) == 6, "each image has its own"


def test_random_colours_are_one_matrix_for_each_image() -> None:
    before = drawn(Augment(height=HEIGHT, width=WIDTH))
    after = drawn(COLORS)
    points = some_points(6)
    for i in range(6):
        matrix = torch.linalg.lstsq(before.colors[i], after.colors[i]).solution.T
        wanted = picture(before[i : i + 1], points[i : i + 1]) @ matrix.T
        close(picture(after[i : i + 1], points[i : i + 1]), wanted)
    gray = (after.colors.amax(-1) - after.colors.amin(-1)).amax(1) < 1e-6
    assert 0 < gray.sum() < 6


@given(st.integers(0, 10_000))
def test_crops_stay_in_the_image_and_in_their_ranges(seed: int) -> None:
    config = Augment(height=10, width=10, crop_scale=(0.1, 0.5), crop_ratio=(0.5, 2.0))
    corners = torch.tensor([[0.0, 0], [WIDTH, HEIGHT]]).double().expand(4, 2, 2)
    unit = torch.tensor([1.0, 0, 1]).double().expand(4, 2, 3)
    splats = Splats(corners, unit, unit, torch.ones(4, 2, dtype=torch.bool))
    sizes = torch.full((4,), HEIGHT), torch.full((4,), WIDTH)
    config = replace(config, cutoff=1e6)  # so that both corners stay
    after = augment(splats, *sizes, config, torch.Generator().manual_seed(seed)).means
    scale = (after[:, 1] - after[:, 0]) / torch.tensor([WIDTH, HEIGHT])
    left_top, size = -after[:, 0] / scale, 10 / scale
    assert (left_top > -1e-6).all()
    assert (left_top + size < torch.tensor([WIDTH, HEIGHT]) + 1e-6).all()
    share = size.prod(1) / (HEIGHT * WIDTH)
    ratio = size[:, 0] / size[:, 1]
    clamped = (size > torch.tensor([WIDTH, HEIGHT]) - 1e-6).any(1)
    within = (share > 0.1 - 1e-6) & (share < 0.5 + 1e-6) & (ratio > 0.5 - 1e-6) & (ratio < 2 + 1e-6)
    assert (within | clamped).all()


def test_the_generator_alone_decides() -> None:
    """Its state in the middle of a run is enough to go on with the same augmentations."""
    splats = some_splats(4, 20, dtype=torch.float32)
    sizes = torch.full((4,), HEIGHT), torch.full((4,), WIDTH)
    generator = torch.Generator().manual_seed(3)
    augment(splats, *sizes, FULL, generator)
    state = generator.get_state()
    wanted = [augment(splats, *sizes, FULL, generator) for _ in range(2)]
    torch.manual_seed(99)
    resumed = torch.Generator()
    resumed.set_state(state)
    for one in wanted:
        again = augment(splats, *sizes, FULL, resumed)
        assert all(
            torch.equal(a, b) for a, b in zip(vars(one).values(), vars(again).values(), strict=True)
        )
    assert not torch.equal(wanted[0].means, wanted[1].means)


def test_float32_is_as_good_as_its_rounding() -> None:
    config = replace(FULL, dropout=0)
    single, double = drawn(config, dtype=torch.float32), some_splats(6, 40, dtype=torch.float32)
    double = Splats(*(x.double() if x.is_floating_point() else x for x in vars(double).values()))
    sizes = torch.full((6,), HEIGHT), torch.full((6,), WIDTH)
    wanted = augment(double, *sizes, config, torch.Generator().manual_seed(1))
    assert torch.equal(single.mask, wanted.mask)
    for name in ("means", "cholesky", "colors"):
        found, exact = getattr(single, name), getattr(wanted, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5)


def test_nothing_is_computed_elsewhere_than_the_splats() -> None:
    """On the meta device mixing devices fails, and so does asking for a value (which on a GPU would
    be waiting for it)."""
    splats = some_splats(4, 20, dtype=torch.float32).to(torch.device("meta"))
    sizes = torch.full((4,), HEIGHT), torch.full((4,), WIDTH)
    after = augment(splats, *sizes, FULL, torch.Generator().manual_seed(0))
    assert {x.device.type for x in vars(after).values()} == {"meta"}
    assert after.means.shape == (4, 21, 2)


def test_empty_batches_images_and_rows_that_pad_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, n in ((0, 5), (2, 0)):
        empty = some_splats(2, 6)
        empty = Splats(*(x[:batch, :n] for x in vars(empty).values()))
        sizes = torch.full((batch,), HEIGHT), torch.full((batch,), WIDTH)
        assert augment(empty, *sizes, FULL, generator).mask.shape == (batch, n + 1)
    unused = hide(some_splats(2, 6), torch.tensor([[True] * 6, [False] * 6]))
    after = augment(unused, torch.tensor([HEIGHT, 0]), torch.tensor([WIDTH, 0]), FULL, generator)
    assert after.mask[0].any()
    assert not after.mask[1].any()
    for name in ("means", "cholesky", "colors"):
        assert getattr(after, name).isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", 0),
        ("width", 70_000),
        ("flip", 1.5),
        ("grayscale", -0.1),
        ("brightness", 1.2),
        ("contrast", math.nan),
        ("saturation", -1.0),
        ("rotation", 181.0),
        ("hue", -5.0),
        ("shear", 90.0),
        ("shift", 2.0),
        ("dropout", 1.0),
        ("cutoff", math.inf),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 1.1)),
        ("crop_ratio", (2.0, 1.0)),
        ("zoom", (0.0, 1.0)),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"augmentation: {name} is .*: choose"):
        Augment(**{name: value})  # type: ignore[arg-type]


def test_constants_are_made_once_and_take_part_in_gradients() -> None:
    x, values = torch.ones(2, requires_grad=True), (0.25, 7.5)
    with torch.inference_mode():
        made = constant(values, x)
    assert constant(values, x) is made
    assert constant(values, x.double()).dtype == torch.float64
    (x * made).sum().backward()
    assert x.grad is not None
    assert tuple(x.grad.tolist()) == values
