"""TIFF: each layout is the right picture or a row that names it, compared with what was written and
with tifffile, which reads without Pillow and libtiff."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.tiff import LAYOUTS, NAMES
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SampleError
from tests.make import encode, photo
from tests.tiffs import COMPRESSIONS, tiff
from tests.unit.decoding import SIDE, picture_or_reason, pixels_of, reason, samples

tifffile = pytest.importorskip("tifffile")

COLORS = {2: 3, 5: 4, 6: 3, 8: 3}
PALETTE = np.random.default_rng(1).integers(0, 256, (3, 256))
EXTRAS = ((), (0,), (1,), (2,), (3,), (0, 0), (1, 0), (2, 0), (0, 2))


def picture(values: np.ndarray, bits: int, photometric: int, extra: Sequence[int]) -> np.ndarray:
    """What these samples mean, over white, float 0 to 255 [SIDE, SIDE, 3]."""
    v = values / (2.0**bits - 1)
    colors, alpha = COLORS.get(photometric, 1), v[..., COLORS.get(photometric, 1) :][..., :1]
    if photometric == 3:
        rgb = PALETTE.T[values[..., 0] & 255] / 255
    elif photometric == 5:
        rgb = (1 - v[..., :3]) * (1 - v[..., 3:4])
    else:
        rgb = np.broadcast_to(v[..., :colors], (*v.shape[:2], 3))
        rgb = 1 - rgb if photometric == 0 else rgb
    if extra and extra[0] == 1:
        rgb = rgb + 1 - alpha
    if extra and extra[0] == 2:
        rgb = rgb * alpha + 1 - alpha
    return 255 * rgb


def stored(photometric: int, bits: int, extra: Sequence[int]) -> np.ndarray:
    """Samples of such a file; premultiplied colours do not exceed their alpha."""
    colors = COLORS.get(photometric, 1)
    values = samples(colors + len(extra), bits)
    if extra and extra[0] == 1:
        values[..., :colors] = np.minimum(values[..., :colors], values[..., colors : colors + 1])
    return values


def ways(bits: int, channels: int) -> Iterator[dict[str, Any]]:
    """How the same samples may lie in a file."""
    for compression in COMPRESSIONS:
        predictors = (1, 2) if compression in (5, 8, 50000) and bits in (8, 16) else (1,)
        for predictor in predictors:
            for planar in (False, True)[: 1 + (channels > 1)]:
                place = {"compression": compression, "predictor": predictor, "planar": planar}
                yield {**place, "order": "<", "rows": 10}
                yield {**place, "order": ">", "tile": 16}
    yield {"big": True, "order": "<", "tile": 16}
    yield {"big": True, "order": ">", "planar": channels > 1}


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("photometric", [0, 1, 2, 3, 5, 8])
def test_each_layout_is_its_picture_or_a_row(photometric: int, bits: int) -> None:
    """Of those that the code knows all but planes of some are read; of others none."""
    for extra in EXTRAS:
        values = stored(photometric, bits, extra)
        expected = picture(values, bits, photometric, extra)
        colors = (PALETTE[:, : 2**bits] * 257).ravel().tolist()
        tags = {320: (3, colors)} if photometric == 3 and bits <= 8 else {}
        found = Counter[str]()
        for way in ways(bits, values.shape[2]):
            image = tiff(values, bits, photometric, extra, tags=tags, **way)
            got = picture_or_reason(image)
            if isinstance(got, str):
                assert got.startswith("a.tif: not supported: a TIFF of"), way
                found["rows, in planes" if way.get("planar") else "rows"] += 1
                continue
            written = tifffile.imread(io.BytesIO(image))
            written = np.moveaxis(written, 0, -1) if way.get("planar") else written
            assert np.array_equal(written.reshape(values.shape), values), way
            tolerance = 3.1 if extra[:1] == (1,) and bits == 16 else 2.1  # divided, multiplied
            assert np.abs(got - expected).max() < tolerance, (way, extra)
            found["ok"] += 1
        known = extra in LAYOUTS.get((photometric, 1), {}).get(bits, ())
        assert bool(found["ok"]) == known, (extra, found)
        assert bool(found["rows"]) != known, (extra, found)


def test_layouts_of_the_code_are_those_that_are_compared() -> None:
    for (photometric, format), of_bits in LAYOUTS.items():
        assert photometric in NAMES
        if format == 1:
            assert set(of_bits) <= {1, 2, 4, 8, 12, 16, 32}
            assert {extra for extras in of_bits.values() for extra in extras} <= set(EXTRAS)
    assert {key: set(bits) for key, bits in LAYOUTS.items() if key[1] != 1} == {
        (1, 2): {32},
        (1, 3): {32},
    }


@pytest.mark.parametrize("compression", [1, 8])
def test_floats_and_integers_of_32_bits(compression: int) -> None:
    grey = samples(1, 8)
    for values in (
        (grey / np.float32(255)).astype(np.float32),
        grey.astype(np.float32),
        grey.astype(np.int32),
        grey.astype(np.int32) * 257,
        grey.astype(np.uint32) * 257,
    ):
        for order in "<>":
            image = tiff(values, 32, 1, order=order, compression=compression, tile=16)
            assert np.array_equal(tifffile.imread(io.BytesIO(image)), values[..., 0])
            if order == ">" and compression != 1:
                assert "big-endian and compressed" in reason(image)
                continue
            assert np.array_equal(pixels_of(image), grey.repeat(3, 2))


def test_floats_of_another_unit_are_rows() -> None:
    """Metres, ratios: most of them above 1, none as far as 4. A tenth may be light."""
    values = np.linspace(0.6, 3.8, SIDE**2, dtype=np.float32).reshape(SIDE, SIDE, 1)
    assert "grey values of 0.6 to 3.8, of which it is not known what is white" in reason(
        tiff(values, 32, 1)
    )
    light = np.linspace(0, 1.05, SIDE**2, dtype=np.float32).reshape(SIDE, SIDE, 1)
    expected = np.round(light.clip(0, 1) * 255).astype(np.uint8)
    assert np.array_equal(pixels_of(tiff(light, 32, 1)), expected.repeat(3, 2))


def test_predictors() -> None:
    grey = samples(1, 8)[..., 0]
    stream = io.BytesIO()
    values = (grey / np.float32(255)).astype(np.float32)
    tifffile.imwrite(stream, values, compression="deflate", predictor=3)
    assert np.array_equal(pixels_of(stream.getvalue()), grey[..., None].repeat(3, 2))
    wide = tiff(samples(1, 8).astype(np.int32), 32, 1, compression=8, predictor=2)
    assert np.array_equal(pixels_of(wide), grey[..., None].repeat(3, 2))
    for bits, compression in ((4, 5), (12, 5), (8, 1), (8, 32773)):
        image = tiff(samples(1, bits), bits, 1, compression=compression, tags={317: (3, [2])})
        assert f"Compression {compression}, Predictor 2" in reason(image)


def test_numbers_that_are_no_grey_are_rows() -> None:
    grey = samples(1, 8)
    for values, bits, words in (
        (grey.astype(np.int8), 8, "8 bits, SampleFormat 2"),
        (grey.astype(np.int16), 16, "16 bits, SampleFormat 2"),
        (grey.astype(np.int64), 64, "64 bits, SampleFormat 2"),
        (grey.astype(np.uint64), 64, "64 bits, SampleFormat 1"),
        (grey / np.float16(255), 16, "16 bits, SampleFormat 3"),
        (grey / 255, 64, "64 bits, SampleFormat 3"),
        (samples(3, 8) / np.float32(255), 32, "RGB, 3 x 32 bits, SampleFormat 3"),
        (samples(1, 32), 32, "not known what is white"),  # all of 32 bits
        (grey.astype(np.int32) - 128, 32, "grey values of -128 to 127"),
    ):
        for order in "<>":
            assert words in reason(
                tiff(values, bits, 1 if values.shape[2] == 1 else 2, order=order)
            )


def test_color_map_of_8_bits() -> None:
    """No entry above 255: libtiff and others take such a map's entries for 8 bits."""
    values = samples(1, 8)
    for order in "<>":
        small = tiff(values, 8, 3, order=order, tags={320: (3, PALETTE.ravel().tolist())})
        assert np.array_equal(pixels_of(small), PALETTE.T[values[..., 0]])


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("compression", ["raw", "group3", "group4", "tiff_ccitt"])
def test_fax(photometric: int, compression: str) -> None:
    bits = samples(1, 1)[..., 0].astype(bool)
    tags = {262: photometric}
    image = encode(Image.fromarray(bits), "TIFF", compression=compression, tiffinfo=tags)
    stored = Image.open(io.BytesIO(image)).tag_v2[262]
    written = tifffile.imread(io.BytesIO(image)).astype(bool)
    assert np.array_equal(written if stored else ~written, bits)
    assert np.array_equal(pixels_of(image)[..., 0] > 0, bits)


