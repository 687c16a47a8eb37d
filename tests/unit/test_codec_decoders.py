"""The two decoders of the codecs balanced and compact agree, and the two encoders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splatshard.pipeline.codec import column, decode_rows, planes
from splatshard.pipeline.codec.layout import MAX_CODE, MAX_LEVEL, class_of, tokens
from splatshard.pipeline.codec.pack import unpack
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


def test_the_encoder_is_its_twin_at_the_ends_of_all_codes() -> None:
    """Codes at every border between tokens, with Gaussians of every level's cells."""
    codes = grid(plausible(3, 900, 31, 50), 0.01, 31, 50)
    edges = [2**k + d for k in range(21) for d in (-1, 0, 1)] + [MAX_CODE - 1]
    edges = torch.tensor([0, *edges, *(-e for e in edges)])
    draw = torch.Generator().manual_seed(0)
    colors = edges[torch.randint(len(edges), codes.colors.shape, generator=draw)]
    codes = replace(codes, colors=colors)
    for level in (0, 1, MAX_LEVEL):
        levels = torch.full_like(codes.level, level)
        last = (1 << levels[:, None]) - 1
        coarse = (codes.x >> codes.width_x).clamp(max=last), (codes.y >> codes.width_y) & last
        own = replace(
            codes, level=levels, x=coarse[0] << codes.width_x, y=coarse[1] << codes.width_y
        )
        classes = class_of(tokens(colors)[0])
        own = replace(own, size=own.size.clamp(-20, 20) + (classes << own.width))
        assert planes.encode(own) == [planes.encode_image(own, i) for i in range(3)]


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
