"""SplatDataset: the samples of real shards of both formats, each once, as they were packed."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splatshard.pipeline.codec.pack import unpack_row
from splatshard.pipeline.data import SplatDataset, TrainBatch
from splatshard.pipeline.data.batch import values_of
from splatshard.pipeline.data.read_parquet import teacher_of
from splatshard.pipeline.shards import write
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    SourceError,
    UnavailableError,
    UsageError,
)
from splatshard.schemas.splats import CODECS
from tests.rows import FORMATS, HEIGHT, WIDTH, metadata_of
from tests.splat_shards import N, commit, forge, keys_of, make_dataset, rows_of, splat_config, vouch

COUNTS = [10, 7, 1, 16, 9]
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Rows]]:
    """A destination and its ok rows by key, for each format."""
    found = {}
    for format in FORMATS:
        dst = str(tmp_path_factory.mktemp(format))
        found[format] = dst, make_dataset(dst, COUNTS, format)
    return found


@pytest.fixture(scope="module")
def dst(shards: dict[str, tuple[str, Rows]]) -> str:
    return shards["parquet"][0]


@pytest.fixture(scope="module")
def rows(shards: dict[str, tuple[str, Rows]]) -> Rows:
    return shards["parquet"][1]


def same(a: TrainBatch, b: TrainBatch) -> bool:
    tensors = ("heights", "widths", "labels", "valid")
    splats = ("means", "cholesky", "colors", "mask")
    return (
        a.keys == b.keys
        and a.captions == b.captions
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
        and all(torch.equal(getattr(a.splats, name), getattr(b.splats, name)) for name in splats)
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("lanes", [1, 3])
def test_every_ok_row_once_and_as_it_was_packed(
    shards: dict[str, tuple[str, Rows]], format: str, lanes: int
) -> None:
    dst, rows = shards[format]
    dataset = SplatDataset(dst, batch_size=4, drop_last=False, lanes=lanes)
    assert len(dataset) == -(-len(rows) // 4)
    batches = list(dataset)
    assert sorted(keys_of(batches)) == sorted(rows)
    for batch in batches:
        assert batch.splats.means.dtype == torch.float32
        assert (batch.heights.tolist(), batch.widths.tolist()) == ([HEIGHT] * 4, [WIDTH] * 4)
        for i, key in enumerate(batch.keys):
            row = rows[key]
            expected = unpack_row(row, metadata_of(splat_config()))
            for name in ("means", "cholesky", "colors", "mask"):
                assert torch.equal(getattr(batch.splats, name)[i], getattr(expected, name)[0])
            assert batch.captions[i] == row["caption"]
            assert batch.labels[i] == (-1 if row["label"] is None else row["label"])


def test_both_formats_give_the_same_batches(shards: dict[str, tuple[str, Rows]]) -> None:
    """So does reading on a thread ahead, or not."""
    sets = [
        SplatDataset(shards[f][0], batch_size=4, seed=3, prefetch_windows=ahead)
        for f, ahead in (("parquet", 1), ("webdataset", 2), ("parquet", 0))
    ]
    for batches in zip(*sets, strict=True):
        assert same(batches[0], batches[1])
        assert same(batches[0], batches[2])


def test_unshuffled_is_in_order_of_the_shards(dst: str, rows: Rows) -> None:
    dataset = SplatDataset(dst, batch_size=5, shuffle=False, drop_last=False)
    assert keys_of(dataset) == sorted(rows)


def test_samples_of_different_sizes_are_padded(tmp_path: Path) -> None:
    """To the batch's largest, or to the number asked for; padding is a masked unit Gaussian."""
    small, large = rows_of(0, 3, n=2), rows_of(1, 3, n=5)
    commit(str(tmp_path), "a", small + large, splat_config(n=5))
    (batch,) = SplatDataset(str(tmp_path), batch_size=6)
    counts = [2 if key < "000001" else 5 for key in batch.keys]
    assert batch.splats.mask.shape == (6, 5)
    assert batch.splats.num_gaussians.tolist() == counts
    padding = ~batch.splats.mask
    assert (batch.splats.cholesky[padding] == torch.tensor([1.0, 0, 1])).all()
    assert not batch.splats.means[padding].any()
    assert not batch.splats.colors[padding].any()
    (tiny,) = SplatDataset(str(tmp_path), batch_size=3, shuffle=False, filter=[("label", "<", 9)])
    assert tiny.splats.mask.shape == (3, 2)
    (wide,) = SplatDataset(str(tmp_path), batch_size=3, num_gaussians=5, filter=[("label", "<", 9)])
    assert wide.splats.mask.shape == (3, 5)


