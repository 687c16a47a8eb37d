"""Every public function of pipeline/ that takes or returns tensors says their shapes; letters of
shapes in names such as `x_BTD` are explained; files that are named exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "pipeline").rglob("*.py"))]

TENSORS = re.compile(r"\b(?:Tensor|NDArray|ndarray|Splats)\b")
STATE_DICT = "dict[str, Tensor]"
"""Whose shapes are the model's."""

SHAPE = re.compile(r"(?<![\w\])])\[(?!0\b)[\w.][^\[\]]*\]|\bscalars?\b")
"""`[B, N, 2]`, `[...]`, a scalar; not the range `[-1, 1]` or `[0, 1]`."""


SUFFIXED = re.compile(r"[a-z][a-z0-9_]*_((?:[A-Z0-9]|k(?=[A-Z0-9]))+)")
"""`x_BTD`, `places_Bk2`; not `MAX_WIDTH`."""


def functions(body: list[ast.stmt], above: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, annotations, and docstring of each public function, with that of its class `above`."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            own = functions(node.body, ast.get_docstring(node) or "")
            yield from ((f"{node.name}.{name}", *rest) for name, *rest in own)
        if not isinstance(node, ast.FunctionDef):
            continue
        if not node.name.startswith("_") or node.name == "__call__":
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            hints = [argument.annotation for argument in given] + [node.returns]
            signature = " ".join(ast.unparse(hint) for hint in hints if hint)
            yield node.name, signature, f"{ast.get_docstring(node) or ''} {above}"


def shapeless(source: str) -> list[str]:
    """The public functions that take or return tensors and say no shape."""
    return [
        name
        for name, signature, text in functions(ast.parse(source).body)
        if TENSORS.search(signature.replace(STATE_DICT, "")) and not SHAPE.search(text)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_shapes(name: str) -> None:
    """As `[B, N, 2]`, in the function's docstring or in that of its class."""
    assert shapeless((ROOT / name).read_text()) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("The mean [B] of `x`.", True),
        ("uint8 [B, H, W, 3] to the same.", True),
        ("Factors [..., 3] in px.", True),
        ("Indices [count], ascending.", True),
        ("The loss, a scalar.", True),
        ("The mean of `x`.", False),
        ("Means in px to [-1, 1].", False),
        ("Means in [0, 1].", False),
        ("rows[i] of `x`.", False),
    ],
)
def test_what_counts_as_a_shape(text: str, says: bool) -> None:
    source = f'def mean(x: Tensor) -> Tensor:\n    """{text}"""\n'
    assert shapeless(source) == ([] if says else ["mean"])


def test_what_needs_no_shape() -> None:
    assert shapeless("def load(state: dict[str, Tensor]) -> None: ...") == []
    assert shapeless("def _own(x: Tensor) -> Tensor: ...") == []
    assert shapeless('class A:\n    """x [B]."""\n    def f(self) -> Tensor: ...') == []
    assert shapeless("class A:\n    def f(self) -> Tensor: ...") == ["A.f"]


# Names that end with a shape


def unexplained(source: str) -> set[str]:
    """Letters of shapes in names that the module's docstring does not have as a word."""
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    shapes = [found[1] for found in map(SUFFIXED.fullmatch, names) if found]
    letters = {letter for shape in shapes for letter in shape if letter.isalpha()}
    return letters - set(re.findall(r"\b\w\b", ast.get_docstring(tree) or ""))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("pipeline/models/")])
def test_letters_of_shapes_are_explained(name: str) -> None:
    assert unexplained((ROOT / name).read_text()) == set()


def test_what_explains_a_letter() -> None:
    source = '"""B images, T tokens."""\ndef f(x_BTD, MAX_WIDTH, spacing_2): places_Bk2 = x_BTD'
    assert unexplained(source) == {"D", "k"}


# Files that are named

HOUSE = [path for part in ("schemas", "pipeline", "jobs") for path in (ROOT / part).rglob("*.py")]
FILES = {path.name for part in ("benchmarks", "tests") for path in (ROOT / part).rglob("*.py")}
FILES |= {path.name for path in HOUSE}
THEIRS = {"compiler.py"}
"""Files of other packages."""


def test_files_that_are_named_exist() -> None:
    """In docstrings and comments, as `start.py` or `fitting/start.py`."""
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in HOUSE
        for name in re.findall(r"(?<![\w.*{}])([a-z_0-9]+\.py)\b", path.read_text())
    }
    assert {pair for pair in named if pair[1] not in FILES | THEIRS} == set()
