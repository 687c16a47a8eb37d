"""The floors of the house, read from the import statements: schemas <- pipeline <- jobs.

Reads source code rather than importing, so that it also sees imports inside functions.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("schemas", "pipeline", "jobs")
MODULES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]

ONLY_IN = {
    "ray": ("jobs/",),
    "tyro": ("jobs/",),
    "rich": ("jobs/",),
    "fsspec": ("pipeline/storage.py", "pipeline/commit.py"),
    "s3fs": ("pipeline/storage.py", "pipeline/commit.py"),
    "triton": ("pipeline/kernels/triton",),
    "numba": ("pipeline/kernels/", "pipeline/codec/kernel.py"),
    "transformers": ("pipeline/models/", "pipeline/teacher.py", "jobs/recipes/"),
    "gsplat": ("pipeline/kernels/gsplat_alpha.py", "pipeline/ply.py"),
}


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("name", NAMES)
def test_floors(name: str) -> None:
    floor = name.split("/")[0]
    higher = set(FLOORS[FLOORS.index(floor) + 1 :])
    assert not higher & set(imported(ROOT / name))


@pytest.mark.parametrize("name", NAMES)
def test_heavy_packages_stay_in_their_place(name: str) -> None:
    for package in imported(ROOT / name):
        if package in ONLY_IN:
            assert name.startswith(ONLY_IN[package]), f"{name} imports {package}"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("schemas/")])
def test_schemas_know_neither_torch_nor_ray(name: str) -> None:
    assert not {"torch", "ray"} & set(imported(ROOT / name))


@pytest.mark.parametrize("name", NAMES)
def test_no_file_grows_beyond_reading(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 450


def test_importing_starts_nothing() -> None:
    """All modules of the CPU build: no Ray, no thread, no process, nothing printed."""
    modules = [n.removesuffix(".py").replace("/", ".") for n in NAMES if "triton" not in n]
    modules = [m.removesuffix(".__init__") for m in modules if not m.endswith("__main__")]
    script = (
        "import importlib, sys, threading\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import ray\n"
        "assert not ray.is_initialized()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"]])
def test_help_needs_neither_torch_nor_ray(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from jobs.__main__ import main\n"
        f"code = main({arguments!r})\n"
        "assert not {'torch', 'ray', 'numba'} & set(sys.modules), 'slow start'\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "splatshard" in done.stdout