@pytest.mark.parametrize("asked", [N - 1, N + 1])
def test_a_budget_that_is_not_there(dst: str, asked: int) -> None:
    with pytest.raises(UsageError, match=f"num_gaussians is {asked}.*up to {N}.*convert again"):
        SplatDataset(dst, batch_size=2, num_gaussians=asked)
    assert len(SplatDataset(dst, batch_size=2, num_gaussians=N))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("codec", CODECS)
def test_a_nested_shard_serves_each_of_its_budgets(tmp_path: Path, format: str, codec: str) -> None:
    budgets = (4, 9, 12)
    rows = make_dataset(str(tmp_path), [3, 1], format, codec, budgets=budgets)
    metadata = metadata_of(splat_config(format, codec, 12, budgets))
    for budget in (*budgets, None):
        n = budget or 12
        batches = list(SplatDataset(str(tmp_path), batch_size=4, num_gaussians=budget))
        assert sum(map(len, batches)) == len(rows) // 4 * 4
        for batch in batches:
            values = values_of(batch.splats)
            assert values.shape == (4, n, 8)
            for key, found in zip(batch.keys, values, strict=True):
                expected = unpack_row(rows[key], metadata, n)
                parts = (expected.means, expected.cholesky, expected.colors)
                torch.testing.assert_close(found, torch.cat(parts, -1)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match=r"num_gaussians is 5.*budgets, 4, 9, 12"):
        SplatDataset(str(tmp_path), batch_size=4, num_gaussians=5)


