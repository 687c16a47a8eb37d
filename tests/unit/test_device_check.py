"""The check for a GPU: all of it runs at toy size, with only the packages such machines have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import device_check, gpu_counts
from benchmarks.device_check import LIMITS_S, main, outcome, read, run, table
from benchmarks.device_predictions import MILLIONS, PREDICTIONS, STEPS, Prediction
from benchmarks.device_record import Tell
from benchmarks.pictures import made_images
from tests.bare import bare_environment
from tests.compile_kernels import Code

ROOT = Path(__file__).resolve().parents[2]
NOTE = ROOT / "benchmarks" / "notes" / "gpu_fit.md"


def test_all_of_it_at_toy_size_on_a_bare_machine(tmp_path: Path) -> None:
    """Every part finds something, in a process in which ray, tyro and others are not installed."""
    (tmp_path / "site").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.device_check", "--toy", "--out", str(tmp_path / "out")],
        cwd=ROOT, env=bare_environment(tmp_path / "site"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = read(tmp_path / "out" / "device_check.jsonl")
    ends = {r["part"]: r["status"] for r in records if r["name"] == "end"}
    assert ends == dict.fromkeys(LIMITS_S, "ok")
    found = {r["name"]: r["value"] for r in records if "value" in r}
    assert found["equal bits"] == found["written"] == 1
    assert found["error over float32's own"] < 8
    assert found["fused step against torch"] < 1e-4
    assert found["tiles: error"] < 0.01
    assert found["tiles: equal bits"] == 1
    assert found["tests failed or broken"] == 0
    assert all(value is not None for value in found.values())
    assert not any("holds" in r for r in records)  # predictions are of an H200
    # a prediction without a figure would stay without an outcome for ever
    told = {without_sizes(name) for name in found}
    of_a_device = {"clock under load", "peak memory", "device idle in a fit", "forward issue"}
    of_a_device |= {"backward issue", "time in steps", "forward instructions"}
    of_a_device |= {"backward instructions", "fit_tiles instructions", "fit_tiles issue"}
    of_a_device |= {"device load"}
    assert {without_sizes(name) for name in PREDICTIONS} - told <= of_a_device
    whole = json.loads((tmp_path / "out" / "device_check.json").read_text())
    assert whole["machine"]["versions"]["ray"] is None
    assert whole["results"]["toy"] is True
    assert (tmp_path / "out" / "device_check.md").read_text().rstrip() == table([])


def without_sizes(name: str) -> str:
    """N, batch and codec are other ones in toys."""
    return name.split(",")[0]


def behave(part: str, lines: Path, work: Path, toy: bool) -> None:
    """Stands in for a part that does what its name says."""
    Tell(lines, part, toy)("figure", 1.0, "of one")
    if part == "fails":
        raise RuntimeError("on purpose")
    if part == "dies":
        os.abort()
    if part == "hangs":
        child = subprocess.Popen(["sleep", "600"])
        (work / "child").write_text(str(child.pid))
        child.wait()


def test_a_part_that_fails_dies_or_hangs_does_not_stop_the_next(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    limits = {"fails": 60.0, "dies": 60.0, "hangs": 5.0, "works": 60.0}
    parts = ["works", "hangs", "dies", "fails"]
    assert run(parts, lines, tmp_path, True, limits, behave) == ["fails", "dies", "hangs"]
    records = read(lines)
    assert [r["part"] for r in records if r["name"] == "figure"] == list(limits)
    ends = {r["part"]: r["status"] for r in records if r["name"] == "end"}
    assert ends == {
        "fails": "exit code 1",
        "dies": "exit code -6",
        "hangs": "stopped after 5 s",
        "works": "ok",
    }
    (error,) = [r for r in records if r["name"] == "error"]
    assert "on purpose" in error["error"]
    assert not running(int((tmp_path / "child").read_text()))


def running(pid: int) -> bool:
    """Whether the process lives on; a killed one may be unwaited for."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_what_is_imported_before_the_parts_are_forked_touches_no_device() -> None:
    """A process forked off after CUDA was used cannot use it."""
    script = (
        "import importlib, torch\n"
        "def touched(*a, **k): raise AssertionError('touched CUDA')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, touched)\n"
        f"for name in {device_check.PRELOADED!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_note_has_every_prediction_and_its_reason() -> None:
    rows = [line.rsplit("|", 2)[0] for line in table([]).splitlines()]
    note = [line.rsplit("|", 2)[0] for line in NOTE.read_text().splitlines() if line[:1] == "|"]
    first = note.index(rows[0])
    assert note[first : first + len(rows)] == rows


def test_a_figure_outside_of_its_range_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PREDICTIONS, "speed", Prediction(10, 20, "m/s", "wind"))
    tell = Tell(tmp_path / "lines.jsonl", "part", toy=False)
    tell("speed", 30.0, "m/s")
    assert "OUTSIDE" in capsys.readouterr().out
    tell("speed", 15.0, "m/s")
    tell("other", float("nan"), "m/s")
    assert "OUTSIDE" not in capsys.readouterr().out
    records = read(tmp_path / "lines.jsonl")
    assert [r.get("holds") for r in records] == [False, True, None]
    assert records[0]["predicted"] == [10, 20]
    assert records[2]["value"] is None
    assert table(records).splitlines()[-1] == "| speed | 10 to 20 m/s | wind | 15 |"
    assert outcome({"speed": 30.0}, "speed") == "**30**"
    assert main(["--table", str(tmp_path / "lines.jsonl")]) == 0
    assert "| speed | 10 to 20 m/s | wind | 15 |" in capsys.readouterr().out


