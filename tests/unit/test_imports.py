"""What importing does, and needs: nothing starts, and a bare machine suffices."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from splatshard.schemas.errors import SourceError, UsageError
from tests.bare import ABSENT, bare_environment
from tests.make import datacomp_tar, image_folder

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    str(path.relative_to(ROOT))
    for part in ("schemas", "pipeline", "jobs")
    for path in sorted((ROOT / part).rglob("*.py"))
]


def module_of(name: str) -> str:
    """The name by which a file is imported."""
    return f"splatshard.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")


def test_importing_starts_nothing() -> None:
    """All modules of the CPU build: no Ray, no thread, no process, nothing printed."""
    modules = [module_of(n) for n in NAMES if "triton" not in n and "__main__" not in n]
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


EXTRAS = {"transformers", "tensorboard", "safetensors", "gsplat", "simplejpeg", "datasets"}


@pytest.mark.parametrize(
    "module", ["pipeline.convert", "pipeline.embed", "pipeline.data", "jobs.driver.worker"]
)
def test_converting_and_reading_need_no_extra(module: str) -> None:
    """Nor wait for one: importing transformers takes longer than all the rest."""
    script = (
        f"import sys, splatshard.{module}\n"
        f"loaded = {EXTRAS!r} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_driver_loads_neither_torch_nor_an_extra(tmp_path: Path) -> None:
    """All of a conversion but what its workers do: seconds of every job would go by."""
    datacomp_tar(tmp_path / "in" / "00000000.tar", 2)
    script = (
        "import sys\n"
        "from unittest import mock\n"
        "import splatshard.jobs.driver.driver\n"
        "from splatshard.jobs import convert, status\n"
        "with mock.patch('splatshard.jobs.driver.execute.drive', return_value=1):\n"
        "    code = convert.main(['in', 'out', '--workers=1'])\n"
        "status.main(['out'])\n"
        f"loaded = {EXTRAS | {'torch', 'numba'}!r} & set(sys.modules)\n"
        "assert (code, loaded) == (3, set()), (code, loaded)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
    with pytest.raises(PackageNotFoundError):
        version("splatshard")
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
    from splatshard.pipeline.convert import convert_shard
    from splatshard.pipeline.data import SplatDataset
    from splatshard.pipeline.kernels.select import select_backend
    from splatshard.pipeline.source.listing import list_shards
    from splatshard.pipeline.train.loop import train
    from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
    from tests.training import toy_config

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
    from splatshard.pipeline.source.listing import list_shards

    with pytest.raises(UsageError, match="which is not installed: pip install braceexpand, or"):
        list_shards("shards/{0..3}.tar")
    with pytest.raises(SourceError, match="needs the package s3fs: install it here"):
        list_shards("s3://bucket/a.tar")
