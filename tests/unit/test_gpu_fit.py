"""The GPU benchmark runs end to end at toy size on a CPU, and says that it was one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu_fit, record
from benchmarks.gpu_fit import Ceilings
from splatshard.pipeline.kernels.gsplat_alpha import load_gsplat
from tests.bare import bare_environment
from tests.make import photo

TOY = "--gaussians 8 16 --batch 1 2 --steps 2 --image-size 24 --images 2 --repeats 1 --backend cpu"
TOY += " --paper-steps 3 --budgets 1 30"


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would have been written, by name; photographs are made up."""
    pytest.importorskip("tyro", reason="tyro, which reads the command line, is not installed")

    def images(count: int, shard: int = 0, size: int = 224) -> torch.Tensor:
        pixels = np.stack([photo(size, size, seed) for seed in range(count)])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()

    results: dict[str, Any] = {}
    monkeypatch.setattr(gpu_fit, "save", results.__setitem__)
    monkeypatch.setattr(gpu_fit, "sample_images", images)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load_gsplat.cache_clear()
    return results


def test_one_table_end_to_end(saved: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    results = gpu_fit.main(TOY.split())
    out = capsys.readouterr().out
    assert saved == {}
    assert results["toy"] is True
    assert "a toy run: no GPU" in out
    assert set(results["absent"]) == {"gsplat", "GaussianImage"}
    kinds = ["batched", "batched", "unbatched", "reference"]
    assert [row["kind"] for row in results["rows"]] == 2 * kinds
    for row in results["rows"]:
        assert row["image_iterations_per_s"] > 0
        assert row["share_of_bound"] > 0
        assert row["peak_bytes"] is None
        assert (row["psnr"] is None) == (row["kind"] == "reference")
    assert [found["num_gaussians"] for found in results["time_to_paper"]] == [8, 16]
    assert all(found["steps"] in (1, 30) for found in results["time_to_paper"])
    assert json.loads(json.dumps(results)) == results


def test_saved_when_asked_under_the_devices_name(saved: dict[str, Any]) -> None:
    results = gpu_fit.main([*TOY.split(), "--gaussians", "8", "--save"])
    ((name, written),) = saved.items()
    assert name.startswith("gpu_fit_")
    assert name.replace("_", "").isalnum()
    assert written is results
    assert written["toy"] is True


def test_the_bound_is_that_of_the_design() -> None:
    """An H200 at its data sheet's rates, 480k evaluations of a 224 px image: about 3.6M per s."""
    h200 = Ceilings(flops=67e12, bytes_per_s=4.8e12)
    assert h200.image_iterations_per_s(480_000, 224 * 224) == pytest.approx(3.67e6, rel=0.01)
    assert h200.image_iterations_per_s(1, 224 * 224) == pytest.approx(4.35e6, rel=0.01)


# A machine with little more than torch: see tests/bare.py


def test_a_bare_machine_imports_what_measures_a_gpu_and_says_what_it_is(tmp_path: Path) -> None:
    """Without git and ray, of whose version it cannot tell."""
    (tmp_path / "site").mkdir()
    script = (
        "import json, benchmarks.cpu_kernel, benchmarks.gpu_fit, benchmarks.record as record\n"
        "print(json.dumps(record.machine()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=record.ROOT,
        env=bare_environment(tmp_path / "site") | {"PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    here = record.machine()
    assert found == here | {"commit": None, "versions": here["versions"] | {"ray": None}}
    assert found["versions"]["torch"]


def test_the_commit_is_that_of_our_own_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None for a copy without one, also where it lies within another."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    identity = {
        f"GIT_{who}_{what}": "a" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    for command in ("init", "commit --allow-empty -m first"):
        subprocess.run(
            ["git", *command.split()], cwd=tmp_path, env=os.environ | identity, check=True
        )
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit()
    monkeypatch.setattr(record, "ROOT", tmp_path / "copy")
    assert record.commit() is None
