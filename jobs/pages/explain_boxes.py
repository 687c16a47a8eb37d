"""The boxes of objects in images, for explain's pointing game.

A line per box, an image may have several; px of the upright original, left and top from 0:

    image,left,top,right,bottom          CSV, with this first line, further columns are not read
    {"image": "a.jpg", "left": 12, "top": 30, "right": 96, "bottom": 110}          JSON lines

An image is named as on the command line, or by its file name alone.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from typing import Any

from splatshard.schemas.errors import UsageError

Box = tuple[float, float, float, float]
COLUMNS = ("image", "left", "top", "right", "bottom")


def read_boxes(url: str) -> dict[str, list[Box]]:
    """All boxes of the file, by the image's name. Raises UsageError for what is no such file."""
    from splatshard.pipeline.evaluation.class_texts import read_lines

    found: dict[str, list[Box]] = {}
    for number, row in rows_of(url, read_lines(url, numbered=False)):
        try:
            name = str(row["image"])
            left, top, right, bottom = (float(row[column]) for column in COLUMNS[1:])
        except (KeyError, TypeError, ValueError) as e:
            raise UsageError(
                f"--boxes {url}, line {number}: {', '.join(COLUMNS)} are wanted, the last four "
                f"numbers ({type(e).__name__}: {e})"
            ) from e
        if not (left < right and top < bottom and math.isfinite(right - left + bottom - top)):
            raise UsageError(
                f"--boxes {url}, line {number}: the box ({left:g}, {top:g}, {right:g}, {bottom:g}) "
                "is empty: left, top, right, bottom are wanted, in px"
            )
        found.setdefault(name, []).append((left, top, right, bottom))
    return found


def rows_of(url: str, lines: list[str]) -> Iterable[tuple[int, Any]]:
    """Rows of a CSV or of JSON lines, with their lines' numbers."""
    if not lines[0].startswith("{"):
        reader = csv.DictReader(lines, skipinitialspace=True)
        if missing := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
            raise UsageError(
                f"--boxes {url}: no column {missing[0]}: its first line must be {','.join(COLUMNS)}"
            )
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(lines, 1):
        try:
            yield number, json.loads(line or "{}")
        except ValueError as e:
            raise UsageError(f"--boxes {url}, line {number} is no JSON ({e})") from e


def boxes_of(boxes: dict[str, list[Box]], image: str, url: str) -> list[Box]:
    """Those of an image. Raises UsageError where there are none."""
    found = boxes.get(image) or boxes.get(image.rpartition("/")[2])
    if not found:
        others = next(iter(boxes))
        raise UsageError(
            f"--boxes {url} has no box for {image} (it has some for {others}): leave the image "
            "out, or add its box"
        )
    return found
