"""PNG and BMP files of any layout, written by hand: their pixels are known without any decoder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)
"""First row and column, and steps, of an interlaced PNG's passes."""

Chunk = tuple[bytes, bytes]


def packed(samples: np.ndarray, bits: int, order: str) -> bytes:
    """Rows of samples [H, W, C], each row filled up to a whole byte."""
    if bits in (8, 16, 32, 64):
        return samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    each = samples[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(each.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


def chunk(kind: bytes, body: bytes, wrong: int = 0) -> bytes:
    """A PNG's chunk; `wrong` is added to its checksum."""
    crc = zlib.crc32(kind + body) + wrong & 0xFFFFFFFF
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(
    samples: np.ndarray,
    depth: int,
    color: int,
    before: Sequence[bytes] = (),
    interlaced: bool = False,
    after: Sequence[bytes] = (),
    missing: int = 0,
) -> bytes:
    """The file of samples [H, W, C]; chunks before and after those of the pixels, which lack their
    last `missing` bytes."""
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [samples]
    rows = b""
    for part in passes:
        if part.size:
            data = packed(part, depth, ">")
            step = len(data) // len(part)
            rows += b"".join(b"\0" + data[i : i + step] for i in range(0, len(data), step))
    head = struct.pack(
        ">IIBBBBB", samples.shape[1], samples.shape[0], depth, color, 0, 0, interlaced
    )
    pixels = zlib.compress(rows[: len(rows) - missing])
    middle = len(pixels) // 2
    chunks = [chunk(b"IHDR", head), *before, chunk(b"IDAT", pixels[:middle])]
    chunks += [chunk(b"IDAT", pixels[middle:]), *after, chunk(b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(chunks)


def bmp(
    values: np.ndarray,
    bits: int,
    header: int = 40,
    palette: np.ndarray | None = None,
    masks: Sequence[int] = (),
    compression: int | None = None,
    top_down: bool = False,
    data: bytes | None = None,
) -> bytes:
    """The file of whole pixels [H, W], the palette RGB [N, 3]; with masks they are bit fields."""
    height, width = values.shape
    if data is None:
        if bits < 8:
            rows = packed(values[..., None], bits, "<")
        elif bits == 24:
            rows = values.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()
        else:
            rows = values.astype(f"<u{bits // 8}").tobytes()
        step = len(rows) // height
        lines = [
            rows[i : i + step].ljust(-step % 4 + step, b"\0") for i in range(0, len(rows), step)
        ]
        data = b"".join(lines if top_down else lines[::-1])
    compression = (3 if masks else 0) if compression is None else compression
    count = 0 if palette is None else len(palette)
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        tall = -height if top_down else height
        info = struct.pack(
            "<IiiHHIIiiII", 40, width, tall, 1, bits, compression, len(data), 0, 0, count, 0
        )
        info = struct.pack("<I", header) + info[4:]
        info += b"".join(struct.pack("<I", mask) for mask in masks)
        info = info if header == 40 else info[:header].ljust(header, b"\0")
    colors = b""
    for red, green, blue in [] if palette is None else palette.tolist():
        colors += bytes((blue, green, red)) + (b"" if header == 12 else b"\0")
    start = 14 + len(info) + len(colors)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + colors + data
