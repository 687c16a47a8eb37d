"""Access to stores: options, what their errors become, small files, and no secrets."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import botocore.exceptions
import fsspec
import pytest
import s3fs.errors
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.errors import is_absent, source_errors, storage_errors
from splatshard.pipeline.storage.options import (
    options_of,
)
from splatshard.schemas.errors import SourceError, StorageError, UnavailableError, UsageError


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


def redirects() -> aiohttp.TooManyRedirects:
    error = http_error(0)
    return aiohttp.TooManyRedirects(error.request_info, ())


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
    (PermissionError(errno.EACCES, "Permission denied"), "denied. check what this user may do"),
    (IsADirectoryError(errno.EISDIR, "Is a directory"), "a folder is in the place of a file"),
    (redirects(), "TooManyRedirects. the server redi"),
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


def test_a_file_of_the_folder_is_named(tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/00000.json")
    with (
        pytest.raises(StorageError, match=f"cannot read {tmp_path}/00000.json: Permission"),
        storage_errors(tmp_path, "read"),
    ):
        raise error


def test_our_own_bugs_are_not_the_stores() -> None:
    for error in (ValueError("x"), KeyError("x"), UsageError("x")):
        with pytest.raises(type(error)), storage_errors("s3://b/x"), source_errors("s3://b/x"):
            raise error


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
