"""What commands say: messages on standard error, answers on standard output, numbers in words.

Standard output is for the answer: the JSON line with `--json`, else what `answer` is given.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

from splatshard.jobs.cli.log import log
from splatshard.pipeline.storage.options import redact


def say(message: str = "") -> None:
    """One line for people, on stderr."""
    log("note", message)


def answer(text: str, as_json: bool) -> None:
    """A part of what was asked for, on standard output; on stderr where `--json` has that."""
    if as_json:
        say(text)
    else:
        put(redact(text))


def print_json(value: dict[str, Any]) -> None:
    """One JSON object as the last line of standard output."""
    put(json.dumps(value, sort_keys=True))


def put(text: str) -> None:
    """`text` as lines of standard output."""
    with suppress(BrokenPipeError):
        print(text)
    flush()


def flush() -> None:
    """What was printed goes out; nowhere, from now on, where `| head` has seen enough: that is no
    error, and the exit code is still ours."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def count(number: int, noun: str) -> str:
    """`1 shard`, `1,288 shards`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """`8.3 s`, `4 min 10 s`, `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """`6,400 B`, `12.3 MB`, decimal units."""
    if num_bytes < 100_000:
        return f"{num_bytes:,.0f} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if num_bytes < 1000 * scale or unit == "TB":
            return f"{num_bytes / scale:,.1f} {unit}"
    raise AssertionError
