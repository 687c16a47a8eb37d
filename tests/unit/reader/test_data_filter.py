"""Filters, several sources and mixtures, and arguments that make no sense."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.shards import write
from splatshard.schemas.errors import (
    UsageError,
)
from tests.rows import FORMATS, WIDTH
from tests.splat_shards import N, commit, keys_of, make_dataset, rows_of
from tests.unit.reader.conftest import Rows


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "conditions",
    [
        [("psnr", ">=", 27.1)],
        [("psnr", "==", 26.1)],
        [("label", "<", 2), ("psnr", ">", 25.5)],
        [("caption_length", ">", 5)],
        [("caption_length", "==", 0), ("label", "!=", 0)],
        [("width", "<=", WIDTH), ("num_gaussians", ">=", N)],
        [("label", ">=", 3003), ("label", "<=", 3007)],
    ],
)
def test_a_filter_leaves_what_fulfils_all_its_conditions(
    shards: dict[str, tuple[str, Rows]], format: str, conditions: list[tuple[str, str, float]]
) -> None:
    """Nulls fulfil none; PSNR is compared as stored, a float32, in both formats."""
    dst, rows = shards[format]

    def passes(row: dict[str, Any]) -> bool:
        values = row | {"psnr": float(torch.tensor(row["psnr"])), "num_gaussians": N}
        values["caption_length"] = None if row["caption"] is None else len(row["caption"])
        return all(
            values[column] is not None and eval(f"a {op} b", {"a": values[column], "b": value})
            for column, op, value in conditions
        )

    expected = sorted(key for key, row in rows.items() if passes(row))
    if not expected:
        with pytest.raises(UsageError, match="no sample"):
            SplatDataset(dst, batch_size=2, filter=conditions)
        return
    dataset = SplatDataset(dst, batch_size=2, drop_last=False, filter=conditions, lanes=2)
    assert sorted(keys_of(dataset)) == expected
    assert len(dataset) == -(-len(expected) // 2)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["psnr > 3"], "give \\(column, operator, number\\)"),
        ([("sharpness", ">", 3)], "column 'sharpness'.*caption_length"),
        ([("psnr", "=>", 3)], "operator '=>'"),
        ([("psnr", ">", "3")], "psnr with '3'"),
        ([("psnr", ">", float("nan"))], "psnr with nan"),
        ([("psnr_400", ">", 3)], "psnr_400.*does not have"),
        ([("psnr", ">", 99)], "no sample of"),
    ],
)
def test_a_filter_that_makes_no_sense(dst: str, conditions: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SplatDataset(dst, batch_size=2, filter=conditions)


def test_row_groups_of_which_a_filter_leaves_nothing_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(write, "ROW_GROUP_BYTES", 1000)
    commit(str(tmp_path), "a", rows_of(0, 40))
    read = []
    original = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, group: int, *args: Any, **kwargs: Any) -> Any:
        read.append(group)
        return original(self, group, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    dataset = SplatDataset(
        str(tmp_path), batch_size=1, filter=[("label", ">=", 4), ("label", "<", 8)]
    )
    assert sorted(keys_of(dataset)) == ["000000004", "000000006"]
    assert 0 < len(read) < 4


def test_several_sources_are_one_pool(tmp_path: Path) -> None:
    """Also where shards of both have one name; formats may differ."""
    a = make_dataset(str(tmp_path / "a"), [5, 6], "parquet", first=0)
    b = make_dataset(str(tmp_path / "b"), [9], "webdataset", first=5)
    make_rows_named = {"a/00000.json", "b/00005.json"}
    assert all((tmp_path / name).exists() for name in make_rows_named)
    joined = SplatDataset(f"{tmp_path}/a::{tmp_path}/b/", batch_size=2, drop_last=False)
    listed = SplatDataset([f"{tmp_path}/a", f"{tmp_path}/b"], batch_size=2, drop_last=False)
    keys = keys_of(joined)
    assert sorted(keys) == sorted([*a, *b])
    assert keys_of(listed) == keys
    parts = [SplatDataset(f"{tmp_path}/{name}", batch_size=2).state_dict() for name in "ab"]
    assert joined.state_dict()["data"] == "+".join(state["data"] for state in parts)


def test_the_order_of_a_list_does_not_matter(tmp_path: Path) -> None:
    """Each rank may list the files in another one: they read some twice and others never."""
    make_dataset(str(tmp_path / "a"), [5, 6, 7])
    make_dataset(str(tmp_path / "b"), [9], first=5)
    src = [f"{tmp_path}/a/0000{i}.parquet" for i in range(3)] + [f"{tmp_path}/b"]
    whole = SplatDataset(src, batch_size=2)
    keys, state = keys_of(whole), whole.state_dict()
    for other in (src[::-1], "::".join(src[2:] + src[:2])):
        dataset = SplatDataset(other, batch_size=2)
        assert keys_of(dataset) == keys
        dataset.load_state_dict(state)
    in_order = keys_of(SplatDataset(src[::-1], batch_size=1, shuffle=False))
    assert in_order == sorted(in_order)
    with pytest.raises(UsageError, match="saved with data"):
        SplatDataset(src[:3], batch_size=2).load_state_dict(state)


def test_a_mixture_takes_its_shares_and_resumes(tmp_path: Path) -> None:
    a = make_dataset(str(tmp_path / "a"), [20, 20], first=0)
    make_dataset(str(tmp_path / "b"), [9], first=5)
    weights = {f"{tmp_path}/a": 1, f"{tmp_path}/b": 3}

    def dataset(**options: Any) -> SplatDataset:
        return SplatDataset(weights, **({"batch_size": 2, "epoch_samples": 160} | options))

    batches = list(dataset())
    from_a = sum(key in a for key in keys_of(batches))
    assert (len(batches), from_a) == (80, 40)
    resumed = dataset(world_size=2, rank=1, batch_size=4)
    resumed.load_state_dict(dataset().state_after(batches[11]))
    whole = keys_of(batches)
    assert keys_of(resumed) == [whole[i + j] for i in range(28, 160, 8) for j in range(4)]
    other = SplatDataset({**weights, f"{tmp_path}/a": 2}, batch_size=2, epoch_samples=160)
    with pytest.raises(UsageError, match="saved with weights"):
        other.load_state_dict(dataset().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2, "rank": 1}, "rank is 1"),
        ({"batch_size": 2, "rank": -1}, "rank is -1"),
        ({"batch_size": 2, "lanes": 0}, "lanes is 0"),
        ({"batch_size": 2, "shuffle_shards": 1.5}, "shuffle_shards is 1.5"),
        ({"batch_size": 2, "epoch_samples": 9}, "epoch_samples is 9"),
        (
            {"batch_size": 11, "rank": 0, "world_size": 4},
            "batch_size is 11 on each of 4 ranks, but .* has only 34 samples an epoch.*: "
            "choose at most 34 on all ranks together, or drop_last=False",
        ),
    ],
)
def test_arguments_that_make_no_sense(dst: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SplatDataset(dst, **options)


def test_sources_that_make_no_sense(dst: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no splat shards"):
        SplatDataset(str(tmp_path), batch_size=2)
    with pytest.raises(UsageError, match="weight"):
        SplatDataset({dst: 0.0}, batch_size=2)
    with pytest.raises(UsageError, match="weight"):
        SplatDataset({}, batch_size=2)
    with pytest.raises(UsageError, match="names no source"):
        SplatDataset([], batch_size=2)
    with pytest.raises(UsageError, match="one per lane"):
        SplatDataset({dst: 1.0}, batch_size=2, lanes=1000)


def test_failed_shards_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from splatshard.pipeline.shards.commit import mark_failed
    from tests.rows import config_of, make_ref

    rows = make_dataset(str(tmp_path), [5])
    mark_failed(str(tmp_path), make_ref("bad"), config_of(), ValueError("cut"))
    with caplog.at_level(logging.WARNING):
        dataset = SplatDataset(str(tmp_path), batch_size=1)
    assert "1 shards failed and are not read, first of them bad" in caplog.text
    assert sorted(keys_of(dataset)) == sorted(rows)
