"""Pixels of any kind to 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

from splatshard.pipeline.source.containers import Bare
from splatshard.pipeline.source.formats import NotSupported

MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "La", "PA", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F")
"""Pillow's modes that are read."""

RARE = 0.01
"""A share of pixels that decides nothing: a hot one, overshoot of resampling."""
BRIGHT = 0.1
"""Of the pixels of floats to 1 that light may take above it: where more do, 1 is not white (metres,
ratios)."""


def to_rgb(image: Image.Image, bare: Bare) -> Image.Image:
    """An opened image, loaded, as RGB.

    Transparency over white; 16 and 32 bit and float by value. CMYK by its complement, without a
    profile. Raises NotSupported.
    """
    image.load()
    if image.mode not in MODES:
        raise NotSupported(f"pixels of Pillow's mode {image.mode}")
    if image.mode[0] in "IF":
        return grey(np.asarray(image), image.format == "PPM" or len(image.mode) > 1, bare)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data and not (image.format == "BMP" and is_empty(image)):
        return over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def over_white(foreground: Image.Image) -> Image.Image:
    image = Image.new("RGB", foreground.size, "white")
    image.paste(foreground, mask=foreground)
    return image


def is_empty(image: Image.Image) -> bool:
    """Whether all alpha is 0: writers of BMP that know no alpha leave its byte at that."""
    return image.getextrema()[-1] == (0, 0)


def grey(values: np.ndarray, known: bool, bare: Bare) -> Image.Image:
    """Grey values [H, W] to RGB; integers of 16 bits where their range is known."""
    levels = (bare.black, bare.white) if known and values.dtype.kind != "f" else None
    image = Image.fromarray(to_8_bits(values, levels)).convert("RGB")
    if bare.transparent is not None:
        image.paste("white", mask=Image.fromarray(values == bare.transparent))
    return image


def to_8_bits(values: np.ndarray, levels: tuple[int, int] | None = None) -> np.ndarray:
    """Grey values [H, W] of more than 8 bits to uint8 of that shape, clipped.

    `levels` are black and white of integers of 16 bits; without them the values must show their
    white. NaN is black, infinity black or white. Raises NotSupported.
    """
    if levels:
        black, white = levels
        table = np.round((np.arange(65536) - black) / (white - black) * 255).clip(0, 255)
        return table.astype(np.uint8)[values]  # a look-up: no float copy
    white = white_of(values)
    scaled = np.nan_to_num(values.clip(0, white)) * np.float32(255 / white)
    return np.round(scaled).astype(np.uint8)


def white_of(values: np.ndarray) -> int:
    """1 or 255 of floats [H, W], 255 or 65535 of integers: where values are of that size, whatever
    a RARE share of them says, and not NaN or infinity. Raises NotSupported where none is plain."""
    finite = np.count_nonzero(np.isfinite(values))
    lit = np.count_nonzero((values > 0) & (values < np.inf))

    def share(limit: float) -> float:
        return np.count_nonzero((values > limit) & (values < np.inf)) / max(lit, 1)

    if values.dtype.kind == "f":
        fits = {1: share(4) <= RARE and share(1) <= BRIGHT}
        fits |= {255: share(280) <= RARE < share(128) and share(1) > 0.5}
    else:
        fits = {255: not share(255) and (share(128) > RARE or not lit)}
        fits |= {65535: share(65535) <= RARE < share(32768) and share(255) > 0.5}
    for white in filter(fits.get, fits):
        below = np.count_nonzero((values < -0.1 * white) & (values > -np.inf))
        if below <= RARE * finite and finite:
            return white
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if finite else (np.nan, np.nan)
    span = f"{low:g} to {high:g}"
    raise NotSupported(f"grey values of {span}, of which it is not known what is white")
