"""The recipes' toys: boxes of made-up scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from splatshard.jobs.pages.explain_boxes import read_boxes
from splatshard.jobs.recipes.toys import shapes, write_scenes


def test_boxes_hold_the_shapes_and_nothing_else(tmp_path: Path) -> None:
    write_scenes(tmp_path, list(shapes(20)))
    boxes = read_boxes(f"{tmp_path}/boxes.csv")
    assert len(boxes) == 20
    for name, found in boxes.items():
        pixels = np.asarray(Image.open(tmp_path / "scenes" / name)).astype(int)
        ((left, top, right, bottom),) = (tuple(map(int, box)) for box in found)
        ground = pixels.copy()
        ground[top:bottom, left:right] = pixels[0, 0]
        assert (ground == pixels[0, 0]).all(), name
        inner = (pixels[top:bottom, left:right] != pixels[0, 0]).any(-1)
        assert all(side.any() for side in (inner[0], inner[-1], inner[:, 0], inner[:, -1])), name
        assert 11 <= right - left <= 21
