"""A folder of images that is cut into fewer shards than before: nothing is converted twice."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs import convert, verify
from splatshard.jobs.destination.manifest import Catalog
from splatshard.jobs.destination.plan import Plan, status
from splatshard.jobs.destination.plan_file import read_plan
from splatshard.jobs.driver import execute
from splatshard.jobs.driver.worker import Outcome
from splatshard.pipeline.shards.commit import mark_failed, publish, remove, staged_file
from splatshard.pipeline.shards.markers import read_manifest, read_markers
from splatshard.pipeline.source import read
from splatshard.schemas.errors import SourceError, StaleShardError
from splatshard.schemas.shard import FailedShard, ShardManifest
from tests.make import image_folder
from tests.rows import config_of, make_rows, write_shard
from tests.unit.committing import commit_shard, die_at, snapshot

CONFIG = config_of()


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def no_fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards of random splats, as many as their sources have files; those named here fail."""
    failing: list[str] = []

    def drive(
        plan: Plan, config: Any, dst: str, options: Any, progress: Any, catalog: Catalog
    ) -> int:
        for ref in plan.work:
            if ref.name in failing:
                mark_failed(dst, ref, config, SourceError("cut"))
                failed = Outcome(name=ref.name, kind="failed", error="SourceError", message="cut")
                progress.failures[ref.name] = failed
                continue
            with staged_file(dst, ref.name) as path:
                write_shard(path, make_rows(ref.limit or len(ref.urls)))
                replaces = plan.replaces.get(ref.name, "")
                catalog.add(publish(dst, path, ref, config, "cd" * 32, replaces=replaces))
        return 1

    monkeypatch.setattr(execute, "drive", drive)
    monkeypatch.setattr(read, "source_sha256", lambda ref: "ab" * 32)
    return failing


def run(src: object, dst: Path, per_shard: int, *, overwrite: bool = False, **options: Any) -> int:
    return convert.convert(
        convert.ConvertOptions(
            src=str(src),
            dst=str(dst),
            samples_per_shard=per_shard,
            overwrite_stale=overwrite,
            config=CONFIG,
            **options,
        ),
        0.0,
    )


def sizes(dst: Path) -> dict[str, int]:
    """Samples of all shards, once every command says that DST is whole and holds these alone."""
    assert verify.main([str(dst)]) == 0
    markers = read_markers(str(dst), trust_manifest=False)
    done = [marker for marker in markers.values() if isinstance(marker, ShardManifest)]
    state = status(read_plan(str(dst)), markers)
    assert (len(state.done), state.missing, state.unplanned) == (len(markers), (), ())
    listed = {n: e.manifest for n, e in read_manifest(f"{dst}/_manifest.json").items()}
    assert listed == markers
    assert sorted(path.name for path in dst.glob("*.parquet")) == [m.data_file for m in done]
    return {marker.name: marker.samples for marker in done}


CUT_IN_TWOS = {"photos-00000": 2, "photos-00001": 2, "photos-00002": 2}


def test_the_rest_of_an_older_cut_is_refused_then_deleted(tmp_path: Path, dst: Path) -> None:
    src = image_folder(tmp_path / "photos")
    run(src, dst, 2)
    assert sizes(dst) == CUT_IN_TWOS
    before = snapshot(dst)
    with pytest.raises(StaleShardError) as caught:
        run(src, dst, 3)
    text = str(caught.value)
    assert "holds 3 shards of another configuration or source; nothing was touched" in text
    assert f"1 shard (photos-00002):\n    source: {src} is cut into fewer shards now" in text
    assert "redo or delete them with --overwrite-stale" in text
    assert snapshot(dst) == before
    run(src, dst, 3, overwrite=True)
    assert sizes(dst) == {"photos-00000": 3, "photos-00001": 3}


