"""PNG, BMP, JPEG, GIF, PPM, WebP and AVIF: each layout is the right picture or a row that names it.
Compared with what was written by hand, or with other decoders (imagecodecs)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from splatshard.pipeline.source.decode import readable
from tests.bitmaps import bmp, chunk, png
from tests.make import animation, encode, jpeg, photo
from tests.unit.decoding import SIDE, picture_or_reason, pixels_of, reason, samples

imagecodecs = pytest.importorskip("imagecodecs")

PALETTE = np.random.default_rng(2).integers(0, 256, (256, 3)).astype(np.uint8)
ALPHAS = np.random.default_rng(3).integers(0, 256, 256).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).max())


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours 0 to 255 and alpha 0 to 1 [H, W, 1]."""
    return rgb * alpha + 255 * (1 - alpha)


# PNG

PNG_LAYOUTS = [
    *((0, depth) for depth in (1, 2, 4, 8, 16)),
    *((3, depth) for depth in (1, 2, 4, 8)),
    *((color, depth) for color in (2, 4, 6) for depth in (8, 16)),
]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("color", "depth"), PNG_LAYOUTS)
def test_png(color: int, depth: int, interlaced: bool) -> None:
    values = samples({0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color], depth)
    before = [chunk(b"PLTE", PALETTE[: 2**depth].tobytes())] if color == 3 else []
    scaled = 255.0 * values / (2**depth - 1)
    rgb = PALETTE[values[..., 0]] if color == 3 else scaled[..., : 3 if color in (2, 6) else 1]
    expected = over_white(rgb, scaled[..., -1:] / 255) if color in (4, 6) else rgb
    image = png(values, depth, color, before, interlaced)
    assert difference(pixels_of(image), expected) < (2.1 if (depth, color & 4) == (16, 4) else 1.1)
    if depth >= 8 and color != 3 and not interlaced:
        assert np.array_equal(imagecodecs.png_decode(image), np.squeeze(values))
    if color in (4, 6):
        return
    for high in (0, 0xFFFF << depth & 0xFFFF):  # of which a decoder takes the low bits
        clear = values[3, 4].astype(int) + high
        shown = np.where((values == values[3, 4]).all(-1, keepdims=True), 255, rgb)
        body = clear.astype(">u2").tobytes()
        if color == 3:
            shown = over_white(rgb, ALPHAS[values] / 255)
            body = ALPHAS[: 2**depth].tobytes()
        transparent = png(values, depth, color, [*before, chunk(b"tRNS", body)], interlaced)
        if (color, depth) == (2, 16):
            assert "a PNG of 16 bits with a transparent colour" in reason(transparent)
        else:
            assert difference(pixels_of(transparent), shown) < 1.1


def test_png_that_needs_an_unknown_chunk() -> None:
    """Apple's telephones swap red and blue behind such a chunk."""
    for kind in (b"CgBI", b"ABCD"):
        assert f"chunk {kind.decode()}" in reason(png(samples(3, 8), 8, 2, [chunk(kind, b"1234")]))


@pytest.mark.parametrize(
    ("count", "controls", "animated"), [(2, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)]
)
def test_png_with_frames(count: int, controls: int, animated: int) -> None:
    """Animated is more than one frame, or one that is not the picture before it."""
    values = samples(3, 8)
    control = struct.pack(">IIIIIHHBB", 0, SIDE, SIDE, 0, 0, 1, 1, 0, 0)
    before = [chunk(b"acTL", struct.pack(">II", count, 0)), *[chunk(b"fcTL", control)] * controls]
    found = picture_or_reason(png(values, 8, 2, before))
    if animated:
        assert found == "a.tif has more than one frame"
    else:
        assert np.array_equal(found, values)


# BMP

BLACK_WHITE = np.array([[0, 0, 0], [255, 255, 255]])
RAMP = np.arange(256)[:, None].repeat(3, 1)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("header", [12, 40, 52, 56, 64, 108, 124])
def test_bmp_with_palettes(header: int, bits: int) -> None:
    full = 2**bits
    for palette in (PALETTE[:full], BLACK_WHITE, BLACK_WHITE[::-1], RAMP[:full], RAMP[: full - 1]):
        if header == 12 and len(palette) != full:
            continue
        values = samples(1, bits)[..., 0].astype(int) % len(palette)
        for top_down in (False, header != 12):
            image = bmp(values, bits, header, palette, top_down=top_down)
            found = picture_or_reason(image)
            if bits == 4 and palette[-1, 0] == len(palette) - 1:
                assert "not supported" in found
            else:
                assert np.array_equal(found, palette[values]), (len(palette), top_down)


