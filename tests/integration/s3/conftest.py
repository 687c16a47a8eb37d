"""One faulty S3 server per file, an empty bucket per test."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from splatshard.pipeline.storage import fs, retry
from tests.integration.s3.faulty import SECRET, Server, faulty


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server("")
    app = faulty(DomainDispatcherApplication(create_backend_app), server)
    http = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    server.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield server
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def server(
    running: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Server]:
    """The server and the usual environment for it; nothing is retried."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0)
    fs.use_options({})
    yield running
    running.fault = lambda _: ""
    fs.use_options({})


buckets = itertools.count()


@pytest.fixture
def dst(server: Server) -> str:
    """A folder in an empty bucket."""
    bucket = f"bucket-{next(buckets)}"
    server.client().create_bucket(Bucket=bucket)
    server.asked.clear()
    return f"s3://{bucket}/splats"
