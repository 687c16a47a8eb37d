"""Runs a notebook's cells in order, and keeps what they show in it.

    python docs/run_notebook.py docs/notebooks/first_look.ipynb

Texts and pictures alone, the latter as JPEG: enough for ours, without Jupyter. Raises what a cell
raises.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

QUALITY = 82
"""Of the pictures that are kept."""


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of this run."""
    names: dict[str, Any] = {}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell |= {
                "execution_count": count,
                "outputs": run("".join(cell["source"]), names, count),
            }
    return notebook


def run(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints, and the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        shown = {"execution_count": count, "metadata": {}, "output_type": "execute_result"}
        outputs.append(shown | {"data": shown_as(value)})
    return outputs


def shown_as(value: Any) -> dict[str, Any]:
    """By MIME type."""
    data: dict[str, Any] = {"text/plain": [repr(value).split(" at 0x")[0]]}
    if hasattr(value, "_repr_png_"):
        stream = io.BytesIO()
        image = Image.open(io.BytesIO(value._repr_png_())).convert("RGB")
        image.save(stream, "JPEG", quality=QUALITY)
        data["image/jpeg"] = base64.b64encode(stream.getvalue()).decode()
    return data


def main(path: Path) -> None:
    notebook = executed(json.loads(path.read_text()))
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
