"""SplatTable: samples by number and key, as SplatDataset has them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from splatshard.pipeline.data import SplatDataset, SplatTable, TrainBatch, table
from splatshard.pipeline.data.batch import values_of
from splatshard.pipeline.data.table import bytes_of
from splatshard.pipeline.shards import write
from splatshard.schemas.errors import CorruptShardError, UsageError
from tests.rows import FORMATS
from tests.splat_shards import N, commit, make_dataset, rows_of, splat_config
from tests.unit.reader.conftest import Rows

COLUMNS = ("uid", "psnr", "members")
SOME = [("label", ">=", 1000), ("label", "<", 3015)]


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def src(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Shards of several row groups."""
    monkeypatch.setattr(write, "ROW_GROUP_BYTES", 4 * N * 16)
    monkeypatch.setattr(write, "ROWS_TOGETHER", 1)
    make_dataset(str(tmp_path), [10, 7, 1, 16, 9], format)
    if format == "parquet":
        assert pq.ParquetFile(next(tmp_path.glob("00003*.parquet"))).num_row_groups > 2
    return str(tmp_path)


def in_order(src: str, **options: Any) -> list[TrainBatch]:
    """The samples one by one."""
    dataset = SplatDataset(src, batch_size=1, shuffle=False, columns=COLUMNS, **options)
    return list(dataset)


def same(sample: dict[str, Any], batch: TrainBatch) -> bool:
    expected = {k: v[0] for k, v in batch.as_dict().items() if k not in ("valid", "position")}
    expected |= {"key": batch.keys[0], "caption": batch.captions[0] or ""}
    return sample.keys() == expected.keys() and all(
        v.equal(expected[k]) if isinstance(v, torch.Tensor) else v == expected[k]
        for k, v in sample.items()
    )


@pytest.mark.parametrize("filter", [(), SOME], ids=["all", "filter"])
def test_samples_are_those_of_the_dataset_in_its_order(src: str, filter: Any) -> None:
    expected = in_order(src, filter=filter)
    found = SplatTable(src, columns=COLUMNS, filter=filter)
    assert len(found) == len(expected) > 10
    samples = list(found)  # ends with IndexError
    assert all(map(same, samples, expected))
    assert found.keys() == [batch.keys[0] for batch in expected]
    for number in (0, 5, len(expected) - 1):
        assert same(found[expected[number].keys[0]], expected[number])
        assert same(found[np.int64(number - len(found))], expected[number])


def test_several_samples_are_a_batch_in_the_order_asked_for(src: str) -> None:
    expected = in_order(src)
    found = SplatTable(src, columns=COLUMNS)
    numbers = [20, 3, 4, 3, 9]
    for asked in (numbers, [expected[n].keys[0] for n in numbers], np.array(numbers)):
        batch = found[asked]
        assert isinstance(batch, TrainBatch)
        assert batch.keys == [expected[n].keys[0] for n in numbers]
        values = torch.cat([values_of(expected[n].splats) for n in numbers])
        assert values_of(batch.splats).equal(values)
        assert batch.columns["uid"] == [expected[n].columns["uid"][0] for n in numbers]
    assert found[-3:].keys == found.keys()[-3:]
    assert found[torch.tensor([1])].keys == found.keys()[1:2]
    assert found[::7].keys == found.keys()[::7]


def test_a_default_loader_makes_batches(src: str, format: str) -> None:
    """Its fields are those of `as_dict`, with the texts beside them, whatever N each sample has."""
    commit(src, "00005", rows_of(5, 8, N // 2), splat_config(format))
    found = SplatTable(src, columns=["uid"])
    assert len({len(sample["means"]) for sample in found}) > 1
    batches = list(DataLoader(found, batch_size=5, num_workers=1, shuffle=True))
    assert sorted(key for batch in batches for key in batch["key"]) == sorted(found.keys())
    batch = batches[0]
    numbers = [found.keys().index(key) for key in batch["key"]]
    for name, values in found[numbers].as_dict().items():
        if name == "uid":
            assert values == batch[name]
        elif name != "valid":
            assert values.equal(batch[name]), name


def test_memory_is_bounded(src: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups that are in memory are not read again, and those used longest ago go first."""
    read: list[int] = []
    for name in ("parquet_blocks", "tar_blocks"):
        original = getattr(table, name)

        def spy(*args: Any, original: Any = original, **options: Any) -> Any:
            blocks = original(*args, **options)
            read.append(sum(map(bytes_of, blocks)))
            return blocks

        monkeypatch.setattr(table, name, spy)
    whole = SplatTable(src)
    for _ in range(2):
        list(whole)
    groups = len(read)
    assert (groups > 5) == (format == "parquet")
    none = SplatTable(src, memory_bytes=0)
    list(none)
    assert none[len(none) - 1]["key"] == none.keys()[-1]
    assert len(read) == 2 * groups
    two = SplatTable(src, memory_bytes=max(read) * 2)
    for number in (0, -1, 0, -1, 0):
        two[number]
    assert len(read) == 2 * groups + 2
    list(two)
    assert len(two._loaded) < groups
    assert two._loaded_bytes == sum(bytes_of(b) for held in two._loaded.values() for b in held)


def test_errors_say_what_there_is(dst: str, rows: Rows) -> None:
    found = SplatTable(dst)
    with pytest.raises(IndexError, match=f"{len(rows)} is not among the {len(rows)} samples"):
        found[len(rows)]
    with pytest.raises(IndexError):
        found[-len(rows) - 1]
    keys = sorted(rows)
    with pytest.raises(KeyError, match=f"'{keys[4]}x'; those nearest.*{keys[4]}, {keys[5]}"):
        found[f"{keys[4]}x"]
    with pytest.raises(UsageError, match="none of the"):
        found[5:5]
    with pytest.raises(UsageError, match="not a mask"):
        found[np.ones(len(rows), bool)]
    assert keys[0] in found
    assert "zzz" not in found
    assert 0 not in found
    with pytest.raises(UsageError, match="a table cannot"):
        SplatTable({dst: 0.5})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"no sample of .* passes"):
        SplatTable(dst, filter=[("psnr", ">", 99)])
    with pytest.raises(UsageError, match="'url', which"):
        SplatTable(dst, columns=["url"])


def test_a_key_that_several_samples_have(tmp_path: Path) -> None:
    """As tars of WebDataset that begin anew with 000000."""
    for name in ("a", "b"):
        commit(str(tmp_path), name, rows_of(0, 3))
    found = SplatTable(str(tmp_path))
    assert found[4]["key"] == "000000001"
    with pytest.raises(UsageError, match=r"2 samples have the key '000000001'.*, 1, 4"):
        found["000000001"]


def test_nested_budgets(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [4], budgets=(4, 9))
    assert SplatTable(str(tmp_path), num_gaussians=4)[0]["means"].shape == (4, 2)
    assert SplatTable(str(tmp_path))[0]["means"].shape == (9, 2)


def test_a_file_is_compared_with_its_marker(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [4])
    (path,) = tmp_path.glob("*.parquet")
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match="SHA-256"):
        SplatTable(str(tmp_path))[0]


def test_a_copy_has_nothing_in_memory(dst: str) -> None:
    found = SplatTable(dst)
    first = found[found.keys()[0]]
    again = pickle.loads(pickle.dumps(found))
    assert again._loaded == {}
    assert again[0]["means"].equal(first["means"])