def test_fill_order() -> None:
    values = samples(1, 1)
    image = tiff(values, 1, 1, tags={266: (3, [2])})
    start = 8
    stop = start + SIDE * -(-SIDE // 8)
    swapped = bytes(int(f"{byte:08b}"[::-1], 2) for byte in image[start:stop])
    got = pixels_of(image[:start] + swapped + image[stop:])
    assert np.array_equal(got[..., 0] > 0, values[..., 0] > 0)
    assert "FillOrder 2" in reason(tiff(samples(1, 8), 8, 1, tags={266: (3, [2])}))
    assert "FillOrder 2" in reason(tiff(values, 1, 1, compression=5, tags={266: (3, [2])}))


@pytest.mark.parametrize("photometric", ["ycbcr", "rgb", "minisblack"])
def test_jpeg_in_tiff(photometric: str) -> None:
    pixels = photo(48, 48) if photometric != "minisblack" else photo(48, 48)[..., 0]
    stored = pixels
    if photometric == "ycbcr":  # tifffile takes it as it is, but turns RGB into YCbCr
        stored = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    for options in ({}, {"tile": (16, 16)}, {"rowsperstrip": 16}):
        stream = io.BytesIO()
        kind = {"photometric": photometric, "compression": "jpeg", "compressionargs": {"level": 95}}
        tifffile.imwrite(stream, stored, **kind, **options)
        other = tifffile.imread(io.BytesIO(stream.getvalue()))
        expected = other if other.ndim == 3 else other[..., None].repeat(3, 2)
        got = pixels_of(stream.getvalue(), 48)
        assert np.abs(got.astype(int) - expected).mean() < 1.5
        assert np.abs(got.astype(int) - np.atleast_3d(pixels)).mean() < 6


def test_ycbcr() -> None:
    pixels = photo(SIDE, SIDE)
    values = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    whole = {530: (3, [1, 1])}
    assert np.abs(pixels_of(tiff(values, 8, 6, tags=whole)).astype(int) - pixels).max() <= 3
    full = {532: (5, [0, 1, 255, 1, 256, 2, 255, 1, 128, 1, 255, 1])}
    assert np.abs(pixels_of(tiff(values, 8, 6, tags=whole | full)).astype(int) - pixels).max() <= 3
    for tags, options in (
        ({}, {}),  # half the colours, as is usual where nothing is said
        ({530: (3, [2, 2])}, {}),
        (whole, {"compression": 5}),
        (whole | {529: (5, [299, 1000, 587, 1000, 114, 1000])}, {}),
        (whole | {532: (5, [16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1])}, {}),
    ):
        assert "YCbCr" in reason(tiff(values, 8, 6, tags=tags, **options))


@pytest.mark.parametrize(
    ("photometric", "tags", "words"),
    [
        (1, {262: (3, [])}, "without PhotometricInterpretation"),
        (2, {338: (3, [])}, "4 x 8 bits, SampleFormat 1, ExtraSamples []"),
        (2, {258: (3, [8, 8, 8, 16])}, "not alike"),
        (5, {332: (3, [2]), 338: (3, [])}, "inks other than CMYK"),
        (2, {259: (3, [50001])}, "Compression 50001"),
        (2, {259: (3, [6])}, "Compression 6"),
        (2, {254: (4, [1])}, "thumbnail"),
        (2, {255: (3, [2])}, "thumbnail"),
        (2, {50706: (1, [1, 4, 0, 0])}, "RAW photograph"),
        (32803, {}, "RAW photograph"),
        (32844, {}, "LogL"),
        (7, {}, "PhotometricInterpretation 7"),
    ],
)
def test_rows_name_what_they_are(photometric: int, tags: Any, words: str) -> None:
    found = reason(tiff(samples(4, 8), 8, photometric, (2,), tags=tags))
    assert words in found
    remedy = (
        "develop it" if words == "RAW photograph" else "convert it to a PNG of 8-bit grey or RGB"
    )
    assert f": {remedy}" in found


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation(orientation: int) -> None:
    values = samples(3, 8)[:20]
    turned = np.rot90(values, {1: 0, 3: 2, 6: 3, 8: 1}[orientation])
    xmp = f'<x tiff:Orientation="{orientation}"/>'.encode()
    for tags in ({274: (3, [orientation])}, {700: (1, xmp)}, {700: (7, xmp)}):
        found = decode(tiff(values, 8, 2, tags=tags), "a.tif", DecodeConfig(image_size=20))
        assert (found.original_height, found.original_width) == turned.shape[:2]
        upright = decode(encode(turned, "PNG"), "a.png", DecodeConfig(image_size=20))
        assert np.abs(found.pixels.astype(int) - upright.pixels).max() <= 1


def test_broken_metadata_costs_nothing() -> None:
    values = samples(3, 8)
    far = 1 << 30
    wrong = {
        34665: (4, [far]),  # EXIF beyond the end
        34853: (4, [9]),  # GPS within the pixels
        34675: (7, b"no profile"),
        700: (7, b"\xff\xfe broken"),
        33723: (4, [1, 2, 3]),
        282: (2, b"high\0"),
        283: (2, b"high\0"),
        296: (3, [3]),
        274: (3, [99]),
        34377: (7, b"8BIM\xff"),
    }
    assert np.array_equal(pixels_of(tiff(values, 8, 2, tags=wrong)), values)
    image = tiff(values, 8, 2, tags={34675: (7, bytes(100))})
    place = image.index(struct.pack("<HHI", 34675, 7, 100)) + 8
    beyond = image[:place] + struct.pack("<I", far) + image[place + 4 :]
    assert np.array_equal(pixels_of(beyond), values)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("compression", [1, 5, 8])
def test_cut_and_lying_files_are_corrupt(planar: bool, compression: int) -> None:
    image = tiff(samples(3, 16), 16, 2, planar=planar, compression=compression, rows=9)
    for broken in (
        image[:6],
        image[: len(image) // 2],
        image[:-3],
        image[:4] + struct.pack("<I", 1 << 31) + image[8:],
        tiff(samples(3, 16), 16, 2, planar=planar, tags={273: (4, [1 << 30] * 3)}, rows=0),
        tiff(samples(3, 16), 16, 2, planar=planar, tags={256: (4, [0])}),
        tiff(samples(3, 16), 16, 2, planar=planar, tags={258: (3, [16] * ((1 << 20) + 1))}),
    ):
        with pytest.raises(SampleError) as caught:
            pixels_of(broken)
        assert caught.value.status == "corrupt_image"


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("block", [{"rows": 9}, {"tile": 16}])
def test_blocks_that_are_not_stored(block: dict[str, int], planar: bool, big: bool) -> None:
    """Their bytes would be those of the header."""
    values = samples(3, 8)
    options = {"big": big, "planar": planar, **block}
    whole = tiff(values, 8, 2, **options)
    assert np.array_equal(pixels_of(whole), values)
    place, size = (324, 325) if "tile" in block else (273, 279)
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        starts, sizes = file.pages[0].dataoffsets, file.pages[0].databytecounts
    first = 12 if big else 4  # within the header
    for tags in (
        {place: (4, [*starts[:-1], 0]), size: (4, [*sizes[:-1], 0])},
        {place: (4, [0, *starts[1:]])},
        {size: (4, [*sizes[:-1], 0])},
        {place: (4, [first, *starts[1:]])},
        {place: (4, [0] * len(starts)), size: (4, [0] * len(sizes))},
    ):
        for compression in (1, 8):
            words = "blocks that are not stored (sparse): save it again without SPARSE_OK"
            file = tiff(values, 8, 2, compression=compression, tags=tags, **options)
            assert f"not supported: a TIFF with {words}" in reason(file)
    fewer = {place: (4, starts[:-1]), size: (4, sizes[:-1])}
    with pytest.raises(SampleError, match=f"{len(starts) - 1} of its {len(starts)} strips or tile"):
        pixels_of(tiff(values, 8, 2, tags=fewer, **options))


@pytest.mark.parametrize("compression", [None, "jpeg"])
def test_pixels_that_are_cut_behind_their_directory(compression: str | None) -> None:
    """The directory that is put behind them must not become some."""
    stream = io.BytesIO()
    values = photo(48, 48)
    tifffile.imwrite(stream, values, photometric="rgb", metadata=None, compression=compression)
    image = stream.getvalue()
    pixels_of(image)
    for cut in (1, 2, 20, 100):
        with pytest.raises(SampleError, match="it ends before its pixels") as caught:
            pixels_of(image[:-cut])
        assert caught.value.status == "corrupt_image"


def test_strips_that_share_their_bytes_take_no_memory() -> None:
    """Planes of an uncompressed file are copied: not more than the file has."""
    many = {273: (4, [8] * 10_000), 279: (4, [40_000] * 10_000)}
    image = tiff(samples(3, 16), 16, 2, planar=True, tags=many)
    tracemalloc.start()
    with pytest.raises(SampleError, match="its strips are larger than the file"):
        pixels_of(image)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_huge_header_is_refused() -> None:
    image = tiff(samples(1, 8), 8, 1, tags={number: (4, [1 << 20]) for number in (256, 257, 278)})
    with pytest.raises(SampleError, match="1048576x1048576 px"):
        pixels_of(image)
