"""The look at all shards before the first step: what is wrong in the last one is named at once."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.train import check, distributed
from splatshard.pipeline.train.batches import open_dataset
from splatshard.pipeline.train.check import check_data
from splatshard.pipeline.train.distributed import World, on_rank_zero
from splatshard.pipeline.train.loop import train
from splatshard.schemas.errors import CorruptShardError, SplatshardError, UsageError
from splatshard.schemas.splats import TEACHER
from splatshard.schemas.train import TrainConfig
from tests.splat_shards import commit, make_dataset, rows_of
from tests.training import (
    WIDTH,
    events,
    images_config,
    rewrite,
    toy_config,
    with_metadata,
    without_teacher,
)

HERE = World(0, 1, torch.device("cpu"))


def changed(shards: Path, tmp_path: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """A copy, of whose last shard `change` has changed the table."""
    shutil.copytree(shards, tmp_path / "changed")
    rewrite(tmp_path / "changed/splats", lambda t: change(t) if len(t) == 10 else t)
    return tmp_path / "changed"


def with_values(name: str, values: dict[int, Any]) -> Callable[[pa.Table], pa.Table]:
    """Puts `values` into rows of the column `name`."""

    def change(table: pa.Table) -> pa.Table:
        column = [values.get(i, v) for i, v in enumerate(table[name].to_pylist())]
        number = table.schema.get_field_index(name)
        field = table.schema.field(name)
        return table.set_column(number, field, pa.array(column, field.type))

    return change


def look(config: TrainConfig) -> None:
    check_data(open_dataset(config, HERE), config, HERE)


def embedding(value: float, width: int = WIDTH) -> bytes:
    return np.full(width, value, "<f2").tobytes()


@pytest.mark.parametrize(
    ("stage", "column", "values", "message"),
    [
        ("classify", "label", {3: None, 5: -1}, r"000083 has no label, .*\(2 of .*data.filter"),
        ("classify", "label", {3: 24}, r"000083 has the label 24, and model.num_classes is 24"),
        ("classify", "label", {3: -7}, r"000083 has the label -7"),
        ("contrast", "caption", {2: None, 3: " \n"}, r"000082 has no caption, .*\(2 of .*=keep"),
        ("distill", TEACHER, {4: None}, r"000084 has no teacher's embedding"),
        ("distill", TEACHER, {4: embedding(0.25)[:-2]}, r"000084 .* of another length"),
        ("distill", TEACHER, {4: embedding(0)}, r"000084 has .* zero or not finite"),
        ("distill", TEACHER, {4: embedding(np.nan)}, r"000084 has .* zero or not finite"),
    ],
)
def test_a_sample_of_the_last_shard(
    shards: Path, tmp_path: Path, stage: str, column: str, values: dict[int, Any], message: str
) -> None:
    """Shard, key, how many there are, remedy; nothing was begun."""
    bad = changed(shards, tmp_path, with_values(column, values))
    config = toy_config(bad, tmp_path / "run", stage)
    with pytest.raises(UsageError, match=rf"00002-.*\.parquet: sample {message}") as raised:
        train(config)
    assert f"({len(values)} of 90 samples are so, in 1 of 3 shards): " in str(raised.value)
    assert events(tmp_path / "run") == []


def test_faults_are_counted_over_all_shards(shards: Path, tmp_path: Path) -> None:
    """Those of one kind; labels that are missing and labels that are too large are two."""
    shutil.copytree(shards, tmp_path / "changed")
    rewrite(tmp_path / "changed/splats", with_values("label", {0: None, 1: 99}))
    config = toy_config(tmp_path / "changed", tmp_path / "run")
    with pytest.raises(UsageError, match=r"no label.*\(3 of 90 samples are so, in 3 of 3 shards"):
        look(config)


@pytest.mark.parametrize(
    ("stage", "column", "wanted"),
    [("classify", "label", r"labels \(class folders"), ("contrast", "caption", r"captions \(.txt")],
)
def test_no_filter_is_proposed_that_would_leave_nothing(
    shards: Path, tmp_path: Path, stage: str, column: str, wanted: str
) -> None:
    shutil.copytree(shards, tmp_path / "changed")
    rewrite(tmp_path / "changed/splats", with_values(column, dict.fromkeys(range(90))))
    with pytest.raises(UsageError, match=rf"90 of 90 .*: use a source with {wanted}") as raised:
        look(toy_config(tmp_path / "changed", tmp_path / "run", stage))
    assert "data.filter" not in str(raised.value)
    assert "keep" not in str(raised.value)


def test_what_a_filter_leaves_out_may_be_anything(shards: Path, tmp_path: Path) -> None:
    bad = changed(shards, tmp_path, with_values("label", {3: None, 4: 77}))
    config = toy_config(
        bad, tmp_path / "run", data__filter=(("label", ">=", 0), ("label", "<", 70))
    )
    look(config)
    bad = toy_config(bad, tmp_path / "run", data__filter=(("label", ">=", 0),))
    with pytest.raises(UsageError, match=r"label 77.*\(1 of 89 samples"):
        look(bad)


def test_rows_that_were_skipped_may_be_anything(tmp_path: Path, shards: Path) -> None:
    rows = rows_of(0, 5)
    assert [row["status"] == "ok" for row in rows] == [True, True, True, False, True]
    rows[3]["label"] = 99
    commit(str(tmp_path), "00000", rows)
    config = toy_config(shards, tmp_path / "run", data__src=str(tmp_path), data__batch_size=2)
    look(config)
    rows[4]["label"] = 98
    commit(str(tmp_path), "00001", rows)
    with pytest.raises(UsageError, match=r"00001-.* the label 98, .*\(1 of 8 samples"):
        look(config)


def test_empty_captions_that_are_kept(shards: Path, tmp_path: Path) -> None:
    bad = changed(shards, tmp_path, with_values("caption", {0: None}))
    look(toy_config(bad, tmp_path / "run", "contrast", data__empty_captions="keep"))


# Teachers and cutoffs


def test_a_shard_without_embeddings(shards: Path, tmp_path: Path) -> None:
    """As after `splatshard embed` was interrupted."""
    bad = changed(shards, tmp_path, without_teacher)
    with pytest.raises(UsageError) as raised:
        look(toy_config(bad, tmp_path / "run", "distill"))
    text = str(raised.value)
    assert "differ in their teacher: 2 of 3 shards have 16 numbers of toy, first of them " in text
    assert "1 of 3 shards have no teacher's embeddings, first of them " in text
    assert f"{bad}/splats/00002-" in text
    assert f"splatshard embed {bad}/splats --teacher MODEL" in text


def test_a_shard_of_another_teacher(shards: Path, tmp_path: Path) -> None:
    bad = changed(
        shards,
        tmp_path,
        lambda t: with_metadata(t, {TEACHER: {"model": "b", "dim": 8, "weights": "ab" * 32}}),
    )
    with pytest.raises(UsageError, match=r"8 numbers of b, weights abababababab, .*/00002-"):
        look(toy_config(bad, tmp_path / "run", "distill"))


def test_shards_of_two_cutoffs_in_one_folder(shards: Path, tmp_path: Path) -> None:
    bad = changed(shards, tmp_path, lambda t: with_metadata(t, {"cutoff": 2.5}))
    with pytest.raises(UsageError, match=r"cutoff: 2 of 3 .* 3\.0, .*; 1 of 3 .* 2\.5, .*00002-"):
        look(toy_config(bad, tmp_path / "run"))


def test_an_encoder_of_another_width(shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, tmp_path / "run", "distill")
    encoder = replace(config.model.encoder, width=32)
    config = replace(config, model=replace(config.model, encoder=encoder))
    with pytest.raises(UsageError, match="embeddings of 16 numbers, the encoder makes 32: set mod"):
        look(config)


# Files


def test_tars_are_known_by_their_markers(shards: Path, tmp_path: Path) -> None:
    """Their labels are not looked at (0, 1, 1000 ... here), the constants in the markers are."""
    make_dataset(str(tmp_path), [8, 8], format="webdataset")
    config = toy_config(shards, tmp_path / "run", data__src=str(tmp_path), data__batch_size=4)
    look(config)
    distill = replace(config, stage="distill")
    with pytest.raises(UsageError, match="no teacher's embeddings"):
        look(distill)
    marker = tmp_path / "00001.json"
    text = json.loads(marker.read_text())
    text["inputs"]["recipe"]["fit"]["cutoff"] = 2.5
    marker.write_text(json.dumps(text))
    with pytest.raises(UsageError, match=r"1 of 2 shards have 2\.5, first of them .*00001-.*tar"):
        look(config)


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_file_that_is_gone_or_cut(shards: Path, tmp_path: Path, format: str) -> None:
    make_dataset(str(tmp_path), [8, 8], format=format)
    config = toy_config(shards, tmp_path / "run", data__src=str(tmp_path))
    (path,) = tmp_path.glob("00001-*")
    dataset = SplatDataset(str(tmp_path), batch_size=2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match=r"00001-.* its marker says .*splatshard repair"):
        check_data(dataset, config, HERE)
    path.unlink()
    with pytest.raises(CorruptShardError, match=r"00001-.* is missing"):
        check_data(dataset, config, HERE)


# When


def test_a_run_that_goes_on_does_not_look_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(check, "look_through", lambda *a: looked.append(a))
    train(toy_config(shards, tmp_path, steps=2))
    train(toy_config(shards, tmp_path, steps=3))
    assert len(looked) == 1


def test_all_processes_hear_of_it(shards: Path, tmp_path: Path) -> None:
    """Rank 0 looks, and the others raise what it found."""
    place = changed(shards, tmp_path, with_values("label", {3: 24}))
    config = toy_config(place, tmp_path)
    dataset = open_dataset(config, HERE)
    ranks = two_ranks()
    for rank in ranks:
        with pytest.raises(UsageError, match=r"000083 has the label 24"):
            check_data(dataset, config, rank)
        shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True)
class Told(World):
    """One of two ranks that are here one after the other: `said` is what rank 0 told."""

    said: list[bytes]

    def same(self, value: Any) -> Any:
        if self.rank:
            assert value is None, "only rank 0 has something to tell"
            return pickle.loads(self.said.pop(0))
        self.said.append(pickle.dumps(value))
        return value


def two_ranks() -> list[Told]:
    said: list[bytes] = []
    return [Told(rank, 2, torch.device("cpu"), said) for rank in range(2)]


@pytest.mark.parametrize("make", [toy_config, images_config])
def test_only_rank_0_opens_the_sources(shards: Path, tmp_path: Path, make: Any) -> None:
    """It counts and filters. The other one, when all is gone, still knows what there was."""
    place = shutil.copytree(shards, tmp_path / "copy")
    config = make(place, tmp_path / "run", data__filter=(("label", "<", 12),))
    alone = open_dataset(config, HERE).sources[0]
    found = []
    for rank in two_ranks():
        found.append(open_dataset(config, rank))
        shutil.rmtree(place, ignore_errors=True)
        assert not rank.said or rank.rank == 0
    for dataset in found:
        (source,) = dataset.sources
        assert (source.shards, source.content) == (alone.shards, alone.content)
        assert source.counts.tolist() == alone.counts.tolist()
        assert 0 < source.counts.sum() < 90
        assert {i: kept.tolist() for i, kept in source.kept.items()} == {
            i: kept.tolist() for i, kept in alone.kept.items()
        }
    assert [dataset.rank for dataset in found] == [0, 1]


@pytest.mark.parametrize("make", [toy_config, images_config])
def test_no_rank_opens_what_rank_0_cannot(shards: Path, tmp_path: Path, make: Any) -> None:
    config = make(shards, tmp_path, data__src=f"{tmp_path}/later")
    found = []
    for rank in two_ranks():
        with pytest.raises(SplatshardError, match="later") as e:
            open_dataset(config, rank)
        found.append(e.value)
        if not (tmp_path / "later").exists():
            part = "splats" if make is toy_config else "images"
            shutil.copytree(shards / part, tmp_path / "later")
    assert (type(found[0]), str(found[0])) == (type(found[1]), str(found[1]))


def test_who_waits_is_told_that_rank_0_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: a collective that waits for too long ends the run."""
    monkeypatch.setattr(distributed, "TELL_EVERY_S", 0.001)
    first, second = two_ranks()

    def find() -> str:
        while len(first.said) < 3:
            time.sleep(0.001)
        return "found"

    assert on_rank_zero(first, find) == "found"
    assert len(first.said) >= 3 + 2
    assert on_rank_zero(second, find) == "found"
    assert not second.said


def test_it_says_how_far_it_is(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(check, "REPORT_AFTER_S", -1.0)
    look(toy_config(shards, tmp_path))
    assert "before the first step: 3 of 3 shards looked at" in caplog.text