MASKS = {
    (16, ()): (0x7C00, 0x3E0, 0x1F),
    (16, (0xF800, 0x7E0, 0x1F)): (),
    (16, (0x7C00, 0x3E0, 0x1F)): (),
    (24, ()): (0xFF0000, 0xFF00, 0xFF),
    (32, ()): (0xFF0000, 0xFF00, 0xFF),
    (32, (0xFF0000, 0xFF00, 0xFF)): (),
    (32, (0xFF000000, 0xFF0000, 0xFF00)): (),
    (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)): (),
    (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)): (),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)): (),
}
"""Bits and masks to the masks that are meant where there are none."""


@pytest.mark.parametrize("header", [40, 56, 108, 124])
@pytest.mark.parametrize(("bits", "masks"), MASKS)
def test_bmp_with_fields(bits: int, masks: Sequence[int], header: int) -> None:
    if header == 40 and len(masks) == 4:
        pytest.skip("this header has no place for alpha")
    for clear in (False, True):
        values, shown = np.zeros((SIDE, SIDE), np.uint32), []
        for i, mask in enumerate(masks or MASKS[bits, ()]):
            largest = mask // (mask & -mask)
            part = (
                samples(4, 8)[..., i].astype(np.uint32) * largest // 255 * (not (clear and i == 3))
            )
            values |= part * (mask & -mask)
            shown.append(255 * part / largest)
        rgb = np.stack(shown[:3], -1)
        if len(masks) == 4 and not clear:  # alpha of 0 everywhere is none
            rgb = over_white(rgb, shown[3][..., None] / 255)
        if (bits, masks) == (32, ()):
            values |= 0x55000000  # a byte that says nothing
        assert difference(pixels_of(bmp(values, bits, header, masks=masks)), rgb) < 1.1


@pytest.mark.parametrize(
    ("bits", "options", "words"),
    [
        (8, {"compression": 1}, "a BMP with run-length encoding"),
        (4, {"compression": 2}, "a BMP with run-length encoding"),
        (24, {"compression": 4}, "compression 4"),
        (24, {"compression": 5}, "compression 5"),
        (16, {"masks": (0xF00, 0xF0, 0xF)}, "masks f00 f0 f 0"),
        (16, {"masks": (0x7C00, 0x3E0, 0x1F, 0x8000), "header": 108}, "masks 7c00 3e0 1f 8000"),
        (32, {"masks": (0x3FF00000, 0xFFC00, 0x3FF)}, "masks 3ff00000 ffc00 3ff 0"),
        (32, {"masks": (0, 0, 0, 0), "header": 108}, "masks 0 0 0 0"),
    ],
)
def test_bmp_that_is_a_row(bits: int, options: dict[str, Any], words: str) -> None:
    palette = PALETTE if bits <= 8 else None
    assert words in reason(bmp(samples(1, min(bits, 8))[..., 0], bits, palette=palette, **options))


# JPEG


@pytest.mark.parametrize("stored", ["GRAYSCALE", "RGB", "YCBCR", "CMYK", "YCCK"])
def test_jpeg(stored: str) -> None:
    """CMYK and its luminance kind as Adobe writes them, inverted."""
    pixels = photo(64, 64)
    given, name = pixels, "RGB"
    if stored == "GRAYSCALE":
        given = np.ascontiguousarray(pixels[..., 1])
        name = stored
    if stored in ("CMYK", "YCCK"):
        given = 255 - np.asarray(Image.fromarray(pixels).convert("CMYK"))
        name = "CMYK"
    image = imagecodecs.jpeg8_encode(given, 95, colorspace=name, outcolorspace=stored)
    other = imagecodecs.jpeg8_decode(image)
    assert np.abs(other.astype(int) - given).mean() < 5
    rgb = np.atleast_3d(other).astype(float)
    expected = rgb[..., :3] * rgb[..., 3:] / 255 if rgb.shape[2] == 4 else rgb
    assert np.abs(pixels_of(image, 64) - expected).mean() < 1
    if rgb.shape[2] == 4:
        at = image.index(b"\xff\xee")
        without = image[:at] + image[at + 2 + int.from_bytes(image[at + 2 : at + 4]) :]
        assert "without Adobe's marker" in reason(without)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "411", "440"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_subsampling(subsampling: str, progressive: bool) -> None:
    image = imagecodecs.jpeg8_encode(photo(64, 64), 95, subsampling=subsampling)
    if progressive:
        image = encode(photo(64, 64), "JPEG", quality=95, progressive=True)
    expected = imagecodecs.jpeg8_decode(image)
    assert np.abs(pixels_of(image, 64).astype(int) - expected).mean() < 1
    extended = image.replace(b"\xff\xc0\0\x11", b"\xff\xc1\0\x11")  # the same, said otherwise
    assert np.array_equal(pixels_of(extended, 64), pixels_of(image, 64))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c", "12 bits"),
        (b"\xff\xc0", b"\xff\xc3", "lossless JPEG"),
        (b"\xff\xc0", b"\xff\xc9", "arithmetically coded JPEG"),
        (b"\xff\xc0", b"\xff\xc5", "hierarchical or lossless JPEG"),
        (b"\xff\xc0", b"\xff\xf7", "JPEG-LS"),
    ],
)
def test_jpeg_that_is_a_row(old: bytes, new: bytes, words: str) -> None:
    assert words in reason(jpeg().replace(old, new, 1))


