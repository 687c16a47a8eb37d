"""Sources on web servers: streams that end early, refusals, what stands in for an etag."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.implementations.memory
import pytest

from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.tar import read_groups
from splatshard.pipeline.storage import fs, retry
from splatshard.schemas.errors import SourceError, UnavailableError, UsageError
from tests.make import datacomp_tar
from tests.unit.reading import never
from tests.unit.serving import serve


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0)
    with serve() as server:
        yield server


@pytest.mark.parametrize("ranges", [True, False])
def test_a_tar_on_the_web(web: Any, tmp_path: Path, ranges: bool) -> None:
    data = datacomp_tar(tmp_path / "a.tar", 3).read_bytes()
    web.files, web.ranges = {"/in/00.tar": data, "/in/01.tar": data}, ranges
    refs = list_shards(f"{web.url}/in/{{00..01}}.tar?part=1")
    assert [ref.name for ref in refs] == ["00", "01"]
    assert [ref.size_bytes for ref in refs] == [len(data)] * 2
    digest = hashlib.sha256()
    with fs.open_read(refs[0].urls[0]) as stream:
        assert len(list(read_groups("x", stream, digest, never))) == 3
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
    with pytest.raises(UsageError, match=r"matches nothing at 1 of 2 places: \S+/02\.tar"):
        list_shards(f"{web.url}/in/{{01..02}}.tar")


def test_a_tar_that_is_cut_on_its_way(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = datacomp_tar(tmp_path / "a.tar", 3).read_bytes()
    web.files, web.cuts = {"/a.tar": data}, 100

    def groups() -> int:
        with fs.open_read(f"{web.url}/a.tar") as stream:
            return len(list(read_groups(f"{web.url}/a.tar", stream, hashlib.sha256(), never)))

    with pytest.raises(UnavailableError, match=r"cannot read http://\S+/a\.tar at byte \d+"):
        groups()
    web.cuts = 1
    monkeypatch.setattr(retry, "RETRY_FOR_S", 60)
    assert groups() == 3


def test_a_store_that_calls_a_part_the_whole(tmp_path: Path) -> None:
    """Short answers that no driver complains about must not pass for the end of the file."""
    data = datacomp_tar(tmp_path / "a.tar", 3).read_bytes()

    class Short(fsspec.implementations.memory.MemoryFile):
        size = len(data)

    fs.write_bytes("memory://b/short.tar", data[:-10240])
    memory = fs.driver("memory://b/short.tar")[0]
    with memory.open("/b/short.tar") as raw:
        short = Short(memory, "/b/short.tar", raw.read())
    stream = retry.RetryingStream("memory://b/short.tar", short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "RETRY_FOR_S", 0)
        with pytest.raises(UnavailableError, match=f"ended there, short of {len(data)} bytes"):
            list(read_groups("x", stream, hashlib.sha256(), never))


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (503, UnavailableError, "503"),
        (429, UnavailableError, "429"),
        (403, SourceError, "403.*check the credentials"),
        (404, SourceError, "nothing is there"),
    ],
)
def test_refusals_of_a_web_server(web: Any, status: int, error: type[Exception], text: str) -> None:
    """The signature of the URL is not in the message, nor the password."""
    web.refuse = lambda path: status
    url = f"{web.url.replace('://', '://me:hunter2@')}/a.tar?X-Amz-Signature=hunter3"
    calls: list[Callable[[], object]] = [
        lambda: fs.stat(url),
        lambda: fs.open_read(url).__enter__(),
        lambda: list_shards(url),
    ]
    for call in calls:
        with pytest.raises((error, UsageError)) as caught:
            call()
        if not isinstance(caught.value, UsageError):
            assert caught.match(text)
        assert "hunter" not in str(caught.value)
        assert "://***@127.0.0.1" in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "etag"),
    [
        ({"ETag": '"1"', "Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT"}, "1"),
        ({"Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT"}, "Sun, 06 Nov 1994 08:49:37 GMT"),
        ({}, ""),
    ],
)
def test_the_time_of_a_file_on_the_web_stands_in_for_an_etag(
    web: Any, headers: dict[str, str], etag: str
) -> None:
    web.files, web.headers = {"/00.tar": b"x" * 10240, "/01.tar": b""}, headers
    assert fs.stat(f"{web.url}/00.tar") == fs.Stat(10240, etag)
    assert {ref.etag for ref in list_shards(f"{web.url}/{{00..01}}.tar")} == {etag}


def test_a_web_server_that_is_gone(web: Any) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(UnavailableError, match=str(port)):
        list_shards(f"http://127.0.0.1:{port}/a.tar")
