"""The floors of the house, read from the import statements: a room knows only what is below it.

Reads source code rather than importing, so that it also sees imports inside functions and those for
type checkers.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ("schemas", "pipeline", "jobs")
FILES = [path for part in HOUSE for path in sorted((ROOT / part).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

FLOORS = [  # rooms of one floor do not know each other; a room is a folder, or a file beside them
    ("schemas",),
    ("pipeline/splats", "pipeline/psnr"),
    ("pipeline/runtime", "pipeline/storage", "pipeline/kernels", "pipeline/ply"),
    ("pipeline/codec", "pipeline/source"),
    ("pipeline/shards",),
    ("pipeline/data",),
    ("pipeline/models",),
    ("pipeline/train",),
    ("pipeline/fitting",),
    ("pipeline/convert", "pipeline/compile_ahead", "pipeline/picture"),
    ("pipeline/embed", "pipeline/evaluation"),
    ("jobs/cli",),
    ("jobs/destination",),
    ("jobs/driver", "jobs/pages"),
    ("jobs",),
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

ONLY_IN = {
    "ray": ("jobs/",),
    "tyro": ("jobs/",),
    "rich": ("jobs/",),
    "fsspec": ("pipeline/storage/fs.py", "pipeline/shards/commit.py"),
    "s3fs": ("pipeline/storage/fs.py", "pipeline/shards/commit.py"),
    "triton": ("pipeline/kernels/triton",),
    "numba": (
        "pipeline/kernels/",
        *(f"pipeline/codec/{name}.py" for name in ("bits", "kernel", "pack_kernel")),
    ),
    "transformers": ("pipeline/models/", "jobs/recipes/"),
    "gsplat": ("pipeline/kernels/gsplat_alpha.py", "pipeline/ply.py"),
}


def imported(name: str) -> Iterator[str]:
    """Modules that a file imports, anywhere in it: other packages by their top-level name, ours as
    the file that they are."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, attribute in found:
            package, *parts = module.split(".")
            assert package not in HOUSE, f"{name}:{node.lineno}: say splatshard.{module}"
            yield file_of(parts, attribute) if package == "splatshard" and parts else package


def file_of(parts: list[str], attribute: str) -> str:
    """Of `from splatshard.PARTS import ATTRIBUTE`, which may be a module or a name in one."""
    for path in ("/".join([*parts, attribute]), "/".join(parts)):
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if (ROOT / name).is_file():
                return name
    raise AssertionError(f"splatshard.{'.'.join(parts)} has no file")


def room_of(name: str) -> str:
    parts = name.removesuffix(".py").split("/")
    for length in (2, 1):
        room = "/".join(parts[:length])
        if room in FLOOR_OF:
            return room
    raise AssertionError(f"{name} is in no room of FLOORS")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "pipeline/__init__.py"])
def test_a_room_knows_only_what_is_below_it(name: str) -> None:
    room = room_of(name)
    for other in imported(name):
        if other.startswith(HOUSE) and other.endswith(".py") and room_of(other) != room:
            assert FLOOR_OF[room_of(other)] < FLOOR_OF[room], f"{name} imports {other}"


def test_there_are_no_circles() -> None:
    graph = {name: {other for other in imported(name) if other in NAMES} for name in NAMES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", NAMES)
def test_heavy_packages_stay_in_their_place(name: str) -> None:
    for package in imported(name):
        if package in ONLY_IN:
            assert name.startswith(ONLY_IN[package]), f"{name} imports {package}"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("schemas/")])
def test_schemas_know_neither_torch_nor_ray(name: str) -> None:
    assert not {"torch", "ray"} & set(imported(name))


def test_types_are_checked_in_the_whole_house() -> None:
    """Through the links of splatshard/: by their other names, files would be other modules to
    pyright than those that imports find, and their classes other classes."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    parts = (*HOUSE, "__init__.py")
    assert sorted(settings["include"]) == sorted(f"splatshard/{part}" for part in parts)
    assert not {"exclude", "ignore"} & set(settings)
    for name in settings["strict"]:
        assert name.startswith("splatshard/")
        assert (ROOT / name).exists()


@pytest.mark.parametrize("name", NAMES)
def test_no_file_grows_beyond_reading(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 450


def test_no_file_of_tests_grows_beyond_reading() -> None:
    """A longer one is split by behaviour."""
    lines = {p: len(p.read_text().splitlines()) for p in (ROOT / "tests").rglob("*.py")}
    assert {str(path): count for path, count in lines.items() if count > 400} == {}
