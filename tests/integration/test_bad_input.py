"""Bad input and bad places: a clear error or a row with its reason, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from splatshard.jobs import status
from splatshard.jobs.driver.bisect import READ
from splatshard.jobs.driver.worker import FitActor, Task
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.errors import SourceError, StorageError, UnavailableError
from splatshard.schemas.shard import ShardRef
from tests.integration.running import (
    assert_verified,
    convert_json,
    files,
    run_json,
    tars,
)
from tests.make import animation, datacomp_sample, datacomp_tar, jpeg, png_header, write_tar

pytestmark = pytest.mark.integration

Capsys = pytest.CaptureFixture[str]


def refused(capsys: Capsys, src: object, dst: object, *flags: str) -> str:
    """The one error line of a command that is refused before anything is done."""
    code, summary, err = convert_json(capsys, src, dst, *flags)
    assert (code, summary) == (1, {})
    assert err.count("splatshard: error: ") == 1
    assert "Traceback" not in err
    return err


def test_src_that_matches_nothing(tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "empty").mkdir()
    for src in ("nothing.tar", "no*.tar", "{00..03}.tar", "empty", "list.txt"):
        assert refused(capsys, tmp_path / src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dst_that_is_a_file(tmp_path: Path, capsys: Capsys) -> None:
    src = tars(tmp_path / "in")
    (tmp_path / "out").write_text("precious")
    assert "is not a folder" in refused(capsys, src, tmp_path / "out")
    assert "is not a folder" in refused(capsys, src, tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "precious"


def test_dst_that_cannot_be_written(tmp_path: Path, capsys: Capsys) -> None:
    src = tars(tmp_path / "in")
    assert "/proc/splats" in refused(capsys, src, "/proc/splats")


@pytest.mark.usefixtures("shared_ray")
def test_dst_of_a_newer_version(tmp_path: Path, capsys: Capsys) -> None:
    src, dst = tars(tmp_path / "in"), tmp_path / "out"
    assert convert_json(capsys, src, dst)[0] == 0
    marker = dst / "00000001.json"
    newer = json.loads(marker.read_text()) | {"format_version": 99}
    marker.write_text(json.dumps(newer))
    before = files(dst)
    err = refused(capsys, src, dst, "--overwrite-stale")
    assert "format version 99" in err
    assert files(dst) == before
    assert status.main([str(dst)]) == 1


@pytest.mark.usefixtures("shared_ray")
def test_a_truncated_tar_fails_alone_and_converts_once_repaired(
    tmp_path: Path, capsys: Capsys
) -> None:
    src, dst = tars(tmp_path / "in", shards=3), tmp_path / "out"
    broken = tmp_path / "in" / "00000001.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    code, summary, err = convert_json(capsys, src, dst)
    assert code == 3
    assert (summary["shards_done"], summary["shards_failed"], summary["ok"]) == (2, 1, 6)
    assert "00000001" in err
    assert "SourceError" in err
    assert not list(dst.glob("00000001*.parquet"))
    state = run_json(capsys, status, dst)[1]
    assert (state["shards_done"], state["shards_failed"]) == (2, 1)
    assert state["failed"]["00000001"]["error"] == "SourceError"

    code, summary, _ = convert_json(capsys, src, dst)
    assert (code, summary["shards_failed"], summary["shards_skipped_done"]) == (3, 1, 2)

    broken.write_bytes(whole)
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["shards_done"], summary["ok"]) == (0, 1, 9), err
    assert assert_verified(capsys, dst)["shards_failed"] == 0


@pytest.mark.usefixtures("shared_ray")
def test_bad_samples_are_rows_with_their_reasons(tmp_path: Path, capsys: Capsys) -> None:
    good = jpeg()
    members = [
        *datacomp_sample(1),
        ("a.jpg", b""),
        ("b.jpg", good[: len(good) // 2]),
        ("c.jpg", b"this is a text"),
        ("d.png", png_header(100_000, 100_000)),
        ("e.gif", animation()),
        ("f.txt", b"a caption without a picture"),
        ("g.jpg", good),
        ("h.jpg", good),
        ("g.jpg", good),
        ("../x.jpg", good),
    ]
    write_tar(tmp_path / "in" / "a.tar", members)
    write_tar(tmp_path / "in" / "b.tar", [])
    dst = tmp_path / "out"
    code, summary, err = convert_json(capsys, tmp_path / "in", dst)
    assert (code, summary["samples"], summary["ok"]) == (0, 11, 3), err
    assert summary["skipped"] == {
        "animated_image": 1,
        "corrupt_image": 1,
        "duplicate_key": 1,
        "empty_image": 1,
        "no_image": 1,
        "not_an_image": 1,
        "too_large": 1,
        "unsafe_path": 1,
    }
    assert "  a in shard a: empty_image: " in err
    assert f"  ... the others: splatshard report {dst}\n" in err
    assert summary["samples"] == summary["ok"] + sum(summary["skipped"].values())
    assert assert_verified(capsys, dst)["samples"] == 11
    assert not (tmp_path / "x.jpg").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; skips where it cannot be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.usefixtures("shared_ray")
def test_a_full_disk_stops_the_job_and_loses_nothing(
    small_disk: Path, tmp_path: Path, capsys: Capsys
) -> None:
    src, dst = tars(tmp_path / "in", shards=8, samples=2), small_disk / "out"
    large = ("--image-size=64", "--num-gaussians=1600", "--steps=1", "--codec=fp16")
    code, summary, err = convert_json(capsys, src, dst, *large)
    assert (code, summary) == (1, {}), err
    assert "no space left" in err
    state = run_json(capsys, status, dst)[1]
    assert state["shards_failed"] == 0
    assert 0 < state["shards_done"] < 8
    assert state["shards_missing"] == 8 - state["shards_done"]

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, summary, err = convert_json(capsys, src, dst, *large)
    assert code == 0, err
    assert summary["shards_skipped_done"] == state["shards_done"]
    assert assert_verified(capsys, dst)["shards_done"] == 8


REF = ShardRef(name="00000000", kind="tar", urls=("in.tar",), size_bytes=1, etag="1")
TASK = Task(ref=REF, attempt="0badc0de0")


@pytest.mark.parametrize(
    ("error", "kind", "marked"),
    [
        (StorageError("disk full"), "storage", False),
        (UnavailableError("503"), "unavailable", False),
        (SourceError("cut off"), "failed", True),
        (RuntimeError("a bug, or the device"), "broken", False),
        (MemoryError("Unable to allocate"), "oom", False),
    ],
)
def test_the_worker_tells_whose_error_it_is(
    error: Exception, kind: str, marked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **named: object) -> None:
        raise error

    actor = FitActor({})
    assert actor.start("cpu").backend == "cpu"
    monkeypatch.setattr("splatshard.pipeline.convert.convert_shard", fails)
    outcome = actor.convert(TASK, ConvertConfig(), str(tmp_path))
    assert (outcome.kind, outcome.message) == (kind, str(error))
    assert (tmp_path / "00000000.failed.json").exists() == marked


@pytest.mark.parametrize(
    ("error", "words"), [(AssertionError, "--debug shows where"), (MemoryError, "fewer --workers")]
)
def test_an_error_without_words_is_told_in_some(
    error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **named: object) -> None:
        raise error

    actor = FitActor({})
    actor.start("cpu")
    monkeypatch.setattr("splatshard.pipeline.convert.convert_shard", fails)
    outcome = actor.convert(TASK, ConvertConfig(), str(tmp_path))
    assert outcome.error == error.__name__
    assert words in outcome.message


def test_a_trial_reading_counts_the_samples_and_decodes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = datacomp_tar(tmp_path / "00000000.tar", 5)
    ref = replace(REF, urls=(str(path),))
    actor = FitActor({})
    actor.start("cpu")
    monkeypatch.delattr("splatshard.pipeline.convert.decode")
    for limit, tried in ((None, 5), (3, 3)):
        task = replace(TASK, ref=replace(ref, limit=limit), span=READ, alone=True)
        outcome = actor.convert(task, ConvertConfig(), str(tmp_path / "out"))
        assert (outcome.kind, outcome.tried) == ("survived", tried)
    assert not (tmp_path / "out").exists()


def test_a_stopped_worker_commits_nothing(tmp_path: Path) -> None:
    actor = FitActor({})
    actor.start("cpu")
    actor.stop()
    outcome = actor.convert(TASK, ConvertConfig(), str(tmp_path))
    assert outcome.kind == "stopped"
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_run_here_is_an_error_of_start() -> None:
    assert "nonsense" in FitActor({}).start("nonsense").error
