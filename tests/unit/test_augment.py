"""Augmentation as it is drawn: one map and one matrix for each image, by the generator alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splatshard.pipeline.data.augment import (
    augment,
    constant,
    hide,
)
from splatshard.pipeline.kernels import reference
from splatshard.pipeline.splats import Splats
from splatshard.schemas.errors import UsageError
from splatshard.schemas.train import AugmentConfig
from tests.unit.augmented import (
    FULL,
    HEIGHT,
    WIDTH,
    as_image,
    centers,
    close,
    picture,
    some_points,
    some_splats,
)


def drawn(config: AugmentConfig, batch: int = 6, seed: int = 1, dtype=torch.float64) -> Splats:
    splats = some_splats(batch, 40, dtype=dtype)
    sizes = torch.full((batch,), HEIGHT), torch.full((batch,), WIDTH)
    return augment(splats, *sizes, config, torch.Generator().manual_seed(seed))


def test_by_default_only_the_size_changes() -> None:
    splats = some_splats(6, 40)
    after = drawn(AugmentConfig(height=2 * HEIGHT, width=2 * WIDTH))
    inside = centers(6, 2 * HEIGHT, 2 * WIDTH) / 2
    close(
        reference.render(after, 2 * HEIGHT, 2 * WIDTH),
        as_image(picture(splats, inside), 2 * HEIGHT, 2 * WIDTH),
    )


GEOMETRY = replace(FULL, brightness=0, contrast=0, saturation=0, hue=0, grayscale=0, dropout=0)
COLORS = AugmentConfig(
    height=HEIGHT, width=WIDTH, brightness=0.4, saturation=0.4, hue=40, grayscale=0.3
)


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
    before = drawn(AugmentConfig(height=HEIGHT, width=WIDTH))
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
    config = AugmentConfig(height=10, width=10, crop_scale=(0.1, 0.5), crop_ratio=(0.5, 2.0))
    corners = torch.tensor([[0.0, 0], [WIDTH, HEIGHT]]).double().expand(4, 2, 2)
    unit = torch.tensor([1.0, 0, 1]).double().expand(4, 2, 3)
    splats = Splats(corners, unit, unit, torch.ones(4, 2, dtype=torch.bool))
    sizes = torch.full((4,), HEIGHT), torch.full((4,), WIDTH)
    generator = torch.Generator().manual_seed(seed)
    after = augment(splats, *sizes, config, generator, 1e6).means  # so far, both corners stay
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
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 1.1)),
        ("crop_ratio", (2.0, 1.0)),
        ("zoom", (0.0, 1.0)),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"augment\.{name} is .*: choose"):
        AugmentConfig(**{name: value})  # type: ignore[arg-type]


def test_constants_are_made_once_and_take_part_in_gradients() -> None:
    x, values = torch.ones(2, requires_grad=True), (0.25, 7.5)
    with torch.inference_mode():
        made = constant(values, x)
    assert constant(values, x) is made
    assert constant(values, x.double()).dtype == torch.float64
    (x * made).sum().backward()
    assert x.grad is not None
    assert tuple(x.grad.tolist()) == values
