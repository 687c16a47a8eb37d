"""The explain job's picture: an image, its Gaussians, and how they score.

    image | rendered Gaussians | attention | class gradient | saliency map

The two in the middle show each Gaussian as the outline of one standard deviation over the dimmed
image, the highest scores on top; the map is laid over the image. Colours go with the score's share
of the largest one in the image (its square root, as few Gaussians have most of it): dark blue for
0, red, then yellow for 1. So pictures say where, and how much only within an image.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from splatshard.pipeline.splats import Splats

Floats = NDArray[np.float32]
Box = tuple[float, float, float, float]

PANEL = 288
"""Side of a panel in px, at least; images are enlarged by whole factors."""
GAP, LINE = 8, 22
DIM = 0.4
"""Of the image below outlines."""
LEAST = 0.02
"""Outlines of a smaller share of the largest score are faint and thin."""
HEAT = np.array([[24, 32, 96], [150, 20, 120], [230, 60, 40], [250, 160, 30], [255, 245, 120]])


def sheet(
    pixels: Floats,
    rendering: Floats,
    splats: Splats,
    attention: Floats,
    gradient: Floats,
    map_HW: Floats,
    title: str,
    boxes: list[Box],
) -> bytes:
    """A PNG of five panels. `pixels`, `rendering` [S, S, 3], 0 to 1; scores [N] of the Gaussians
    (B = 1); `boxes` in px are drawn into the first and the last panel."""
    zoom = math.ceil(PANEL / len(pixels))
    image = picture(pixels, zoom)
    over = heated(pixels, map_HW, zoom)
    for panel in (image, over):
        for box in boxes:
            corners = [zoom * x for x in box]
            ImageDraw.Draw(panel).rectangle(corners, outline="white", width=2)
    panels = {
        "image": image,
        "Gaussians, rendered": picture(rendering, zoom),
        "attention": outlines(pixels, splats, attention, zoom),
        "class gradient": outlines(pixels, splats, gradient, zoom),
        "saliency (class gradient)": over,
    }
    side = image.width
    whole = Image.new("RGB", (len(panels) * (side + GAP) - GAP, side + 2 * LINE + GAP), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=15)
    draw.text((4, 2), title, fill="black", font=font)
    for i, (caption, panel) in enumerate(panels.items()):
        left = i * (side + GAP)
        whole.paste(panel, (left, LINE + 2))
        draw.text((left + 4, LINE + side + 4), caption, fill="black", font=font)
    stream = io.BytesIO()
    whole.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def picture(pixels: Floats, zoom: int) -> Image.Image:
    """[H, W, 3], 0 to 1, as an image `zoom` times as large."""
    small = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return small.resize((small.width * zoom, small.height * zoom), Image.Resampling.BICUBIC)


def shares(scores: Floats) -> Floats:
    """Of any shape: the square root of the share of the largest; what is not positive is 0."""
    largest = float(scores.max(initial=0.0))
    return np.sqrt(scores.clip(0) / largest) if largest > 0 else np.zeros_like(scores)


def heat(share: Floats) -> Floats:
    """[...], 0 to 1, to colours [..., 3], 0 to 255."""
    steps = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(share, steps, channel) for channel in HEAT.T], -1)


def heated(pixels: Floats, map_HW: Floats, zoom: int) -> Image.Image:
    """The map's colours over the grey image, the more the higher."""
    share = shares(map_HW)
    grey = pixels.clip(0, 1).mean(-1, keepdims=True)
    opaque = 0.25 + 0.65 * share[..., None]
    return picture(opaque * heat(share) / 255 + (1 - opaque) * grey, zoom)


def outlines(pixels: Floats, splats: Splats, scores: Floats, zoom: int) -> Image.Image:
    """Ellipses of one standard deviation over the dimmed image, coloured by score."""
    from splatshard.pipeline.splats import ellipses

    base = picture(DIM * pixels, 2 * zoom)  # drawn at twice the size: Pillow's lines are jagged
    draw = ImageDraw.Draw(base)
    share = shares(scores)
    curves = ellipses(splats)[0].cpu().numpy() * 2 * zoom
    for i in np.argsort(share, kind="stable"):
        faint = share[i] ** 2 < LEAST
        color = tuple(int(c * (0.5 if faint else 1)) for c in heat(share[i]))
        draw.line([(x, y) for x, y in curves[i].tolist()], fill=color, width=1 if faint else 3)
    return base.resize((base.width // 2, base.height // 2), Image.Resampling.LANCZOS)
