"""Web servers that send no ranges, or do not say how long a file is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs.driver.dryrun import look
from splatshard.pipeline.data import ImageDataset
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.parquet import declared
from splatshard.pipeline.source.read import count_samples, read, scan
from splatshard.pipeline.storage import fs, retry
from splatshard.schemas.errors import SourceError, UnavailableError
from splatshard.schemas.shard import ShardRef
from tests.make import datacomp_tar, image_parquet
from tests.unit.reading import IMAGE
from tests.unit.serving import serve
from tests.unit.test_links import HARD, tar_of

KINDS = ["ignores ranges", "refuses ranges", "chunked", "length unknown"]


@pytest.fixture(params=KINDS)
def web(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server without ranges, and small blocks, so that there are many."""
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0)
    monkeypatch.setattr("splatshard.pipeline.source.tar.BLOCK_BYTES", 1024)
    with serve() as server:
        fs.use_options({"http": {"block_size": 1000}})
        server.ranges = False
        server.headers = {"ETag": '"1"'}
        server.length = {KINDS[2]: "chunked", KINDS[3]: ""}.get(request.param, "told")
        if request.param == KINDS[1]:
            server.headers["Accept-Ranges"] = "none"
        yield server


def whole(ref: ShardRef) -> tuple[list[str], str]:
    """The keys of a shard, and the digest of its bytes."""
    digest = hashlib.sha256()
    return [sample.key for sample in read(ref, digest)], digest.hexdigest()


def test_tars_are_read_front_to_back(web: Any, tmp_path: Path) -> None:
    data = datacomp_tar(tmp_path / "a.tar", 4).read_bytes()
    web.files = {"/a.tar": data}
    (ref,) = list_shards(f"{web.url}/a.tar")
    keys, digest = whole(ref)
    assert len(keys) == 4
    assert digest == hashlib.sha256(data).hexdigest()
    web.asked.clear()
    assert whole(replace(ref, limit=2))[0] == keys[:2]
    assert count_samples(ref, 9) == 4
    assert [s.key for s in scan(ref)] == keys
    assert sum(method == "GET" and not ranged for method, _, ranged in web.asked) <= 6


def test_parquet_is_copied_first(web: Any, tmp_path: Path) -> None:
    data = image_parquet(tmp_path / "a.parquet", 9, row_group_size=2).read_bytes()
    web.files = {"/a.parquet": data}
    url = f"{web.url}/a.parquet"
    assert declared(url).no_images == ""
    (ref,) = list_shards(url)
    keys, digest = whole(ref)
    assert len(keys) == 9
    assert digest == hashlib.sha256(data).hexdigest()
    assert whole(replace(ref, limit=5))[0] == keys[:5]
    assert count_samples(ref, 99) == 9
    assert [s.key for s in scan(ref)] == keys


def test_parquet_without_images_is_told_when_it_is_read(web: Any, tmp_path: Path) -> None:
    """To look before would be to copy it once more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"url": ["x"] * 500}), tmp_path / "a.parquet")
    web.files = {"/a.parquet": (tmp_path / "a.parquet").read_bytes()}
    (ref,) = list_shards(f"{web.url}/a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet has no image column, only url .string"):
        whole(ref)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_login_page_is_not_to_be_downloaded_again(web: Any, name: str) -> None:
    web.files[f"/{name}"] = b"<!DOCTYPE html><title>Log in</title>"
    (ref,) = list_shards(f"{web.url}/{name}")
    with pytest.raises(SourceError, match=r"but a web page: open the address in a browser"):
        whole(ref)


def test_links_are_followed(web: Any, tmp_path: Path) -> None:
    members = [("a.jpg", IMAGE), *((f"b{i}.jpg", HARD, "a.jpg") for i in range(9))]
    web.files = {"/a.tar": tar_of(tmp_path / "a.tar", *members).read_bytes()}
    (ref,) = list_shards(f"{web.url}/a.tar")
    web.asked.clear()
    assert [s.image for s in read(ref, hashlib.sha256())] == [IMAGE] * 10
    assert len(web.asked) < 12  # not one for each link


def test_what_is_cut_begins_again(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing tells the length, the tar's own end does."""
    data = datacomp_tar(tmp_path / "a.tar", 4).read_bytes()
    web.files = {"/a.tar": data}
    (ref,) = list_shards(f"{web.url}/a.tar")
    web.cuts = 100
    error = UnavailableError if web.length else SourceError
    with pytest.raises(error, match=r"a\.tar.*at byte|a\.tar is cut short|a\.tar ends at byte"):
        whole(ref)
    if not web.length:
        return
    web.cuts = 2
    monkeypatch.setattr(retry, "RETRY_FOR_S", 60)
    keys, digest = whole(ref)
    assert (len(keys), digest) == (4, hashlib.sha256(data).hexdigest())


def test_cut_parquet_is_no_parquet(web: Any, tmp_path: Path) -> None:
    web.files = {"/a.parquet": image_parquet(tmp_path / "a.parquet", 9).read_bytes()}
    (ref,) = list_shards(f"{web.url}/a.parquet")
    web.cuts = 100
    with pytest.raises((UnavailableError, SourceError), match=r"a\.parquet"):
        whole(ref)


def test_another_file_is_not_read_on(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not web.length:
        return
    web.files = {"/a.tar": datacomp_tar(tmp_path / "a.tar", 4).read_bytes()}
    monkeypatch.setattr(retry, "RETRY_FOR_S", 60)
    with fs.open_read(f"{web.url}/a.tar") as stream:
        stream.seek(5000)
        assert len(stream.read(5000)) == 5000
        web.headers = web.headers | {"ETag": '"2"'}
        stream.seek(0)
        with pytest.raises(SourceError, match=r"a\.tar was replaced while it was read"):
            stream.read(10)


def test_images_of_such_a_server_are_trained_on(web: Any, tmp_path: Path) -> None:
    web.files = {
        "/a.tar": datacomp_tar(tmp_path / "a.tar", 3).read_bytes(),
        "/b.parquet": image_parquet(tmp_path / "b.parquet", 3).read_bytes(),
    }
    for path in web.files:
        url = web.url + path
        keys = [sample.key for ref in list_shards(url) for sample in scan(ref)]
        dataset = ImageDataset(url, image_size=16, batch_size=3, shuffle=False)
        (batch,) = dataset
        assert batch.keys == keys
        assert batch.valid.all()


def test_a_dry_run_counts_what_no_size_tells(web: Any, tmp_path: Path) -> None:
    counts = [3, 5]
    for i, count in enumerate(counts):
        web.files[f"/{i}.tar"] = datacomp_tar(tmp_path / f"{i}.tar", count).read_bytes()
    work = list_shards(f"{web.url}/{{0..1}}.tar")
    assert all((ref.size_bytes > 0) == (web.length == "told") for ref in work)
    total, picked = look(work, 4)
    assert (total, len(picked)) == (8, 4)
