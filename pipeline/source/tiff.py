"""TIFF files of one page as Pillow reads them right: where the layout is one that tests compare
with another decoder, under a directory with only the tags that the pixels need.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from splatshard.pipeline.source.containers import ORIENTATION_TAG, Bare
from splatshard.pipeline.source.formats import DEVELOP, NotSupported

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
SIZES |= {16: 8, 17: 8, 18: 8}
INTEGERS = {1: "B", 3: "H", 4: "I", 7: "B", 13: "I", 16: "Q"}
"""Bytes of a tag's types, and struct's letters of those that are numbers from 0 on."""

BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES = 258, 259, 262, 266, 277
PLANAR, PREDICTOR, COLOR_MAP, INK_SET = 284, 317, 320, 332
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
COEFFICIENTS, SUBSAMPLING, REFERENCE = 529, 530, 532
MOST_VALUES = 1 << 20
"""More strips than any picture has: lists of numbers take many times their bytes."""

FULL = (0, 255, 128, 255, 128, 255)
"""The range of YCbCr as JPEG has it: black and white of each component."""
SUBFILE, OLD_SUBFILE, XMP, DNG_VERSION, JPEG_TABLES = 254, 255, 700, 50706, 347
WIDTH, HEIGHT, DESCRIPTION, DEPTH, METAMORPH = 256, 257, 270, 32997, 33629

ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT = 278, 322, 323
STRIPS, TILES = (273, 279), (324, 325)
"""Tags of where they begin, and of how many bytes they have."""

SHORTS = (BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES, PLANAR, COLOR_MAP)
SHORTS += (PREDICTOR, EXTRA_SAMPLES, SAMPLE_FORMAT, SUBSAMPLING)
LONGS = (256, 257, 273, 278, 279, 292, 293, 322, 323, 324, 325)
"""What the pixels need: layout and predictor; size, strips, options of fax, tiles."""

UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
MASK = 4
NAMES = {
    WHITE_IS_ZERO: "white-is-zero grey",
    BLACK_IS_ZERO: "grey",
    RGB: "RGB",
    PALETTE: "palette",
    MASK: "mask",
    CMYK: "CMYK",
    YCBCR: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32844: "LogL",
    32845: "LogLuv",
}

NONE, JPEG = 1, 7
FAX = (2, 3, 4)
LOSSLESS = (NONE, 5, 8, 32946, 32773, 34925, 50000)
"""None, LZW, Deflate, Deflate of old, PackBits, LZMA, Zstandard."""
PREDICTED = (5, 8, 32946, 50000)
"""Those with a predictor."""

ALONE = ((),)
BESIDE = ((), (0,), (1,), (2,))
LAYOUTS = {
    (WHITE_IS_ZERO, UNSIGNED): dict.fromkeys((1, 2, 4, 8, 16), ALONE),
    (BLACK_IS_ZERO, UNSIGNED): dict.fromkeys((1, 2, 4, 12, 16, 32), ALONE) | {8: BESIDE},
    (BLACK_IS_ZERO, SIGNED): {32: ALONE},
    (BLACK_IS_ZERO, FLOAT): {32: ALONE},
    (RGB, UNSIGNED): {8: (*BESIDE, (0, 0), (1, 0), (2, 0)), 16: BESIDE},
    (PALETTE, UNSIGNED): dict.fromkeys((1, 2, 4), ALONE) | {8: ((), (0,), (2,))},
    (CMYK, UNSIGNED): {8: ((), (0,), (0, 0)), 16: ALONE},
    (YCBCR, UNSIGNED): {8: ALONE},
}
"""Photometric interpretation and sample format to bits per sample, to what lies beside the colours:
0 is anything, 1 premultiplied alpha, 2 alpha."""

Changes = dict[int, tuple[int, ...]]
"""Tags and the values that they get."""


@dataclass
class Directory:
    """A directory of a TIFF. `entries`: tag to its type, its count and where its values are, which
    may be fewer than its `count`; `start`: where it begins; `next`: where the next one does, or 0.
    """

    order: str
    big: bool
    image: bytes
    entries: dict[int, tuple[int, int, int]]
    count: int
    start: int
    next: int

    def values(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The numbers of a tag. Raises struct.error where the file ends before them."""
        kind, count, at = self.entries.get(tag, (0, 0, 0))
        if count > MOST_VALUES:
            raise ValueError(f"tag {tag} has {count} values")
        if kind not in INTEGERS or not count:
            return default
        return struct.unpack_from(f"{self.order}{count}{INTEGERS[kind]}", self.image, at)

    def value(self, tag: int, default: int = 0) -> int:
        return self.values(tag, (default,))[0]


