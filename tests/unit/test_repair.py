"""What repair and retry-failed choose, and the plan they make of it; test_repair.py of the
integration tests runs them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from splatshard.jobs.destination.integrity import orphans
from splatshard.jobs.destination.plan import (
    Marker,
    make_plan,
    plan_from_json,
    plan_lines,
    planned,
    status,
)
from splatshard.jobs.driver.redo import by_recipe, redo, redo_plan
from splatshard.jobs.repair import RepairOptions, to_redo
from splatshard.jobs.retry_failed import failure_counts, samples, worth_retrying
from splatshard.pipeline.source.listing import current, list_shards
from splatshard.schemas.config import ConvertConfig, FitConfig
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.shard import ShardManifest, marker_digest
from tests.make import datacomp_tar, image_folder
from tests.unit.planning import CONFIG, make_failed, make_manifest, make_ref

REFS = [make_ref(name) for name in ("good", "bad", "failed", "corrupt", "missing")]
MARKERS: dict[str, Marker] = {
    "good": make_manifest(REFS[0]),
    "bad": make_manifest(REFS[1]),
    "failed": make_failed(REFS[2]),
    "corrupt": CorruptShardError("not JSON"),
    "elsewhere": make_manifest(make_ref("elsewhere")),
}
SHARDS = planned(REFS, make_plan(REFS, {}, CONFIG, str), CONFIG)


def test_a_plan_to_redo_keeps_the_rest() -> None:
    work = REFS[1:]
    plan = redo_plan(work, {ref.name for ref in work}, SHARDS, MARKERS)
    assert plan.work == tuple(work)
    assert [manifest.name for manifest in plan.done] == ["elsewhere", "good"]
    assert [ref.name for ref in plan.todo] == ["bad", "missing"]
    assert [failed.name for failed in plan.failed] == ["failed"]
    assert plan.corrupt == ("corrupt",)
    bad = MARKERS["bad"]
    assert isinstance(bad, ShardManifest)
    assert plan.replaces == {"bad": marker_digest(bad)}
    assert plan.others == (bad,)


def test_what_is_redone_later_is_not_done_yet() -> None:
    plan = redo_plan(REFS[4:], {"bad", "missing"}, SHARDS, MARKERS)
    assert [manifest.name for manifest in plan.done] == ["elsewhere", "good"]
    assert plan.replaces == {}
    assert [manifest.name for manifest in plan.others] == ["bad"]


def test_stale_shards_are_neither_done_nor_redone() -> None:
    stale = make_manifest(REFS[0], ConvertConfig(fit=FitConfig(steps=300)))
    plan = redo_plan(REFS[4:], {"missing"}, SHARDS, MARKERS | {"good": stale})
    assert [manifest.name for manifest in plan.done] == ["bad", "elsewhere"]
    assert plan.others == (stale,)


def test_a_source_whose_address_was_a_secret_cannot_be_redone(tmp_path: Path) -> None:
    """`_plan.json` does not keep the signature; nothing is begun."""
    url = "https://host/a.tar?Policy=hunter2"
    refs = [make_ref("a"), dataclasses.replace(make_ref("b"), urls=(url,))]
    shards = planned(refs, make_plan(refs, {}, CONFIG, str), CONFIG)
    shards = plan_from_json("".join(plan_lines(shards)), "_plan.json")
    options = RepairOptions(dst=str(tmp_path))
    with pytest.raises(UsageError, match=r"source of b is https://host/a\.tar\?\*\*\*, .*convert"):
        redo(str(tmp_path), ["a", "b"], shards, options, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_sources_in_the_destination_are_left_alone(tmp_path: Path) -> None:
    refs = list_shards(f"{datacomp_tar(tmp_path / 'a.tar', 1)}")
    shards = planned(refs, make_plan(refs, {}, CONFIG, str), CONFIG)
    with pytest.raises(UsageError, match=r"a\.tar of SRC lies in DST .*: choose another DST"):
        redo(str(tmp_path), ["a"], shards, RepairOptions(dst=str(tmp_path)), 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_each_recipe_gets_its_configuration() -> None:
    other = ConvertConfig(fit=FitConfig(steps=300))
    refs = [make_ref("x"), make_ref("y")]
    shards = SHARDS | planned(refs, make_plan(refs, {}, other, str), other)
    groups = list(by_recipe({"y", "good", "x", "missing"}, shards, "cpu"))
    assert groups == [
        (dataclasses.replace(CONFIG, backend="cpu"), ["good", "missing"]),
        (dataclasses.replace(other, backend="cpu"), ["x", "y"]),
    ]
    foreign = {
        name: dataclasses.replace(shard, recipe=shard.recipe | {"stages_version": 0})
        for name, shard in SHARDS.items()
    }
    with pytest.raises(UsageError, match="stages_version 0"):
        list(by_recipe({"good"}, foreign, "auto"))


def test_quick_looks_at_sizes(tmp_path: Path) -> None:
    sizes = {"good": 10, "bad": 9}
    for name, size_bytes in sizes.items():
        (tmp_path / f"{name}.parquet").write_bytes(bytes(size_bytes))
    state = status(SHARDS, MARKERS)
    assert to_redo(str(tmp_path), state, quick=True) == {
        "bad": "bad.parquet has 9 bytes, its marker says 10",
        "corrupt": "not JSON",
        "elsewhere": "elsewhere.parquet is gone",
        "failed": "failed: cut off",
        "missing": "missing",
    }


def test_orphans_are_data_files_that_no_marker_can_mean() -> None:
    files = [
        "good.parquet",
        "good-00000000.parquet",
        "gone-00000000-0123456789.tar",
        "corrupt-00000000.parquet",
        "mine.parquet",
        "_plan.json",
        "good.json",
    ]
    assert orphans(files, MARKERS) == [
        "good-00000000.parquet",
        "gone-00000000-0123456789.tar",
        "mine.parquet",
    ]


def test_only_failed_shards_and_samples_worth_it_are_retried() -> None:
    good = MARKERS["good"]
    assert isinstance(good, ShardManifest)
    killed = dataclasses.replace(good, name="killed", counts={"ok": 2, "quarantined": 1})
    markers = MARKERS | {"killed": killed}
    assert worth_retrying(markers, ("quarantined", "fit_diverged")) == {"failed", "killed"}
    assert worth_retrying(markers, ("no_image",)) == {"failed", "good", "bad", "elsewhere"}
    assert samples(markers, {"killed", "good"}, ("quarantined", "no_image")) == {
        "quarantined": 1,
        "no_image": 1,
    }
    names = {"killed", "failed"}
    assert (
        failure_counts(markers, names, ("quarantined",)) == "1 failed shard, 1 quarantined sample"
    )
    assert failure_counts(markers, {"good"}, ("quarantined",)) == "nothing"


# Sources as they are now


def test_sources_that_have_not_changed_stay_as_they_were(tmp_path: Path) -> None:
    for i in range(9):
        datacomp_tar(tmp_path / "tars" / f"{i:08d}.tar", 1)
    image_folder(tmp_path / "images", per_class=12)
    refs = list_shards(f"{tmp_path}/tars::{tmp_path}/images", samples_per_shard=7)
    assert current(refs) == refs


def test_changes_of_sources_are_seen(tmp_path: Path) -> None:
    tar = datacomp_tar(tmp_path / "a.tar", 1)
    folder = image_folder(tmp_path / "images", per_class=2)
    refs = list_shards(f"{tar}::{folder}")
    os.utime(tar, ns=(10**9, 10**9))
    with (folder / "cat" / "0000.jpg").open("ab") as image:
        image.write(b"more")
    now = current(refs)
    assert now == list_shards(f"{tar}::{folder}")
    assert now[0].etag == "1000000"
    assert now[1].size_bytes == refs[1].size_bytes + 4
    tar.unlink()
    assert current(refs)[0] == refs[0]
