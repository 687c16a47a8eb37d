"""What is wrong with metadata costs no picture: same pixels, in bounded memory, and the orientation
where it can be read."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from splatshard.pipeline.source.decode import readable
from tests.bitmaps import chunk, png
from tests.make import encode, jpeg, photo
from tests.unit.decoding import SIDE, picture_or_reason, pixels_of, samples

GARBAGE = random.Random(1).randbytes(300)
LARGE = zlib.compress(b"x" * 1_500_000)
UPSIDE_DOWN = 3


def exif(orientation: int = UPSIDE_DOWN) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def xmp(orientation: int = UPSIDE_DOWN) -> bytes:
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()


# PNG

TEXTS = [
    (b"zTXt", b"workflow\0\0" + LARGE),
    (b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
    (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    (b"zTXt", b"Raw profile type exif\0\0" + LARGE),
    (b"iCCP", b"profile\0\0" + zlib.compress(bytes(1_200_000))),
    (b"zTXt", b"workflow\0\7no such method"),
    (b"iCCP", b"profile\0\7no such method"),
    (b"zTXt", b"Raw profile type exif\0\0" + GARBAGE),
    (b"tEXt", b"Raw profile type exif\0\nexif\n4\nno digits"),
    (b"iTXt", b"XML:com.adobe.xmp\0"),
    (b"iTXt", b"\xff"),
    (b"tEXt", GARBAGE),
    (b"eXIf", GARBAGE),
    (b"eXIf", exif()[6:20]),
    *((kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"iCCP", b"eXIf", b"acTL")),
    (b"zzZz", GARBAGE),
    (b"sPLT", GARBAGE),
    (b"tRNS", b"\1"),
]


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_png(number: int, wrong: int) -> None:
    """Before the pixels and behind them; a wrong checksum of what may be left out says nothing."""
    values = samples(3, 8)
    odd = chunk(*TEXTS[number], wrong)
    for before, after in (([odd], []), ([], [odd]), ([odd] * 3, [odd] * 3)):
        assert np.array_equal(pixels_of(png(values, 8, 2, before, after=after)), values)
    image = png(values, 8, 2, after=[odd])
    assert np.array_equal(pixels_of(image[:-13]), values)  # cut within the last chunk
    at = image.index(b"IDAT", image.index(b"IDAT") + 4) - 4
    assert np.array_equal(pixels_of(image[:at] + odd + image[at:]), values)  # amid the pixels


def test_png_transparency_with_a_wrong_checksum() -> None:
    values = samples(3, 8)
    clear = chunk(b"tRNS", values[2, 5].astype(">u2").tobytes(), wrong=1)
    shown = np.where((values == values[2, 5]).all(-1, keepdims=True), 255, values)
    assert np.array_equal(pixels_of(png(values, 8, 2, [clear])), shown)


def test_png_of_wrong_pixels_stays_corrupt() -> None:
    whole = png(samples(3, 8), 8, 2, after=[chunk(b"tEXt", b"a\0b")])
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    for broken in (
        whole[: second - 4],  # half of the pixels, no end
        whole[: second + 20],
        whole[: second - 4] + whole[whole.index(b"tEXt") - 4 :],
        whole.replace(b"IHDR", b"IHDR" + b"\0", 1),
        png(samples(1, 8), 8, 3),  # no palette
        # zeros at the end of a download, say, which inflate to pixels, too
        whole[: second + 9] + bytes([whole[second + 9] ^ 1]) + whole[second + 10 :],
    ):
        assert "a.tif" in picture_or_reason(broken)


KINDS = [(0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (3, 4), (4, 8), (6, 8)]


@pytest.mark.parametrize(("color", "depth"), KINDS)
@pytest.mark.parametrize("interlaced", [False, True])
def test_png_whose_pixels_end_early(color: int, depth: int, interlaced: bool) -> None:
    """In a whole stream with right checksums: Pillow shows the rest as zeros."""
    palette = [chunk(b"PLTE", bytes(48))] * (color == 3)
    for height, width in ((9, 5), (1, 1), (1, 4), (3, 40)):
        for value in (0, 1):  # a last row of zeros is none that is missing
            shape = (height, width, {2: 3, 4: 2, 6: 4}.get(color, 1))
            values = np.full(shape, value, np.uint16 if depth == 16 else np.uint8)
            for missing in (0, 1, 2, 5):
                image = png(values, depth, color, palette, interlaced, missing=missing)
                found = picture_or_reason(image)
                assert isinstance(found, str) == bool(missing), found


def test_png_of_half_its_rows() -> None:
    image = png(np.full((64, 64, 3), 200, np.uint8), 8, 2, missing=32 * 193)
    assert "its pixels end early, after 6,176 of 12,352 bytes" in picture_or_reason(image)


def test_memory_is_bounded_whatever_texts_promise() -> None:
    values = samples(3, 8)
    bomb = zlib.compress(bytes(50_000_000))
    kinds = [(b"zTXt", b"a\0\0"), (b"zTXt", b"Raw profile type exif\0\0"), (b"iCCP", b"a\0\0")]
    kinds += [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0")]
    odd = [chunk(kind, head + bomb) for kind, head in kinds] * 3
    image = png(values, 8, 2, odd, after=odd)
    tracemalloc.start()
    assert np.array_equal(pixels_of(image), values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6 + len(image)


# JPEG


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


SEGMENTS = [
    segment(0xE0, b"JFIF\0"),
    segment(0xE0, b"JFXX\0" + GARBAGE),
    segment(0xE1, b"Exif\0\0" + GARBAGE),
    segment(0xE1, b"Exif\0\0"),
    segment(0xE1, exif()[:20]),
    segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + GARBAGE),
    segment(0xE2, b"ICC_PROFILE\0"),
    segment(0xE2, b"ICC_PROFILE\0\7\2" + GARBAGE),
    segment(0xE2, b"MPF\0"),
    segment(0xE2, b"MPF\0II*\0\x08\0\0\0\2\0" + GARBAGE),
    segment(0xE2, b"FPXR\0"),
    segment(0xED, b"Photoshop 3.0\x008BIM"),
    segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0" + GARBAGE),
    segment(0xEE, b"Adobe"),
    segment(0xEE, GARBAGE),
    segment(0xEB, GARBAGE),
    segment(0xFE, b"x" * 65000),
    segment(0xE5, b""),
    b"\xff\xff\xff" + segment(0xE4, GARBAGE),
]


@pytest.mark.parametrize("number", range(len(SEGMENTS)))
def test_jpeg(number: int) -> None:
    image = jpeg(64, 64)
    expected = pixels_of(image, 64)
    jfif = image[2:20]
    assert jfif[4:9] == b"JFIF\0"
    for broken in (
        image[:2] + SEGMENTS[number] * 2 + image[2:],
        image[:20] + SEGMENTS[number] + image[20:],
    ):
        assert np.array_equal(pixels_of(broken, 64), expected)
    table = image.index(b"\xff\xda")  # right before the scan, and instead of JFIF's
    assert np.array_equal(pixels_of(image[:table] + SEGMENTS[number] + image[table:], 64), expected)
    assert np.array_equal(pixels_of(image[:2] + SEGMENTS[number] + image[20:], 64), expected)


# WebP, AVIF, GIF


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def test_webp_of_one_frame() -> None:
    """As a picture where it fills the canvas; what lies beside a smaller one is nowhere told."""
    values = samples(3, 8)
    pixels = encode(values, "WEBP", lossless=True)[12:]
    whole, more = struct.pack("<I", SIDE - 1)[:3], struct.pack("<I", SIDE)[:3]
    frame = riff_chunk(b"ANMF", bytes(6) + whole * 2 + bytes(4) + pixels)
    for side in (whole, more):
        head = riff_chunk(b"VP8X", b"\x02\0\0\0" + side * 2) + riff_chunk(b"ANIM", bytes(6))
        found = picture_or_reason(riff(head, frame))
        if side == whole:
            assert np.array_equal(found, values)
        else:
            assert "a WebP whose picture does not fill its canvas" in found
        assert picture_or_reason(riff(head, frame, frame)) == "a.tif has more than one frame"


@pytest.mark.parametrize("kind", [b"EXIF", b"XMP ", b"ICCP", b"ABCD"])
def test_webp(kind: bytes) -> None:
    values = samples(3, 8)
    plain = encode(values, "WEBP", lossless=True)
    pixels, side = plain[12:], struct.pack("<I", SIDE - 1)[:3]
    head = riff_chunk(b"VP8X", b"\x2c\0\0\0" + side + side)
    odd = riff_chunk(kind, GARBAGE)
    for image in (
        riff(head, pixels, odd),
        riff(head, odd, pixels),
        riff(pixels, odd),
        riff(head, pixels, odd)[:-100],  # cut within it
        riff(head, pixels, odd, size=20),
        riff(head, pixels, odd, size=1 << 30),
        riff(head, pixels) + GARBAGE,
    ):
        assert np.array_equal(pixels_of(image), values)
    for cut in (riff(pixels)[:-20], riff(head, pixels[: len(pixels) // 2])):
        assert "a.tif" in picture_or_reason(cut)


def test_gif() -> None:
    image = encode(photo(SIDE, SIDE), "GIF", comment=b"x" * 5000)
    expected = pixels_of(encode(photo(SIDE, SIDE), "GIF"))
    at = image.index(b"!\xfe")
    odd = [b"!\xff\x0bXMP DataXMP" + bytes([200]) + GARBAGE[:200] + b"\0", b"!\x01\x03abc\0"]
    for broken in (image, *(image[:at] + extension + image[at:] for extension in odd)):
        assert np.array_equal(pixels_of(broken), expected)
    assert np.array_equal(pixels_of(image[:-1] + b"!\xfe\x20cut"), expected)


avif = pytest.mark.skipif(not readable("AVIF"), reason="this Pillow has no AVIF")


@avif
def test_avif() -> None:
    pixels = photo(64, 64)
    software = Image.Exif()
    software[0x0131] = "somebody's camera"
    image = encode(pixels, "AVIF", exif=software.tobytes())
    expected = pixels_of(encode(pixels, "AVIF"), 64)
    assert np.array_equal(pixels_of(image, 64), expected)
    tags = software.tobytes()[6:]
    at = image.index(tags)
    for broken in (GARBAGE[: len(tags)], bytes(len(tags)), tags[:8] + b"\xff" * (len(tags) - 8)):
        damaged = image[:at] + broken + image[at + len(tags) :]
        assert np.array_equal(pixels_of(damaged, 64), expected)


# Orientation

HEX = b"\nexif\n    %d\n" % len(exif()) + exif().hex().encode()


def with_orientation(kind: str) -> bytes:
    """The picture as it is stored, and a word that it is upside down."""
    values = samples(3, 8)
    match kind.split():
        case ["png", "eXIf"]:
            return png(values, 8, 2, after=[chunk(b"eXIf", exif()[6:])])
        case ["png", "tEXt"]:
            return png(values, 8, 2, [chunk(b"tEXt", b"Raw profile type exif\0" + HEX)])
        case ["png", "zTXt"]:
            packed = zlib.compress(HEX)
            return png(values, 8, 2, [chunk(b"zTXt", b"Raw profile type exif\0\0" + packed)])
        case ["png", "iTXt"]:
            return png(values, 8, 2, [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp())])
        case ["png", "packed"]:
            body = b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(xmp())
            return png(values, 8, 2, after=[chunk(b"iTXt", body)])
        case [format, "exif"]:
            return encode(
                values, format, exif=exif(), **({} if format == "AVIF" else {"quality": 95})
            )
        case [format, "xmp"]:
            return encode(values, format, xmp=xmp(), quality=95)
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *(f"png {kind}" for kind in ("eXIf", "tEXt", "zTXt", "iTXt", "packed")),
        *("JPEG exif", "JPEG xmp", "WEBP exif", "WEBP xmp", "TIFF exif"),
        pytest.param("AVIF exif", marks=avif),
    ],
)
def test_orientation(kind: str) -> None:
    turned = samples(3, 8)[::-1, ::-1].astype(int)
    tolerance = 0 if kind.startswith(("png", "TIFF")) else 12
    assert np.abs(pixels_of(with_orientation(kind)) - turned).mean() <= tolerance


def test_orientation_between_either_quotes() -> None:
    image = jpeg(64, 64)
    tags = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp().replace(b'"', b"'"))
    found = pixels_of(image[:2] + tags + image[2:], 64)
    assert np.array_equal(found, pixels_of(image, 64)[::-1, ::-1])


def test_orientation_of_exif_in_pieces() -> None:
    image = jpeg(64, 64)
    first, rest = exif()[:12], exif()[12:]
    pieces = segment(0xE1, first) + segment(0xE1, b"Exif\0\0" + rest)
    whole = segment(0xE1, exif())
    upright = pixels_of(image, 64)
    for tags in (pieces, whole):
        found = pixels_of(image[:2] + tags + image[2:], 64)
        assert np.array_equal(found, upright[::-1, ::-1])
    both = segment(0xE1, exif(1)) + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp())
    assert np.array_equal(pixels_of(image[:2] + both + image[2:], 64), upright)  # EXIF has the word
    assert Image.open(io.BytesIO(image[:2] + whole + image[2:])).getexif()[0x0112] == UPSIDE_DOWN
