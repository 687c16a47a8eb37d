"""What a job says on standard error: lines for people, or one JSON object per line.

    log("retry", "shard 00000003 ...", level="warning", shard="00000003", kind="oom")

With `--log-format json` each event becomes {"time", "level", "event", "message", ...fields}, and
lines that others print on `sys.stderr` (Ray, warnings) become events of the kind "output". What C++
writes to the file descriptor itself stays as it is. Secrets are struck out here, whoever named
them. Not built on `logging`: there is one place to write to, and the format is the whole of it.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from splatshard.pipeline.storage.options import redact

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]


def debugging() -> bool:
    """True with `--debug` (which sets the variable) or SPLATSHARD_DEBUG=1."""
    return os.environ.get("SPLATSHARD_DEBUG", "") not in ("", "0")


def configure(format: Format) -> None:
    """How to write from now on."""
    if isinstance(sys.stderr, _JsonLines):
        sys.stderr.flush_rest()
        sys.stderr = sys.stderr.stream
    if format == "json":
        sys.stderr = _JsonLines(sys.stderr)


def structured() -> bool:
    """Whether JSON is written."""
    return isinstance(sys.stderr, _JsonLines)


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
    stream = sys.stderr
    if isinstance(stream, _JsonLines):
        fields = {**fields, "trace": trace or None}
        stream.stream.write(json_line(event, message, level, fields))
        stream.stream.flush()
    elif debugging() or not detail:
        shown = trace if debugging() else ""
        print(redact(shown + message), file=stream, flush=True)


def json_line(event: str, message: str, level: Level, fields: dict[str, Any]) -> str:
    """The event as JSON, closing newline included."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
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
                self.stream.write(json_line("output", line.rstrip(), "info", {}))
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