def test_a_small_budget_reads_only_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(str(tmp_path), [4], budgets=(4, 9, 12))
    asked = []
    original = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, group: int, columns: list[str], **kwargs: Any) -> Any:
        asked.append([name for name in columns if name.startswith("splats")])
        return original(self, group, columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    list(SplatDataset(str(tmp_path), batch_size=1, num_gaussians=9, prefetch_windows=0))
    assert asked == [["splats", "splats_9"]]


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_golden_shards_of_version_1_read(tmp_path: Path, suffix: str) -> None:
    """As their rows are read one by one."""
    golden = Path(__file__).resolve().parents[1] / "data" / f"golden-v1.{suffix}"
    shutil.copy(golden, tmp_path)
    vouch(str(tmp_path), golden.name)
    metadata = shard_metadata_of(str(golden))
    rows = {row["key"]: row for row in read_rows(str(golden)) if row["status"] == "ok"}
    batches = list(SplatDataset(str(tmp_path), batch_size=1))
    assert sorted(keys_of(batches)) == sorted(rows)
    for batch in batches:
        expected = unpack_row(rows[batch.keys[0]], metadata)
        torch.testing.assert_close(batch.splats.means, expected.means)
        torch.testing.assert_close(batch.splats.colors, expected.colors)


def test_epochs_differ_and_repeat(dst: str) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    first, second = keys_of(dataset), keys_of(dataset)  # one after the other by itself
    assert (first != second, dataset.epoch) == (True, 2)
    dataset.set_epoch(0)
    assert keys_of(dataset) == first
    dataset.set_epoch(1)
    assert keys_of(dataset) == second
    assert keys_of(SplatDataset(dst, batch_size=4, seed=1)) != first


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_get_as_many_batches_and_share_the_samples(
    dst: str, rows: Rows, drop_last: bool
) -> None:
    ranks = [
        list(SplatDataset(dst, batch_size=4, rank=r, world_size=3, drop_last=drop_last))
        for r in range(3)
    ]
    lengths = {len(batches) for batches in ranks}
    assert lengths == {len(rows) // 12 if drop_last else -(-len(rows) // 12)}
    keys = [key for batches in ranks for key in keys_of(batches)]
    assert len(keys) == len(set(keys)) == (len(rows) // 12 * 12 if drop_last else len(rows))
    for batches in ranks:
        assert all(len(batch) == 4 == len(batch.keys) for batch in batches)
    last = [int(batches[-1].valid.sum()) for batches in ranks]
    assert last == ([4, 4, 4] if drop_last else [3, 3, 4])


def test_ranks_without_a_sample_of_the_last_step_get_a_batch_all_the_same(tmp_path: Path) -> None:
    commit(str(tmp_path), "a", rows_of(0, 3))
    for rank in range(4):
        (batch,) = SplatDataset(
            str(tmp_path), batch_size=2, rank=rank, world_size=4, drop_last=False
        )
        assert (len(batch), int(batch.valid.sum())) == (2, 1 if rank else 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)),
        max_size=4,
    ),
    st.integers(0, 99),
)
def test_any_sequence_of_interrupts_and_resizes_sees_each_sample_once(
    shards: dict[str, tuple[str, Rows]], runs: list[tuple[int, int, int, int]], seed: int
) -> None:
    """Batch size, ranks and lanes change; the state travels as JSON."""
    dst, rows = shards["parquet"]
    seen: list[str] = []
    state = None
    for batch_size, world_size, lanes, steps in [*runs, (3, 2, 1, 99)]:
        after = state
        for rank in range(world_size):
            dataset = SplatDataset(
                dst,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                lanes=lanes,
                drop_last=False,
                seed=seed,
                prefetch_windows=0,
            )
            if state is not None:
                dataset.load_state_dict(json.loads(json.dumps(state)))
            for _, batch in zip(range(steps), dataset, strict=False):
                seen += keys_of([batch])
                after = dataset.state_after(batch)
                assert after == dataset.state_dict()
        state = after
    assert sorted(seen) == sorted(rows)
    assert (state["epoch"], state["samples"]) == (0, len(rows))


def test_an_iterator_given_up_does_not_move_the_dataset(dst: str) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    whole = keys_of(SplatDataset(dst, batch_size=4))
    next(iter(dataset))
    assert dataset.state_dict()["samples"] == 4
    assert keys_of(dataset) == whole


@pytest.mark.parametrize("drop_last", [True, False])
def test_after_the_last_step_nothing_of_the_epoch_is_left(dst: str, drop_last: bool) -> None:
    """Not for fewer ranks either, which could fill a step with what was dropped."""
    dataset = SplatDataset(dst, batch_size=4, world_size=4, drop_last=drop_last)
    batches = iter(dataset)
    (*_, last) = (next(batches) for _ in range(len(dataset)))
    resumed = SplatDataset(dst, batch_size=1, drop_last=drop_last)
    resumed.load_state_dict(dataset.state_after(last))
    resumed.set_epoch(0)
    assert len(resumed) == 0
    assert keys_of(resumed) == []
    assert resumed.epoch == 1
    assert keys_of(resumed)


