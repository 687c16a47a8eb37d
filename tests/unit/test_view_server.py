"""`splatshard view`: whom its server answers, and how; what the page may do; the command."""

from __future__ import annotations

import http.client
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs import verify
from splatshard.jobs import view as job
from splatshard.jobs.pages import view_server
from splatshard.jobs.pages.view_data import View
from splatshard.jobs.pages.view_server import FILES, HEADERS, open_server
from tests.splat_shards import make_dataset
from tests.viewing import serving


@pytest.fixture(scope="module")
def dst(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("served"))
    make_dataset(folder, [4, 4])
    return folder


@pytest.fixture(scope="module")
def view(dst: str) -> View:
    return View(dst)


def asked(port: int, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def test_only_pages_of_this_machine_are_answered(view: View) -> None:
    """A page of somebody else's, whose name leads here, is not."""
    with serving(view) as port:
        for host in (f"127.0.0.1:{port}", "localhost:1", "[::1]:80", "localhost"):
            assert asked(port, "/api/overview", Host=host).status == 200
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "",
            "[",
            "a@b",
        ):
            found = asked(port, "/api/overview", Host=host)
            assert (found.status, "samples" in found.read().decode()) == (403, False), host


def test_get_alone_is_answered(view: View) -> None:
    with serving(view) as port:
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert asked(port, "/api/overview", method).status == 501


def test_every_answer_lets_nothing_in_from_elsewhere(view: View) -> None:
    with serving(view) as port:
        for path, status in (("/", 200), ("/api/overview", 200), ("/no", 404), ("/api/shard", 400)):
            found = asked(port, path)
            assert found.status == status
            for name, value in HEADERS.items():
                assert found.headers[name] == value
    rules = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in rules
    assert "unsafe" not in rules


def test_the_server_listens_on_this_machine_alone(view: View) -> None:
    with open_server(view, 0) as server:
        assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", FILES)
def test_the_page_needs_nothing_that_its_policy_forbids(view: View, path: str) -> None:
    kind, status, body = view_server.answer(view, path)
    assert (status, kind) == (200, FILES[path][1])
    text = body.decode()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), "something from elsewhere"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    if path == "/":
        assert not re.search(r"<style|<script(?![^>]* src=\"/)|\sstyle=|\son\w+=", text)
        for name in re.findall(r"(?:src|href)=\"(/[^\"]+)\"", text):
            assert name in FILES


def test_all_files_of_the_page_are_served() -> None:
    folder = resources.files("splatshard.jobs.pages")
    there = {f.name for f in folder.iterdir() if f.name.startswith("view") and ".py" not in f.name}
    assert {name for name, _ in FILES.values()} == there


# The command


def test_a_destination_without_shards_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dst, error in (
        (
            str(tmp_path),
            "holds no finished shard: wait for the first one where",
        ),
        (str(tmp_path / "no"), "no such folder"),
        ("", "DST is empty"),
    ):
        assert job.main([dst, "--no-browser", "--port=0"]) == 1
        assert error in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(
    dst: str, view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(view) as port:
        assert job.main([dst, "--no-browser", f"--port={port}"]) == 1
    error = capsys.readouterr().err
    assert f"--port {port} cannot be used" in error
    assert "--port 0" in error
    assert job.main([dst, "--port=65536"]) == 1
    assert "choose 0 to 65535" in capsys.readouterr().err


def test_what_comes_after_verify_is_said_where_all_is_good(
    dst: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([dst]) == 0
    assert f"next: splatshard view {dst}    splatshard train" in capsys.readouterr().err
    assert verify.main([str(tmp_path)]) == 1
    assert "next:" not in capsys.readouterr().err


@pytest.mark.parametrize(("display", "arguments"), [(":0", []), ("", []), (":0", ["--no-browser"])])
def test_the_address_is_printed_and_opened_where_there_is_a_browser(
    dst: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    display: str,
    arguments: list[str],
) -> None:
    """And Ctrl-C ends it well."""
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setenv("WAYLAND_DISPLAY", "")
    monkeypatch.setattr(job.sys, "platform", "linux")
    monkeypatch.setattr(job.webbrowser, "open", opened.append)

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(view_server.Server, "serve_forever", interrupted)
    assert job.main([dst, "--port=0", "--json", *arguments]) == 0
    url, line = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/", url)
    assert json.loads(line) == {"url": url, "dst": dst, "shards": 2}
    assert opened == ([url] if display and not arguments else [])
