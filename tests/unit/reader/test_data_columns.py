"""SplatDataset: further columns by name, batches as dictionaries, loaders that would collate."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import default_data_collator

from splatshard.pipeline.data import SplatDataset, TrainBatch
from splatshard.schemas.errors import UsageError
from tests.rows import FORMATS
from tests.splat_shards import commit, forge, keys_of, make_dataset, rows_of, splat_config
from tests.unit.reader.conftest import Rows

COLUMNS = ("uid", "psnr", "original_width", "metadata", "members", "key", "caption", "label")
FIELDS = ("means", "cholesky", "colors", "mask", "heights", "widths", "labels", "valid")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("workers", [0, 1])
def test_columns_come_as_the_shards_have_them(
    shards: dict[str, tuple[str, Rows]], format: str, workers: int
) -> None:
    dst, rows = shards[format]
    dataset = SplatDataset(dst, batch_size=4, drop_last=False, columns=COLUMNS)
    for batch in DataLoader(dataset, batch_size=None, num_workers=workers):
        assert list(batch.columns) == list(COLUMNS)
        expected = [rows[key] for key in batch.keys]
        for name in ("uid", "metadata", "members", "key", "caption"):
            assert batch.columns[name] == [row[name] for row in expected], name
        psnr = torch.tensor([row["psnr"] for row in expected], dtype=torch.float32)
        assert batch.columns["psnr"].equal(psnr)
        assert batch.columns["original_width"].tolist() == [640] * 4
        assert batch.columns["label"].equal(batch.labels)


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_row_does_not_have(tmp_path: Path, format: str) -> None:
    first, second = rows_of(0, 3), rows_of(1, 3)
    manifest = commit(str(tmp_path), "a", first + second, splat_config(format))
    for row in first:
        row |= dict.fromkeys(("uid", "metadata", "psnr_loss", "steps", "caption")) | {"members": []}
    forge(str(tmp_path), manifest, first + second)  # commit refuses a row without psnr_loss
    columns = ("uid", "metadata", "psnr_loss", "steps", "members", "caption")
    (batch,) = SplatDataset(str(tmp_path), batch_size=6, shuffle=False, columns=columns)
    found = batch[:3].columns
    assert (found["uid"], found["metadata"], found["members"]) == ([None] * 3, [None] * 3, [[]] * 3)
    assert found["psnr_loss"].isnan().all()
    assert found["steps"].tolist() == [-1] * 3
    assert batch.as_dict()["caption"][:3] == [""] * 3
    assert batch.as_dict()["uid"] == [""] * 3 + [row["uid"] for row in second]
    assert batch.columns["steps"].tolist()[3:] == [100] * 3


def test_only_the_columns_asked_for_are_read(dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    original = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, group: int, columns: list[str], **kwargs: Any) -> Any:
        asked.append(columns)
        return original(self, group, columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    for columns in ((), ("psnr", "key", "uid")):
        next(iter(SplatDataset(dst, batch_size=1, columns=columns, prefetch_windows=0)))
    (first, *_), last = asked, asked[-1]
    assert first == ["key", "caption", "label", "num_gaussians", "width", "height", "splats"]
    assert last == [*first, "psnr", "uid"]


def test_nested_budgets_have_columns_of_their_own(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [4], budgets=(4, 9))
    (batch,) = SplatDataset(str(tmp_path), batch_size=3, num_gaussians=4, columns=["psnr_4"])
    assert batch.columns["psnr_4"].tolist() == [20.5] * 3


@pytest.mark.parametrize("name", ["psnr_4", "splats", "teacher", "status", "url"])
def test_a_column_that_is_not_there(dst: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"columns names '{name}', which .*choose among key, uid"):
        SplatDataset(dst, batch_size=2, columns=[name])


def test_a_name_that_is_no_list_of_names(dst: str) -> None:
    with pytest.raises(UsageError, match=r"columns is 'uid': give names in a list"):
        SplatDataset(dst, batch_size=2, columns="uid")


def test_dictionaries_hold_what_batches_hold(dst: str) -> None:
    """All tensors begin with the batch, so that Lightning, accelerate and others may slice them."""
    plain = SplatDataset(dst, batch_size=4, columns=("key", "psnr"))
    dictionaries: Any = SplatDataset(dst, batch_size=4, columns=("key", "psnr"), as_dict=True)
    names = [*FIELDS, "position", "key", "psnr"]
    for batch, found in zip(plain, dictionaries, strict=True):
        assert list(found) == names
        assert all(len(found[name]) == 4 for name in names)
        assert all(found[n].equal(getattr(batch.splats, n)) for n in names[:4])
        assert all(found[n].equal(getattr(batch, n)) for n in names[4:8])
        assert found["key"] == batch.keys
        assert found["psnr"].equal(batch.columns["psnr"])
        assert found["position"].tolist() == [list(batch.position)] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dictionary_knows_where_reading_is(dst: str, workers: int) -> None:
    dataset: Any = SplatDataset(dst, batch_size=4, as_dict=True, drop_last=False)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    (*_, last) = islice(loader, 3)
    state = json.loads(json.dumps(dataset.state_after(last)))
    resumed = SplatDataset(dst, batch_size=4, drop_last=False)
    resumed.load_state_dict(state)
    assert keys_of(resumed) == keys_of(SplatDataset(dst, batch_size=4, drop_last=False))[12:]
    with pytest.raises(UsageError, match="no position"):
        dataset.state_after({"means": last["means"]})


def test_columns_move_and_are_cut_with_their_batch(dst: str) -> None:
    (batch, *_) = SplatDataset(dst, batch_size=4, columns=("uid", "psnr"))
    moved = batch.to("meta")
    assert moved.columns["psnr"].device.type == "meta"
    assert moved.columns["uid"] == batch.columns["uid"]
    part = batch[1:3]
    assert part.columns["psnr"].equal(batch.columns["psnr"][1:3])
    assert part.columns["uid"] == batch.columns["uid"][1:3]


def first_of(batches: list[Any]) -> Any:
    return batches[0]


class Samples(IterableDataset[Any]):
    """As a user who trains on single samples wraps a dataset."""

    def __init__(self, inner: SplatDataset) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        for batch in self.inner:
            yield from batch.labels


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 2}, {"num_workers": 1}, {"collate_fn": default_data_collator}],
    ids=["alone", "size", "workers", "transformers"],
)
def test_a_loader_that_collates_whole_batches_is_refused(
    dst: str, options: dict[str, Any], as_dict: bool
) -> None:
    """Of torch's own error nobody learns what to do, and dictionaries got another dimension."""
    dataset: Any = SplatDataset(dst, batch_size=4, as_dict=as_dict)
    with pytest.raises(UsageError, match=r"DataLoader\(dataset, batch_size=None"):
        next(iter(DataLoader(dataset, **options)))


def test_who_knows_what_a_batch_is_may_collate(dst: str) -> None:
    dataset = SplatDataset(dst, batch_size=4)
    loader = DataLoader(dataset, batch_size=1, collate_fn=first_of)
    assert isinstance(next(iter(loader)), TrainBatch)
    assert next(iter(DataLoader(Samples(dataset), batch_size=3))).shape == (3,)
