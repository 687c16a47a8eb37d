"""A proxy in front of an S3 server that misbehaves by a seeded plan.

    pass         forward and answer
    error_500    answer 500 InternalError, do nothing
    slow_down    answer 503 SlowDown, do nothing
    skewed       answer 403 RequestTimeTooSkewed, do nothing
    cut_before   close the connection, do nothing
    cut_after    do it, close the connection: the client cannot know whether it was done
    cut_body     do it, send the headers and half of the answer, close (cut_after if it is empty)
    slow         forward, but request and answer trickle at SLOW_BYTES_PER_S for SLOW_S

What becomes of a request is a hash of (seed, method, path, how often it was asked before): neither
the order in which processes ask nor their number changes the plan of a seed, and a repeated request
is drawn anew. Attempt ids in data names are left out of the hash, since they are random. Requests
are forwarded with the Host they came with, so that signatures hold. Threads in the test's process:
the test sleeps meanwhile, and can change the plan or the server in the middle.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("error_500", "slow_down", "cut_before", "cut_after", "cut_body", "slow")
SLOW_BYTES_PER_S = 8192
SLOW_S = 1.0
TIMEOUT_S = 60.0

ERRORS = {
    "error_500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "skewed": (
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
    ),
}

HOP_BY_HOP = frozenset(("connection", "content-length", "expect", "transfer-encoding"))


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """Shares of requests, 0 to 1, that meet each fault; the others pass.

    `only` is a pattern that "METHOD /path" begins with, of the requests that are meant; each of
    them is disturbed when asked for the first `times` times.
    """

    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    only: str = ""
    times: int = sys.maxsize

    def kind(self, method: str, path: str, asked_before: int) -> str:
        """What becomes of one request."""
        if asked_before >= self.times or not re.match(self.only, f"{method} {path}"):
            return "pass"
        text = f"{self.seed} {method} {path} {asked_before}"
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        for kind, rate in self.rates.items():
            if draw < rate:
                return kind
            draw -= rate
        return "pass"


def evenly(seed: int, share: float) -> FaultPlan:
    """`share` of the requests fail, each of FAULTS as often as the others."""
    return FaultPlan(seed=seed, rates=dict.fromkeys(FAULTS, share / len(FAULTS)))


@dataclass(kw_only=True)
class Proxy:
    """A running proxy; `plan` and `upstream` ("http://host:port") may be changed at any time."""

    endpoint: str
    upstream: str
    plan: FaultPlan = field(default_factory=FaultPlan)
    counts: Counter[str] = field(default_factory=Counter[str])
    _asked: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, plan: FaultPlan, upstream: str = "") -> None:
        """A new plan, with nothing asked or counted so far."""
        with self._lock:
            self.upstream = upstream or self.upstream
            self.plan = plan
            self.counts.clear()
            self._asked.clear()

    def draw(self, method: str, path: str) -> str:
        """Decide on one request and count it."""
        path = re.sub(r"-[0-9a-f]{8}[0-9]+\.(parquet|tar)", r".\1", path)  # no attempt id
        with self._lock:
            kind = self.plan.kind(method, path, self._asked[method, path])
            self._asked[method, path] += 1
            self.counts[kind] += 1
        return kind

    def requests(self) -> int:
        """How many there were since `begin`."""
        return sum(self.counts.values())

    def faults(self) -> dict[str, int]:
        """Requests by fault, without those that passed."""
        return {kind: n for kind, n in sorted(self.counts.items()) if kind != "pass"}


@contextmanager
def fault_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of `upstream` that passes everything until `Proxy.begin`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler, bind_and_activate=False)
    server.request_queue_size = 128
    server.daemon_threads = True
    server.server_bind()
    server.server_activate()
    proxy = Proxy(endpoint=f"http://127.0.0.1:{server.server_address[1]}", upstream=upstream)
    server.proxy = proxy  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One client connection."""

    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_S
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Counted, not printed."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client was killed, or gave up waiting
            self.close_connection = True

    def _serve(self) -> None:
        proxy: Proxy = self.server.proxy  # pyright: ignore[reportAttributeAccessIssue]
        kind = proxy.draw(self.command, self.path)
        slow = kind == "slow"
        body = self._body(slow)
        if kind == "cut_before":
            self.close_connection = True
            return
        if kind in ERRORS:
            self._error(*ERRORS[kind])
            return
        try:
            response, content = self._forward(proxy.upstream, body)
        except (OSError, http.client.HTTPException):  # the server is being stopped
            self.close_connection = True
            return
        if kind == "cut_after" or (kind == "cut_body" and not content):
            self.close_connection = True
            return
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        length = response.headers.get("Content-Length") if self.command == "HEAD" else len(content)
        if response.status not in (204, 304) and length is not None:
            self.send_header("Content-Length", str(length))
        if kind == "cut_body":
            self.close_connection = True
            content = content[: len(content) // 2]
        self.end_headers()
        for piece in _trickle(content) if slow else [content]:
            self.wfile.write(piece)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self, slow: bool) -> bytes:
        """The request's body, as sent (a chunked one without its framing)."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            pieces: list[bytes] = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(pieces)
        length = int(self.headers.get("Content-Length", 0))
        if not slow:
            return self.rfile.read(length)
        pieces, step = [], SLOW_BYTES_PER_S // 10
        for _ in range(round(SLOW_S * 10)):
            pieces.append(self.rfile.read(min(step, length)))
            length -= len(pieces[-1])
            if not length:
                break
            time.sleep(0.1)
        return b"".join((*pieces, self.rfile.read(length)))

    def _forward(self, upstream: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """The server's answer, read whole."""
        connection = http.client.HTTPConnection(upstream.removeprefix("http://"), timeout=TIMEOUT_S)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.putheader("Connection", "close")
            connection.endheaders(body)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def _error(self, status: int, code: str, message: str) -> None:
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        ).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _trickle(content: bytes) -> Iterator[bytes]:
    """`content` slowly for SLOW_S, then the rest at once."""
    step = SLOW_BYTES_PER_S // 10
    for i in range(round(SLOW_S * 10)):
        yield content[i * step : (i + 1) * step]
        if (i + 1) * step >= len(content):
            return
        time.sleep(0.1)
    yield content[round(SLOW_S * 10) * step :]
