"""A web server for tests, as good or bad as they want it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from splatshard.pipeline.storage import fs


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` as the server's attributes say, see `serve`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Not printed."""

    def handle(self) -> None:
        with suppress(ConnectionError):  # a reader that has seen enough
            super().handle()

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.command, self.path, self.headers.get("Range", "")))
        data = server.files.get(self.path.partition("?")[0])
        status = server.refuse(self.path) or (404 if data is None else 200)
        data = data if status == 200 and data is not None else b"no"
        total, ranged = len(data), self.headers.get("Range")
        if status == 200 and ranged and server.ranges:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            status, start = 206, int(first)
            data = data[start : int(last or total) + 1]
        self.send_response(status)
        if server.length == "told":
            self.send_header("Content-Length", str(len(data)))
        elif server.length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        for name, value in server.headers.items():
            self.send_header(name, value)
        if server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(server, data)

    do_HEAD = do_GET

    def send_body(self, server: Any, data: bytes) -> None:
        if cut := bool(server.cuts and len(data) > 100):
            server.cuts -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        if server.length != "chunked":
            self.wfile.write(data)
            return
        for begin in range(0, len(data), 5000):
            chunk = data[begin : begin + 5000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"" if cut else b"0\r\n\r\n")


@contextmanager
def serve() -> Iterator[Any]:
    """A server at `url`. It has `files` by path, whose lengths are "told", "chunked" or not known
    (""), and sends `ranges`, unless `refuse(path)` is a status; `cuts` answers are cut in half.
    `asked` are the requests so far: method, path, range."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.asked, server.ranges, server.cuts = {}, [], True, 0
    server.length, server.headers, server.refuse = "told", {}, lambda path: 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        fs.use_options({})
        server.shutdown()
        thread.join()
        server.server_close()