def test_jpegs_of_other_encoders_are_rows() -> None:
    deep = samples(1, 12)[..., 0]
    assert "12 bits" in reason(imagecodecs.jpeg8_encode(deep, 95, bitspersample=12))
    assert "lossless" in reason(imagecodecs.ljpeg_encode(samples(1, 8)[..., 0]))
    assert "JPEG-LS" in reason(imagecodecs.jpegls_encode(samples(1, 8)[..., 0]))
    two = jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x08", 1)
    at = two.index(b"\xff\xc0") + 9
    assert "2 components" in reason(two[:at] + b"\2" + two[at + 1 :])


# GIF


def gif(values: np.ndarray, canvas: int, left: int = 0, clear: int | None = None) -> bytes:
    """The picture [H, W] at (left, left): codes of 9 bits, cleared before they grow."""
    head = b"GIF89a" + struct.pack("<HHBBB", canvas, canvas, 0xF7, 0, 0) + PALETTE.tobytes()
    if clear is not None:
        head += b"!\xf9\x04\x01\0\0" + bytes([clear, 0])
    tall, wide = values.shape
    codes = []
    for i, value in enumerate(values.ravel().tolist()):
        codes += [256] * (i % 100 == 0) + [value]
    bits = (np.array([*codes, 257])[:, None] >> np.arange(9) & 1).astype(np.uint8).ravel()
    data = np.packbits(bits, bitorder="little").tobytes()
    blocks = [data[i : i + 255] for i in range(0, len(data), 255)]
    image = b"," + struct.pack("<HHHHB", left, left, wide, tall, 0) + b"\x08"
    return head + image + b"".join(bytes([len(b)]) + b for b in blocks) + b"\0;"


def test_gif() -> None:
    values = samples(1, 8)[..., 0]
    image = gif(values, SIDE)
    assert np.array_equal(imagecodecs.gif_decode(image), PALETTE[values])
    assert np.array_equal(pixels_of(image), PALETTE[values])
    clear = int(values[3, 4])
    shown = np.where(values[..., None] == clear, 255, PALETTE[values])
    assert np.array_equal(pixels_of(gif(values, SIDE, clear=clear)), shown)
    small = gif(values[:20, :20], SIDE, left=3)
    assert "does not fill its canvas" in reason(small)
    whole = np.full((SIDE, SIDE, 3), 255)
    whole[3:23, 3:23] = np.where(values[:20, :20, None] == clear, 255, PALETTE[values[:20, :20]])
    assert np.array_equal(pixels_of(gif(values[:20, :20], SIDE, left=3, clear=clear)), whole)
    assert np.array_equal(pixels_of(image[:-1] + b"!"), PALETTE[values])  # cut behind the picture


# PPM


