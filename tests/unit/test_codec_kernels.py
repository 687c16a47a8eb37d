"""The writer's compiled kernels beside their twins: grid, squared errors, colours from overlaps.

test_codec_decoders.py has the encoder of planes.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splatshard.pipeline.codec import pack_kernel, quantise
from splatshard.pipeline.codec.layout import Codes
from splatshard.pipeline.kernels import cpu_errors, overlaps, reference
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.splats import Splats
from tests.rows import CUTOFF
from tests.unit.codes import GAUSSIANS, SIZES, STEPS, batch_of, plausible

SHAPES = [  # batch, Gaussians, height, width
    (0, 3, 5, 5),
    (2, 0, 5, 5),
    (1, 1, 1, 1),
    (2, 7, 13, 17),
    (3, 60, 31, 45),
    (1, 150, 90, 7),
    (2, 300, 64, 65),
]


def both_grids(splats: Splats, solved: Splats, step: float, size: tuple[int, int]) -> None:
    steps = torch.full((len(splats),), step, dtype=torch.float64)
    found = pack_kernel.on_grid(splats, solved, steps, *size)
    wanted = quantise.on_grid_anywhere(splats, solved, steps, *size)
    for field in fields(Codes):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        assert a.dtype == b.dtype, field.name
        assert torch.equal(a, b), field.name
    assert (steps == step).all()  # a new tensor holds those that were raised


@given(
    st.integers(0, 4),
    st.sampled_from([0, 1, 2, 9, 200]),
    SIZES,
    st.floats(-8, 3),
    st.integers(0, 9),
)
@settings(max_examples=40)
def test_the_grid_is_its_twin(
    batch: int, n: int, size: tuple[int, int], log_step: float, seed: int
) -> None:
    splats = plausible(batch, n, *size, seed)
    solved = plausible(batch, n, *size, seed + 10)
    both_grids(splats, replace(solved, mask=splats.mask), 10**log_step, size)


@given(GAUSSIANS, SIZES, STEPS)
def test_the_grid_is_its_twin_at_the_ends(
    gaussians: list[tuple[float, ...]], size: tuple[int, int], step: float
) -> None:
    splats = batch_of(gaussians)
    both_grids(splats, splats, step, size)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["means", "cholesky", "colors"])
def test_codes_are_in_range_whatever_the_values(field: str, value: float) -> None:
    """A solution may be anything; what is stored is a table's index."""
    splats = plausible(1, 9, 20, 30)
    getattr(splats, field)[0, 4] = value
    steps = torch.ones(1, dtype=torch.float64)
    codes = pack_kernel.on_grid(splats, splats, steps, 20, 30)
    for name, (lowest, highest) in (
        ("size", quantise.SIZE_CELLS),
        ("ratio", quantise.RATIO_CELLS),
        ("shear", quantise.SHEAR_RANGE),
    ):
        cells = getattr(codes, name) >> codes.width
        assert lowest <= int(cells.min()) <= int(cells.max()) <= highest, name
    for place, width in ((codes.x, codes.width_x), (codes.y, codes.width_y)):
        assert ((place >> width) >= 0).all()
        assert ((place >> width) < 1 << codes.level[:, None]).all()
    assert codes.colors.abs().max() < quantise.MAX_CODE


# Squared errors


