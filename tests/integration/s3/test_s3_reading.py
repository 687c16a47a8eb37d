"""Reading from S3: streams that are cut, objects that change, long listings."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.storage import fs, retry
from splatshard.schemas.errors import UnavailableError
from tests.integration.s3.faulty import CONFIG, Server
from tests.make import datacomp_tar, image_parquet

pytestmark = pytest.mark.integration


def test_a_stream_goes_on_where_it_was_cut(
    server: Server, dst: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = datacomp_tar(tmp_path / "a.tar", 6).read_bytes()
    server.put(dst, {"a.tar": data})
    monkeypatch.setattr(retry, "RETRY_FOR_S", 60)
    cuts = itertools.count()
    server.fault = lambda request: "cut" if request.method == "GET" and next(cuts) in (0, 1) else ""
    with fs.open_read(f"{dst}/a.tar") as stream:
        assert stream.read(1000) == data[:1000]
        assert stream.read() == data[1000:]
    assert next(cuts) == 3


@pytest.mark.parametrize("name", ["a.tar", "p.parquet"])
def test_a_source_that_is_cut_for_good_is_unavailable(
    server: Server, dst: str, name: str, tmp_path: Path
) -> None:
    """Neither a truncated tar, which would fail the shard for good, nor a shorter shard."""
    make = datacomp_tar if name == "a.tar" else image_parquet
    server.put(dst, {name: make(tmp_path / name).read_bytes()})
    (ref,) = list_shards(f"{dst}/{name}")
    server.fault = lambda request: "cut" if request.key.endswith(name) else ""
    with pytest.raises(UnavailableError, match=f"cannot read {dst}/{name} at byte 0"):
        convert_shard(ref, CONFIG, dst, select_backend("cpu"))
    server.fault = lambda _: ""
    assert server.names(dst) == [name]


def test_an_object_that_changes_while_it_is_read(server: Server, dst: str, tmp_path: Path) -> None:
    fs.use_options({"default_block_size": 1 << 16})
    server.put(dst, {"a": os.urandom(1 << 18)})
    with fs.open_read(f"{dst}/a") as stream:
        stream.read(1000)
        server.put(dst, {"a": os.urandom(1 << 17)})
        with pytest.raises(UnavailableError, match="at byte 1000"):
            stream.read()


def test_long_listings_and_folders_of_web_consoles(server: Server, dst: str) -> None:
    names = [f"{i:04d}.failed.json" for i in range(50)]
    server.put(dst, dict.fromkeys(names, b"x") | {"": b"", "sub/x": b""})
    server.asked.clear()
    server.fault = lambda _: "paged"
    assert list(fs.list_folder(dst)) == names
    assert len(server.asked) == 8
    assert fs.list_folder(f"{dst}/none") == {}
    assert fs.is_dir(dst)
    assert not fs.is_dir(f"{dst}/none")
    assert not fs.exists(f"{dst}/none")
    assert fs.exists(dst)


def test_threads_share_one_driver(server: Server, dst: str) -> None:
    urls = [f"{dst}/{i}" for i in range(64)]
    fs.use_options({})
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda url: fs.write_bytes(url, url.encode()), urls))
        assert list(pool.map(fs.read_bytes, urls)) == [url.encode() for url in urls]
        drivers = set(pool.map(lambda url: id(fs.driver(url)[0]), urls))
    assert len(drivers) == 1
    # a child has one of its own
    child = os.fork()
    if child == 0:
        os._exit(0 if fs.read_bytes(urls[0]) == urls[0].encode() else 1)
    assert os.waitpid(child, 0)[1] == 0
