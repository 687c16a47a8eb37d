"""Codecs balanced and compact: the grid's bounds, planes that go round.

test_codec_decoders.py has the decoders, test_codec_damage.py payloads that are not what they should
be, test_codec_loss.py what the codecs lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from splatshard.pipeline.codec import planes, quantise, split_member
from splatshard.pipeline.codec.layout import (
    CELLS_PER_OCTAVE,
    MAX_CODE,
    MAX_LEVEL,
    MAX_WIDTH,
    SHEAR_CELLS,
    SHEAR_UNIT,
    Codes,
    dequantise,
    hilbert_tables,
    level_of,
    opponent,
    slant_table,
    token_tables,
    tokens,
)
from splatshard.pipeline.splats import Splats
from splatshard.schemas.splats import MAX_PAYLOAD_GAUSSIANS
from tests.rows import HEIGHT, WIDTH, values_of
from tests.unit.codes import (
    GAUSSIANS,
    SIZES,
    STEPS,
    assert_same_codes,
    batch_of,
    grid,
    plausible,
    sizes_of,
)


def test_every_code_has_a_token() -> None:
    codes = torch.arange(-MAX_CODE + 1, MAX_CODE)
    token, extra, width = tokens(codes)
    base, extra_width, sign = (table[token] for table in token_tables())
    assert 0 <= int(token.min()) <= int(token.max()) < 256
    assert torch.equal(width, extra_width)
    assert ((extra >= 0) & (extra < 1 << width)).all()
    assert torch.equal(base + sign * extra, codes)


@pytest.mark.parametrize("table", [token_tables, slant_table, partial(hilbert_tables, 3)])
def test_tables_reach_a_device_by_a_copy(table: Callable[..., Any]) -> None:
    """A copy is waited for; a kernel would not be, by whoever gets the table on another stream."""
    device, found = torch.device("meta"), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if getattr(result, "device", None) == device:
                found.append(func)
            return result

    with Watch():
        table(device)
    assert set(found) == {torch.ops.aten._to_copy.default}


@pytest.mark.parametrize("level", [0, 1, 2, 5, MAX_LEVEL])
def test_curves_visit_every_cell_once_and_end_beside_their_begin(level: int) -> None:
    curve, cells = hilbert_tables(level)
    side = 1 << level
    assert torch.equal(curve.flatten()[cells], torch.arange(side * side))
    y, x = cells >> level, cells & side - 1
    assert ((y.diff().abs() + x.diff().abs()) == 1).all()
    assert (int(y[0]), int(x[0]), int(y[-1]), int(x[-1])) == (0, 0, 0, side - 1)


@given(st.integers(0, MAX_PAYLOAD_GAUSSIANS), SIZES)
def test_levels_are_in_range_and_follow_the_number(count: int, size: tuple[int, int]) -> None:
    (level,), (cell_log,) = level_of(torch.tensor([count]), *size)
    assert 0 <= level <= MAX_LEVEL
    cell = 2 * max(size) / 2 ** int(level)
    assert abs(int(cell_log) / 2 - math.log2(cell)) <= 0.25
    assert -128 <= int(cell_log) <= 127
    if count and 0 < level < MAX_LEVEL:  # cells are as dense as asked, to a factor of two
        assert 1 / 4 < cell * cell * count / (size[0] * size[1]) * 16 < 8


# Geometry and colours on the grid


def clamped_geometry(splats: Splats, codes: Codes, size: tuple[int, int]) -> torch.Tensor:
    """What the grid should hold of `splats`, [B, N, 5] in cells: x, y, size, ratio, shear."""
    height, width = size
    side = max(size)
    cell = 2 * side / codes.level.double().exp2()[:, None]
    x = (splats.means[..., 0] - width / 2 + side) / cell
    y = (splats.means[..., 1] - height / 2 + side) / cell
    l11, l21, l22 = splats.cholesky.double().unbind(-1)
    area = (l11.log2() + l22.log2()) / 2 * CELLS_PER_OCTAVE
    ratio = (l11.log2() - l22.log2()) / 2 * CELLS_PER_OCTAVE
    stored = (codes.ratio + 0.5) / codes.width.double().exp2()
    shear = (l21 / l11 * (2 * stored / CELLS_PER_OCTAVE).exp2() / SHEAR_UNIT).asinh() * SHEAR_CELLS
    last = (1 << codes.level).double()[:, None]
    ends = [
        (x, 0, last),
        (y, 0, last),
        (area, quantise.SIZE_CELLS[0], quantise.SIZE_CELLS[1] + 1),
        (ratio, quantise.RATIO_CELLS[0], quantise.RATIO_CELLS[1] + 1),
        (shear, quantise.SHEAR_RANGE[0], quantise.SHEAR_RANGE[1] + 1),
    ]
    return torch.stack(
        [
            torch.minimum(torch.maximum(value, torch.as_tensor(low)), torch.as_tensor(high))
            for value, low, high in ends
        ],
        -1,
    )


@given(GAUSSIANS, SIZES, STEPS)
def test_parameters_are_within_half_a_step(
    gaussians: list[tuple[float, ...]], size: tuple[int, int], step: float
) -> None:
    splats = batch_of(gaussians)
    codes = grid(splats, step, *size)
    wanted = clamped_geometry(splats, codes, size)
    found = clamped_geometry(dequantise(codes, *sizes_of(1, *size)), codes, size)
    widths = [codes.width_x, codes.width_y, codes.width, codes.width, codes.width]
    half = torch.stack([torch.exp2(-w.double()) / 2 for w in widths], -1)
    assert ((found - wanted).abs() <= half * (1 + 1e-6) + 1e-8).all()
    assert all(((w >= 0) & (w <= MAX_WIDTH)).all() for w in widths)


@given(GAUSSIANS, SIZES, STEPS)
def test_colours_are_within_half_a_step(
    gaussians: list[tuple[float, ...]], size: tuple[int, int], step: float
) -> None:
    """Of an amplitude: the colour times sqrt(pi det L)."""
    splats = batch_of(gaussians)
    codes = grid(splats, step, *size)
    area = (splats.cholesky[..., 0] * splats.cholesky[..., 2] * math.pi).sqrt()
    wanted = splats.colors * area[..., None] @ opponent().T / codes.step[:, None, None]
    assert ((codes.colors - wanted).abs() <= 0.5 + 1e-6).all()
    assert codes.colors.abs().max() < MAX_CODE
    found = dequantise(codes, *sizes_of(1, *size))
    area = (found.cholesky[..., 0] * found.cholesky[..., 2] * math.pi).sqrt()
    stored = found.colors * area[..., None] @ opponent().T / codes.step[:, None, None]
    torch.testing.assert_close(stored, codes.colors.double(), rtol=1e-9, atol=1e-6)


def test_steps_follow_the_amplitude() -> None:
    """A place is known to 2^-class standard deviations, and a shape to 2^-class of its cells."""
    splats = plausible(4, 300, HEIGHT, WIDTH)
    splats = replace(splats, mask=torch.ones_like(splats.mask))
    codes = grid(splats, 0.01)
    length = codes.colors.double().norm(dim=-1).clamp(min=1)
    l11, l21, l22 = splats.cholesky.double().unbind(-1)
    deviation_x = l11 / (1 + (l21 / l22) ** 2).sqrt()
    cell = 2 * max(HEIGHT, WIDTH) / codes.level.double().exp2()[:, None]
    for deviation, width in ((deviation_x, codes.width_x), (l22, codes.width_y)):
        inside = (width > 0) & (width < MAX_WIDTH)
        share = (cell / width.double().exp2() / deviation * length)[inside]
        assert inside.double().mean() > 0.5
        assert 1 / 3 < float(share.min()) < float(share.max()) < 3.5
    octave = length.log2().floor()
    assert ((codes.width + 1 - octave).abs() <= 1)[octave >= 2].all()


@pytest.mark.parametrize("cell", ["size", "ratio", "shear"])
def test_the_ends_of_the_ranges_survive(cell: str) -> None:
    """Also with the widest cells, whose codes are the largest."""
    big, small = 2.0**40, 2.0**-40
    shapes = {
        "size": [(big, 0.0, big), (small, 0.0, small)],
        "ratio": [(big, 0.0, small), (small, 0.0, big)],
        "shear": [(1.0, 1e9, 1.0), (1.0, -1e9, 1.0)],
    }
    gaussians = [(5.0, 5.0, *shape, 1e-3, 0.0, 0.0) for shape in shapes[cell]]
    splats = batch_of(gaussians)
    for step in (1e-12, 1.0, 1e12):
        codes = grid(splats, step)
        assert_same_codes(planes.decode(planes.encode(codes)), codes)
        found = dequantise(codes, *sizes_of(1, HEIGHT, WIDTH))
        assert values_of(found).isfinite().all()
        assert (found.cholesky[..., ::2] > 0).all()


@given(
    st.integers(1, 5), st.sampled_from([0, 1, 2, 7, 60]), SIZES, st.floats(-8, 3), st.integers(0, 9)
)
@settings(max_examples=60)
def test_codes_go_round(
    batch: int, n: int, size: tuple[int, int], log_step: float, seed: int
) -> None:
    splats = plausible(batch, n, *size, seed)
    codes = grid(splats, 10**log_step, *size)
    payloads = planes.encode(codes)
    assert [planes.count(one) for one in payloads] == splats.num_gaussians.tolist()
    assert_same_codes(planes.decode(payloads), codes)
    assert [split_member("balanced", planes.join(one)) for one in payloads] == payloads
    if batch > 1:  # whatever the batch
        assert planes.encode(codes[1:2]) == payloads[1:2]


@given(st.integers(1, 4), st.integers(1, 40), SIZES, st.floats(-6, 2), st.integers(0, 9))
@settings(max_examples=40)
def test_what_is_stored_stays_where_it_is(
    batch: int, n: int, size: tuple[int, int], log_step: float, seed: int
) -> None:
    """Quantised again with the same step, geometry keeps its codes."""
    splats = plausible(batch, n, *size, seed)
    codes = grid(splats, 10**log_step, *size)
    stored = dequantise(codes, *sizes_of(batch, *size))
    again = grid(replace(stored, mask=codes.mask), 10**log_step, *size)
    same = codes.mask & (again.width == codes.width)
    assert torch.equal(again.colors[codes.mask], codes.colors[codes.mask])
    for name in ("x", "y", "size", "ratio"):
        assert torch.equal(getattr(again, name)[same], getattr(codes, name)[same]), name