def test_set_epoch_keeps_what_a_state_says_of_that_epoch(dst: str) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    whole = keys_of(dataset)
    dataset.set_epoch(0)
    batch = next(iter(dataset))
    resumed = SplatDataset(dst, batch_size=4, lanes=2)
    resumed.load_state_dict(dataset.state_after(batch))
    resumed.set_epoch(0)
    assert len(resumed) == len(whole) // 4 - 1
    assert keys_of(resumed) == whole[4:]
    assert resumed.state_dict()["lanes"] == 2  # the next epoch is its own


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("seed", {"seed": 1}),
        ("shuffle", {"shuffle": False}),
        ("shuffle_shards", {"shuffle_shards": 3}),
        ("filter", {"filter": [("psnr", ">", 26)]}),
    ],
)
def test_a_state_of_other_settings_is_refused(
    dst: str, field: str, options: dict[str, Any]
) -> None:
    state = SplatDataset(dst, batch_size=4).state_dict()
    with pytest.raises(UsageError, match=f"saved with {field} "):
        SplatDataset(dst, batch_size=4, **options).load_state_dict(state)


def test_a_state_of_other_data_is_refused(dst: str, tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [6, 6])
    state = SplatDataset(dst, batch_size=4).state_dict()
    with pytest.raises(UsageError, match="saved with data "):
        SplatDataset(str(tmp_path), batch_size=4).load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"samples": -1},
        {"samples": 10**9},
        {"epoch": "1"},
        {"lanes": 0},
        {"more": 1},
        {"reader": {"rank": 0, "taken": 3}},
    ],
)
def test_what_is_no_state_is_refused(dst: str, change: dict[str, Any]) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    with pytest.raises(UsageError):
        dataset.load_state_dict(dataset.state_dict() | change)
    with pytest.raises(UsageError, match="no state"):
        dataset.load_state_dict({})


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
    swapped = SplatDataset(f"{tmp_path}/b::{tmp_path}/a", batch_size=2)
    with pytest.raises(UsageError, match="saved with data"):
        swapped.load_state_dict(joined.state_dict())


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
            {"batch_size": 11, "world_size": 4},
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


def data_file(dst: Path) -> Path:
    (found,) = (path for path in dst.iterdir() if path.suffix in (".parquet", ".tar"))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "other"])
