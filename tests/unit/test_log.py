"""Standard error: lines for people, or one JSON object per line whoever prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from splatshard.jobs.cli.command import Interrupted, run
from splatshard.jobs.cli.log import configure, log, structured
from splatshard.jobs.cli.text import say
from splatshard.schemas.errors import StorageError

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def text_afterwards(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> Iterator[None]:
    monkeypatch.delenv("SPLATSHARD_DEBUG", raising=False)
    yield
    configure("text")


def events(capsys: Capsys) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_people_see_the_message_and_no_details(capsys: Capsys) -> None:
    log("retry", "shard 3 again", level="warning", trace="a trace\n", shard="3", kind="oom")
    log("shard_done", "shard 3 done", detail=True, shard="3")
    assert capsys.readouterr().err == "shard 3 again\n"


def test_people_who_debug_see_details_and_traces(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLATSHARD_DEBUG", "1")
    log("retry", "shard 3 again", trace="a trace\n", shard="3")
    log("shard_done", "shard 3 done", detail=True)
    assert capsys.readouterr().err == "a trace\nshard 3 again\nshard 3 done\n"


def test_json_has_every_event_with_its_fields(capsys: Capsys) -> None:
    configure("json")
    assert structured()
    message = 'a "quoted"\nmessage, é'
    log("retry", message, level="warning", trace="a trace\n", shard="3", uid=None)
    log("shard_done", "shard 3 done", detail=True, counts={"ok": 2})
    retry, done = events(capsys)
    assert datetime.fromisoformat(retry.pop("time")).utcoffset() == timedelta(0)
    assert retry == {
        "level": "warning",
        "event": "retry",
        "message": message,
        "shard": "3",
        "trace": "a trace\n",
    }
    assert (done["event"], done["level"], done["counts"]) == ("shard_done", "info", {"ok": 2})


def test_what_others_print_becomes_json_too(capsys: Capsys) -> None:
    configure("json")
    print("in", "parts", file=sys.stderr)
    print("two\n\nlines", file=sys.stderr)
    sys.stderr.write("no end")
    configure("text")
    print("text again", file=sys.stderr)
    *lines, last = capsys.readouterr().err.splitlines()
    found = [(e["event"], e["message"]) for e in map(json.loads, lines)]
    assert found == [("output", m) for m in ("in parts", "two", "lines", "no end")]
    assert last == "text again"


def test_secrets_are_struck_out(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush/+1")
    monkeypatch.setenv("SPLATSHARD_DEBUG", "1")
    secret = "hush/+1 at https://me:pw@host/"
    log("retry", secret, trace=secret)
    configure("json")
    log("retry", secret, trace=secret, error=secret)
    print(secret, file=sys.stderr)
    err = capsys.readouterr().err
    assert "hush" not in err
    assert "pw" not in err
    assert "***" in err


def test_json_ends_with_the_job(capsys: Capsys) -> None:
    def body() -> int:
        configure("json")
        say("four shards")
        raise StorageError("disk full")

    assert run(body) == 1
    assert not structured()
    note, error = events(capsys)
    assert (note["event"], note["message"]) == ("note", "four shards")
    assert (error["event"], error["level"]) == ("error", "error")
    assert error["message"] == "splatshard: error: disk full"


def test_an_interruption_is_an_event(capsys: Capsys) -> None:
    def body() -> int:
        configure("json")
        raise Interrupted(143, "terminated")

    assert run(body) == 143
    (event,) = events(capsys)
    assert (event["event"], event["message"]) == ("interrupted", "splatshard: terminated")


def test_a_trace_is_a_field(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> int:
        configure("json")
        raise ValueError("a bug")

    monkeypatch.setenv("SPLATSHARD_DEBUG", "1")
    assert run(body) == 1
    (event,) = events(capsys)
    assert "ValueError: a bug" in event["trace"]
