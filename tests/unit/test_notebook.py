"""docs/notebooks: their cells run, and show what is kept in them."""

from __future__ import annotations

import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def shown(notebook: dict[str, Any]) -> list[Any]:
    """Of each output the text, less decimals, which may differ between CPUs, and the kinds."""
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", ())]
    texts = [(o.get("text") or o["data"]["text/plain"], sorted(o.get("data", ()))) for o in outputs]
    return [(re.sub(r"\d\.\d", "#", "".join(text)), kinds) for text, kinds in texts]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path) -> None:
    kept = json.loads(path.read_text())
    found = runpy.run_path(str(DOCS / "run_notebook.py"))["executed"](copy.deepcopy(kept))
    assert shown(found) == shown(kept)
    assert any("image/jpeg" in kinds for _, kinds in shown(kept))


def test_there_is_one() -> None:
    assert NOTEBOOKS