def bare_tiff(image: bytes) -> Bare:
    """Raises NotSupported, and struct.error where the directory is cut off."""
    page = directory(image)
    if page.value(DNG_VERSION, -1) >= 0 or page.value(PHOTOMETRIC) in (32803, 34892):
        raise NotSupported("RAW photograph", DEVELOP)
    if page.value(SUBFILE) & 1 or page.value(OLD_SUBFILE) == 2:
        raise NotSupported("a TIFF whose first page is a thumbnail, as in RAW photographs")
    check_layout(page)
    check_whole(page)
    bits, changed, order = page.value(BITS, 1), {}, page.order
    bare = Bare(image, orientation=page.value(ORIENTATION_TAG), pages=pages_of(page))
    if XMP in page.entries:
        _, count, at = page.entries[XMP]
        bare.xmp = image[at : at + count]
    if bits == 12:  # packed in the same order in all files, but Pillow knows it in one
        bare.white, order = 4095, "<"
    if bits == 16 and page.value(PHOTOMETRIC) == WHITE_IS_ZERO:
        bare.black, bare.white = 65535, 0
        changed[PHOTOMETRIC] = (BLACK_IS_ZERO,)
    if bits == 32 and page.value(SAMPLE_FORMAT, UNSIGNED) == UNSIGNED:
        changed[SAMPLE_FORMAT] = (SIGNED,)  # too large is negative then, and no grey
    colors = page.values(COLOR_MAP)
    if colors and max(colors) < 256:  # entries of 8 bits, as old scanners write them
        changed[COLOR_MAP] = tuple(257 * color for color in colors)
    more = b""
    if page.value(PLANAR, 1) == 2 and page.value(COMPRESSION, NONE) == NONE:
        more, deflated = deflate(page)  # libtiff knows planes, and Pillow asks it of such files
        changed |= deflated
    bare.data = with_tags(page, changed, order, more)
    bare.mask = mask_of(page)
    return bare