def test_predicted_times_stand_on_the_counts_that_are_committed() -> None:
    counted = json.loads((ROOT / "benchmarks/results/gpu_counts.json").read_text())["results"]
    rows = {row["num_gaussians"]: row for row in counted["rows"]}
    for n, millions in MILLIONS.items():
        row = rows[n]
        found = {
            "forward": row["forward"],
            "backward": row["backward"],
            "backward, as given": row["backward_as_given"],
            "lists": 2 * row["lists"],
        }
        for name, count in found.items():
            assert millions[name] == pytest.approx(count / 1e6, abs=0.006)


def test_predicted_steps_stand_on_the_counts_that_are_committed() -> None:
    counted = json.loads((ROOT / "benchmarks/results/tile_counts.json").read_text())["results"]
    rows = {row["num_gaussians"]: row for row in counted["rows"]}
    for n, millions in STEPS.items():
        count = rows[n]["step"] / 1e6
        assert millions["step on tensor cores"] == pytest.approx(count, abs=0.0006)


def test_counted_tiles_are_those_of_the_lists() -> None:
    pytest.importorskip("triton", reason="Triton is not installed (extra: gpu)")
    from splatshard.pipeline.kernels.select import select_backend
    from splatshard.pipeline.kernels.triton_lists import tile_lists
    from tests.unit.test_kernels import make_splats, to_float32

    splats = to_float32(make_splats(2, 30, 37, 45, 2.0))
    lists = tile_lists(splats.to(select_backend("triton").device), 37, 45, 3.0, True)
    for side, counts in ((8, lists.fine_counts), (32, lists.coarse_counts)):
        found = gpu_counts.tiles_hit(splats, 37, 45, side).flatten(1)
        assert torch.equal(found, counts.cpu().float())


def test_counted_rounds_are_those_of_the_largest_window_of_each_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two programs of 4 and 1 Gaussians, in rounds of 8 px: a large window alone in the second is
    dear, and sorted into the first it is not."""
    code = Code(instructions=1100, loop=100, registers=0, stack=0, shared=0)
    monkeypatch.setattr(gpu_counts, "code", lambda name: code)
    around, loop = 1000, 100
    sizes = torch.tensor([[1.0, 9, 0, 2, 3]])
    assert gpu_counts.backward([sizes], [None]) == 2 * around + 3 * loop
    sizes = torch.tensor([[1.0, 9, 0, 2, 17]])
    assert gpu_counts.backward([sizes], [None]) == 2 * around + 5 * loop
    order = sizes.argsort(1, descending=True)
    assert gpu_counts.backward([sizes], [order]) == 2 * around + 3 * loop  # the other holds none


def test_made_pictures_are_pictures() -> None:
    images = made_images(2, 48)
    assert images.shape == (2, 3, 48, 48)
    assert 0 <= images.min() < 0.2 < 0.8 < images.max() <= 1
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images, made_images(2, 48))
