"""SRC elsewhere than on the disk."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from splatshard.jobs.destination.plan import Marker, make_plan, planned
from splatshard.jobs.destination.plan_file import write_plan
from splatshard.pipeline.shards.commit import mark_failed, publish, staged_file
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.errors import SourceError, UsageError
from tests.make import (
    image_parquet,
    imagenet_tar,
    jpeg,
    shared_data,
)
from tests.rows import make_rows, write_shard
from tests.unit.test_sources import keys, names
from tests.web import Quiet, served


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system in memory, standing for any remote one."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


# Elsewhere than on the disk


def test_remote_file_system(memory, tmp_path):
    for i in range(3):
        path = imagenet_tar(tmp_path / f"{i}.tar", count=2)
        memory.pipe(f"/bucket/{i}.tar", path.read_bytes())
    memory.pipe("/bucket/list.txt", b"0.tar\n2.tar\n")
    assert names(list_shards("memory://bucket")) == ["0", "1", "2"]
    assert names(list_shards("memory://bucket/*.tar")) == ["0", "1", "2"]
    assert names(list_shards("memory://bucket/{0..2}.tar")) == ["0", "1", "2"]
    assert names(list_shards("memory://bucket/list.txt")) == ["0", "2"]
    assert keys(list_shards("memory://bucket/1.tar", limit=1)) == ["n00000000"]
    with pytest.raises(UsageError, match="matches nothing"):
        list_shards("memory://bucket/3.tar")


def test_remote_folders_that_cannot_be_listed(memory, monkeypatch):
    for part in ("a", "b"):
        memory.pipe(f"/bucket/{part}/{part}.tar", b"")
    patterns = ("", "/*/*.tar", "/**/*.tar")
    for pattern in patterns:
        assert names(list_shards(f"memory://bucket{pattern}")) == ["a", "b"]
    assert names(list_shards("memory://bucket/b*/b.tar")) == ["b"]
    listing = type(memory).ls

    def broken(self: Any, path: str, **options: Any) -> Any:
        if path.endswith("/b"):
            raise PermissionError(errno.EACCES, "denied")
        return listing(self, path, **options)

    monkeypatch.setattr(type(memory), "ls", broken)
    for pattern in patterns:
        with pytest.raises(SourceError, match=r"cannot read memory:/+bucket/b: denied"):
            list_shards(f"memory://bucket{pattern}")
    assert names(list_shards("memory://bucket/a*/*.tar")) == ["a"]


def test_remote_parquet_and_folder(memory, tmp_path):
    path = image_parquet(tmp_path / "p.parquet", count=5)
    memory.pipe("/bucket/p.parquet", path.read_bytes())
    (ref,) = list_shards("memory://bucket")
    digest = hashlib.sha256()
    assert len(list(read(ref, digest))) == 5
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    memory.pipe("/photos/a/1.jpg", jpeg())
    memory.pipe("/photos/b/2.jpg", jpeg())
    refs = list_shards("memory://photos")
    assert (names(refs), refs[0].labels, keys(refs)) == (
        ["photos-00000"],
        ("a", "b"),
        ["a/1", "b/2"],
    )
    assert refs[0].etag == ""  # this store has none, so that only a checksum tells


def test_unknown_kind_of_address():
    with pytest.raises(Exception, match="install its fsspec driver"):
        list_shards("nosuch://bucket/a.tar")


def test_real_data(tmp_path):
    refs = list_shards(str(shared_data("datacomp-sample")), limit=250)
    assert [(r.name, r.limit) for r in refs] == [
        ("00000000", None),
        ("00000001", None),
        ("00000002", 50),
    ]
    assert len(list_shards(str(shared_data("tiny-imagenet-100")))) == 5
    shutil.copytree(shared_data("kodak"), tmp_path / "kodak")
    (ref,) = list_shards(str(tmp_path / "kodak"))
    assert (ref.name, ref.kind, len(ref.urls), ref.labels) == ("kodak-00000", "folder", 12, ())


# On the web, signed


class Signed(Quiet):
    """Serves whatever the query is, with an etag."""

    def end_headers(self) -> None:
        self.send_header("ETag", '"one"')
        super().end_headers()

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # a reader that has seen enough
            super().handle()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A server of `tmp_path`; its address."""
    with served(tmp_path, Signed) as address:
        yield address


def test_an_address_that_does_not_end_as_a_tar(web: str, tmp_path: Path) -> None:
    """As Zenodo has them."""
    imagenet_tar(tmp_path / "content", count=1)
    with pytest.raises(UsageError, match=r"on the web the path without its query must"):
        list_shards(f"{web}/content")


def test_a_new_signature_is_the_same_source(web: str, tmp_path: Path) -> None:
    """The job that goes on with a URL signed anew knows what is done, and writes the same plan."""
    imagenet_tar(tmp_path / "a.tar", count=2)
    config = ConvertConfig()
    texts: list[str] = []
    markers: dict[str, Marker] = {}
    for query in ("", "?jwt=first", "?hdnts=exp=9~hmac=second"):
        (ref,) = list_shards(f"{web}/a.tar{query}")
        assert (ref.name, ref.etag) == ("a", "one")
        assert len(keys([ref])) == 2
        plan = make_plan([ref], markers, config, str)
        assert [m.name for m in plan.done] == ([] if not query else ["a"])
        dst = tmp_path / f"out{len(texts)}"
        with staged_file(str(dst), "a") as path:
            write_shard(path, make_rows(2))
            markers["a"] = publish(str(dst), path, ref, config, "ab" * 32)
        mark_failed(str(dst), ref, config, SourceError(f"cannot read {ref.urls[0]}: cut"))
        write_plan(str(dst), planned([ref], plan, config))
        texts.append((dst / "_plan.json").read_text() + (dst / "a.json").read_text())
        assert not re.search("jwt|hmac|first|second", texts[-1])
    assert texts[1] == texts[2]