def test_deleted_files_take_their_shard_with_them(
    tmp_path: Path, dst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is nothing else to do."""
    src = image_folder(tmp_path / "photos")
    run(src, dst, 2)
    for name in ("0001", "0002"):
        (src / "dog" / f"{name}.jpg").unlink()
    with pytest.raises(StaleShardError, match=r"1 shard \(photos-00002\)"):
        run(src, dst, 2)
    run(src, dst, 2, overwrite=True)
    err = capsys.readouterr().err
    assert "2 shards: 2 done, 1 gone from SRC, to delete at the end" in err
    assert "1 shard deleted that SRC no longer has" in err
    assert sizes(dst) == {"photos-00000": 2, "photos-00001": 2}
    run(src, dst, 2)  # nothing is left to refuse


def test_what_is_planned_or_failed_is_forgotten(
    tmp_path: Path, dst: Path, no_fits: list[str]
) -> None:
    """No data are lost by that, so nobody is asked."""
    src = image_folder(tmp_path / "photos")
    no_fits += CUT_IN_TWOS
    run(src, dst, 2)
    (dst / "photos-00000.failed.json").unlink()
    no_fits.clear()
    run(src, dst, 6)
    assert sizes(dst) == {"photos-00000": 6}
    assert not list(dst.glob("*.failed.json"))


def test_it_stays_while_a_shard_fails(tmp_path: Path, dst: Path, no_fits: list[str]) -> None:
    """Its samples may be nowhere else."""
    src = image_folder(tmp_path / "photos")
    run(src, dst, 2)
    no_fits.append("photos-00001")
    assert run(src, dst, 3, overwrite=True) == 3
    markers = read_markers(str(dst))
    assert list(markers) == list(CUT_IN_TWOS)
    stale = status(read_plan(str(dst)), markers).stale
    assert [shard.name for shard in stale] == ["photos-00001", "photos-00002"]
    assert "cut into fewer" in stale[1].differences[0]
    no_fits.clear()
    run(src, dst, 3, overwrite=True)
    assert sizes(dst) == {"photos-00000": 3, "photos-00001": 3}


def test_no_false_alarm(tmp_path: Path, dst: Path) -> None:
    """Runs over a part of what DST was made of, or over other folders."""
    photos = image_folder(tmp_path / "photos")
    others = image_folder(tmp_path / "b" / "others")
    elsewhere = image_folder(tmp_path / "c" / "others")
    image_folder(tmp_path / "d" / "photos" / "x", per_class=1)
    (listed := tmp_path / "list.txt").write_text("photos\n")
    run(f"{photos}::{others}", dst, 2)
    both = CUT_IN_TWOS | {name.replace("photos", "others"): n for name, n in CUT_IN_TWOS.items()}
    assert sizes(dst) == both
    for src in (photos, others, listed, f"{tmp_path}/{{photos,b/others}}", f"{photos}/cat"):
        run(src, dst, 2)
    for limit in (2, 4):
        run(photos, dst, 2, limit=limit)
    assert sizes(dst) == both | {"cat-00000": 2, "cat-00001": 1}
    (elsewhere / "dog" / "0002.jpg").unlink()
    with pytest.raises(StaleShardError, match="3 shards") as caught:
        run(elsewhere, dst, 2)
    assert "fewer" not in str(caught.value)
    run(elsewhere, dst, 3, overwrite=True)  # of the folder it replaces nobody knows more
    assert sizes(dst)["others-00002"] == 2


def test_images_given_one_by_one_gather_until_their_folder_is_given(
    tmp_path: Path, dst: Path
) -> None:
    src = image_folder(tmp_path / "photos")
    run(f"{src}/cat/0001.jpg", dst, 9)
    run(f"{src}/dog/0002.jpg", dst, 9)
    assert sizes(dst) == {"0001-00000": 1, "0002-00000": 1}
    run(f"{src}/cat/*.jpg", dst, 9)
    one_by_one = {"0001-00000": 1, "0002-00000": 1, "cat-00000": 3}
    assert sizes(dst) == one_by_one
    (src / "cat" / "0001.jpg").rename(tmp_path / "0001.jpg")
    with pytest.raises(StaleShardError, match="cat-00000"):
        run(f"{src}/cat/*.jpg", dst, 9)
    assert sizes(dst) == one_by_one


def test_tars_are_never_judged(tmp_path: Path, dst: Path) -> None:
    commit_shard(dst)
    src = image_folder(tmp_path / "photos")
    run(src, dst, 6)
    markers = read_markers(str(dst))
    assert list(markers) == ["00000000", "photos-00000"]


def test_a_kill_at_any_step_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = image_folder(tmp_path / "photos", per_class=2)
    for step in itertools.count():
        dst = tmp_path / str(step)
        run(src, dst, 2)
        (marker,) = (m for m in read_markers(str(dst)).values() if m.name == "photos-00001")
        assert isinstance(marker, ShardManifest)
        child = os.fork()
        if child == 0:
            try:
                die_at(monkeypatch, step, lambda: os._exit(1))
                remove(str(dst), [marker])
            finally:
                os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        left = read_markers(str(dst)).get("photos-00001")
        if isinstance(left, ShardManifest):  # a reader finds it whole, or not at all
            assert (dst / left.data_file).exists()
        for path in sorted((src / "dog").iterdir()):
            path.rename(tmp_path / path.name)
        run(src, dst, 2, overwrite=True)
        assert sizes(dst) == {"photos-00000": 2}
        assert not list(dst.glob("photos-00001*"))
        for path in tmp_path.glob("*.jpg"):
            path.rename(src / "dog" / path.name)
        if not killed:
            break
    assert step >= 6


def test_what_others_have_made_anew_is_not_removed(dst: Path) -> None:
    old = commit_shard(dst, config_of("webdataset"))
    new = commit_shard(dst, replaces=old)
    failed = FailedShard(
        name="00000000", source_url="x", error="E", message="", fingerprint=new.fingerprint
    )
    for marker in (old, failed):
        assert remove(str(dst), [marker]) == []
    assert read_markers(str(dst)) == {"00000000": new}
    assert remove(str(dst), [new]) == ["00000000"]
    assert snapshot(dst) == {}


def test_only_data_of_that_fingerprint_are_removed(dst: Path) -> None:
    """A tar of the user's may be called as data of a shard are."""
    manifest = commit_shard(dst)
    (dst / "00000000-00000001.tar").touch()
    remove(str(dst), [manifest])
    assert list(snapshot(dst)) == ["00000000-00000001.tar"]