def images(shape: tuple[int, int, int, int]) -> tuple[Splats, torch.Tensor, torch.Tensor]:
    batch, n, height, width = shape
    draw = torch.Generator().manual_seed(0)
    target, behind = torch.rand(2, batch, 3, height, width, generator=draw)
    return plausible(batch, n, height, width), 1.2 * target - 0.1, behind - 0.5


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_squared_errors_are_their_twin(shape: tuple[int, int, int, int], before: bool) -> None:
    splats, target, behind = images(shape)
    backend = replace(select_backend("cpu"), squared_errors=None)
    inputs = (splats, target, behind if before else None, CUTOFF)
    found = cpu_errors.squared_errors(*inputs)
    wanted = quantise.squared_errors(*inputs, backend)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for i in range(len(splats)):
        part = (value if value is None else value[i : i + 1] for value in inputs[:3])
        assert torch.equal(cpu_errors.squared_errors(*part, CUTOFF), found[:, i : i + 1])


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_squared_errors_of_what_is_not_finite(value: float, place: int) -> None:
    """Shown clamped, infinity is white; what is no number stays none."""
    splats, target, behind = images((1, 3, 9, 17))
    behind[0, 1, place, place] = value
    found = cpu_errors.squared_errors(splats, target, behind, CUTOFF)
    backend = replace(select_backend("cpu"), squared_errors=None)
    wanted = quantise.squared_errors(splats, target, behind, CUTOFF, backend)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


# Colours from overlaps


def assert_same_changes(splats: Splats, target: torch.Tensor) -> None:
    found, error, seen = overlaps.color_change(splats, target, CUTOFF)
    wanted, foreseen, counted = reference.color_change(splats, target, CUTOFF)
    assert found.dtype == torch.float32
    assert (found[~splats.mask] == 0).all()
    size = float(wanted.abs().max()) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * size)
    torch.testing.assert_close(error, foreseen, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen, counted, rtol=1e-4, atol=1e-4)
    for i in range(len(splats)):
        alone = overlaps.color_change(splats[i : i + 1], target[i : i + 1], CUTOFF)
        assert torch.equal(alone[0], found[i : i + 1])
        assert torch.equal(alone[1], error[i : i + 1])


@pytest.mark.parametrize("shape", SHAPES)
def test_changes_of_colour_are_their_twin(shape: tuple[int, int, int, int]) -> None:
    splats, target, _ = images(shape)
    assert_same_changes(splats, target)


def test_changes_of_colour_of_thin_and_small_gaussians_are_their_twin() -> None:
    """Where the pixels count: smaller than one, thin along a diagonal, and hardly seen."""
    splats, target, _ = images((3, 80, 40, 40))
    cholesky, means = splats.cholesky.clone(), splats.means.clone()
    cholesky[0] = torch.tensor([0.3, 0.1, 0.25])
    cholesky[1] = torch.tensor([4.0, 4.0, 0.2])
    means[2, :40, 0] = -8
    assert_same_changes(replace(splats, means=means, cholesky=cholesky), target)


@pytest.mark.parametrize("count", [5, 400])
def test_one_change_is_nearly_the_least_squares_solution(count: int) -> None:
    """Of few Gaussians, and of so many that each lies on hundreds; its error is foreseen."""
    draw = torch.Generator().manual_seed(2)
    side = 48
    means = side * torch.rand(1, count, 2, generator=draw)
    cholesky = torch.tensor([3.0, 1.0, 2.5]).expand(1, count, 3)
    mask = torch.ones(1, count, dtype=torch.bool)
    colors = torch.rand(2, 1, count, 3, generator=draw) - 0.5
    splats, wanted = (Splats(means, cholesky, own, mask) for own in colors)
    backend = select_backend("cpu")
    target = backend.render(wanted, side, side, CUTOFF)
    change, foreseen, _ = overlaps.color_change(splats, target, CUTOFF)
    solved = replace(splats, colors=splats.colors + change)
    before, after = (
        cpu_errors.squared_errors(one, target, None, CUTOFF)[1] for one in (splats, solved)
    )
    assert after < 0.1 * before
    assert abs(foreseen - after) < 0.05 * before


def test_pairs_that_are_left_out_do_no_harm() -> None:
    """All on one another: most pairs are left out, and the change stays finite."""
    splats = plausible(1, 1500, 20, 20)
    splats = replace(splats, cholesky=torch.tensor([30.0, 0, 30]).expand(1, 1500, 3))
    change, error, _ = overlaps.color_change(splats, torch.ones(1, 3, 20, 20), CUTOFF)
    assert change.isfinite().all()
    assert error.isfinite().all()
