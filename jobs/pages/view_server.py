"""The server behind `splatshard view`: one page on this machine, and the data it asks for.

It listens on 127.0.0.1 alone and answers GET alone, and only where the browser has asked for this
machine by such a name: a page of somebody else's that has its own name point here is refused. All
that comes from a dataset leaves as JSON or PNG, which the page puts in as text or pictures; no
script, style or picture from elsewhere is let in.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from splatshard.jobs.cli.log import debugging
from splatshard.jobs.cli.text import say
from splatshard.jobs.pages import view_data, view_sample
from splatshard.jobs.pages.view_data import Query, View
from splatshard.pipeline.storage.options import redact
from splatshard.schemas.errors import SplatshardError, UsageError

HOST = "127.0.0.1"
NAMED = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?")
"""This machine; with any port, as a tunnel may end at another one."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

SCRIPT = "text/javascript; charset=utf-8"
FILES = {
    "/": ("view.html", "text/html; charset=utf-8"),
    "/view.css": ("view.css", "text/css; charset=utf-8"),
    "/view.js": ("view.js", SCRIPT),
    "/view_parts.js": ("view_parts.js", SCRIPT),
    "/view_sample.js": ("view_sample.js", SCRIPT),
    "/view_icon.svg": ("view_icon.svg", "image/svg+xml"),
}

GAINS = range(1, 65)
LARGEST = 1 << 40

Answer = dict[str, Any] | bytes


class Asked:
    """The parameters of a request. Raises UsageError for one that is missing or is none."""

    def __init__(self, query: str) -> None:
        self._values = {name: values[-1] for name, values in parse_qs(query).items()}

    def text(self, name: str) -> str:
        return self._values.get(name, "")

    def number(self, name: str, default: int | None = None, largest: int = LARGEST) -> int:
        if name not in self._values and default is not None:
            return default
        found = self.maybe(name, largest)
        if found is None:
            raise UsageError(f"{name} is missing")
        return found

    def maybe(self, name: str, largest: int = LARGEST) -> int | None:
        if name not in self._values:
            return None
        text = self._values[name]
        if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) <= largest):
            raise UsageError(f"{name} {text!r}: must be a whole number up to {largest}")
        return int(text)

    def decibels(self, name: str) -> float | None:
        text = self._values.get(name, "")
        try:
            found = float(text) if text else None
        except ValueError:
            found = float("nan")
        if found is not None and not abs(found) < 1e6:
            raise UsageError(f"{name} {text!r}: must be a number of dB")
        return found

    def query(self) -> Query:
        return Query(
            self.text("text"), self.text("status"), self.decibels("low"), self.decibels("high")
        )

    def place(self) -> tuple[str, int]:
        """Shard and row."""
        return self.text("shard"), self.number("row")


# What is answered, by path


def overview(view: View, asked: Asked) -> Answer:
    if asked.text("again"):
        view.read_markers()
    return view_data.overview(view)


def shard(view: View, asked: Asked) -> Answer:
    return view_data.shard_overview(view, asked.text("shard"))


def shards(view: View, asked: Asked) -> Answer:
    order = asked.text("order") or "name"
    return view_data.list_shards(view, asked.text("text"), order, asked.number("start", 0))


def samples(view: View, asked: Asked) -> Answer:
    place = asked.number("start", 0), asked.maybe("around")
    order = asked.text("order") or "row"
    return view_data.list_samples(view, asked.text("shard"), asked.query(), order, *place)


def scan(view: View, asked: Asked) -> Answer:
    return view_data.scan(view, asked.query(), asked.text("shard"), asked.number("row", 0))


def sample(view: View, asked: Asked) -> Answer:
    return view_sample.sample(view, *asked.place())


def ellipses(view: View, asked: Asked) -> Answer:
    return view_sample.ellipses(view, *asked.place(), asked.maybe("budget"))


def has_original(view: View, asked: Asked) -> Answer:
    return view_sample.has_original(view, *asked.place())


def original(view: View, asked: Asked) -> Answer:
    return view_sample.original(view, *asked.place())


def rendering(view: View, asked: Asked) -> Answer:
    side = asked.number("side", view_sample.SHOWN_PX, view_sample.SHOWN_PX)
    return view_sample.rendering(view, *asked.place(), asked.maybe("budget"), max(1, side))


def residual(view: View, asked: Asked) -> Answer:
    gain = asked.number("gain", 1, max(GAINS))
    return view_sample.residual(view, *asked.place(), asked.maybe("budget"), gain)


ANSWERS: dict[str, Callable[[View, Asked], Answer]] = {
    "/api/overview": overview,
    "/api/shard": shard,
    "/api/shards": shards,
    "/api/samples": samples,
    "/api/scan": scan,
    "/api/sample": sample,
    "/api/ellipses": ellipses,
    "/api/original": has_original,
    "/image/original": original,
    "/image/rendering": rendering,
    "/image/residual": residual,
}


# How


class Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "splatshard", ""
    timeout = 60
    view: View

    def do_GET(self) -> None:
        kind, status, body = "application/json", 200, b""
        if not NAMED.fullmatch(self.headers.get("Host", "")):
            status, body = 403, text_of({"error": f"open this page as http://{HOST}:PORT"})
        else:
            kind, status, body = answer(self.view, self.path)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # the page has gone on
            self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        with suppress(ConnectionError):
            super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        if debugging():
            say(f"view: {format % args}")


def answer(view: View, path: str) -> tuple[str, int, bytes]:
    """Content type, HTTP status and body of what is at `path`."""
    parts = urlsplit(path)
    if parts.path in FILES:
        name, kind = FILES[parts.path]
        return kind, 200, resources.files("splatshard.jobs.pages").joinpath(name).read_bytes()
    if parts.path not in ANSWERS:
        return "application/json", 404, text_of({"error": f"nothing is at {parts.path}"})
    try:
        found = ANSWERS[parts.path](view, Asked(parts.query))
    except SplatshardError as e:
        status = 400 if isinstance(e, UsageError) else 500
        return "application/json", status, text_of({"error": redact(str(e))})
    except Exception as e:
        if debugging():
            say(traceback.format_exc())
        message = f"internal error, {type(e).__name__}: {e} (--debug shows where)"
        return "application/json", 500, text_of({"error": redact(message)})
    if isinstance(found, bytes):
        return "image/png", 200, found
    return "application/json", 200, text_of(found)


def text_of(value: dict[str, Any]) -> bytes:
    """JSON, without numbers that are none in a browser."""
    return json.dumps(value, allow_nan=False).encode()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if debugging():
            say(traceback.format_exc())


def open_server(view: View, port: int) -> Server:
    """A server of `view`, not yet serving. Raises UsageError for a port that is taken."""
    handler = type("ViewHandler", (Handler,), {"view": view})
    try:
        return Server((HOST, port), handler)
    except OSError as e:
        raise UsageError(
            f"--port {port} cannot be used ({e.strerror or e}): choose another one, or --port 0 "
            "for any that is free"
        ) from e
