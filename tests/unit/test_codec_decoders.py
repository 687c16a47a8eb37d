"""The two decoders of the codecs balanced and compact agree, and the two encoders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from splatshard.pipeline.codec import column, decode_rows, kernel, planes
from splatshard.pipeline.codec.layout import (
    MAX_CODE,
    MAX_LEVEL,
    MAX_WIDTH,
    class_of,
    position_widths,
    shape_width,
    token_tables,
    tokens,
)
from splatshard.pipeline.codec.pack import unpack
from splatshard.pipeline.kernels.simd import load_wide, store
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.splats import PLANES
from tests.rows import packed, random_splats, values_of
from tests.unit.codes import SIZES, assert_values_close, grid, plausible, twin


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


@given(
    st.integers(0, 5),
    st.sampled_from([0, 1, 2, 9, 701]),
    SIZES,
    st.floats(-9, 3),
    st.integers(0, 9),
)
@settings(max_examples=40)
def test_the_encoder_is_its_twin(
    batch: int, n: int, size: tuple[int, int], log_step: float, seed: int
) -> None:
    """Byte for byte; also where many Gaussians share a cell, and with codes of many extra bits."""
    splats = plausible(batch, n, *size, seed)
    if seed % 2:
        splats = replace(splats, means=splats.means.round(decimals=-1))
    codes = grid(splats, 10**log_step, *size)
    assert planes.encode(codes) == [planes.encode_image(codes, i) for i in range(batch)]


def test_the_twins_agree_at_the_ends_of_all_codes() -> None:
    """Codes at every border between tokens, with Gaussians of every level's cells."""
    codes = grid(plausible(3, 900, 31, 50), 0.01, 31, 50)
    edges = [2**k + d for k in range(21) for d in (-1, 0, 1)] + [MAX_CODE - 1]
    edges = torch.tensor([0, *edges, *(-e for e in edges)])
    draw = torch.Generator().manual_seed(0)
    colors = edges[torch.randint(len(edges), codes.colors.shape, generator=draw)]
    classes = class_of(tokens(colors)[0])
    width = shape_width(classes)
    size, ratio, shear = (
        (getattr(codes, name) >> codes.width).clamp(-20, 20) for name in ("size", "ratio", "shear")
    )

    def inside(cell: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
        """A place in each cell, often its last one."""
        place = torch.randint(1 << MAX_WIDTH, cell.shape, generator=draw)
        return (cell << width) + torch.minimum(place, (1 << width) - 1)

    for level in (0, 1, MAX_LEVEL):
        levels = torch.full_like(codes.level, level)
        width_x, width_y = position_widths(classes, size, ratio, shear, codes.cell_log)
        columns, rows = torch.randint(1 << level, (2, *width.shape), generator=draw)
        own = replace(
            codes, colors=colors, level=levels, width=width, width_x=width_x, width_y=width_y,
            size=inside(size, width), ratio=inside(ratio, width), shear=inside(shear, width),
            x=inside(columns, width_x), y=inside(rows, width_y),
        )  # fmt: skip
        payloads = planes.encode(own)
        assert payloads == [planes.encode_image(own, i) for i in range(3)]
        wanted = planes.decode(payloads)
        found = values_of(unpack([{"splats": payload} for payload in payloads], 31, 50, "compact"))
        assert_values_close(found[wanted.mask], twin(wanted, 31, 50)[wanted.mask], 50)


@njit
def octaves(codes, c0, out):
    """`octave_of` c0 and two of `codes` [N, 16], into out [N, N, 16]."""
    for i in range(len(codes)):
        for j in range(len(codes)):
            pair = load_wide(codes[i], 0), load_wide(codes[j], 0)
            store(out[i, j], 0, kernel.octave_of(load_wide(c0, 0), pair[0], pair[1]))


def test_the_octave_of_a_colour_is_exact_for_all_tokens() -> None:
    """float32 sums of squares, against whole numbers: all magnitudes, in the order of the sum."""
    sizes = token_tables()[0].abs().unique().numpy()
    lanes = np.repeat(sizes[:, None], 16, 1).astype(np.int32)
    found = np.empty((len(sizes), len(sizes), 16), np.int32)
    for size in sizes:
        octaves(lanes, np.full(16, size, np.int32), found)
        squares = size**2 + sizes[:, None] ** 2 + sizes**2
        exact = np.array([max(int(s), 1).bit_length() - 1 >> 1 for s in squares.flat])
        assert np.array_equal(found[..., 0].ravel(), exact)
        assert (found == found[..., :1]).all()


def test_all_halves_are_read_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint16).reshape(8, -1)
    payload = halves.view(np.uint8).reshape(8, -1, 2).transpose(0, 2, 1).tobytes()
    out = np.empty((1, halves.shape[1], 8), np.float32)
    none, count = np.zeros(1, np.int32), np.full(1, halves.shape[1], np.int32)
    decode_rows("fp16", {"": column([payload])}, np.zeros(1, np.int64), count, none, none, out)
    assert np.array_equal(out[0], halves.view(np.float16).T.astype(np.float32), equal_nan=True)


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
