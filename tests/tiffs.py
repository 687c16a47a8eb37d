"""TIFF files of any layout, written by hand: their pixels are known without any decoder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.bitmaps import packed

imagecodecs = pytest.importorskip("imagecodecs")

COMPRESSIONS: dict[int, Callable[[bytes], bytes]] = {
    1: bytes,
    5: imagecodecs.lzw_encode,
    8: zlib.compress,
    32773: imagecodecs.packbits_encode,
    32946: zlib.compress,
    34925: imagecodecs.lzma_encode,
    50000: imagecodecs.zstd_encode,
}
"""None, LZW, Deflate, PackBits, Deflate of old, LZMA, Zstandard."""

LETTERS = {1: "B", 2: "B", 3: "H", 4: "I", 5: "I", 7: "B", 16: "Q"}

Tags = Mapping[int, tuple[int, Sequence[Any]]]


def differences(samples: np.ndarray) -> np.ndarray:
    """What predictor 2 stores."""
    return np.diff(samples, axis=1, prepend=samples[:, :1] * 0)


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    extra: Sequence[int] = (),
    *,
    order: str = "<",
    big: bool = False,
    planar: bool = False,
    compression: int = 1,
    predictor: int = 1,
    tile: int = 0,
    rows: int = 0,
    tags: Tags | None = None,
) -> bytes:
    """The file of samples [H, W, C]: in tiles of that side, in strips of so many rows, or in one.

    Of `tags` number to type and values; they replace others of that number.
    """
    height, width, channels = samples.shape
    planes = np.split(samples, channels, axis=2) if planar else [samples]
    if tile:
        fill = [(0, -height % tile), (0, -width % tile), (0, 0)]
        planes = [np.pad(plane, fill) for plane in planes]
        tall, wide = tile, tile
    else:
        tall, wide = rows or height, width
    pieces = [
        plane[y : y + tall, x : x + wide]
        for plane in planes
        for y in range(0, len(plane), tall)
        for x in range(0, plane.shape[1], wide)
    ]
    if predictor == 2:
        pieces = [differences(piece) for piece in pieces]
    encode = COMPRESSIONS.get(compression, bytes)
    data = [encode(packed(piece, bits, order)) for piece in pieces]
    format = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    found: dict[int, tuple[int, Sequence[Any]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [compression]),
        262: (3, [photometric]),
        277: (3, [channels]),
        284: (3, [2 if planar else 1]),
    }
    if tile:
        found |= {322: (3, [tile]), 323: (3, [tile])}
    else:
        found[278] = (4, [tall])
    if predictor != 1:
        found[317] = (3, [predictor])
    if extra:
        found[338] = (3, extra)
    if format != 1:
        found[339] = (3, [format] * channels)
    return with_directory(
        data, found | dict(tags or {}), order, big, (324, 325) if tile else (273, 279)
    )


def with_directory(
    data: Sequence[bytes],
    tags: Mapping[int, tuple[int, Sequence[Any]]],
    order: str,
    big: bool = False,
    places: tuple[int, int] = (273, 279),
) -> bytes:
    """Header, data, directory; `places` are the tags of offsets and sizes of the data. Tags without
    values are left out."""
    start, offsets, body = 16 if big else 8, [], b""
    for piece in data:
        offsets.append(start + len(body))
        body += piece + bytes(len(piece) % 2)
    tags = {places[0]: (4, offsets), places[1]: (4, [*map(len, data)])} | dict(tags)
    tags = {number: tag for number, tag in tags.items() if len(tag[1])}
    word, count, room = ("Q", "Q", 8) if big else ("I", "H", 4)
    at = start + len(body)
    far = at + struct.calcsize(f"={count}{word}") + len(tags) * (20 if big else 12)
    entries, values = b"", b""
    for number in sorted(tags):
        kind, numbers = tags[number]
        stored = struct.pack(f"{order}{len(numbers)}{LETTERS[kind]}", *numbers)
        if len(stored) > room:
            place = far + len(values)
            values += stored + bytes(len(stored) % 2)
            stored = struct.pack(order + word, place)
        entries += struct.pack(f"{order}HH{word}", number, kind, len(numbers) // (1 + (kind == 5)))
        entries += stored.ljust(room, b"\0")
    magic = b"II" if order == "<" else b"MM"
    header = struct.pack(order + "HHHQ", 43, 8, 0, at) if big else struct.pack(order + "HI", 42, at)
    directory = struct.pack(order + count, len(tags)) + entries + bytes(room)
    return magic + header + body + directory + values
