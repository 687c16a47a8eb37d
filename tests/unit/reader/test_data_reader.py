"""SplatDataset: the samples of real shards of both formats, each once, as they were packed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from splatshard.pipeline.codec.pack import unpack_row
from splatshard.pipeline.data import SplatDataset, SplatTable, TrainBatch
from splatshard.pipeline.data.batch import values_of
from splatshard.pipeline.data.read_parquet import teacher_of
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.splats import CODECS, TEACHER
from tests.rows import FORMATS, HEIGHT, WIDTH, metadata_of
from tests.splat_shards import N, commit, keys_of, make_dataset, rows_of, splat_config, vouch
from tests.training import rewrite, with_metadata
from tests.unit.reader.conftest import Rows


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
    golden = Path(__file__).resolve().parents[2] / "data" / f"golden-v1.{suffix}"
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


HALVES = np.arange(12, dtype="<f2").reshape(4, 3)


def test_teacher_embeddings_of_a_part_of_a_column() -> None:
    """Its rows are not at its buffer's beginning."""
    column = pa.array([row.tobytes() for row in HALVES], pa.binary())
    assert (teacher_of(column) == HALVES).all()
    assert (teacher_of(column[1:3]) == HALVES[1:3]).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (TEACHER, pa.large_binary()),
        (TEACHER, pa.binary(6)),
        (TEACHER, pa.list_(pa.float16())),
        ("splats", pa.large_binary()),
        ("key", pa.large_string()),
        ("label", pa.int32()),
    ],
    ids=str,
)
def test_a_column_of_a_type_that_no_shard_has(tmp_path: Path, name: str, kind: Any) -> None:
    """schemas/FORMAT.md says which; the error names the column and both types."""
    make_dataset(str(tmp_path), [4])
    right: list[Any] = []

    def change(table: pa.Table) -> pa.Table:
        halves = pa.array([row.tobytes() for row in HALVES], pa.binary())
        table = with_metadata(table.append_column(TEACHER, halves), {TEACHER: {"dim": 3}})
        right.append(table.field(name).type)
        values = list(HALVES) if pa.types.is_list(kind) else table[name].to_pylist()
        number = table.schema.get_field_index(name)
        field = table.field(name).with_type(kind)
        return table.set_column(number, field, pa.array(values, kind))

    rewrite(tmp_path, change)
    with pytest.raises(CorruptShardError, match="splatshard repair") as raised:
        SplatDataset(str(tmp_path), batch_size=2)
    given = str(kind).partition("<")[0]  # a list's item has another name in files
    assert f"has the column {name} ({given}" in str(raised.value)
    assert f"not {name} ({right[0]}" in str(raised.value)


def test_folders_are_paths_or_texts(dst: str) -> None:
    expected = keys_of(SplatDataset(dst, batch_size=4))
    for src in (Path(dst), [Path(dst)], {Path(dst): 1.0}):
        dataset: Any = SplatDataset(src, batch_size=4)  # pyright: ignore
        assert sorted(keys_of(dataset)) == sorted(expected)
    assert len(SplatTable(Path(dst))) > 0
    for none in (None, 3, [None]):
        with pytest.raises(UsageError, match=r"src is .*: give a folder or URL, or a list"):
            SplatDataset(none, batch_size=4)  # pyright: ignore
    with pytest.raises(UsageError, match=r"seed is 'a': it must be a whole number$"):
        SplatDataset(dst, batch_size=4, seed="a")  # pyright: ignore
