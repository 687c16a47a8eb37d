"""The floors of the house, read from the import statements: schemas <- pipeline <- jobs.

Reads source code rather than importing, so that it also sees imports inside functions.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.kernels.backend import select_backend
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.train.loop import train
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.errors import SourceError, UsageError
from tests.bare import ABSENT, bare_environment
from tests.make import image_folder
from tests.training import toy_config

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("schemas", "pipeline", "jobs")
MODULES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]

ONLY_IN = {
    "ray": ("jobs/",),
    "tyro": ("jobs/",),
    "rich": ("jobs/",),
    "fsspec": ("pipeline/storage/fs.py", "pipeline/shards/commit.py"),
    "s3fs": ("pipeline/storage/fs.py", "pipeline/shards/commit.py"),
    "triton": ("pipeline/kernels/triton",),
    "numba": ("pipeline/kernels/", "pipeline/codec/kernel.py"),
    "transformers": ("pipeline/models/", "pipeline/models/teacher.py", "jobs/recipes/"),
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
        "from splatshard.jobs.__main__ import main\n"
        f"code = main({arguments!r})\n"
        "assert not {'torch', 'ray', 'numba'} & set(sys.modules), 'slow start'\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "splatshard" in done.stdout


# A machine with little more than torch: see tests/bare.py


def on_a_bare_machine(call: str, folder: Path) -> None:
    """Run a function of this file there."""
    (folder / "site").mkdir()
    script = f"from tests.unit import test_imports as t; from pathlib import Path; t.{call}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True, text=True, cwd=ROOT, env=bare_environment(folder / "site"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_is_absent_cannot_be_found(tmp_path: Path) -> None:
    on_a_bare_machine("cannot_be_found()", tmp_path)


def cannot_be_found(inherited: bool = False) -> None:
    for name in ABSENT:
        assert find_spec(name) is None
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            importlib.import_module(name)
        with pytest.raises(PackageNotFoundError):
            version(name)
    assert version("torch")
    if not inherited:
        script = "from tests.unit import test_imports as t; t.cannot_be_found(inherited=True)"
        subprocess.run([sys.executable, "-c", script], check=True)


def test_a_bare_machine_imports_all_that_needs_no_ray(tmp_path: Path) -> None:
    on_a_bare_machine("import_all()", tmp_path)


def import_all() -> None:
    for name in NAMES:
        if name.startswith(("schemas/", "pipeline/")) and "triton" not in name:
            importlib.import_module(name.removesuffix(".py").replace("/", "."))


def test_a_bare_machine_converts_reads_and_trains(tmp_path: Path) -> None:
    on_a_bare_machine(f"convert_read_train(Path({str(tmp_path)!r}))", tmp_path)


def convert_read_train(folder: Path) -> None:
    (ref,) = list_shards(str(image_folder(folder / "images")))
    config = ConvertConfig(
        decode=DecodeConfig(image_size=32), fit=FitConfig(num_gaussians=8, steps=2), backend="cpu"
    )
    (folder / "splats").mkdir()
    convert_shard(ref, config, str(folder / "splats"), select_backend("cpu"))
    (batch,) = SplatDataset(str(folder / "splats"), batch_size=6)
    assert sorted(batch.keys) == sorted(f"{c}/{i:04d}" for c in ("cat", "dog") for i in range(3))
    assert batch.valid.all()
    result = train(toy_config(folder, folder / "run", steps=2, data__batch_size=3))
    assert result.steps == 2


def test_a_bare_machine_says_what_a_source_needs(tmp_path: Path) -> None:
    on_a_bare_machine("say_what_is_needed()", tmp_path)


def say_what_is_needed() -> None:
    with pytest.raises(UsageError, match="which is not installed: pip install braceexpand, or"):
        list_shards("shards/{0..3}.tar")
    with pytest.raises(SourceError, match="needs the package s3fs: install it here"):
        list_shards("s3://bucket/a.tar")
