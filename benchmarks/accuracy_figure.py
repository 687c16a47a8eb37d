"""Accuracy against bytes, drawn from benchmarks/results/accuracy.json.

python -m benchmarks.accuracy_figure            writes docs/accuracy.svg
"""

from __future__ import annotations

import json
import math
from html import escape
from typing import Any

from benchmarks.record import ROOT

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 50
LABELS = {
    "A": ("RGB patches, the files as they came", "#555555"),
    "B": ("RGB patches of the rendered splats", "#7a5fb0"),
    "C": ("splats", "#c0392b"),
    "D": ("splats, distilled first", "#e08a00"),
    "E": ("JPEG", "#2a7f62"),
    "e": ("WebP", "#2a7f62"),
    "F": ("fewer pixels", "#2a7f62"),
    "P": ("splats, the resampler as published", "#c0392b"),
}
"""Of the arms that are drawn, their names and colours."""


def figure(rows: list[dict[str, Any]]) -> str:
    """SVG: bytes per image on a logarithmic axis, top-1 in %, bars of one deviation."""
    shown = [row for row in rows if row["arm"] in LABELS]
    low, high = (f(math.log2(row["bytes"]) for row in shown) for f in (min, max))
    top = 5 * math.ceil(max(bounds(row)[1] for row in shown) / 5)
    bottom = 5 * math.floor(min(bounds(row)[0] for row in shown) / 5)

    def x(size: float) -> float:
        share = (math.log2(size) - low + 0.3) / (high - low + 1.8)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(percent: float) -> float:
        return TOP + (top - percent) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">Top-1 of held-out images, %, against bytes per '
        "image</text>",
    ]
    for tick in range(bottom, top + 1, 5):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            f'stroke="#dddddd"/><text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick}</text>'
        )
    for size in (2**i for i in range(math.ceil(low - 0.3), math.floor(high + 1) + 1)):
        parts.append(
            f'<text x="{x(size):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{size:,} B'
            "</text>"
        )
    line = " ".join(
        f"{x(r['bytes']):.1f},{y(100 * r['top1']):.1f}" for r in shown if r["arm"] == "C"
    )
    parts.append(f'<polyline points="{line}" fill="none" stroke="#c0392b" stroke-opacity="0.4"/>')
    names: dict[bool, list[float]] = {True: [], False: []}
    for row in sorted(shown, key=lambda r: -r["top1"]):
        name, color = LABELS[row["arm"]]
        if row["arm"] == "C":
            name = f"{name}, N = {row['inputs'].removeprefix('splats')}"
        least, most = bounds(row)
        px, py = x(row["bytes"]), y(100 * row["top1"])
        parts.append(
            f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(least):.1f}" y2="{y(most):.1f}" '
            f'stroke="{color}"/><circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{color}"/>'
        )
        left = row["arm"] in "EeF"  # they crowd
        at = py + 4
        while any(abs(at - other) < 13 for other in names[left]):  # no name lies on another
            at += 1
        names[left].append(at)
        side = f'x="{px - 8:.1f}" text-anchor="end"' if left else f'x="{px + 8:.1f}"'
        parts.append(f'<text {side} y="{at:.1f}" fill="{color}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def bounds(row: dict[str, Any]) -> tuple[float, float]:
    """One deviation about the mean, %."""
    spread = row["top1_deviation"] or 0.0
    return 100 * (row["top1"] - spread), 100 * (row["top1"] + spread)


def main() -> None:
    found = json.loads((ROOT / "benchmarks/results/accuracy.json").read_text())
    path = ROOT / "docs" / "accuracy.svg"
    path.write_text(figure(found["results"]["rows"]))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
