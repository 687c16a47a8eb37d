"""A reader of payloads that follows schemas/FORMAT.md, with numpy alone.

It uses nothing of the package and is slow: one Gaussian and one bit at a time.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np

PLANES = ("gap", "c0", "c1", "c2", "size", "ratio", "shear", "bits")


def decode(payload: Any, codec: str, width: int, height: int) -> np.ndarray:
    """FORMAT.md, "Payload": float32 [N, 8], x y l11 l21 l22 r g b."""
    if isinstance(payload, dict):
        return decode_planes(payload, width, height)
    header, row_bytes = {"fp16": (0, 16), "q11": (4, 11)}[codec]
    planes = np.frombuffer(payload, np.uint8, offset=min(header, len(payload)))
    rows = planes.reshape(row_bytes, -1).T.copy()  # [N, row_bytes]
    if codec == "fp16":
        out = rows.view("<f2").astype(float)
        out[:, 0] += width / 2
        out[:, 1] += height / 2
        return out.astype(np.float32)
    m = np.frombuffer(payload, "<f4", 1).astype(float) if payload else 0
    b = rows.astype(int)
    out = np.zeros((len(rows), 8))
    out[:, 0] = (2 * (b[:, 0] + 256 * b[:, 1]) / 65535 - 0.5) * width
    out[:, 1] = (2 * (b[:, 2] + 256 * b[:, 3]) / 65535 - 0.5) * height
    out[:, 2] = 2 ** ((4 * b[:, 4] + b[:, 7] % 4) / 64 - 5)
    out[:, 4] = 2 ** ((4 * b[:, 5] + b[:, 7] // 4 % 4) / 64 - 5)
    out[:, 3] = out[:, 4] * 2 * np.sinh((16 * b[:, 6] + b[:, 7] // 16 - 2048) / 384)
    signed = np.where(b[:, 8:] < 128, b[:, 8:], b[:, 8:] - 256) / 127
    out[:, 5:] = m * signed * np.abs(signed)
    return out.astype(np.float32)


def decode_planes(planes: dict[str, bytes], width: int, height: int) -> np.ndarray:
    """FORMAT.md, "balanced and compact"."""
    if not planes["gap"]:
        return np.zeros((0, 8), np.float32)
    q, level, c = struct.unpack("<fBb", planes["bits"][:6])
    stream = [byte >> i & 1 for byte in planes["bits"][6:] for i in range(8)]

    def take(bits: int) -> int:
        return sum(stream.pop(0) << i for i in range(bits))

    def parts(token: int) -> tuple[int, int, int]:  # code without its extra bits, their w, sign
        if token < 128:
            return token - 64, 0, 1
        u = token - 128
        w = 6 + u % 64 // 4 - 2
        sign = -1 if u >= 64 else 1
        return sign * ((4 + u % 4) << w), w, sign

    def clamped(bits: int) -> int:
        return min(max(bits, 0), 12)

    cells = curve(level)
    place, side, out = 0, max(width, height), []
    for tokens in zip(*(planes[name] for name in PLANES[:4]), strict=True):
        i = len(out)
        found = [parts(token) for token in tokens]
        square = sum(code**2 for code, _, _ in found[1:])
        k = math.floor(math.log2(math.sqrt(square))) if square else 0
        gap, *n = [code + sign * take(w) for code, w, sign in found]
        a, b, s = (planes[name][i] - 64 for name in ("size", "ratio", "shear"))
        a += k
        slant = round(math.log2(1 + (4 * math.sinh((s + 0.5) / 8)) ** 2))
        widths = [clamped(k - 1)] * 3
        widths.append(clamped((2 * k + c + 1 - (a + b + 1) + slant) // 2))
        widths.append(clamped((2 * k + c + 1 - (a - b)) // 2))
        f = [(take(w) + 0.5) / 2**w for w in widths]
        place += gap + 64
        column, row = cells[place]
        size, ratio = (a + f[0]) / 2, (b + f[1]) / 2
        l22 = 2 ** (size - ratio)
        m = q / (math.sqrt(math.pi) * 2**size)
        n0, n1, n2 = n[0] / math.sqrt(3), n[1] / math.sqrt(2), n[2] / math.sqrt(6)
        out.append(
            (
                width / 2 - side + 2 * side * (column + f[3]) / 2**level,
                height / 2 - side + 2 * side * (row + f[4]) / 2**level,
                2 ** (size + ratio),
                l22 * 4 * math.sinh((s + f[2]) / 8),
                l22,
                *((n0 + n1 + n2) * m, (n0 - 2 * n2) * m, (n0 - n1 + n2) * m),
            )
        )
    assert len(stream) < 8
    assert not any(stream)
    return np.array(out, np.float32)


@lru_cache(maxsize=20)
def curve(level: int) -> list[tuple[int, int]]:
    """FORMAT.md: (column, row) of each place."""
    if level == 0:
        return [(0, 0)]
    half = 1 << (level - 1)
    before = curve(level - 1)
    return (
        [(y, x) for x, y in before]
        + [(x, half + y) for x, y in before]
        + [(half + x, half + y) for x, y in before]
        + [(2 * half - 1 - y, half - 1 - x) for x, y in before]
    )


def picture(gaussians: np.ndarray, width: int, height: int, cutoff: float) -> np.ndarray:
    """FORMAT.md, "Geometry": [H, W, 3]."""
    image = np.zeros((height, width, 3))
    for x, y, l11, l21, l22, *color in gaussians.astype(float):
        for row in range(height):
            for column in range(width):
                u = (column + 0.5 - x) / l11
                v = (row + 0.5 - y - l21 * u) / l22
                if u * u + v * v <= cutoff**2:
                    image[row, column] += np.array(color) * math.exp(-(u * u + v * v) / 2)
    return image


def assert_close(found: np.ndarray, wanted: np.ndarray, side: float) -> None:
    """To a few roundings: of the side for places, of the largest colour for colours."""
    assert found.shape == wanted.shape
    scale = np.abs(wanted)
    scale[:, :2] += side
    scale[:, 3] += 4 * wanted[:, 4]
    scale[:, 5:] = np.abs(wanted[:, 5:]).sum(1, keepdims=True)
    assert (np.abs(found - wanted) <= 1e-6 * scale).all()
