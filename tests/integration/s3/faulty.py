"""What tests of commits on S3 share: moto with faults, and a commit."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import boto3

from splatshard.pipeline.shards.commit import (
    marker_digest,
    publish,
    staged_file,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.storage import atomic
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.shard import ShardManifest
from tests.rows import config_of, make_ref, make_rows, write_shard

SECRET = "never-to-be-seen"
JOB, OTHER_JOB = "00c0ffee", "deadbeef"
DIGEST = "cd" * 32
CONFIG = ConvertConfig(
    decode=DecodeConfig(image_size=24), fit=FitConfig(num_gaussians=6, steps=3), backend="cpu"
)

ERROR = "<Error><Code>{}</Code><Message>{}</Message></Error>"


@dataclasses.dataclass
class Request:
    method: str
    key: str
    query: str
    conditional: bool


@dataclasses.dataclass
class Server:
    """moto, one request at a time: it checks a write's condition first and writes later, so that
    of two at once both might succeed. `fault` says what becomes of a request:

    ""          is answered
    Code        refused with that error code
    lost        done, but answered with an error
    cut         answered with half of the body
    short       the body that is sent is stored without its last byte
    deaf        done, whatever its condition
    paged       a listing in small pages
    """

    endpoint: str
    fault: Callable[[Request], str] = lambda _: ""
    asked: list[Request] = dataclasses.field(default_factory=list)

    def client(self) -> Any:
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def put(self, url: str, files: Mapping[str, bytes]) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        client = self.client()
        for name, data in files.items():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)

    def names(self, url: str) -> list[str]:
        """What lies below `url`, but for the probe."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        found = self.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")
        names = [entry["Key"].removeprefix(f"{prefix}/") for entry in found.get("Contents", ())]
        return [name for name in names if name != atomic.PROBE]


STATUS = {"InternalError": 500, "SlowDown": 503, "NotImplemented": 501, "NoSuchBucket": 404}


def faulty(app: Any, server: Server) -> Any:
    """The WSGI application `app`, with the faults of `server`."""
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        method = environ["REQUEST_METHOD"]
        condition = environ.keys() & {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}
        request = Request(
            method,
            environ["PATH_INFO"],
            environ["QUERY_STRING"],
            conditional=method == "PUT" and bool(condition),
        )
        server.asked.append(request)
        fault = server.fault(request)
        if fault == "short":
            body = body[:-1]
            environ["CONTENT_LENGTH"] = str(len(body))
        if fault == "deaf":
            environ.pop("HTTP_IF_MATCH", None)
            environ.pop("HTTP_IF_NONE_MATCH", None)
        environ["wsgi.input"] = io.BytesIO(body)
        if fault == "paged":
            environ["QUERY_STRING"] += "&max-keys=7"
        if fault in ("", "short", "deaf", "paged"):
            with lock:
                return list(app(environ, start_response))
        if fault == "cut":
            status: list[Any] = []
            with lock:
                whole = b"".join(app(environ, lambda *given: status.extend(given)))
            start_response(*status)
            return [whole[: len(whole) // 2]]
        if fault == "lost":
            with lock:
                list(app(environ, lambda *_: None))
            fault = "InternalError"
        text = ERROR.format(fault, "because of a test").encode()
        start_response(f"{STATUS.get(fault, 403)} x", [("Content-Length", str(len(text)))])
        return [b"" if request.method == "HEAD" else text]

    return answer


def commit_shard(
    dst: str,
    attempt: str = f"{JOB}1",
    config: ConvertConfig | None = None,
    replaces: ShardManifest | None = None,
    rows: list[dict[str, Any]] | None = None,
) -> ShardManifest:
    config = config or config_of()
    rows = make_rows(8, codec=config.pack.codec) if rows is None else rows
    digest = marker_digest(replaces) if replaces else ""
    with staged_file(dst, "00000000") as path:
        write_shard(path, rows, config.pack.format, config.pack.codec)
        return publish(dst, path, make_ref(), config, DIGEST, attempt=attempt, replaces=digest)


def assert_one_shard(server: Server, dst: str) -> ShardManifest:
    """`dst` holds one whole shard and nothing else."""
    (marker,) = read_markers(dst).values()
    assert isinstance(marker, ShardManifest)
    assert server.names(dst) == [marker.data_file, "00000000.json"]
    assert verify_shard(dst, marker) == []
    return marker
