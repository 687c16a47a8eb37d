"""Access to stores: options, what their errors become, streams that end early, and no secrets."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec
import pytest
import s3fs.errors
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.tar import read_groups
from splatshard.pipeline.storage import fs, retry
from splatshard.pipeline.storage.errors import is_absent, source_errors, storage_errors
from splatshard.pipeline.storage.options import is_redacted, options_of, redact, redact_urls
from splatshard.schemas.errors import SourceError, StorageError, UnavailableError, UsageError
from tests.make import datacomp_tar


@pytest.fixture(autouse=True)
def no_options() -> Iterator[None]:
    fs.use_options({})
    yield
    fs.use_options({})


# Errors


def s3_error(code: str, status: int = 400, message: str = "because") -> OSError:
    """What s3fs makes of an answer of S3."""
    response = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return s3fs.errors.translate_boto_error(botocore.exceptions.ClientError(response, "GetObject"))


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def http_error(status: int) -> aiohttp.ClientResponseError:
    url = aiohttp.client.URL("https://host/x?token=abc")
    request = aiohttp.RequestInfo(url, "GET", {}, url)  # type: ignore[arg-type]
    return aiohttp.ClientResponseError(request, (), status=status, message="x")


PASSING = [
    *(s3_error(code) for code in ("SlowDown", "InternalError", "RequestTimeout", "BadDigest")),
    *(s3_error(str(status), status) for status in (500, 502, 503, 504, 429)),
    s3_error("SomethingOfAClone", 503),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://host"),
    botocore.exceptions.ConnectTimeoutError(endpoint_url="http://host"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://host"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://host"),
    ResponseParserError("<html>"),
    urllib3.exceptions.IncompleteRead(1, 2),
    aiohttp.ClientPayloadError("cut"),
    aiohttp.ServerDisconnectedError(),
    http_error(503),
    caused(FileNotFoundError("https://host/x"), http_error(503)),
    TimeoutError(),
    fsspec.exceptions.FSTimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError(errno.ESTALE, "stale file handle"),
    socket.gaierror(-3, "Temporary failure in name resolution"),
]
LASTING = [
    (s3_error("AccessDenied", 403), "check what the credentials may do"),
    (s3_error("InvalidAccessKeyId", 403), "set AWS_ACCESS_KEY_ID"),
    (s3_error("SignatureDoesNotMatch", 403), "set AWS_ACCESS_KEY_ID"),
    (s3_error("ExpiredToken", 400), "renew them"),
    (s3_error("RequestTimeTooSkewed", 403), "clock is wrong"),
    (s3_error("NoSuchBucket", 404), "create it or correct the name"),
    (s3_error("403", 403), "check the credentials"),
    (s3_error("PermanentRedirect", 301), "set AWS_REGION"),
    (s3_error("QuotaExceeded", 507), "free some"),
    (botocore.exceptions.NoCredentialsError(), "set AWS_ACCESS_KEY_ID"),
    (http_error(401), "check the credentials"),
    (caused(FileNotFoundError("https://host/x"), http_error(403)), "403"),
    (aiohttp.InvalidURL("http:///"), "http:///"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_unavailable(error: BaseException) -> None:
    for errors, verb in ((source_errors, "read"), (storage_errors, "write")):
        with (
            pytest.raises(UnavailableError, match=f"cannot {verb} s3://b/x: .+"),
            errors("s3://b/x", verb),
        ):
            raise error
    assert not is_absent(error)


@pytest.mark.parametrize(("error", "text"), LASTING, ids=lambda value: repr(value)[:40])
def test_what_lasts_names_the_remedy(error: BaseException, text: str) -> None:
    said = f"s3://b/x: .*{text}"
    with pytest.raises(SourceError, match=f"^cannot read {said}"), source_errors("s3://b/x"):
        raise error
    with pytest.raises(StorageError, match=f"^cannot write {said}"), storage_errors("s3://b/x"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        FileNotFoundError("b/x"),
        s3_error("NoSuchKey", 404),
        s3_error("404", 404),
        caused(FileNotFoundError("https://host/x"), http_error(404)),
    ],
    ids=repr,
)
def test_what_is_absent_passes_through(error: FileNotFoundError) -> None:
    with pytest.raises(FileNotFoundError), source_errors("s3://b/x"):
        raise error


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="no space left: free some, then run the same command"),
        storage_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_our_own_bugs_are_not_the_stores() -> None:
    for error in (ValueError("x"), KeyError("x"), UsageError("x")):
        with pytest.raises(type(error)), storage_errors("s3://b/x"), source_errors("s3://b/x"):
            raise error


# Secrets


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://me:hunter2@host:80/x y", "https://***@host:80/x y"),
        ("https://token@host/x", "https://***@host/x"),
        ("ftp://me:hunter2@host/x", "ftp://***@host/x"),
        ("abfs://box@account.net/x", "abfs://box@account.net/x"),
        ("hf://datasets/me/it@main/x", "hf://datasets/me/it@main/x"),
        ("s3://b/a@b:c", "s3://b/a@b:c"),
        ("no https://h/x?X-Amz-Credential=a&X-Amz-Signature=b, sir", "no https://h/x?*** sir"),
        ("https://h/x?a=b&sig=c#d", "https://h/x?***"),
        ("URL('https://h/x?access_token=c')", "URL('https://h/x?***')"),
        ("https://h/x?versionId=7&part=3", "https://h/x?versionId=7&part=3"),
        ("s3://b/{0..9}.tar?versionId=7", "s3://b/{0..9}.tar?versionId=7"),
        ("/data/img?token*.tar", "/data/img?token*.tar"),
    ],
)
def test_secrets_in_urls(text: str, wanted: str) -> None:
    assert redact(text) == wanted
    assert redact(wanted) == wanted
    assert redact_urls(text) == wanted
    if " " not in text and text.startswith("http"):
        assert is_redacted(wanted) == (wanted != text)


def test_secrets_of_the_options_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoG")
    options: dict[str, Any] = {"key": "AKIA1", "secret": "hunter2", "endpoint_url": "http://host"}
    options["client_kwargs"] = {"aws_secret_access_key": "hunter3", "region_name": "moon-1"}
    options["gs"] = {"token": {"private_key": "BEGIN", "project": "mine"}}
    fs.use_options(options)
    text = redact("AKIA1 hunter2 hunter3 BEGIN wJalr FwoG http://host moon-1")
    assert text == "*** *** *** *** *** *** http://host moon-1"
    with (
        pytest.raises(StorageError, match=r"^cannot write s3://b/x: SignatureDoesNotMatch not \*"),
        storage_errors("s3://b/x"),
    ):
        raise s3_error("SignatureDoesNotMatch", 403, "not AKIA1")


# Options and drivers


def test_options_of_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"):
        monkeypatch.delenv(name, raising=False)
    fs.use_options(
        {
            "config_kwargs": {"retries": {"total_max_attempts": 2}, "read_timeout": 7},
            "anon": True,
            "s3a": {"anon": False},
            "https": {"headers": {"Authorization": "Bearer x"}},
        }
    )
    s3 = options_of("s3")
    assert s3["anon"] is False
    retries = {"mode": "adaptive", "total_max_attempts": 2}
    assert s3["config_kwargs"]["retries"] == retries
    assert s3["config_kwargs"]["read_timeout"] == 7
    assert s3["config_kwargs"]["connect_timeout"] == 10
    web = options_of("http")
    assert web["headers"] == {"Authorization": "Bearer x"}
    assert "anon" not in web  # http's driver would send it
    assert options_of("gs")["anon"] is True
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    fs.use_options({})
    assert options_of("s3")["config_kwargs"]["retries"] == {"mode": "adaptive"}


@pytest.mark.parametrize(
    ("url", "package"),
    [("gs://b/x.tar", "gcsfs"), ("https://h/x.tar", "aiohttp"), ("abfss://b@a/x.tar", "adlfs")],
)
def test_a_missing_driver_names_its_package(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(protocol: str) -> None:
        raise ImportError(f"install something for {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(SourceError, match=f"needs the package {package}: install it.*every worker"):
        list_shards(url)


def test_an_unknown_scheme() -> None:
    with pytest.raises(SourceError, match=r"^nosuch://b/x\.tar: nosuch:// is unknown; give a path"):
        list_shards("nosuch://b/x.tar")


def test_a_driver_is_made_once() -> None:
    first = fs.driver("memory://a")[0]
    assert fs.driver("memory://b")[0] is first
    fs.use_options({})
    assert fs.driver("memory://a")[0] is not first


# Writing


@pytest.mark.parametrize("name", ["_progress.json", "a.txt"])
def test_small_files_are_replaced_as_a_whole(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}", f"memory://b/{name}"):
        fs.write_bytes(url, b"one")
        fs.write_bytes(url, b"two")
        assert fs.read_bytes(url) == b"two"
    assert [path.name for path in tmp_path.iterdir()] == [name]

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/{name}: no space left"):
        fs.write_bytes(f"{tmp_path}/{name}", b"three")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"two"


def test_ways_to_name_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"x")
    for url in ("a", "~/a", f"{tmp_path}/a", f"file://{tmp_path}/a"):
        assert fs.exists(url)
        assert fs.read_bytes(url) == b"x"
        assert not fs.exists(f"{url}b")


# HTTP sources


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` as `server.mode` says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Not printed."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append(self.path)
        data = server.files.get(self.path.partition("?")[0])
        status = server.refuse(self.path) or (404 if data is None else 200)
        data = data if status == 200 and data is not None else b"no"
        total, ranged = len(data), self.headers.get("Range")
        if status == 200 and ranged and server.ranges:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            status, start = 206, int(first)
            data = data[start : int(last or total) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in server.headers.items():
            self.send_header(name, value)
        if server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if server.cuts and len(data) > 100:
            server.cuts -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)

    do_HEAD = do_GET


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server at `web.url`."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.asked, server.ranges, server.cuts = {}, [], True, 0
    server.headers, server.refuse = {}, lambda path: 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(retry, "PATIENCE_S", 0)
    yield server
    fs.use_options({})
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_tar_on_the_web(web: Any, tmp_path: Path, ranges: bool) -> None:
    data = datacomp_tar(tmp_path / "a.tar", 3).read_bytes()
    web.files, web.ranges = {"/in/00.tar": data, "/in/01.tar": data}, ranges
    refs = list_shards(f"{web.url}/in/{{00..01}}.tar?part=1")
    assert [ref.name for ref in refs] == ["00", "01"]
    assert [ref.size_bytes for ref in refs] == [len(data)] * 2
    digest = hashlib.sha256()
    with fs.open_read(refs[0].urls[0]) as stream:
        assert len(list(read_groups("x", stream, digest))) == 3
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
    with pytest.raises(UsageError, match=r"matches nothing at 1 of 2 places: \S+/02\.tar"):
        list_shards(f"{web.url}/in/{{01..02}}.tar")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_tar_that_is_cut_on_its_way(
    web: Any, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = datacomp_tar(tmp_path / "a.tar", 3).read_bytes()
    web.files, web.ranges, web.cuts = {"/a.tar": data}, ranges, 100

    def groups() -> int:
        with fs.open_read(f"{web.url}/a.tar") as stream:
            return len(list(read_groups(f"{web.url}/a.tar", stream, hashlib.sha256())))

    with pytest.raises(UnavailableError, match=r"cannot read http://\S+/a\.tar at byte \d+"):
        groups()
    if ranges:
        web.cuts = 1
        monkeypatch.setattr(retry, "PATIENCE_S", 60)
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
        patch.setattr(retry, "PATIENCE_S", 0)
        with pytest.raises(UnavailableError, match=f"ended there, short of {len(data)} bytes"):
            list(read_groups("x", stream, hashlib.sha256()))


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
