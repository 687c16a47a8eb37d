"""Progress fed by hand: lines, `_progress.json`, metrics, logs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs.cli.command import Interrupted
from splatshard.jobs.cli.log import configure
from splatshard.jobs.destination.plan_file import PROGRESS_FILE
from splatshard.jobs.driver import progress as progress_module
from splatshard.jobs.driver.execute import tell_summary
from splatshard.jobs.driver.progress import Progress, line, run_summary
from splatshard.jobs.driver.prometheus import COUNTERS, GAUGES, TAGS, readings
from splatshard.jobs.driver.stats import Snapshot
from splatshard.jobs.driver.worker import SkippedSample, Unused, WorkerState
from splatshard.pipeline.runtime.stage_timer import StageStats
from splatshard.schemas.config import ConvertConfig, PackConfig, output_config
from splatshard.schemas.errors import StorageError, UnavailableError
from tests.unit.progressing import done, failed, manifest, state, tar

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def text_afterwards() -> Iterator[None]:
    yield
    configure("text")


def test_the_line() -> None:
    s = Snapshot(shards=4, shards_done=2, shards_failed=1, images=1312, images_per_s=4.14)
    assert line(s) == "3/4 shards  1,312 images  4.1 images/s"
    s = Snapshot(
        shards=1,
        images=1,
        images_per_s=4.0,
        psnr_mean=29.84,
        eta_s=20.0,
        busy={"fit": 0.971},
        retries={"oom": 1, "storage": 2},
        backend="triton",
    )
    assert line(s) == (
        "0/1 shard  1 image  4.0 images/s  29.8 dB  fit 97 %  3 retries  20.0 s left"
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_on_a_cpu_busy_says_nothing(backend: str) -> None:
    assert "fit" not in line(Snapshot(shards=1, busy={"fit": 1.0}, backend=backend))


def test_what_is_not_used_is_told_once_and_counted(capsys: Capsys) -> None:
    refs = [tar(0), tar(1)]
    with Progress(refs, [], time.monotonic()) as progress:
        for ref in refs:
            unused = (
                Unused(".npy", "it stays a member", f"k{ref.name}", 10),
                Unused("x", "y", "k"),
            )
            progress.finished(ref, replace(done(ref), unused=unused))
    summary = run_summary(progress, [], time.monotonic(), 1)
    tell_summary(summary | {"left_out": {}}, progress, "out")
    err = capsys.readouterr().err
    assert err.count("is not used") == 2
    line = ".npy is not used: it stays a member (10 samples, such as k00000000)\n"
    assert f"shard 00000000: {line}" in err
    assert "x is not used: y (1 sample, such as k)\n" in err
    assert "  not used: .npy of 20 samples, x of 2 samples\n" in err
    assert summary["unused"] == {".npy": 20, "x": 2}
    with Progress(refs, [], time.monotonic()) as progress:
        unused = (
            Unused("alt", "why", "k", 3),
            Unused("id", "z", "k"),
            Unused("prompt", "why", "k", 3),
        )
        progress.finished(refs[0], replace(done(refs[0]), unused=unused))
    line = "shard 00000000: alt, prompt are not used: why (3 samples, such as k)\n"
    assert line in capsys.readouterr().err  # one line for a reason
    many = {f"{i}.txt": 12 - i for i in range(12)}
    tell_summary(summary | {"left_out": {}, "unused": many}, progress, "out")
    line = "9.txt of 3 samples, ... (_run.json names all 12)\n"
    assert line in capsys.readouterr().err


def test_plain_lines_come_every_few_seconds(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    with Progress([tar(0)], [], 100.0) as progress:
        progress.needs = "1 CPU"
        for now, states in (
            (106.0, [WorkerState()]),
            (107.0, [WorkerState(loading=True)]),
            (112.0, [WorkerState(), WorkerState(loading=True)]),
        ):
            clock[0] = now
            progress.update(states)
        progress.worker_ready("cpu")
        for now, images in ((118.0, 0), (119.0, 3), (124.0, 6)):
            clock[0] = now
            progress.update([state((tar(0), images))])
    assert capsys.readouterr().err.splitlines() == [
        "starting workers: each waits for 1 CPU of Ray ...",
        "starting workers: they import torch and the kernels ...",
        "0/1 shard  0 images  first batch (kernels are compiled once) ...",
        "0/1 shard  6 images  0.6 images/s  20.0 dB",
    ]


def test_failures_and_retries_are_told_at_once(capsys: Capsys) -> None:
    ref = tar(0)
    with Progress([ref], [], time.monotonic()) as progress:
        progress.retried("worker_death", ref.name, "once more, alone")
        progress.finished(ref, failed(ref))
    assert capsys.readouterr().err == (
        "shard 00000000 will be tried again (worker death): once more, alone\n"
        "shard 00000000 failed: SourceError: truncated\n"
    )
    assert progress.failures == {ref.name: failed(ref)}
    assert progress.retries == {"worker_death": 1}


def test_the_summary() -> None:
    before, refs = manifest(tar(7), ok=10), [tar(0), tar(1)]
    started = time.monotonic() - 5
    with Progress(refs, [before], started) as progress:
        progress.worker_ready("cpu")
        progress.retried("storage", refs[0].name, "")
        progress.finished(refs[0], done(refs[0], ok=5, corrupt=1, psnr=24.0))
        progress.finished(refs[1], failed(refs[1]))
    found = run_summary(progress, [before], started, 3)
    assert (found["samples"], found["ok"], found["skipped"]) == (16, 15, {"corrupt_image": 1})
    assert found["psnr_mean"] == pytest.approx((10 * 30 + 5 * 24) / 15)
    assert (found["shards_done"], found["shards_skipped_done"], found["shards_failed"]) == (1, 1, 1)
    assert found["images_converted"] == 6
    assert (found["retries"], found["workers"]) == ({"storage": 1}, 3)
    assert 5 <= found["time_to_first_shard_s"] <= found["wall_s"]


@pytest.mark.parametrize("fields", [{}, {"caption": 0}, {"label": 1, "caption": 0}])
def test_a_job_without_captions_labels_and_metadata_is_told(
    fields: dict[str, int], capsys: Capsys
) -> None:
    with Progress([tar(0), tar(1)], [], time.monotonic()) as progress:
        progress.finished(tar(0), replace(done(tar(0)), fields=fields))
        progress.finished(tar(1), done(tar(1)))
    summary = run_summary(progress, [], time.monotonic(), 1) | {"left_out": {}}
    assert summary["fields"] == {"caption": 0, "label": fields.get("label", 0), "metadata": 0}
    tell_summary(summary, progress, "out")
    told = "  no captions, labels or metadata: nothing beside the images gives any"
    assert (told in capsys.readouterr().err) == ("label" not in fields)
    again = Progress([], [], time.monotonic())  # nothing was read
    tell_summary(run_summary(again, progress.manifests, 0.0, 0) | {"left_out": {}}, again, "out")
    assert "no captions" not in capsys.readouterr().err


def test_the_summary_names_the_first_skipped_samples(capsys: Capsys) -> None:
    refs = [tar(0), tar(1)]
    first, second = (
        tuple(SkippedSample(key=key, uid=None, status="corrupt_image", error="cut") for key in keys)
        for keys in ("ab", "cd")
    )
    with Progress(refs, [], time.monotonic()) as progress:
        progress.finished(refs[0], done(refs[0], first, ok=5, corrupt=2))
        named = (
            "  a in shard 00000000: corrupt_image: cut\n  b in shard 00000000: corrupt_image: cut\n"
        )
        tell_summary(run_summary(progress, [], 0.0, 1), progress, "/dst")
        assert f"skipped: 2 corrupt_image\n{named}  PSNR" in capsys.readouterr().err
        progress.finished(refs[1], done(refs[1], second, ok=5, corrupt=2))
    tell_summary(run_summary(progress, [], 0.0, 1), progress, "/dst")
    named += "  c in shard 00000001: corrupt_image: cut\n  ... the others: splatshard report /dst\n"
    assert f"skipped: 4 corrupt_image\n{named}  PSNR" in capsys.readouterr().err
    again = Progress([], progress.manifests, 0.0)
    tell_summary(run_summary(again, progress.manifests, 0.0, 0), again, "/dst")
    assert "skipped: 4 corrupt_image\n  which: splatshard report /dst\n" in capsys.readouterr().err


# _progress.json


def read(dst: Path) -> dict[str, Any]:
    return json.loads((dst / PROGRESS_FILE).read_text())


@pytest.mark.parametrize(("codec", "loss"), [("fp16", 1.5), ("fp16", 0.1), ("compact", 0.9)])
def test_what_halves_cost_large_pictures_is_told(
    codec: str, loss: float, capsys: pytest.CaptureFixture[str]
) -> None:
    refs = [tar(0), tar(1), tar(2)]
    with Progress(refs, [], time.monotonic()) as progress:
        for ref, ok, lost in zip(refs, (30, 10, 0), (loss + 0.1, loss - 0.3, None), strict=True):
            own = manifest(ref, ok=ok)
            own = replace(own, statistics=own.statistics | {"psnr_loss_mean": lost})
            progress.finished(
                ref, replace(done(ref), manifest=replace(own, inputs=inputs_of(codec)))
            )
    tell_summary(run_summary(progress, [], 0.0, 1), progress, "/dst")
    said = f"fp16 took {loss:.2f} dB of that" in capsys.readouterr().err
    assert said == (codec == "fp16" and loss > 0.2)


def inputs_of(codec: str) -> dict[str, Any]:
    recipe = output_config(ConvertConfig(pack=PackConfig(codec=codec)))  # type: ignore[arg-type]
    return {"recipe": recipe, "source": {"limit": None}}


def test_the_file_ends_with_the_final_figures(tmp_path: Path) -> None:
    refs = [tar(0), tar(1)]
    with Progress(refs, [], time.monotonic(), str(tmp_path)) as progress:
        progress.workers = 2
        progress.worker_ready("cpu")
        for ref in refs:
            progress.finished(ref, done(ref))
    found = read(tmp_path)
    assert found["state"] == "done"
    assert (found["shards"], found["shards_done"], found["images"]) == (2, 2, 20)
    assert (found["psnr_mean"], found["workers"], found["backend"]) == (30.0, 2, "cpu")
    assert found["started"] <= found["updated"]
    assert found["updated"].endswith("Z")
    assert {path.name for path in tmp_path.iterdir()} == {PROGRESS_FILE}


def test_the_file_says_running_until_the_end(tmp_path: Path) -> None:
    with Progress([tar(0)], [], time.monotonic(), str(tmp_path)) as progress:
        while not (tmp_path / PROGRESS_FILE).exists():
            progress.update([])
        assert (read(tmp_path)["state"], read(tmp_path)["shards_done"]) == ("running", 0)
        progress.worker_ready("cpu")
        progress.finished(tar(0), done(tar(0)))
    assert (read(tmp_path)["state"], read(tmp_path)["shards_done"]) == ("done", 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Interrupted(143, "terminated"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (StorageError("full"), "failed"),
    ],
)
def test_the_final_state(error: BaseException, expected: str, tmp_path: Path) -> None:
    with (
        pytest.raises(type(error)),
        Progress([tar(0)], [], time.monotonic(), str(tmp_path)) as progress,
    ):
        raise error
    assert progress.state == read(tmp_path)["state"] == expected


def test_a_job_that_will_stop_says_so_at_once(tmp_path: Path) -> None:
    with Progress([tar(0)], [], time.monotonic(), str(tmp_path)) as progress:
        progress.interrupted()
        assert read(tmp_path)["state"] == "interrupted"  # as it stays where SIGKILL follows


def test_a_failed_shard_fails_the_job(tmp_path: Path) -> None:
    with Progress([tar(0)], [], time.monotonic(), str(tmp_path)) as progress:
        progress.finished(tar(0), failed(tar(0)))
    assert read(tmp_path)["state"] == "failed"


@pytest.mark.parametrize("error", [StorageError("disk full"), UnavailableError("no answer")])
def test_a_store_that_refuses_the_file_is_told_once_and_fails_nothing(
    error: Exception, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(progress_module, "write_text", refuse)
    monkeypatch.setattr(progress_module, "LOCAL_FILE_EVERY_S", 0.0)
    with Progress([tar(0)], [], time.monotonic(), str(tmp_path)) as progress:
        for _ in range(50):
            progress.update([])
        progress.worker_ready("cpu")
        progress.finished(tar(0), done(tar(0)))
    assert capsys.readouterr().err == f"_progress.json is not up to date: {error}\n"
    assert progress.state == "done"


def test_a_store_that_hangs_holds_up_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    asked, answer = threading.Event(), threading.Event()
    calls: list[str] = []

    def hang(dst: str, name: str, text: str) -> None:
        calls.append(text)
        asked.set()
        assert answer.wait(60)

    monkeypatch.setattr(progress_module, "write_text", hang)
    monkeypatch.setattr(progress_module, "LOCAL_FILE_EVERY_S", 0.0)
    with Progress([tar(0)], [], time.monotonic(), str(tmp_path)) as progress:
        assert asked.wait(60)
        for _ in range(50):
            progress.update([])
        assert len(calls) == 1
        answer.set()
    assert [json.loads(text)["state"] for text in calls] == ["running", "done"]


# Metrics


def test_every_metric_has_a_reading_with_its_tag() -> None:
    full = Snapshot(
        shards=5,
        shards_done=2,
        shards_failed=1,
        shards_in_work=1,
        skipped={"corrupt_image": 3},
        images_per_s=4.0,
        psnr_mean=30.0,
        eta_s=5.0,
        busy={"fit": 0.5},
        queued={"fit": 2},
        retries={"oom": 1},
    )
    found = {(name, tag): value for name, tag, value in readings(full)}
    assert {name for name, _ in found} == {*COUNTERS, *GAUGES}
    assert all((name in TAGS) == bool(tag) for name, tag in found)
    assert found["splatshard_shards", "pending"] == 1
    assert found["splatshard_retries_total", "oom"] == 1
    unknown = {"splatshard_psnr_db", "splatshard_eta_seconds", "splatshard_images_per_second"}
    assert not unknown & {name for name, _, _ in readings(Snapshot())}


# Logs


def test_json_logs_name_shard_and_uid(capsys: Capsys) -> None:
    configure("json")
    refs = [tar(0), tar(1)]
    skipped = (
        SkippedSample(key="7", uid="u7", status="corrupt_image", error="cut"),
        SkippedSample(key="8", uid=None, status="quarantined", error="killed its worker"),
    )
    with Progress(refs, [], time.monotonic(), "") as progress:
        progress.worker_ready("cpu", node="n1", pid=5)
        progress.retried("oom", refs[0].name, "once more", node="n1")
        progress.finished(refs[0], done(refs[0], skipped, ok=8, corrupt=2))
        progress.finished(refs[1], failed(refs[1]))
        progress.worker_left("it was dismissed", StageStats(), node="n1")
    found = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    by_event = {e["event"]: e for e in found}
    assert list(by_event) == [
        *("job_start", "worker_ready", "retry", "sample_skipped", "quarantine"),
        *("shard_done", "shard_failed", "worker_left", "job_end"),
    ]
    assert (by_event["retry"]["kind"], by_event["retry"]["node"]) == ("oom", "n1")
    sample = by_event["sample_skipped"]
    assert (sample["shard"], sample["key"], sample["uid"]) == ("00000000", "7", "u7")
    assert (sample["status"], sample["error"]) == ("corrupt_image", "cut")
    assert "uid" not in by_event["quarantine"]
    assert by_event["shard_done"]["counts"] == {"ok": 8, "corrupt_image": 2}
    assert by_event["shard_failed"]["trace"] == "trace\n"
    assert (by_event["job_end"]["state"], by_event["job_end"]["images"]) == ("failed", 10)


def test_people_are_not_told_every_skipped_sample(capsys: Capsys) -> None:
    ref = tar(0)
    skipped = (SkippedSample(key="7", uid="u7", status="corrupt_image", error="cut"),)
    with Progress([ref], [], time.monotonic()) as progress:
        progress.finished(ref, done(ref, skipped))
    assert capsys.readouterr().err == ""