@pytest.mark.parametrize("largest", [1, 7, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_ppm(channels: int, plain: bool, largest: int) -> None:
    values = np.round(samples(channels, 16) / 65535.0 * largest).astype(int)
    magic = {(1, 1): 2, (3, 1): 3, (1, 0): 5, (3, 0): 6}[channels, plain]
    head = f"P{magic}\n# a comment\n{SIDE} {SIDE}\n{largest}\n".encode()
    body = " ".join(map(str, values.ravel())).encode()
    if not plain:
        body = values.astype(">u2" if largest > 255 else "u1").tobytes()
    assert difference(pixels_of(head + body), values * 255 / largest) < 1.1


def test_pbm() -> None:
    values = samples(1, 1)[..., 0]
    plain = f"P1 {SIDE} {SIDE}\n".encode() + "".join(map(str, values.ravel())).encode()
    raw = f"P4 {SIDE} {SIDE}\n".encode() + np.packbits(values, axis=1).tobytes()
    for image in (plain, raw):
        assert np.array_equal(pixels_of(image)[..., 0], 255 * (1 - values))


@pytest.mark.parametrize(("scale", "order"), [("-1.0", "<"), ("1.0", ">"), ("-2.5", "<")])
def test_pfm_goes_up(scale: str, order: str) -> None:
    grey = samples(1, 8)[..., 0]
    body = (grey[::-1] / np.float32(255)).astype(f"{order}f4").tobytes()
    image = f"Pf\n{SIDE} {SIDE}\n{scale}\n".encode() + body
    assert np.array_equal(pixels_of(image), grey[..., None].repeat(3, 2))


@pytest.mark.parametrize("kind", ["P4", "P5", "P5 wide", "P6"])
def test_streams_of_ppm_have_frames(kind: str) -> None:
    """As ffmpeg writes them into one file; zeros and line ends behind a picture are none."""
    magic = kind[:2].encode()
    values = samples(3 if magic == b"P6" else 1, 1 if magic == b"P4" else 8)
    body = np.packbits(values[..., 0], axis=1).tobytes() if magic == b"P4" else values.tobytes()
    if kind == "P5 wide":
        body = (values.astype(">u2") * 257).tobytes()
    largest = {"P4": b"", "P5 wide": b"65535\n"}.get(kind, b"255\n")
    image = magic + f"\n# one of them\n{SIDE} {SIDE}\n".encode() + largest + body
    alone = pixels_of(image)
    for behind in (b"\n", bytes(100), b"P", b"P6"):
        assert np.array_equal(pixels_of(image + behind), alone)
    for behind in (image, b"\n" + image):
        assert picture_or_reason(image + behind) == "a.tif has more than one frame"


# WebP and AVIF


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
def test_webp(channels: int, lossless: bool) -> None:
    values = samples(channels, 8)
    image = imagecodecs.webp_encode(values, 90, lossless=lossless)
    other = imagecodecs.webp_decode(image).astype(float)
    expected = over_white(other[..., :3], other[..., 3:] / 255) if channels == 4 else other
    assert difference(pixels_of(image), expected) < 1.1


avif = pytest.mark.skipif(not readable("AVIF"), reason="this Pillow has no AVIF")


@avif
@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_avif(channels: int, bits: int) -> None:
    values = np.squeeze(samples(channels, bits))
    image = imagecodecs.avif_encode(values, 100, bitspersample=bits)
    other = np.atleast_3d(imagecodecs.avif_decode(image)).astype(float) / (2**bits - 1) * 255
    expected = over_white(other[..., :3], other[..., 3:] / 255) if channels == 4 else other
    assert difference(pixels_of(image), expected) < 2.1


def with_clap(image: bytes, *clap: int) -> bytes:
    """An AVIF with one more property, its last one: which part is to be shown."""
    data, box = bytearray(image), struct.pack(">I4s8i", 40, b"clap", *clap)

    def at(kind: bytes) -> int:
        return data.index(kind) - 4

    def enlarge(place: int, more: int) -> None:
        data[place : place + 4] = (int.from_bytes(data[place : place + 4]) + more).to_bytes(4)

    start = at(b"ipco")
    place, count, end = start + 8, 1, start + int.from_bytes(data[start : start + 4])
    while place < end:
        place, count = place + int.from_bytes(data[place : place + 4]), count + 1
    used = at(b"ipma") + 18  # number of the first item's properties
    data[used] += 1
    data[used + 1 : used + 1] = bytes([0x80 | count])
    data[end:end] = box
    pixels = (image.index(b"mdat") + 4).to_bytes(4)
    enlarge(data.index(pixels, at(b"iloc")), 41)
    for kind, more in ((b"ipma", 1), (b"ipco", 40), (b"iprp", 41), (b"meta", 41)):
        enlarge(at(kind), more)
    return bytes(data)


@avif
def test_avif_that_is_cropped() -> None:
    """Pillow, OpenCV and imagecodecs show all of it, libheif the part."""
    image = encode(photo(SIDE, SIDE), "AVIF")
    whole = with_clap(image, SIDE, 1, SIDE, 1, 0, 1, 0, 1)
    assert np.array_equal(pixels_of(whole), pixels_of(image))
    for clap in ((9, 1, SIDE, 1, 0, 1, 0, 1), (SIDE, 1, SIDE, 1, 1, 2, 0, 1)):
        assert reason(with_clap(image, *clap)).startswith("a.tif: not supported: a cropped AVIF")


@avif
def test_avif_of_frames() -> None:
    assert picture_or_reason(animation("AVIF")) == "a.tif has more than one frame"
    assert isinstance(picture_or_reason(animation("AVIF", frames=1)), np.ndarray)
