"""The estimate of `--dry-run`: what it reads, what it rests on, and its units."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch

from splatshard.jobs.driver import dryrun
from splatshard.jobs.driver.dryrun import begin_of, convert_timed, dry_run, estimate_job, look, tell
from splatshard.pipeline.runtime.stage_timer import StageStats
from splatshard.pipeline.shards.write import sample_members
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.errors import SourceError
from splatshard.schemas.shard import ShardRef
from splatshard.schemas.splats import scalars, splat_columns
from tests.make import datacomp_tar, image_folder, image_parquet
from tests.rows import config_of, make_rows, metadata_of

CONFIG = ConvertConfig(
    decode=DecodeConfig(image_size=32), fit=FitConfig(num_gaussians=16, steps=2), backend="cpu"
)


def tars(folder: Path, counts: list[int]) -> list[ShardRef]:
    for i, count in enumerate(counts):
        datacomp_tar(folder / f"{i:03d}.tar", count, start=100 * i)
    return list_shards(str(folder / "*.tar"))


@pytest.fixture
def remote_tar(tmp_path: Path) -> Iterator[Callable[..., ShardRef]]:
    """Makes a tar in fsspec's memory, of which only a part is there; its size is the whole's."""
    fs = fsspec.filesystem("memory")

    def make(count: int, kept: float = 1.0) -> ShardRef:
        whole = datacomp_tar(tmp_path / "a.tar", count).read_bytes()
        fs.pipe("/dryrun/a.tar", whole[: int(kept * len(whole))])
        url = "memory://dryrun/a.tar"
        return ShardRef(name="a", kind="tar", urls=(url,), size_bytes=len(whole), etag="")

    yield make
    fs.rm("/dryrun", recursive=True)


def test_samples_of_shards_spread_over_the_job(tmp_path):
    total, picked = look(tars(tmp_path, [3] * 8), 8)
    assert total == 24
    assert [s.key for s in picked] == [f"{100 * i + j:012d}" for i in (0, 2, 4, 6) for j in (0, 1)]
    total, picked = look(tars(tmp_path / "few", [1, 3]), 8)
    assert (total, len(picked)) == (4, 4)


def test_limits_count(tmp_path):
    tars(tmp_path, [4, 4])
    refs = list_shards(str(tmp_path / "*.tar"), limit=5)
    total, picked = look(refs, 100)
    assert (total, len(picked)) == (5, 5)


@pytest.mark.parametrize("make", [image_parquet, image_folder])
def test_other_sources_are_counted(tmp_path, make):
    path = make(tmp_path / "a.parquet")
    work = list_shards(str(path), samples_per_shard=4)
    total, picked = look(work, 100)
    assert total == len(picked) == sum(1 for ref in work for _ in read(ref, hashlib.sha256()))


def test_of_a_remote_tar_only_the_beginning_is_read(remote_tar, monkeypatch):
    monkeypatch.setattr(dryrun, "PREFIX", 10)
    ref = remote_tar(count=40, kept=0.4)
    with pytest.raises(SourceError):  # there is no more
        list(read(ref, hashlib.sha256()))
    total, picked = look([ref], 4)
    assert [s.key for s in picked] == [f"{i:012d}" for i in range(4)]
    assert total == pytest.approx(40, abs=3)


def test_a_small_remote_tar_is_counted(remote_tar):
    ref = remote_tar(count=7)
    assert begin_of(ref, 2)[1:] == (7, ref.size_bytes)


def test_the_estimate_on_the_cpu(tmp_path, monkeypatch):
    work = tars(tmp_path, [3, 3])
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    estimate = estimate_job(work, CONFIG, None)
    assert (estimate["samples"], estimate["sampled"], estimate["sampled_ok"]) == (6, 6, 6)
    assert estimate["workers"] == 2  # of 64 cores: one shard each
    assert estimate["device"] == "CPU core"
    assert estimate["psnr_p5"] <= estimate["psnr_mean"]
    assert estimate["device_hours"] == pytest.approx(6 * estimate["s_per_image"] / 3600)
    assert estimate["wall_s"] == pytest.approx(3 * estimate["s_per_image"])
    assert estimate["stored_bytes"] > 6 * 256
    assert estimate_job(work, CONFIG, 1)["workers"] == 1


@pytest.mark.parametrize("codec", ["fp16", "balanced"])
def test_bytes_of_rows_are_those_of_a_tar(codec):
    row = make_rows(1, codec=codec, budgets=(4, 9))[0]
    suffixes = scalars(metadata := metadata_of(config_of("parquet", codec, (4, 9))))
    members = sample_members(row, suffixes, splat_columns(metadata["budgets"]))
    large = [len(data) for suffix, data in members if suffix != "splat.json"]
    assert sum(large) - 5 < dryrun.row_bytes(row) <= sum(large)  # a label, and characters


class StoppedClock:
    """Has seen so many seconds of each stage."""

    def stage_stats(self) -> StageStats:
        return StageStats(busy_s={"decode": 2.0, "fit": 8.0, "pack": 1.0})


def test_on_a_gpu_the_slowest_stage_decides(monkeypatch):
    converted = []

    def convert_samples(samples: list[int], *arguments: Any) -> Any:
        converted.append(samples)
        yield [{} for _ in samples]

    monkeypatch.setattr("splatshard.pipeline.runtime.stage_timer.StageTimer", StoppedClock)
    monkeypatch.setattr("splatshard.pipeline.convert.convert_samples", convert_samples)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    rows, each_s = convert_timed([1, 2, 3, 4], CONFIG, gpu)
    assert (len(rows), each_s) == (4, 2.0)
    assert converted == [[1, 2, 3, 4]] * 2  # warmed up with a batch of the same size


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("CPU core", "18.00 ms per image on one CPU core (backend b), so about 5.00 core-hours: "),
        ("NVIDIA H200", "ms per image on one NVIDIA H200 (backend b), so about 5.00 GPU-hours: "),
    ],
)
def test_what_people_are_told(capsys, device, told):
    estimate = {"samples": 1_000_000, "shards": 100, "sampled": 8, "sampled_ok": 7}
    estimate |= {"psnr_mean": 27.6, "psnr_p5": 22.1, "s_per_image": 0.018, "device": device}
    estimate |= {"device_hours": 5.0, "wall_s": 9000.0, "workers": 2, "backend": "b"}
    tell(estimate | {"stored_bytes": 6.4e9})
    err = capsys.readouterr().err
    assert told in err
    assert f"2 h 30 min on 2 {'core' if device == 'CPU core' else 'GPU'}s" in err
    assert "8 images fitted, 7 ok" in err
    assert "27.60 dB on average, 22.10 dB at the 5th percentile" in err
    assert "6.4 GB" in err


def test_nothing_to_do(capsys):
    assert dry_run([], CONFIG, None, True) == 0
    out, err = capsys.readouterr()
    assert "already done" in err
    assert '"dry_run": true' in out
