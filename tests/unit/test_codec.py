"""Codecs balanced and compact: the grid's bounds, planes that go round, two decoders that agree,
and payloads that are not what they should be. test_codec_loss.py has what they lose."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from splatshard.pipeline.codec import column, decode_rows, planes, quantise, split_member
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
from splatshard.pipeline.codec.pack import unpack
from splatshard.pipeline.splats import Splats
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.splats import MAX_GAUSSIANS, PLANES
from tests.rows import HEIGHT, WIDTH, packed, random_splats, values_of

SIGNALLING_NAN = b"\x00\x00\x81\x7f"
"""A float32 that numpy warns of when it is cast; Hypothesis met it once."""
SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))
"""Height and width, px."""

GAUSSIANS = st.lists(
    st.tuples(
        st.floats(-1e6, 1e6),
        st.floats(-1e6, 1e6),
        st.floats(2.0**-40, 2.0**40),
        st.floats(-1e6, 1e6),
        st.floats(2.0**-40, 2.0**40),
        *(st.floats(-1e5, 1e5) for _ in range(3)),
    ),
    min_size=1,
    max_size=20,
)
STEPS = st.floats(1e-6, 10)


def batch_of(gaussians: list[tuple[float, ...]]) -> Splats:
    """One image of float64 Gaussians."""
    values = torch.tensor(gaussians, dtype=torch.float64)[None]
    mask = torch.ones(values.shape[:2], dtype=torch.bool)
    return Splats(values[..., :2], values[..., 2:5], values[..., 5:], mask)


def plausible(batch: int, n: int, height: int, width: int, seed: int = 0) -> Splats:
    """Gaussians as fits have them, for images of any size; some lie outside, some are masked."""
    g = torch.Generator().manual_seed(seed)
    side = torch.tensor([width, height])
    means = (torch.rand(batch, n, 2, generator=g) * 1.5 - 0.25) * side
    cholesky = torch.randn(batch, n, 3, generator=g) * 2
    cholesky[..., ::2] = cholesky[..., ::2].exp2()
    colors = torch.randn(batch, n, 3, generator=g) * torch.rand(batch, n, 1, generator=g) ** 4 * 2
    return Splats(means, cholesky, colors, torch.rand(batch, n, generator=g) < 0.9)


def grid(splats: Splats, step: float, height: int = HEIGHT, width: int = WIDTH) -> Codes:
    """Codes of `splats` with their own colours."""
    steps = torch.full((len(splats),), step, dtype=torch.float64)
    return quantise.on_grid(splats, splats, steps, torch.zeros(len(splats), 3, height, width))


def sizes_of(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((batch,), height), torch.full((batch,), width)


# Tokens, curves, levels


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


@given(st.integers(0, MAX_GAUSSIANS), SIZES)
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


# Planes


def assert_same_codes(found: Codes, wanted: Codes) -> None:
    """Gaussians may be in another order, and padded otherwise."""
    for name in ("step", "level", "cell_log"):
        kept = wanted.mask.any(1)
        assert torch.equal(
            getattr(found, name)[kept].double(), getattr(wanted, name)[kept].double()
        ), name
    names = [f.name for f in fields(Codes) if getattr(wanted, f.name).ndim > 1]
    for i in range(len(wanted.step)):
        tables = []
        for codes in (found, wanted):
            rows = [getattr(codes, name)[i][codes.mask[i]] for name in names if name != "mask"]
            rows = [row if row.ndim > 1 else row[:, None] for row in rows]
            tables.append(sorted(torch.cat(rows, 1).tolist()))
        assert tables[0] == tables[1]


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


# Two decoders


def twin(codes: Codes, height: int, width: int) -> torch.Tensor:
    """[B, N, 8] by `layout.dequantise`, 0 where the mask is."""
    values = values_of(dequantise(codes, *sizes_of(len(codes.step), height, width)))
    return torch.where(codes.mask[..., None], values, 0)


def assert_values_close(found: torch.Tensor, wanted: torch.Tensor, side: float) -> None:
    """To a few roundings of float32: of the value, of the side for places, of the largest colour
    for colours, which are sums."""
    found, wanted = found.double(), wanted.double()
    scale = wanted.abs().clone()
    scale[..., :2] = scale[..., :2] + side
    scale[..., 3] = scale[..., 3] + scale[..., 4] * SHEAR_UNIT
    scale[..., 5:] = scale[..., 5:].norm(dim=-1, keepdim=True)
    error = (found - wanted).abs()
    assert (error <= 16 * 2.0**-24 * scale + 1e-37).all(), (error / scale).nan_to_num().max()


@given(st.data())
@settings(max_examples=40)
def test_the_kernel_is_its_twin(data: st.DataObject) -> None:
    """Payloads of several images in one column, taken in any order and any number of times."""
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=4))
    payloads, values = [], []
    for i, size in enumerate(sizes):
        n = data.draw(st.sampled_from([1, 2, 9, 70]))
        splats = plausible(2, n, *size, seed=i)
        codes = grid(splats, 10 ** data.draw(st.floats(-6, 1)), *size)
        payloads += planes.encode(codes)
        for image, one in enumerate(twin(planes.decode(payloads[-2:]), *size)):
            values.append((one[: int(splats.num_gaussians[image])], size))
    payloads.append(dict.fromkeys(PLANES, b""))
    values.append((torch.zeros(0, 8), (1, 1)))
    rows = np.array(data.draw(st.lists(st.integers(0, len(payloads) - 1), max_size=9)), np.int64)
    start = data.draw(st.integers(0, 3))
    counts = np.array([len(values[row][0]) for row in rows], np.int32)
    heights, widths = (np.array([values[row][1][k] for row in rows], np.int32) for k in (0, 1))
    out = np.full((len(rows), start + counts.max(initial=0) + 2, 8), -7, np.float32)
    columns = {name: column([one[name] for one in payloads]) for name in PLANES}
    decode_rows("compact", columns, rows, counts, heights, widths, out, start)
    for i, row in enumerate(rows):
        end = start + counts[i]
        wanted, size = values[row]
        assert_values_close(torch.from_numpy(out[i, start:end]), wanted, max(size))
        assert (out[i, :start] == -7).all()
        assert (out[i, end:] == -7).all()


@pytest.mark.parametrize("codec", ["fp16", "q11"])
def test_other_codecs_decode_in_any_order_too(codec: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [63, 0, 1, 130]
    header, row_bytes = {"fp16": (0, 16), "q11": (4, 11)}[codec]
    payloads = []
    for n in sizes:
        noise = rng.integers(0, 64, header + row_bytes * n, np.uint8)
        payloads.append((b"\0\0\x80\x3f"[:header] + noise[header:].tobytes()) if n else b"")
    rows = np.array([3, 0, 3, 1, 2], np.int64)
    counts = np.array([sizes[row] for row in rows], np.int32)
    heights, widths = np.full(5, 40, np.int32), np.array([30, 31, 32, 33, 34], np.int32)
    out = np.full((5, 134, 8), -7, np.float32)
    decode_rows(codec, {"": column(payloads)}, rows, counts, heights, widths, out, 2)
    for i, row in enumerate(rows):
        alone = unpack([{"splats": payloads[row]}], 40, int(widths[i]), codec)
        assert np.array_equal(out[i, 2 : 2 + counts[i]], values_of(alone)[0].numpy())
        assert (out[i, :2] == -7).all()
        assert (out[i, 2 + counts[i] :] == -7).all()


def test_counts_that_do_not_fit_are_refused() -> None:
    (payload,) = packed(random_splats(1, 5))
    columns = {name: column([payload["splats"][name]]) for name in PLANES}

    def decode(count: int, room: int, start: int = 0) -> None:
        one = np.ones(1, np.int32)
        out = np.zeros((1, room, 8), np.float32)
        counts = np.array([count], np.int32)
        decode_rows("balanced", columns, np.zeros(1, np.int64), counts, one, one, out, start)

    decode(5, 5)
    for count, room, start in ((4, 9, 0), (6, 9, 0), (0, 9, 0), (-5, 9, 0), (5, 4, 0), (5, 9, 5)):
        with pytest.raises(CorruptShardError):
            decode(count, room, start)
    with pytest.raises(CorruptShardError, match="unknown codec 'zip'"):
        decode_rows("zip", columns, *[np.zeros(0, np.int64)] * 4, np.zeros((0, 0, 8), np.float32))


def test_offsets_outside_of_the_column_are_refused() -> None:
    (payload,) = packed(random_splats(1, 5))
    good = {name: column([payload["splats"][name]]) for name in PLANES}
    row, one, five = np.zeros(1, np.int64), np.ones(1, np.int32), np.full(1, 5, np.int32)
    for name in PLANES:
        data, (_, end) = good[name]
        for offsets in ((0, end + 1), (-1, end), (end, 0), (1, end + 1)):
            bad = good | {name: type(good[name])(data, np.array(offsets, np.int64))}
            with pytest.raises(CorruptShardError):
                decode_rows("compact", bad, row, five, one, one, np.zeros((1, 5, 8), np.float32))


# Payloads that are not what they should be


def sample_payloads() -> list[dict[str, bytes]]:
    found = [payload["splats"] for payload in packed(random_splats(3, 12), "compact")]
    extreme = plausible(2, 9, HEIGHT, WIDTH)
    return found + planes.encode(grid(extreme, 1e-6)) + planes.encode(grid(extreme, 10.0))


SAMPLES = sample_payloads()


def mutated(data: st.DataObject) -> dict[str, bytes]:
    """A payload with some bytes changed, and planes cut or grown, all alike or not."""
    payload = dict(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(PLANES))
        plane = bytearray(payload[name])
        change = data.draw(st.sampled_from(["byte", "byte", "byte", "cut", "grow", "all"]))
        if change == "byte" and plane:
            plane[data.draw(st.integers(0, len(plane) - 1))] = data.draw(st.integers(0, 255))
            payload[name] = bytes(plane)
        elif change == "cut":
            payload[name] = bytes(plane[: data.draw(st.integers(0, len(plane)))])
        elif change == "grow":
            payload[name] += data.draw(st.binary(min_size=1, max_size=9))
        elif change == "all":
            n = data.draw(st.integers(0, len(payload["gap"]) + 2))
            for plane_name in PLANES[:-1]:
                payload[plane_name] = (payload[plane_name] + b"\x41" * n)[:n]
    return payload


@given(st.data())
@settings(max_examples=300)
def test_damaged_planes_are_corrupt_or_what_the_twin_says(data: st.DataObject) -> None:
    payload = mutated(data)
    try:
        wanted = twin(planes.decode([payload]), HEIGHT, WIDTH)[0]
    except CorruptShardError:
        wanted = None
    try:
        found = values_of(unpack([{"splats": payload}], HEIGHT, WIDTH, "compact"))[0]
    except CorruptShardError:
        assert wanted is None
        return
    assert wanted is not None
    inside = (wanted.abs() < 1e37).all(-1)
    assert_values_close(found[inside], wanted[inside], max(HEIGHT, WIDTH))


@given(st.lists(st.binary(max_size=12), min_size=8, max_size=8), st.integers(0, 12))
@settings(max_examples=200)
@example([b""] * 7 + [SIGNALLING_NAN + bytes(2)], 1)
def test_garbage_planes_are_corrupt_or_gaussians(parts: list[bytes], n: int) -> None:
    parts = [(part + bytes(12))[:n] for part in parts[:7]] + parts[7:]
    payload = dict(zip(PLANES, parts, strict=True))
    try:
        found = unpack([{"splats": payload}], HEIGHT, WIDTH, "balanced")
    except CorruptShardError:
        return
    assert found.num_gaussians.tolist() == [n]


@given(st.data())
@settings(max_examples=200)
def test_damaged_members_are_corrupt_or_planes(data: st.DataObject) -> None:
    member = bytearray(planes.join(data.draw(st.sampled_from(SAMPLES))))
    for _ in range(data.draw(st.integers(1, 3))):
        member[data.draw(st.integers(0, len(member) - 1))] = data.draw(st.integers(0, 255))
    member = member[: data.draw(st.integers(0, len(member)))] + data.draw(st.binary(max_size=4))
    try:
        parts = split_member("balanced", bytes(member))
        assert {len(parts[name]) for name in PLANES[:-1]} == {planes.count(parts)}
        unpack([{"splats": parts}], HEIGHT, WIDTH, "balanced")
    except CorruptShardError:
        pass


def member_of(count: int, symbols: bytes, bits: bytes = bytes(9)) -> bytes:
    stream = planes.BROTLI.compress(symbols, asbytes=True)
    return struct.pack("<II", count, len(stream)) + stream + bits


@pytest.mark.parametrize("symbols", [0, 69, 71, 1 << 20])
def test_a_member_whose_stream_is_not_as_long_as_it_says_is_corrupt(symbols: int) -> None:
    """A shorter one would be filled up with whatever lies in memory."""
    assert planes.count(split_member("compact", member_of(10, bytes(70)))) == 10
    with pytest.raises(CorruptShardError, match="cannot be taken apart"):
        split_member("compact", member_of(10, bytes(symbols)))


@pytest.mark.parametrize("count", [0, MAX_GAUSSIANS + 1, 2**31, 2**32 - 1])
def test_a_huge_count_takes_no_memory(count: int) -> None:
    member = member_of(count, bytes(70))
    tracemalloc.start()
    with pytest.raises(CorruptShardError, match="cannot be taken apart"):
        split_member("compact", member)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_signalling_nan_in_q11_is_no_warning() -> None:
    """Which would be an error here."""
    found = values_of(unpack([{"splats": SIGNALLING_NAN + bytes(11)}], 8, 16, "q11"))[0]
    assert found[..., 5:].isnan().all()
    assert found[..., :5].isfinite().all()


def test_fixed_bytes_of_q11() -> None:
    """Format version 1; schemas/FORMAT.md has them too."""
    payload = bytes.fromhex(
        "0000803f 00ff6093 00ff60a3 605950 49855df0 655a7f40 00d320".replace(" ", "")
    )
    wanted = [
        [4.000183, 2.000092, 2.0, 0.499854, 1.0, 0.502201, 0.253953, -0.12555],
        [10.499794, 6.249912, 1.492908, -2.982722, 0.746454, 1.0, 0.0, 0.063488],
    ]
    found = values_of(unpack([{"splats": payload}], 8, 16, "q11"))[0]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=6e-7)


CHECKED = """
import sys
import numpy as np
from splatshard.pipeline.codec.pack import unpack
from splatshard.pipeline.codec.planes import split
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.splats import PLANES

rng = np.random.default_rng(0)
samples = [split(bytes.fromhex(line)) for line in sys.stdin.read().split()]
accepted = 0
for number in range(3000):
    payload = {name: bytearray(plane) for name, plane in samples[number % len(samples)].items()}
    n = len(payload["gap"])
    for name in rng.choice(PLANES, 2):
        for _ in range(rng.integers(1, 4)):
            payload[name][rng.integers(len(payload[name]))] = rng.integers(256)
    if number % 3 == 0:
        payload["bits"] = payload["bits"][: rng.integers(6, len(payload["bits"]) + 1)]
    try:
        unpack([{"splats": {k: bytes(v) for k, v in payload.items()}}], 48, 64, "compact")
        accepted += 1
    except CorruptShardError:
        pass
print(accepted)
"""


def test_the_kernel_never_indexes_out_of_range(tmp_path: Any) -> None:
    """Compiled with numba's own checks, which raise IndexError."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    members = "\n".join(planes.join(one).hex() for one in SAMPLES)
    result = subprocess.run(
        [sys.executable, "-c", CHECKED],
        input=members,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert 0 < int(result.stdout) < 3000
