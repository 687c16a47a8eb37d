"""Standard error: one `logging` handler, for lines that people read or one JSON object per line.

    configure("json")   in each process: a command (`run` does it), a worker, a training process
    log("retry", "shard 00000003 ...", level="warning", shard="00000003", kind="oom")

All that goes through `logging` and `warnings`, whoever says it, is written by this handler, which
strikes out secrets. With `--log-format json` each record is {"time", "level", "event", "message",
...fields}: the events of `log` have their own names, records of others are events "log" with the
name of their logger, and lines that are printed on `sys.stderr` are events "output". What C++
writes to the file descriptor itself stays as it is.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from splatshard.pipeline.storage.options import redact

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def debugging() -> bool:
    """True with `--debug` (which sets the variable) or SPLATSHARD_DEBUG=1."""
    return os.environ.get("SPLATSHARD_DEBUG", "") not in ("", "0")


def log(
    event: str,
    message: str = "",
    *,
    level: Level = "info",
    detail: bool = False,
    trace: str = "",
    **fields: Any,
) -> None:
    """One event.

    People see the message alone; of a `detail`, and of the trace, they see nothing unless they
    debug. Fields that are None are left out.
    """
    logger = logging.getLogger(__name__)
    extra = {"event": event, "detail": detail, "trace": trace, "fields": fields}
    record = logger.makeRecord(__name__, LEVELS[level], "", 0, message, (), None, extra=extra)
    (logger if installed() else _handler).handle(record)  # whatever the level of the logger is


# How it is written


class StderrHandler(logging.Handler):
    """Writes each record to `sys.stderr` as that is at the moment, in text or JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = sys.stderr
            if isinstance(stream, _JsonLines):
                stream.stream.write(json_of(record))
                stream.stream.flush()
            elif debugging() or not getattr(record, "detail", False):
                print(text_of(record), file=stream, flush=True)
        except Exception:
            self.handleError(record)


def text_of(record: logging.LogRecord) -> str:
    """What people read. Of records that are not from `log` it is the message and its traceback."""
    trace = getattr(record, "trace", None)
    if trace is None:
        return redact(logging.Formatter().format(record).rstrip("\n"))
    return redact((trace if debugging() else "") + record.getMessage())


def json_of(record: logging.LogRecord) -> str:
    """The record as a line of JSON."""
    if hasattr(record, "event"):
        fields = {**record.fields, "trace": record.trace or None}  # type: ignore[attr-defined]
        return json_line(record.event, record.getMessage(), record, fields)  # type: ignore[attr-defined]
    trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
    fields = {"logger": record.name, "trace": trace}
    return json_line("log", record.getMessage().rstrip("\n"), record, fields)


def json_line(
    event: str, message: str, record: logging.LogRecord | None, fields: dict[str, Any]
) -> str:
    """The event as JSON, closing newline included; without a record it is of now, and "info"."""
    when = datetime.fromtimestamp(record.created, UTC) if record else datetime.now(UTC)
    time = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    number = record.levelno if record else logging.INFO
    level = max((n, name) for name, n in LEVELS.items() if n <= max(number, logging.DEBUG))[1]
    line = {"time": time, "level": level, "event": event, "message": message}
    line |= {name: value for name, value in fields.items() if value is not None}
    shown = {name: redact(v) if isinstance(v, str) else v for name, v in line.items()}
    return json.dumps(shown, default=str) + "\n"


class _JsonLines(io.TextIOBase):
    """Stands for `stream`, and turns each line that is printed into an event."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._rest = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.stream.write(json_line("output", line.rstrip(), None, {}))
        return len(text)

    def flush_rest(self) -> None:
        """Write a line that was not ended."""
        if self._rest:
            self.write("\n")
        self.flush()

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


# Where it is in force

_handler = StderrHandler()


def configure(format: Format, alone: bool = False) -> None:
    """Install the handler in this process and choose how it writes from now on.

    With `alone` it replaces the handlers that others gave the root logger.
    """
    root = logging.getLogger()
    if alone:
        root.handlers.clear()
    root.addHandler(_handler)
    logging.captureWarnings(True)
    if isinstance(sys.stderr, _JsonLines):
        sys.stderr.flush_rest()
        sys.stderr = sys.stderr.stream
    if format == "json":
        sys.stderr = _JsonLines(sys.stderr)


def installed() -> bool:
    """Whether all of `logging` is written here."""
    return _handler in logging.getLogger().handlers


def structured() -> bool:
    """Whether JSON is written."""
    return isinstance(sys.stderr, _JsonLines)


def log_format() -> Format:
    """What `configure` was given, for processes that are to write the same."""
    return "json" if structured() else "text"


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """The handler is installed, and writes text until `configure` says JSON; then as before."""
    was_installed = installed()
    configure("text")
    try:
        yield
    finally:
        configure("text")
        if not was_installed:
            logging.getLogger().removeHandler(_handler)
            logging.captureWarnings(False)
