"""SplatDataset over S3: the same batches as from a local disk, through a bounded cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from splatshard.jobs.pages.view_data import View
from splatshard.pipeline.data import SplatDataset, SplatTable
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import CorruptShardError, UsageError
from tests.integration.stores import Store
from tests.rows import FORMATS
from tests.splat_shards import commit, keys_of, make_dataset, rows_of
from tests.viewing import ask

pytestmark = pytest.mark.integration

COUNTS = [10, 7, 16, 9]
buckets = itertools.count()


@pytest.fixture
def store(moto: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    fs.use_options({})
    yield moto
    fs.use_options({})


@pytest.fixture
def bucket(store: Store) -> str:
    name = f"reader-{next(buckets)}"
    store.client().create_bucket(Bucket=name)
    return name


def dataset_of(dst: str, cache: Path, **options: Any) -> SplatDataset:
    options = {"batch_size": 4, "drop_last": False, "cache_dir": cache} | options
    return SplatDataset(dst, **options)


def data_key(store: Store, bucket: str) -> str:
    found = store.client().list_objects_v2(Bucket=bucket)["Contents"]
    return next(o["Key"] for o in found if o["Key"].endswith((".parquet", ".tar")))


def cached(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_file()]


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_as_from_a_local_disk(bucket: str, tmp_path: Path, format: str) -> None:
    local, remote = str(tmp_path / "local"), f"s3://{bucket}/splats"
    make_dataset(local, COUNTS, format)
    make_dataset(remote, COUNTS, format, attempt="00c0ffee1")
    expected = list(dataset_of(local, tmp_path / "unused"))
    for _ in range(2):  # the second time out of the cache
        found = list(dataset_of(remote, tmp_path / "cache"))
        assert keys_of(found) == keys_of(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.splats.means, b.splats.means)
    assert len(cached(tmp_path / "cache")) == len(COUNTS)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_table_fetches_the_shards_that_it_reads(bucket: str, tmp_path: Path, format: str) -> None:
    remote, cache = f"s3://{bucket}/splats", tmp_path / "cache"
    rows = make_dataset(remote, COUNTS, format, attempt="00c0ffee1")
    table = SplatTable(remote, cache_dir=cache)
    assert table.keys() == sorted(rows)
    if format == "parquet":  # of which a column is enough
        assert not cache.exists()
        assert table[table.keys()[-1]]["caption"] == (rows[table.keys()[-1]]["caption"] or "")
        assert len(cached(cache)) == 1


def test_shards_of_one_name_in_two_folders(bucket: str, tmp_path: Path) -> None:
    a = make_dataset(f"s3://{bucket}/a", [6], attempt="00c0ffee1")
    rows = rows_of(7, 6)
    commit(f"s3://{bucket}/b", "00000", rows, attempt="00c0ffee1")
    b = [row["key"] for row in rows if row["status"] == "ok"]
    dataset = dataset_of(f"s3://{bucket}/a::s3://{bucket}/b", tmp_path / "cache", batch_size=1)
    assert sorted(keys_of(dataset)) == sorted([*a, *b])


def test_a_cache_smaller_than_the_data(bucket: str, tmp_path: Path) -> None:
    """DataLoader workers share it; what is evicted is fetched again."""
    remote, cache = f"s3://{bucket}/splats", tmp_path / "cache"
    rows = make_dataset(remote, COUNTS, attempt="00c0ffee1")
    size = max(shard.size_bytes for shard in dataset_of(remote, cache).sources[0].shards)
    dataset = dataset_of(remote, cache, cache_bytes=2 * size, shuffle_shards=3)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert sorted(keys_of(DataLoader(dataset, batch_size=None, num_workers=2))) == sorted(rows)
        assert sum(path.stat().st_size for path in cached(cache)) <= 2 * size
    with pytest.raises(UsageError, match="cache_bytes is 100,"):
        list(dataset_of(remote, cache, cache_bytes=100))


def test_a_filter_fetches_no_shards(bucket: str, tmp_path: Path) -> None:
    """It reads the columns it needs, from where they are."""
    remote, cache = f"s3://{bucket}/splats", tmp_path / "cache"
    rows = make_dataset(remote, COUNTS, attempt="00c0ffee1")
    dataset = dataset_of(remote, cache, filter=[("psnr", ">=", 30)])
    assert not cache.exists()
    expected = sorted(key for key, row in rows.items() if row["psnr"] >= 30)
    assert sorted(keys_of(dataset)) == expected


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_is_named(store: Store, bucket: str, tmp_path: Path, damage: str) -> None:
    remote = f"s3://{bucket}/splats"
    make_dataset(remote, [8], attempt="00c0ffee1")
    dataset = dataset_of(remote, tmp_path / "cache")
    key, client = data_key(store, bucket), store.client()
    data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    if damage == "missing":
        client.delete_object(Bucket=bucket, Key=key)
    elif damage == "truncated":
        client.put_object(Bucket=bucket, Key=key, Body=bytes(data[:-9]))
    else:
        data[len(data) // 2] ^= 1
        client.put_object(Bucket=bucket, Key=key, Body=bytes(data))
    with pytest.raises(CorruptShardError, match=rf"s3://{bucket}/{key}.*repair"):
        list(dataset)
    if (tmp_path / "cache").exists():
        assert cached(tmp_path / "cache") == []


def test_a_shard_that_was_replaced_is_not_taken_from_the_cache(
    store: Store, bucket: str, tmp_path: Path
) -> None:
    """Here under the same URL and with the same size, so that only the etag tells."""
    remote = f"s3://{bucket}/splats"
    make_dataset(remote, [8], attempt="00c0ffee1")
    dataset = dataset_of(remote, tmp_path / "cache")
    list(dataset)
    key, client = data_key(store, bucket), store.client()
    data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    data[len(data) // 2] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(data))
    with pytest.raises(CorruptShardError, match=key):
        list(dataset)


@pytest.mark.parametrize("format", FORMATS)
def test_the_page_of_view_is_over_s3_as_well(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Lists bring no Parquet shard to the cache, pictures do."""
    monkeypatch.setenv("SPLATSHARD_CACHE", str(tmp_path))
    make_dataset(f"s3://{bucket}/splats", [5, 6], format, attempt="-0123456789")
    view = View(f"s3://{bucket}/splats")
    assert [shard["samples"] for shard in ask(view, "/api/shards")["items"]] == [5, 6]
    assert ask(view, "/api/samples?shard=00001&order=worst")["total"] == 6
    assert len(ask(view, "/api/scan?text=WORD&status=ok")["items"]) == 6
    cached = tmp_path / "shards"
    assert cached.exists() == (format == "webdataset")
    assert ask(view, "/image/rendering?shard=00000&row=2")[:4] == b"\x89PNG"
    assert ask(view, "/api/sample?shard=00000&row=3")["status"] == "corrupt_image"
    assert cached.exists()
