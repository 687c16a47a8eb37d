"""Pictures for a machine that has none: dead leaves, whose statistics are those of photographs.

Discs that cover each other, with radii of density r^-3, have the edges, the flat areas and the
1/f spectrum of natural images (Lee, Mumford and Huang, Occlusion models for natural images, 2001).
Each disc is shaded and some are textured; the whole is blurred by half a pixel, as a lens does.

Fitted with 100 steps at 224 px, 8 of them against 16 photographs (the backward kernel's windows
decide its time, triton_backend.windows):

    N       dead leaves: dB, mean window   photographs
    400     27.8, 1,636 px                 27.6, 1,453 px
    1600    35.2,   418 px                 33.6,   360 px
    4900    40.1,   132 px                 39.3,   118 px
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

DISCS = 1200
RADII = (0.025, 0.6)  # in units of the picture's side
TEXTURED = 0.35  # share of the discs
DISTINCT = 16


def dead_leaves(size: int, seed: int) -> NDArray[np.uint8]:
    """One picture, uint8 [size, size, 3]; the same at every size, but for its grain."""
    random = np.random.default_rng(seed)
    small, large = RADII
    # inverse of the distribution function of a density r^-3 between the two
    u = random.random(DISCS)
    radii = 1 / np.sqrt(u / large**2 + (1 - u) / small**2)
    centres = random.random((DISCS, 2)) * 1.2 - 0.1
    palette = random.uniform(0.15, 0.85, (6, 1)) + random.normal(0, 0.1, (6, 3))  # muted
    colors = palette[random.integers(0, 6, DISCS)] + random.normal(0, 0.06, (DISCS, 3))
    slopes = random.normal(0, 0.25, (DISCS, 2))
    waves = random.normal(0, 1, (DISCS, 2)) * random.uniform(20, 160, (DISCS, 1))
    contrast = np.where(random.random(DISCS) < TEXTURED, random.uniform(0.03, 0.15, DISCS), 0)
    picture = np.broadcast_to(palette[0], (size, size, 3)).copy()
    for i in range(DISCS):  # the last one is in front
        (x, y), r = centres[i], radii[i]
        left, right = np.clip(((x - r) * size, (x + r) * size + 2), 0, size).astype(int)
        top, bottom = np.clip(((y - r) * size, (y + r) * size + 2), 0, size).astype(int)
        dx = (np.arange(left, right) + 0.5) / size - x
        dy = ((np.arange(top, bottom) + 0.5) / size - y)[:, None]
        shade = slopes[i, 0] * dx + slopes[i, 1] * dy
        shade = shade + contrast[i] * np.sin(waves[i, 0] * dx + waves[i, 1] * dy)
        inside = dx * dx + dy * dy < r * r
        own = picture[top:bottom, left:right]
        own[inside] = (colors[i] + shade[..., None])[inside]
    picture += random.normal(0, 0.012, picture.shape)
    image = Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)))


def made_images(count: int, size: int = 224) -> Tensor:
    """float32 [count, 3, size, size], 0 to 1."""
    pixels = np.stack([dead_leaves(size, seed) for seed in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()


def write_tar(path: Path, count: int, size: int, classes: int = 10) -> Path:
    """A WebDataset tar of `count` JPEG files of made pictures, with labels; they are DISTINCT ones,
    shifted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [dead_leaves(size, seed) for seed in range(min(count, DISTINCT))]
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            shifted = np.roll(pictures[i % len(pictures)], i // len(pictures) * size // 7, axis=1)
            buffer = io.BytesIO()
            Image.fromarray(shifted).save(buffer, "JPEG", quality=92)
            for name, data in (("jpg", buffer.getvalue()), ("cls", str(i % classes).encode())):
                info = tarfile.TarInfo(f"{i:06d}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path
