"""Samples that take their worker down: found, quarantined by uid, and the rest converted.

The worker class is sent to Ray's processes by value, so that what it patches there is real: the
process does die, or hang, when it meets the sample.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path

import pytest

from splatshard.jobs.driver.worker import FitActor, Started
from splatshard.pipeline.shards.rows import read_rows
from tests.integration.running import assert_verified, convert_json, files, tars

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("shared_ray")]

Capsys = pytest.CaptureFixture[str]


class Poisoned(FitActor):
    """Meets its end at samples of the listed keys."""

    keys: tuple[str, ...] = ()

    def start(self, backend: str) -> Started:
        from splatshard.pipeline import convert

        decode = convert.decode

        def decode_or_die(image, name, config):
            if name.removesuffix(".jpg") in self.keys:
                self.end()
            return decode(image, name, config)

        convert.decode = decode_or_die
        return super().start(backend)

    def end(self) -> None:
        ctypes.string_at(0)  # a real one, in this thread; a signal would go to another


class Crashes(Poisoned):
    keys = ("000000000003",)


class Hangs(Poisoned):
    keys = ("000000000006",)

    def end(self) -> None:
        time.sleep(1000)


class DiesReading(FitActor):
    """Dies where shard 1 is read."""

    def start(self, backend: str) -> Started:
        from splatshard.pipeline import convert

        read = convert.read

        def read_or_die(ref, digest):
            for number, sample in enumerate(read(ref, digest)):
                if ref.name == "00000001" and number == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield sample

        convert.read = read_or_die
        return super().start(backend)


class Breaks(FitActor):
    """Its process is of no use any more once it has met a sample, as after a fault of a GPU; shard
    2 has a fault of its own."""

    spoilt = False

    def _convert(self, task, *arguments):
        if task.ref.name == "00000002":
            raise ValueError("a bug")
        self.spoilt |= task.ref.name == "00000001" and not task.alone
        if self.spoilt:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super()._convert(task, *arguments)


class DiesWhole(FitActor):
    """Dies at every whole attempt at one shard and at no part of it: memory, say."""

    def convert(self, task, config, dst):
        if task.ref.name == "00000001" and not task.span:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().convert(task, config, dst)


def rows(dst: Path, shard: str) -> dict[str, tuple[str, str | None, str | None]]:
    """Key to status, uid and error."""
    (path,) = dst.glob(f"{shard}-*.parquet")
    return {row["key"]: (row["status"], row["uid"], row["error"]) for row in read_rows(str(path))}


def test_samples_that_crash_their_worker_are_quarantined(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tars(tmp_path / "in", shards=2, samples=4), tmp_path / "out"
    monkeypatch.setattr("splatshard.jobs.driver.driver.FitActor", Crashes)
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["shards_done"], summary["samples"]) == (0, 2, 8), err
    assert summary["skipped"] == {"quarantined": 1}
    assert summary["retries"]["worker_death"] > 2
    found = rows(dst, "00000000")
    assert len(found) == 4
    status, uid, error = found.pop("000000000003")
    assert status == "quarantined"
    assert uid
    assert "killed its worker" in (error or "")
    assert {status for status, *_ in found.values()} == {"ok"}
    assert_verified(capsys, dst)
    before = files(dst)
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["shards_skipped_done"]) == (0, 2), err
    assert files(dst) == before


def test_a_sample_that_hangs_is_quarantined(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tars(tmp_path / "in", shards=2, samples=4), tmp_path / "out"
    monkeypatch.setattr("splatshard.jobs.driver.driver.FitActor", Hangs)
    code, summary, err = convert_json(capsys, src, dst, "--sample-timeout=2")
    assert (code, summary["skipped"]) == (0, {"quarantined": 1}), err
    assert summary["retries"]["hang"] > 2
    assert "--sample-timeout" in (rows(dst, "00000001")["000000000006"][2] or "")
    assert_verified(capsys, dst)


def test_a_shard_whose_reading_kills_fails_alone_and_says_so(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tars(tmp_path / "in", shards=3), tmp_path / "out"
    monkeypatch.setattr("splatshard.jobs.driver.driver.FitActor", DiesReading)
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["shards_done"], summary["shards_failed"]) == (3, 2, 1), err
    assert f"reading {tmp_path}/in/00000001.tar killed its worker" in err
    assert summary["retries"]["worker_death"] < 6
    marker = json.loads((dst / "00000001.failed.json").read_text())
    assert "replace it" in marker["message"]


def test_a_worker_that_is_broken_fails_no_shard_but_a_bug_does(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tars(tmp_path / "in", shards=5), tmp_path / "out"
    monkeypatch.setattr("splatshard.jobs.driver.driver.FitActor", Breaks)
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["shards_done"], summary["shards_failed"]) == (3, 4, 1), err
    assert summary["retries"].keys() == {"application"}
    marker = json.loads((dst / "00000002.failed.json").read_text())
    assert (marker["error"], marker["message"]) == ("ValueError", "a bug")


def test_a_shard_that_kills_as_a_whole_fails_alone(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tars(tmp_path / "in", shards=4), tmp_path / "out"
    monkeypatch.setattr("splatshard.jobs.driver.driver.FitActor", DiesWhole)
    monkeypatch.setattr("splatshard.jobs.driver.scheduler.FUTILE_BISECTS", 1)
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["shards_done"], summary["shards_failed"]) == (3, 3, 1), err
    assert "no single sample does it alone" in err
    assert (dst / "00000001.failed.json").exists()
    monkeypatch.undo()
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["shards_done"]) == (0, 1), err
    assert_verified(capsys, dst)