def directory(image: bytes) -> Directory:
    """The first one."""
    order, big = "<" if image[:2] == b"II" else ">", b"+" in image[2:4]
    (start,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", image, 8 if big else 4)
    return directory_at(start, order, big, image)


def directory_at(start: int, order: str, big: bool, image: bytes) -> Directory:
    word = f"{order}Q" if big else f"{order}I"
    (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", image, start)
    layout = struct.Struct(f"{order}HHQ" if big else f"{order}HHI")
    room, step, at = (8, 20, start + 8) if big else (4, 12, start + 2)
    entries, end = {}, at + count * step
    for place in range(at, end, step):
        tag, kind, values = layout.unpack_from(image, place)
        where = place + layout.size
        if values * SIZES.get(kind, 0) > room:
            (where,) = struct.unpack_from(word, image, where)
        entries.setdefault(tag, (kind, values, where))
    following = struct.unpack_from(word, image, end) if end + room <= len(image) else (0,)
    return Directory(order, big, image, entries, count, start, following[0])


def pages_of(first: Directory) -> int:
    """How many full pages a file has; what cannot be read behind the first is none. Some have one
    directory, and the others' pixels behind its own: volumes, ImageJ's stacks of over 4 GB,
    tifffile's (`truncate=True`), MetaMorph's."""
    told = [first.value(DEPTH, 1)]
    if METAMORPH in first.entries:
        told.append(first.entries[METAMORPH][1])
    if DESCRIPTION in first.entries:
        _, count, at = first.entries[DESCRIPTION]
        text = first.image[at : at + min(count, 4096)]
        told += map(int, re.findall(rb"^ImageJ=.*\nimages=([0-9]{1,9})\b", text))
        if shaped := re.match(rb'\{"shape": \[([0-9, ]{1,99})\].*"truncated": true', text):
            values = math.prod(map(int, shaped[1].split(b",")))
            page = first.value(WIDTH) * first.value(HEIGHT) * first.value(SAMPLES, 1)
            told.append(values // max(page, 1))
    return max(*told, 1 + sum(is_page(each, first) for each in further(first)))


def further(first: Directory) -> Iterator[Directory]:
    """The directories behind the first one, up to one that is broken or was met."""
    page, met, left = first, {first.start}, MOST_VALUES
    while page.next and page.next not in met and left > 0:
        met.add(page.next)
        try:
            page = directory_at(page.next, page.order, page.big, page.image)
        except struct.error:
            return
        left -= page.count + 1
        yield page


def is_page(page: Directory, first: Directory) -> bool:
    """Whether it is a picture of its own beside the first: no preview (reduced in resolution, or at
    most half as wide and half as high, as the levels of a pyramid are) and no mask."""
    try:
        kind, width, height = page.value(SUBFILE), page.value(WIDTH), page.value(HEIGHT)
        if kind & 5 or page.value(OLD_SUBFILE) == 2 or page.value(PHOTOMETRIC) == MASK:
            return False
        wide = 2 * width > first.value(WIDTH) + 1
        return min(width, height) > 0 and (wide or 2 * height > first.value(HEIGHT) + 1)
    except (struct.error, ValueError):
        return False


def mask_of(first: Directory) -> bytes:
    """The first page's transparency mask as a grey file of its own, empty where there is none: one
    that is no larger than half of the page belongs to a smaller level. Raises NotSupported."""
    for page in filter(is_mask, further(first)):
        sizes = [(each.value(WIDTH), each.value(HEIGHT)) for each in (page, first)]
        if all(2 * half <= whole + 1 for half, whole in zip(*sizes, strict=True)):
            continue
        bits, compression = page.value(BITS, 1), page.value(COMPRESSION, NONE)
        tags = (SAMPLES, SAMPLE_FORMAT, PREDICTOR, FILL_ORDER)
        plain = compression in LOSSLESS and all(page.value(tag, 1) == 1 for tag in tags)
        if sizes[0] != sizes[1] or bits not in (1, 8) or not plain:
            what = f"a TIFF with a transparency mask of {sizes[0][0]} x {sizes[0][1]} px"
            raise NotSupported(f"{what}, {bits} bits, Compression {compression}")
        check_whole(page)
        return with_tags(page, {PHOTOMETRIC: (BLACK_IS_ZERO,)}, page.order, b"")
    return b""


def is_mask(page: Directory) -> bool:
    try:
        kind, photometric = page.value(SUBFILE), page.value(PHOTOMETRIC)
        return not kind & 1 and bool(kind & 4 or photometric == MASK)
    except (struct.error, ValueError):
        return False


def check_layout(page: Directory) -> None:
    """Raises NotSupported for what is not known to be read right."""
    if PHOTOMETRIC not in page.entries:
        raise NotSupported("a TIFF without PhotometricInterpretation")
    photometric, compression = page.value(PHOTOMETRIC), page.value(COMPRESSION, NONE)
    samples = page.value(SAMPLES, 1)
    bits, formats = page.values(BITS, (1,)), page.values(SAMPLE_FORMAT, (UNSIGNED,))
    extra = page.values(EXTRA_SAMPLES)
    kind = NAMES.get(photometric, f"PhotometricInterpretation {photometric}")
    what = f"a TIFF of {kind}, {samples} x {bits[0]} bits"
    if len(set(bits)) > 1 or len(set(formats)) > 1:
        raise NotSupported(f"{what}, samples that are not alike")
    known = LAYOUTS.get((photometric, formats[0]), {}).get(bits[0], ())
    colors = {RGB: 3, YCBCR: 3, CMYK: 4}.get(photometric, 1)
    if extra not in known or samples != colors + len(extra):
        raise NotSupported(f"{what}, SampleFormat {formats[0]}, ExtraSamples {list(extra)}")
    fits = compression in LOSSLESS and (photometric != YCBCR or plain_ycbcr(page))
    fits |= compression in FAX and bits[0] == 1 and photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)
    fits |= compression == JPEG and bits[0] == 8 and photometric in (BLACK_IS_ZERO, RGB, YCBCR)
    fits &= not (compression == JPEG and extra)
    if page.value(PREDICTOR, 1) != 1 and (
        compression not in PREDICTED or bits[0] not in (8, 16, 32)
    ):
        raise NotSupported(f"{what}, Compression {compression}, Predictor {page.value(PREDICTOR)}")
    if not fits:
        raise NotSupported(f"{what}, Compression {compression}")
    if bits[0] == 32 and compression != NONE and page.order == ">":
        raise NotSupported(f"{what}, big-endian and compressed")
    planes = page.value(PLANAR, 1) == 2 and samples > 1
    if planes and (compression == JPEG or (extra and (photometric != RGB or len(extra) > 1))):
        raise NotSupported(f"{what}, stored plane by plane (PlanarConfiguration 2)")
    if page.value(FILL_ORDER, 1) != 1 and (bits[0] > 1 or compression not in (NONE, *FAX)):
        raise NotSupported(f"{what}, FillOrder {page.value(FILL_ORDER)}")
    if photometric == CMYK and page.value(INK_SET, 1) != 1:
        raise NotSupported("a TIFF of inks other than CMYK")


def check_whole(page: Directory) -> None:
    """Raises NotSupported for strips or tiles without bytes of their own, and ValueError where some
    are not listed or pixels lie beyond the end: another directory will be there."""
    starts, sizes = map(page.values, pieces_of(page))
    if min(starts, default=16) < (16 if page.big else 8) or 0 in sizes:
        raise NotSupported(
            "a TIFF with blocks that are not stored (sparse)", "save it again without SPARSE_OK"
        )
    end = max(map(sum, zip(starts, sizes, strict=False)), default=0)
    if end > len(page.image):
        raise ValueError(f"it ends before its pixels, which reach to byte {end:,}")
    if len(starts) < (blocks := blocks_of(page)):
        raise ValueError(f"it lists {len(starts)} of its {blocks} strips or tiles")


def blocks_of(page: Directory) -> int:
    """How many tiles or strips its pixels have."""
    width, height = page.value(WIDTH), page.value(HEIGHT)
    tiled = pieces_of(page) == TILES
    wide = page.value(TILE_WIDTH) if tiled else width
    tall = page.value(TILE_HEIGHT if tiled else ROWS_PER_STRIP)
    planes = page.value(SAMPLES, 1) if page.value(PLANAR, 1) == 2 else 1
    return planes * -(-width // (wide or width or 1)) * -(-height // (tall or height or 1))


def pieces_of(page: Directory) -> tuple[int, int]:
    """The tags of its tiles or strips."""
    return TILES if TILES[0] in page.entries else STRIPS


def plain_ycbcr(page: Directory) -> bool:
    """Uncompressed, each pixel with its own colour, by JPEG's formula and in its range."""
    kind, count, at = page.entries.get(REFERENCE, (0, 0, 0))
    if kind:
        pairs = struct.unpack_from(f"{page.order}{2 * count}I", page.image, at)
        fits = [n == d * limit for n, d, limit in zip(pairs[::2], pairs[1::2], FULL, strict=False)]
        if kind != 5 or count != len(FULL) or not all(fits):
            return False
    whole = page.values(SUBSAMPLING) == (1, 1) and page.value(COMPRESSION, NONE) == NONE
    return whole and COEFFICIENTS not in page.entries


def deflate(page: Directory) -> tuple[bytes, Changes]:
    """Strips or tiles of an uncompressed file as Deflate stores them, and the tags that say so."""
    tags = pieces_of(page)
    places = list(zip(*map(page.values, tags), strict=True))
    if sum(size for _, size in places) > len(page.image):
        raise ValueError("its strips are larger than the file")
    pieces = [zlib.compress(page.image[at : at + size], level=0) for at, size in places]
    lengths = tuple(map(len, pieces))
    starts = tuple(accumulate(lengths[:-1], initial=len(page.image)))
    return b"".join(pieces), dict(zip((COMPRESSION, *tags), ((8,), starts, lengths), strict=True))


def with_tags(page: Directory, changed: Changes, order: str, more: bytes) -> bytes:
    """The file, `more`, and one more directory, its only one, of the tags that are needed. Raises
    struct.error where an offset does not fit 32 bits."""
    image = page.image
    end = len(image) + len(more)
    start = end + end % 2
    tags = sorted(page.entries.keys() & {*SHORTS, *LONGS, JPEG_TABLES} | changed.keys())
    entries, tail, at = b"", b"", start + 2 + 12 * len(tags) + 4
    for tag in tags:
        kind = 4 if tag in LONGS else 7 if tag == JPEG_TABLES else 3
        values = changed.get(tag) or page.values(tag)
        stored = struct.pack(f"{order}{len(values)}{INTEGERS[kind]}", *values)
        if len(stored) > 4:
            place = at + len(tail)
            tail += stored + bytes(len(stored) % 2)
            stored = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + stored.ljust(4, b"\0")
    magic = b"II" if order == "<" else b"MM"
    header = magic + struct.pack(f"{order}HI", 42, start)
    count = struct.pack(f"{order}H", len(tags))
    pixels = (memoryview(image)[8:], more, bytes(start - end))
    return b"".join([header, *pixels, count, entries, bytes(4), tail])