def test_a_damaged_shard_is_named(tmp_path: Path, format: str, damage: str) -> None:
    make_dataset(str(tmp_path), [9], format)
    dataset = SplatDataset(str(tmp_path), batch_size=2)
    path = data_file(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        other = tmp_path / "other"
        make_dataset(str(other), [9], format, first=1)
        path.write_bytes(data_file(other).read_bytes())
    with pytest.raises(CorruptShardError, match=f"{path}.*repair"):
        list(dataset)
    if damage in ("missing", "truncated"):
        with pytest.raises(CorruptShardError, match=str(path)):
            SplatDataset(str(tmp_path), batch_size=2, filter=[("psnr", ">", 1)])


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_that_is_missing_when_filtered_is_named(tmp_path: Path, format: str) -> None:
    """The first shard is there, and tells the layout."""
    make_dataset(str(tmp_path), [5, 5], format)
    path = max(path for path in tmp_path.iterdir() if path.suffix in (".parquet", ".tar"))
    path.unlink()
    with pytest.raises(CorruptShardError, match=f"{path}.*repair"):
        SplatDataset(str(tmp_path), batch_size=2, filter=[("psnr", ">", 1)])


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EMFILE, SourceError),
        (errno.EACCES, SourceError),
        (errno.EIO, SourceError),
        (errno.ESTALE, UnavailableError),
    ],
)
def test_what_the_system_refuses_is_no_damage(
    dst: str, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    """Nor is `splatshard repair` a remedy for it."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    dataset = SplatDataset(dst, batch_size=2)
    monkeypatch.setattr(hashlib, "file_digest", refuse)
    with pytest.raises(error, match=f"cannot read {dst}/.*: {os.strerror(number)}") as raised:
        list(dataset)
    assert "repair" not in str(raised.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_foreign_file_is_named_without_checksum_too(tmp_path: Path, format: str) -> None:
    """Here the marker was altered with the file, so that only its content tells."""
    make_dataset(str(tmp_path), [9], format)
    dataset = SplatDataset(str(tmp_path), batch_size=2, checksum=False)
    path = data_file(tmp_path)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptShardError, match=f"{path}"):
        list(dataset)


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_files_end_in_an_error_that_names_them(tmp_path: Path, format: str) -> None:
    """200 single-byte changes, checksums off: samples or CorruptShardError, nothing else."""
    make_dataset(str(tmp_path), [6], format)
    dataset = SplatDataset(str(tmp_path), batch_size=2, checksum=False, prefetch_windows=0)
    path = data_file(tmp_path)
    data = path.read_bytes()
    messages = []
    for step in range(200):
        changed = bytearray(data)
        changed[step * len(data) // 200] ^= 1 << step % 8 | 64
        path.write_bytes(changed)
        dataset.set_epoch(step + 1)
        try:
            list(dataset)
        except (CorruptShardError, FormatVersionError) as e:
            messages.append(str(e))
    assert len(messages) > 10
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splats": None}, "splat"),
        ({"splats": bytes(16 * (N - 1))}, "bytes"),
        ({"splats": bytes(16 * N - 1)}, "bytes"),
        ({"num_gaussians": 2**31 - 1}, "num_gaussians"),
        ({"num_gaussians": -1}, "num_gaussians"),
        ({"num_gaussians": 0}, "num_gaussians"),
        ({"width": None}, "width"),
        ({"height": -3}, "height"),
        ({"height": 2**31 - 1, "num_gaussians": N + 1}, "num_gaussians"),
        ({"status": "corrupt_image"}, "2 ok rows, its marker says 3"),
    ],
)
def test_rows_that_no_writer_writes_are_damage(
    tmp_path: Path, format: str, change: dict[str, Any], message: str
) -> None:
    rows = rows_of(0, 4)
    manifest = commit(str(tmp_path), "a", rows, splat_config(format))
    forge(str(tmp_path), manifest, [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(CorruptShardError, match=f"(?s){tmp_path}.*{message}.*repair"):
        list(SplatDataset(str(tmp_path), batch_size=3))


def test_a_shard_of_another_length_than_its_marker_says(tmp_path: Path) -> None:
    rows = rows_of(0, 8)
    manifest = commit(str(tmp_path), "a", rows)
    forge(str(tmp_path), manifest, rows[:4])
    for conditions in ((), [("psnr", ">", 1)]):
        with pytest.raises(CorruptShardError, match=f"{tmp_path}.*4 rows, its marker says 8"):
            list(SplatDataset(str(tmp_path), batch_size=3, filter=conditions))


def test_a_batch_moves_as_one_tensor(dst: str) -> None:
    (batch, *_) = SplatDataset(dst, batch_size=4)
    values = values_of(batch.splats)
    assert values is not None
    assert values.data_ptr() == batch.splats.means.data_ptr()
    assert torch.equal(
        values, torch.cat((batch.splats.means, batch.splats.cholesky, batch.splats.colors), -1)
    )
    moved = batch.to("meta")
    assert (moved.splats.colors.device.type, moved.labels.device.type) == ("meta", "meta")
    assert values_of(moved.splats) is not None
    copied = batch.to("cpu")
    assert same(copied, batch)


@pytest.mark.parametrize("kind", ["list", "fixed list", "binary"])
def test_teacher_embeddings_of_any_layout(kind: str) -> None:
    """Slices, too: the column's rows are not at its buffer's beginning."""
    values = np.arange(12, dtype=np.float16).reshape(4, 3)
    column = {
        "list": pa.array(list(values), pa.list_(pa.float16())),
        "fixed list": pa.array(list(values), pa.list_(pa.float16(), 3)),
        "binary": pa.array([row.tobytes() for row in values], pa.binary(6)),
    }[kind]
    assert (teacher_of(column) == values).all()
    assert (teacher_of(column[1:3]) == values[1:3]).all()
    with pytest.raises(ValueError, match="no teacher"):
        teacher_of(pa.concat_arrays([column, pa.nulls(1, column.type)]))
