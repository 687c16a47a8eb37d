"""JPEG, PNG, WebP, AVIF, BMP and PPM files without what their pixels do not need.

Texts, profiles, EXIF and the like are taken out before a decoder meets them: whatever is wrong with
them, or too large, costs no picture. Of all that only the orientation is wanted. What Pillow would
show wrongly ends here, as NotSupported.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from splatshard.pipeline.source.formats import NotSupported

CROP = "save it anew as it is to be shown"

TEXT_BYTES = 1 << 20
"""So much of a compressed text is inflated, whatever it promises."""

ORIENTATION_TAG = 0x0112
UPRIGHT = 1

Buffer = bytes | memoryview


@dataclass
class Bare:
    """A file as Pillow gets it, and what the file says of its pixels besides.

    `orientation` is the file's own, 0 where only EXIF or XMP can tell. `black` and `white` are the
    values of grey pixels of 16 bits, `transparent` the one that is not painted. Joined, `parts` are
    a JPEG without metadata, for the few whose metadata Pillow trips over: joining takes time.
    `mask` is a grey TIFF of the same size, 0 where nothing is painted.
    """

    data: bytes
    parts: Sequence[Buffer] = ()
    exif: bytes = b""
    xmp: bytes = b""
    orientation: int = 0
    black: int = 0
    white: int = 65535
    transparent: int | None = None
    mask: bytes = b""
    animated: bool = False
    pages: int = 1


def orientation_of(bare: Bare) -> int:
    """1 to 8, as EXIF numbers them; what cannot be read counts as upright, as in every viewer."""
    found = bare.orientation
    if not found and bare.exif:
        found = exif_orientation(bare.exif)
    if not found and (match := re.search(rb"tiff:Orientation(?:=[\"']|>)([0-9])", bare.xmp)):
        found = int(match[1])
    return found if 1 <= found <= 8 else UPRIGHT


def exif_orientation(exif: bytes) -> int:
    """0 where there is none."""
    try:
        tags = Image.Exif()
        tags.load(exif)
        found = tags.get(ORIENTATION_TAG)
    except MemoryError:
        raise
    except Exception:
        return 0
    return found if isinstance(found, int) else 0


# JPEG


def bare_jpeg(image: bytes) -> Bare:
    """Its parts are without comments and application segments, but for JFIF's and Adobe's, which
    tell the colours."""
    bare, adobe, layers = Bare(image), False, 0
    parts: list[Buffer] = [image[:2]]
    at = 2
    for marker, start, end in jpeg_segments(image):
        at = end
        body = image[start + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            bare.exif += body[6:] if bare.exif else body
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            bare.xmp = body
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = True
            parts.append(image[start:end])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) > 5:
            check_frame(marker, body[0])
            layers = body[5]
            parts.append(image[start:end])
        elif marker == 0xF7:
            raise NotSupported("JPEG-LS")
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE) or (
            marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
        ):
            parts.append(image[start:end])
    if layers == 2 or layers > 4:
        raise NotSupported(f"a JPEG of {layers} components")
    if layers == 4 and not adobe:
        raise NotSupported("a CMYK JPEG without Adobe's marker, which may be inverted or not")
    bare.parts = [*parts, memoryview(image)[at:]]
    return bare


def jpeg_segments(image: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment before the first scan, or before what is none."""
    at = 2
    while at + 4 <= len(image) and image[at] == 0xFF:
        marker = image[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA or marker < 0xC0:
            return
        end = at + 2 + int.from_bytes(image[at + 2 : at + 4])
        if 0xD0 <= marker <= 0xD9 or end > len(image):
            return
        yield marker, at, end
        at = end


def check_frame(marker: int, bits: int) -> None:
    kinds = {0xC3: "lossless", 0xC9: "arithmetically coded", 0xCA: "arithmetically coded"}
    if marker > 0xC2:
        raise NotSupported(f"a {kinds.get(marker, 'hierarchical or lossless')} JPEG")
    if bits != 8:
        raise NotSupported(f"a JPEG of {bits} bits per component")


# PNG

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
RAW_PROFILE, XMP = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"


def bare_png(image: bytes) -> Bare:
    """Of the chunks that a PNG may lack only transparency is kept, whatever its checksum."""
    view, bare, frames = memoryview(image), Bare(image), []
    parts: list[Buffer] = [image[:8]]
    depth = color = palette = pixels = end = 0
    for kind, start, end in png_chunks(image):
        body = b"" if kind == b"IDAT" else image[start + 8 : end - 4]
        if kind == b"IHDR" and len(body) == 13:
            depth, color = body[8], body[9]
        if kind == b"IDAT" and end <= len(image):
            check_pixels(view[start:end])
        if kind in (b"IHDR", b"PLTE", b"IDAT"):
            pixels += kind == b"IDAT"
            palette += kind == b"PLTE"
            parts.append(view[start:end])
        elif kind == b"tRNS" and not pixels:
            parts.append(png_transparency(body, depth, color, bare))
        elif kind in (b"acTL", b"fcTL") and not pixels:
            frames.append((kind, body))
        elif kind == b"eXIf":
            bare.exif = body
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and body.startswith((RAW_PROFILE, XMP)):
            read_text(kind, body, bare)
        elif kind[0] < ord("a"):
            raise NotSupported(f"a PNG with the chunk {kind.decode()}, which its pixels need")
    if color == 3 and not palette:
        raise ValueError("it has no palette")
    bare.data = b"".join([*parts, PNG_END if end <= len(image) else b""])
    bare.animated = is_animated(frames)
    return bare


def png_chunks(image: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk before the end, or before what is none. Of chunks that the
    file's end cuts off only pixels are told: the cut must show."""
    at = 8
    while at + 8 <= len(image):
        length, kind = struct.unpack_from(">I4s", image, at)
        end = at + 12 + length
        if kind == b"IEND" or not kind.isalpha() or (end > len(image) and kind != b"IDAT"):
            return
        yield kind, at, end
        at = end


def check_pixels(chunk: memoryview) -> None:
    """Raises ValueError for a checksum that is wrong, as in downloads whose room was made before:
    zeros inflate to a picture, too."""
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
        raise ValueError("the checksum of its pixels is wrong; download it again")


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
ADAM7 += ((0, 1, 1, 2),)
"""Of the passes of an interlaced PNG the first column and row, and the steps to the next."""

ONCE = ((0, 0, 1, 1),)


def check_rows(picture: Image.Image, bare: Bare) -> None:
    """Loads the picture of a PNG. Raises ValueError where its pixels end early, though in a whole
    stream with right checksums: Pillow leaves what is missing at zero. Inflates them a second time
    where the last row is zero, or rows are not in their order."""
    picture.load()
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", bare.data, 16)
    last = picture.resize((width, 1), Image.Resampling.NEAREST, (0, height - 1, width, height))
    if not interlaced and last.tobytes().strip(b"\0"):
        return
    bits = depth * {2: 3, 4: 2, 6: 4}.get(color, 1)
    expected = 0
    for left, top, across, down in ADAM7 if interlaced else ONCE:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        expected += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    if (found := inflated_bytes(bare.data, expected)) < expected:
        raise ValueError(
            f"its pixels end early, after {found:,} of {expected:,} bytes: whatever wrote it was "
            "interrupted; download it again, or write it anew"
        )


def inflated_bytes(png: bytes, at_most: int) -> int:
    """How many bytes the pixels of a PNG inflate to, counted until there are `at_most`."""
    inflater, count = zlib.decompressobj(), 0
    for start, end in ((s, e) for kind, s, e in png_chunks(png) if kind == b"IDAT"):
        body = png[start + 8 : end - 4]
        while body:
            count += len(inflater.decompress(body, TEXT_BYTES))
            if count >= at_most:
                return count
            body = inflater.unconsumed_tail
    return count + len(inflater.flush())


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_transparency(body: bytes, depth: int, color: int, bare: Bare) -> bytes:
    """The chunk as Pillow reads it right: a grey in the range of its pixels, 8 bits of a colour.
    One that is too short, or that no such image has, is none, as for libpng."""
    if color == 3:
        return png_chunk(b"tRNS", body[:256])
    if color == 0 and len(body) >= 2:
        value = int.from_bytes(body[:2]) & ((1 << depth) - 1)
        if depth == 16:
            bare.transparent = value
            return b""
        scale = {2: 85, 4: 17}.get(depth, 1)  # Pillow spreads pixels, but not this value
        return png_chunk(b"tRNS", (value * scale).to_bytes(2))
    if color == 2 and len(body) >= 6:
        if depth == 16:
            raise NotSupported("a PNG of 16 bits with a transparent colour")
        return png_chunk(b"tRNS", bytes(b if i % 2 else 0 for i, b in enumerate(body[:6])))
    return b""


def is_animated(frames: list[tuple[bytes, bytes]]) -> bool:
    """Of the chunks before the pixels: whether more than one picture is promised. Without a control
    of its own the first picture is none of the frames."""
    counts = [int.from_bytes(body[:4]) for kind, body in frames if kind == b"acTL"]
    return bool(counts) and (counts[0] > 1 or (counts[0] == 1 and len(frames) == 1))


def read_text(kind: bytes, body: bytes, bare: Bare) -> None:
    """XMP, or EXIF in hexadecimal digits as ImageMagick writes it."""
    keyword, _, text = body.partition(b"\0")
    compressed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    text = text[1:] if kind == b"zTXt" else text
    text = text[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else text
    try:
        text = zlib.decompressobj().decompress(text, TEXT_BYTES) if compressed else text
        if keyword + b"\0" == XMP:
            bare.xmp = text
        else:
            bare.exif = bare.exif or bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode())
    except (zlib.error, ValueError):
        return


# WebP and AVIF


def bare_webp(image: bytes) -> Bare:
    """Without profile, EXIF, XMP and what nobody knows."""
    view, bare, parts, frames = memoryview(image), Bare(image), [], []
    at, canvas = 12, b""
    while at + 8 <= len(image):
        kind, size = struct.unpack_from("<4sI", image, at)
        end = at + 8 + size + size % 2
        if kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"):
            parts.append(view[at:end])
            canvas = image[at + 12 : at + 18] if kind == b"VP8X" else canvas
            frames += [image[at + 14 : at + 20]] * (kind == b"ANMF")
        elif kind == b"EXIF":
            bare.exif = image[at + 8 : at + 8 + size]
        elif kind == b"XMP ":
            bare.xmp = image[at + 8 : at + 8 + size]
        at = end
    if len(frames) == 1 and frames != [canvas]:
        raise NotSupported("a WebP whose picture does not fill its canvas")
    size = 4 + sum(map(len, parts))
    bare.data = b"".join([b"RIFF", struct.pack("<I", size), b"WEBP", *parts])
    return bare


CLAP = re.compile(rb"\0\0\0\x28clap(.{32})", re.DOTALL)
ISPE = re.compile(rb"\0\0\0\x14ispe\0{4}(.{8})", re.DOTALL)
"""Boxes of an AVIF: the part of its pixels that is to be shown, and how many there are."""


def bare_avif(image: bytes) -> Bare:
    """With its EXIF hidden: an AVIF's orientation is a property of its own."""
    sizes = {struct.unpack(">2I", found[1]) for found in ISPE.finditer(image)}
    for found in CLAP.finditer(image):
        width, by, height, down, *offsets = struct.unpack(">8i", found[1])
        if any(offsets[::2]) or not any((w * by, h * down) == (width, height) for w, h in sizes):
            raise NotSupported("a cropped AVIF (clap), which not all readers crop", CROP)
    return Bare(re.sub(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", rb"\1free", image, flags=re.DOTALL))


# BMP

BMP_MASKS = {
    16: ((0xF800, 0x7E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0)),
    32: (
        (0xFF0000, 0xFF00, 0xFF, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    ),
}
"""Red, green, blue and alpha of bit fields, by bits per pixel."""


def bare_bmp(image: bytes) -> Bare:
    """The file itself, if it is stored without compression, in a common order of bits."""
    if len(image) < 54 or image[14] < 40:
        return Bare(image)
    header, bits = struct.unpack_from("<14xI10xH", image)
    compression, colors = struct.unpack_from("<30xI12xI", image)
    if compression in (1, 2):
        raise NotSupported("a BMP with run-length encoding")
    if compression == 3 and header != 64:
        masks = struct.unpack_from("<54x4I", image.ljust(70, b"\0"))
        masks = masks if header >= 56 else (*masks[:3], 0)
        if masks not in BMP_MASKS.get(bits, ()):
            fields = " ".join(f"{mask:x}" for mask in masks)
            raise NotSupported(f"a BMP of {bits} bits with the masks {fields}")
    elif compression:
        raise NotSupported(f"a BMP with compression {compression}")
    if bits in (4, 8) and colors in (1, 2):  # Pillow takes black and white for 1 bit per pixel
        return Bare(image[:46] + bytes(4) + image[50:])
    return Bare(image)


# PPM

GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
RAW_PPM = re.compile(rb"P[456]" + 2 * (GAP + rb"([0-9]{1,9})"))
LARGEST = re.compile(GAP + rb"([0-9]{1,9})")


def bare_ppm(image: bytes) -> Bare:
    """The file itself, and whether another picture follows, as in a stream of ffmpeg's."""
    if not (size := RAW_PPM.match(image)):
        return Bare(image)
    width, height, end = int(size[1]), int(size[2]), size.end()
    bytes_per_row = -(-width // 8)
    if image[1:2] != b"4":
        if not (largest := LARGEST.match(image, end)):
            return Bare(image)
        bytes_per_row = width * (1 + (int(largest[1]) > 255)) * (3 if image[1:2] == b"6" else 1)
        end = largest.end()
    behind = image[end + 1 + height * bytes_per_row :][:16]
    return Bare(image, animated=bool(re.match(rb"\s*P[1-7]\s", behind)))
