"""The picture on top of the README: a photograph, its Gaussians, and what they render to.

    python -m benchmarks.picture

The photograph is "Chelsea" by Stefan van der Walt (CC0), which ships inside scikit-image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from benchmarks.record import ROOT
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats, scales_and_angles
from splatshard.schemas.config import FitConfig

SIDE, GAP, CAPTION, SCALE = 224, 6, 22, 2
BUDGETS = (400, 1600)


def photograph() -> Image.Image:
    image = Image.fromarray(data.chelsea())
    side = min(image.size)
    left = (image.width - side) // 2
    image = image.crop((left, 0, left + side, side))
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def draw_ellipses(splats: Splats) -> Image.Image:
    """One-sigma outlines in the colour of each Gaussian, on black."""
    zoom = 4
    picture = Image.new("RGB", (SIDE * zoom, SIDE * zoom))
    draw = ImageDraw.Draw(picture)
    scales, angles = scales_and_angles(splats.cholesky[0])
    angle = torch.linspace(0, 2 * math.pi, 33)
    for mean, (s1, s2), a, color in zip(
        splats.means[0], scales, angles, splats.colors[0], strict=True
    ):
        u, v = s1 * angle.cos(), s2 * angle.sin()
        x = mean[0] + a.cos() * u - a.sin() * v
        y = mean[1] + a.sin() * u + a.cos() * v
        fill = tuple(int(c) for c in (color.abs() * 255 * 1.6 + 40).clamp(0, 255))
        points = [(float(px) * zoom, float(py) * zoom) for px, py in zip(x, y, strict=True)]
        draw.line(points, fill=fill, width=3)
    return picture.resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.LANCZOS)


def main() -> None:
    torch.set_num_threads(1)
    backend = select_backend("cpu")
    image = photograph()
    target = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(255)
    size = (SIDE * SCALE, SIDE * SCALE)
    panels = [("original, 224 x 224", image.resize(size, Image.Resampling.BICUBIC))]
    for n in BUDGETS:
        config = FitConfig(num_gaussians=n)
        splats, _ = fit(target.contiguous(), config, backend)
        rendering = backend.render(splats, SIDE, SIDE, 3.0)
        quality = psnr(rendering, target).item()
        pixels = (rendering[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        if n == BUDGETS[0]:
            panels.append((f"{n} Gaussians, 1 sigma", draw_ellipses(splats)))
        shown = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        panels.append((f"{n} Gaussians, {config.steps} steps: {quality:.1f} dB", shown))
    width = len(panels) * size[0] + (len(panels) - 1) * GAP
    sheet = Image.new("RGB", (width, size[1] + CAPTION * 2), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=24)
    for i, (caption, panel) in enumerate(panels):
        left = i * (size[0] + GAP)
        sheet.paste(panel, (left, 0))
        draw.text((left + 4, size[1] + 8), caption, fill="black", font=font)
    path = ROOT / "docs" / "reconstruction.jpg"
    sheet.save(path, quality=88, optimize=True)
    print(f"written: {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
