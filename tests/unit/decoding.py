"""What tests of decoding share: pixels or the reason why there are none, and samples."""

from __future__ import annotations

import numpy as np
import pytest

from splatshard.pipeline.source.decode import decode
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SampleError

SIDE = 27
"""Odd: rows of few bits do not end with a byte."""


def pixels_of(image: bytes, size: int = SIDE, name: str = "a.tif") -> np.ndarray:
    return decode(image, name, DecodeConfig(image_size=size)).pixels


def picture_or_reason(image: bytes) -> np.ndarray | str:
    try:
        return pixels_of(image)
    except SampleError as e:
        return str(e)


def reason(image: bytes, status: str = "corrupt_image") -> str:
    """Of a file that is a row, since it is not supported."""
    with pytest.raises(SampleError) as caught:
        pixels_of(image)
    assert caught.value.status == status, str(caught.value)
    assert str(caught.value).startswith("a.tif: not supported: ")
    return str(caught.value)


def samples(channels: int, bits: int) -> np.ndarray:
    """A smooth picture of all values of `bits`, [SIDE, SIDE, channels]."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = [np.sin(3 + i + (5 + 6 * i) * x + 4 * y) for i in range(channels)]
    values = np.round((0.5 + 0.5 * np.stack(waves, -1)) * (2.0**bits - 1))
    return values.astype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)
