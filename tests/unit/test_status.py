"""Status: figures from markers, what a running job says of itself, and what is no progress file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs import status
from splatshard.jobs.destination.manifest import Catalog
from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import PROGRESS_FILE, write_plan
from splatshard.jobs.status import last_job
from splatshard.pipeline.shards.commit import mark_failed, publish, staged_file
from tests.rows import config_of, make_ref, make_rows, write_shard

CONFIG = config_of()
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
PROGRESS: dict[str, Any] = {
    "state": "running",
    "updated": "2026-01-31T11:59:57Z",
    "shards": 1288,
    "shards_done": 511,
    "shards_failed": 1,
    "images_per_s": 41.26,
    "eta_s": 7260.0,
}


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    """Two done shards, a failed and a missing one."""
    refs = [make_ref(name) for name in "abcd"]
    for ref in refs[:2]:
        with staged_file(str(tmp_path), ref.name) as path:
            write_shard(path, make_rows(4))
            publish(str(tmp_path), path, ref, CONFIG, "")
    mark_failed(str(tmp_path), refs[2], CONFIG, ValueError("cut off"))
    write_plan(str(tmp_path), planned(refs, make_plan(refs, {}, CONFIG, str), CONFIG))
    return tmp_path


def status_of(dst: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert status.main([str(dst), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_it_is_the_same_with_and_without_the_manifest(
    dst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, err = status_of(dst, capsys)
    assert (found["shards_done"], found["shards_failed"], found["missing"]) == (2, 1, ["d"])
    assert (found["samples"], found["ok"], found["skipped"]) == (8, 6, {"corrupt_image": 2})
    assert found["psnr_quantiles"]["p50"] == pytest.approx(26.4, abs=0.3)
    assert found["progress"] is None
    assert "50 % below 26." in err
    assert "failed  c: ValueError: cut off" in err
    from splatshard.pipeline.shards.markers import ShardManifest, read_markers

    done = [m for m in read_markers(str(dst)).values() if isinstance(m, ShardManifest)]
    Catalog(str(dst), done).write()
    assert status_of(dst, capsys) == (found, err)


def test_without_a_plan_it_says_what_the_markers_say(
    dst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dst / "_plan.json").write_text('{"cut": ')
    (dst / PROGRESS_FILE).write_text(json.dumps(PROGRESS))
    assert status.main([str(dst), "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["shards_done"], found["shards_failed"], found["ok"]) == (2, 1, 6)
    assert all(found[name] is None for name in status.OF_THE_PLAN)
    for said in ("6 images ok, 2 skipped", "failed  c: ValueError: cut off", "512/1,288 shards"):
        assert said in err
    (row,) = [line for line in err.splitlines() if line.startswith("missing")]
    assert row.split()[1] == "?"
    last = err.splitlines()[-1]
    assert last.startswith(f"splatshard: error: {dst}/_plan.json cannot be read (JSONDecodeError")
    assert "delete it, the next convert writes it anew; until then nobody knows" in last


def test_a_running_job_is_shown(dst: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dst / PROGRESS_FILE).write_text(json.dumps(PROGRESS))
    found, err = status_of(dst, capsys)
    assert found["progress"] == PROGRESS
    assert "512/1,288 shards, 41.3 images/s, 2 h 01 min left" in err
    (dst / PROGRESS_FILE).write_text(json.dumps(PROGRESS | {"state": "done"}))
    assert "images/s" not in status_of(dst, capsys)[1]


def test_a_job_that_went_silent_is_not_called_running() -> None:
    told = "512/1,288 shards, 41.3 images/s, 2 h 01 min left"
    assert last_job(PROGRESS, NOW, 30.0) == f"a job is running, as of 3.0 s ago: {told}"
    later = NOW + timedelta(seconds=42)
    assert last_job(PROGRESS, later, 30.0) == (
        f"no sign of life for 45.0 s of the job that was running ({told}): it was killed, or its "
        "machine or store hangs; once it is gone, run the same command again"
    )
    assert last_job(PROGRESS, later, 120.0) == f"a job is running, as of 45.0 s ago: {told}"
    behind = NOW - timedelta(hours=1)  # its clock is ahead of ours
    assert last_job(PROGRESS, behind, 30.0) == f"a job is running, as of 0.0 s ago: {told}"
    unknown = PROGRESS | {"images_per_s": None, "eta_s": None}
    assert last_job(unknown, NOW, 30.0).endswith("ago: 512/1,288 shards")


def test_a_killed_job_is_told_after_some_updates_that_did_not_come(
    dst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ago_s, words in ((20, "a job is running, as of 2"), (45, "no sign of life for 4")):
        updated = datetime.now(UTC) - timedelta(seconds=ago_s)
        (dst / PROGRESS_FILE).write_text(json.dumps(PROGRESS | {"updated": updated.isoformat()}))
        assert words in status_of(dst, capsys)[1]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("interrupted", "the last job was stopped 3.0 s ago, at 512/1,288 shards; the same"),
        ("failed", "the last job ended 3.0 s ago with an error or failed shards, at 512/1,288"),
        ("done", ""),
    ],
)
def test_how_the_last_job_ended(state: str, words: str) -> None:
    told = last_job(PROGRESS | {"state": state}, NOW, 30.0)
    assert told.startswith(words)
    assert bool(told) == bool(words)


@pytest.mark.parametrize("change", [{"updated": "soon"}, {"updated": 3}, {"images_per_s": "many"}])
def test_progress_that_cannot_be_understood_is_no_error(change: dict[str, Any]) -> None:
    assert "cannot be understood" in last_job(PROGRESS | change, NOW, 30.0)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"state": "running"}'])
def test_a_broken_progress_file_is_no_error(
    dst: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (dst / PROGRESS_FILE).write_text(text)
    assert status_of(dst, capsys)[0]["shards_done"] == 2


def test_the_answer_is_on_standard_output_but_for_json(
    dst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dst / PROGRESS_FILE).write_text(json.dumps(PROGRESS))
    assert status.main([str(dst)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{dst}\n")
    (row,) = [line for line in out.splitlines() if line.startswith("done")]
    assert "6 images ok, 2 skipped" in row  # rows are whole lines, for grep
    assert "50 % below 26." in out
    assert "failed  c: ValueError: cut off" in out
    assert "512/1,288 shards" in out
    assert status_of(dst, capsys)[1].startswith(f"{dst}\n")


@pytest.mark.parametrize(
    "arguments",
    [["status", "DST"], ["status", "DST", "--json"], ["convert", "--help"], ["--help"]],
)
def test_a_reader_that_has_seen_enough_is_no_error(arguments: list[str], dst: Path) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    arguments = [str(dst) if argument == "DST" else argument for argument in arguments]
    command = [sys.executable, "-m", "jobs", *arguments]
    done = subprocess.run(command, stdout=ours, stderr=subprocess.PIPE, text=True, check=False)
    os.close(ours)
    assert done.returncode == 0
    assert ("--json" in arguments) == bool(done.stderr)  # which has what people read
    assert "BrokenPipe" not in done.stderr
