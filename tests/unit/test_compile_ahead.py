"""What is compiled before workers start: all that they need, once, and by nobody twice."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from splatshard.pipeline import compile_ahead
from splatshard.pipeline.compile_ahead import (
    LOCK,
    PARTS,
    await_compiled,
    compiled_ahead,
    is_compiled,
    markers_of,
    started,
)
from splatshard.pipeline.kernels.compiled import private_folder
from splatshard.pipeline.storage.lock import lock, unlock
from splatshard.schemas.config import ConvertConfig, FitConfig, PackConfig

CONFIGS = {
    "default": ConvertConfig(),
    "nested": ConvertConfig(fit=FitConfig(nested="8,16")),
    "fp16": ConvertConfig(
        pack=PackConfig(codec="fp16"),
        fit=FitConfig(init="grid", num_gaussians=9, target_psnr=40, max_gaussians=20),
    ),
}
CONVERT = """
import sys
from splatshard.pipeline.compile_ahead import PARTS
from splatshard.pipeline.convert import convert_samples
from splatshard.pipeline.kernels.compiled import KERNELS
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.source.read import RawSample
from tests.make import jpeg
from tests.unit.test_compile_ahead import CONFIGS

config, backend = CONFIGS[sys.argv[1]], select_backend("cpu")
for part in PARTS.values():
    part(config, backend)
ahead = {kernel: kernel.signatures for kernel in KERNELS}
samples = [RawSample(str(i), jpeg(seed=i), "a.jpg") for i in range(2)]
(rows,) = convert_samples(samples, config, backend, StageTimer())
assert [row["status"] for row in rows] == ["ok", "ok"], rows
more = [kernel for kernel in KERNELS if kernel.signatures != ahead.get(kernel, [])]
assert not more, f"not compiled ahead: {more}"
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_worker_needs_nothing_else(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", CONVERT, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = private_folder()
    assert folder
    return folder


def mark(config: ConvertConfig, folder: Path, names: list[str]) -> None:
    for marker in markers_of(config, folder).values():
        marker.write_text(json.dumps(names))


def test_once_compiled_nothing_is_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ConvertConfig()
    with compiled_ahead(config):
        await_compiled()
    assert is_compiled(config, folder)
    left = [json.loads(path.read_bytes()) for path in markers_of(config, folder).values()]
    assert len(left) == len(PARTS)
    assert all(names and all(name.endswith(".nbi") for name in names) for names in left)
    monkeypatch.setattr(compile_ahead, "started", lambda *_: pytest.fail("started again"))
    with compiled_ahead(config), compiled_ahead(replace(config, backend="reference")):
        pass


def test_a_cache_that_was_deleted_or_is_of_others_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ConvertConfig()
    mark(config, folder, [__file__])
    assert is_compiled(config, folder)
    assert not is_compiled(CONFIGS["fp16"], folder)
    with monkeypatch.context() as patched:
        patched.setenv("NUMBA_CACHE_DIR", str(folder))
        assert not is_compiled(config, folder)
    mark(config, folder, [__file__, str(folder / "deleted.nbi")])
    assert not is_compiled(config, folder)
    mark(config, folder, [])
    next(iter(markers_of(config, folder).values())).write_text("{")
    assert not is_compiled(config, folder)


def test_while_another_job_compiles_its_workers_are_waited_for(folder: Path) -> None:
    with open(folder / LOCK, "ab") as other:
        lock(other.fileno(), wait=True)
        assert started(ConvertConfig(), folder) is None
        worker = threading.Thread(target=await_compiled)
        worker.start()
        worker.join(0.2)
        assert worker.is_alive()
        unlock(other.fileno())
        worker.join(10)
        assert not worker.is_alive()


def is_locked(folder: Path) -> bool:
    with open(folder / LOCK, "ab") as file:
        try:
            lock(file.fileno(), wait=False)
        except BlockingIOError:
            return True
    return False


def test_processes_end_with_the_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, time; print(os.fork(), flush=True); time.sleep(60)"
    monkeypatch.setattr(compile_ahead, "call", lambda *_: script)
    with compiled_ahead(ConvertConfig()):
        assert is_locked(folder)
    await_compiled()
