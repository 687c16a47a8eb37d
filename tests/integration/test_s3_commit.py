"""S3 as source and destination, over HTTP: conversion, races, lost answers, kills, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from splatshard.jobs.destination import plan_file
from splatshard.jobs.destination.plan import PLAN_FILE, PlannedShard, make_plan, planned
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.commit import (
    check_destination,
    clean_attempts,
    clean_staging,
    mark_failed,
    marker_digest,
    publish,
    remove,
    staged_file,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.pipeline.storage import atomic, retry
from splatshard.pipeline.storage import fs as storage
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.errors import SourceError, StorageError, UnavailableError, UsageError
from splatshard.schemas.shard import ShardManifest, to_json
from tests.make import datacomp_tar, image_folder, image_parquet
from tests.rows import config_of, make_ref, make_rows, write_shard

pytestmark = pytest.mark.integration

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
    monkeypatch.setattr(retry, "PATIENCE_S", 0)
    storage.use_options({})
    yield running
    running.fault = lambda _: ""
    storage.use_options({})


buckets = itertools.count()


@pytest.fixture
def dst(server: Server) -> str:
    """A folder in an empty bucket."""
    bucket = f"bucket-{next(buckets)}"
    server.client().create_bucket(Bucket=bucket)
    server.asked.clear()
    return f"s3://{bucket}/splats"


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


# The whole line


def test_from_s3_to_s3(server: Server, dst: str, tmp_path: Path) -> None:
    """A tar, a Parquet file and a folder of images give the same rows as from a local disk."""
    datacomp_tar(tmp_path / "in" / "00000000.tar", 4)
    image_parquet(tmp_path / "in" / "p.parquet", 3)
    image_folder(tmp_path / "photos", per_class=2)
    source = dst.replace("/splats", "")
    for folder in ("in", "photos"):
        files = (path for path in sorted((tmp_path / folder).rglob("*")) if path.is_file())
        names = {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in files}
        server.put(f"{source}/{folder}", names)
    refs = list_shards(f"{source}/in/{{00000000.tar,p.parquet}}::{source}/photos")
    assert [(ref.name, ref.kind) for ref in refs] == [
        ("00000000", "tar"),
        ("p", "parquet"),
        ("photos-00000", "folder"),
    ]
    local = list_shards(f"{tmp_path}/in::{tmp_path}/photos")
    backend = select_backend("cpu")
    check_destination(dst)
    for ref, there in zip(refs, local, strict=True):
        (tmp_path / "out").mkdir(exist_ok=True)
        ours = convert_shard(ref, CONFIG, dst, backend)
        other = convert_shard(there, CONFIG, str(tmp_path / "out"), backend)
        assert ours.source_sha256 == other.source_sha256
        assert ours.statistics == other.statistics
        rows = list(read_rows(f"{dst}/{ours.data_file}"))
        assert rows == list(read_rows(f"{tmp_path}/out/{other.data_file}"))
        assert verify_shard(dst, ours) == []
    assert set(read_markers(dst)) == {"00000000", "p", "photos-00000"}
    (ref,) = list_shards(f"{source}/in/*.tar", limit=2)
    assert (ref.name, ref.limit) == ("00000000", 2)


@pytest.mark.parametrize("paged", [False, True])
def test_listings_of_sources(server: Server, dst: str, paged: bool) -> None:
    """A folder and `**` cost one listing, other patterns one for each folder on their way."""
    server.put(dst, {f"{part}/{part}{i}.tar": b"" for part in "abc" for i in range(5)})
    server.put(dst, {"a/deep/d.tar": b"", "other/deep/e.tar": b"", "a/": b""})
    server.fault = lambda _: "paged" if paged else ""

    def listed(pattern: str) -> tuple[int, int]:
        server.asked.clear()
        found = len(list_shards(f"{dst}{pattern}"))
        listings = [each for each in server.asked if "list-type" in each.query]
        return found, sum("max-keys=1" not in each.query for each in listings)  # does it exist?

    if paged:
        assert [listed(p)[0] for p in ("", "/**/*.tar", "/*/*.tar")] == [17, 17, 15]
        return
    assert listed("") == (17, 1)
    assert listed("/**/*.tar") == (17, 1)
    assert listed("/[ab]/*.tar") == (10, 3)
    assert listed("/a/*.tar") == (5, 1)
    assert listed("/a*/*.tar") == (5, 2)


def test_a_folder_that_the_store_does_not_list(server: Server, dst: str) -> None:
    server.put(dst, {f"{part}/{part}.tar": b"" for part in "abc"})
    server.fault = lambda request: "SlowDown" if "%2Fb%2F" in request.query else ""
    with pytest.raises(UnavailableError, match=rf"cannot read {dst}/b/?: SlowDown"):
        list_shards(f"{dst}/*/*.tar")
    assert len(list_shards(f"{dst}/**/*.tar")) == 3
    with pytest.raises(UsageError, match=rf"{dst}/a/a\.tar of SRC lies in DST {dst}"):
        list_shards(f"{dst}/a/a.tar", dst=dst)
    for dst_in_src in (f"{dst}/splats", dst.replace("s3://", "s3a://") + "/splats"):
        with pytest.raises(UsageError, match=rf"DST {dst_in_src} lies in SRC {dst}"):
            list_shards(dst, dst=dst_in_src)


def test_a_commit_costs_few_requests(server: Server, dst: str) -> None:
    check_destination(dst)
    server.asked.clear()
    commit_shard(dst)
    assert [request.method for request in server.asked] == ["HEAD", "PUT", "HEAD", "PUT", "DELETE"]


def test_names_hold_the_attempt(server: Server, dst: str) -> None:
    manifest = commit_shard(f"{dst}/", f"{JOB}17")
    assert manifest.data_file == f"00000000-{manifest.fingerprint[:8]}-{JOB}17.parquet"
    assert_one_shard(server, dst)
    manifest = commit_shard(dst, "", config_of("webdataset"), manifest)
    assert manifest == assert_one_shard(server, dst)


# Several attempts


def test_threads_that_race_leave_one_shard(server: Server, dst: str) -> None:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(commit_shard, [dst] * 6, [f"{JOB}{i}" for i in range(6)]))
    winner = assert_one_shard(server, dst)
    assert results == [winner] * 6


RACER = """
import sys
from tests.integration.test_s3_commit import commit_shard, config_of, to_json
from splatshard.schemas.errors import StorageError
print("ready", flush=True)
sys.stdin.readline()
dst, attempt, format = sys.argv[1:]
try:
    print(to_json(commit_shard(dst, attempt, config_of(format))))
except StorageError as e:
    print(e)
"""


def test_processes_that_race_leave_one_shard(server: Server, dst: str) -> None:
    """Three jobs, one of another configuration: the slower configuration is refused."""
    formats = ("parquet", "webdataset", "parquet")
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, dst, f"{JOB}{number}", format],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, format in enumerate(formats)
    ]
    for job in jobs:
        assert job.stdout
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        assert job.stdin
        job.stdin.write("\n")
        job.stdin.flush()
    said = [job.communicate(timeout=120)[0] for job in jobs]
    winner = assert_one_shard(server, dst)
    for text, format in zip(said, formats, strict=True):
        if format == winner.format:
            assert text.strip() == to_json(winner).strip()
        else:
            assert "pack.format" in text


def test_a_stale_shard_is_replaced(server: Server, dst: str) -> None:
    old = commit_shard(dst, config=config_of("webdataset"))
    mark_failed(dst, make_ref(), config_of(), SourceError("cut"))
    assert read_markers(dst) == {"00000000": old}
    new = commit_shard(dst, f"{OTHER_JOB}1", replaces=old)
    assert assert_one_shard(server, dst) == new
    # a second attempt that was told the same finds it done
    assert commit_shard(dst, f"{OTHER_JOB}2", replaces=old) == new
    assert assert_one_shard(server, dst) == new


def test_damaged_data_and_damaged_markers_are_replaced(server: Server, dst: str) -> None:
    old = commit_shard(dst)
    server.put(dst, {old.data_file: b"damaged"})
    new = commit_shard(dst, f"{OTHER_JOB}1", replaces=old)
    assert assert_one_shard(server, dst) == new != old
    server.put(dst, {"00000000.json": b"{}"})
    newer = commit_shard(dst, f"{OTHER_JOB}2")
    clean_attempts(dst, OTHER_JOB, [newer])
    assert assert_one_shard(server, dst) == newer


def test_another_configuration_is_refused(server: Server, dst: str) -> None:
    first = commit_shard(dst)
    for config in (config_of("webdataset"), config_of("parquet", "balanced")):
        with pytest.raises(StorageError, match=r"pack\.(format|codec).*another job writes"):
            commit_shard(dst, f"{OTHER_JOB}1", config)
    assert assert_one_shard(server, dst) == first


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.parametrize("stale", [False, True])
def test_a_race_that_is_lost_after_the_upload(
    server: Server, dst: str, format: str, stale: bool
) -> None:
    """Another job's marker comes when our data are there already and our marker is on its way."""
    old = commit_shard(dst, config=config_of("parquet", "balanced")) if stale else None
    atomic.keeps_conditions(dst)
    others: list[ShardManifest] = []

    def interfere(request: Request) -> str:
        if request.method == "PUT" and request.key.endswith("00000000.json"):
            server.fault = lambda _: ""
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(commit_shard, dst, f"{OTHER_JOB}1", replaces=old)
                others.append(other.result())
        return ""

    server.fault = interfere
    if format == "parquet":
        assert [commit_shard(dst, f"{JOB}2", replaces=old)] == others
    else:
        with pytest.raises(StorageError, match=r"pack\.format"):
            commit_shard(dst, f"{JOB}2", config_of(format), old)
    assert [assert_one_shard(server, dst)] == others


@pytest.mark.parametrize("fault", ["", "deaf", "lost"])
def test_two_jobs_at_once_keep_each_others_plans(
    server: Server, dst: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Another one writes just when this one has read what is there. A store that ignores conditions
    is looked at once more; a lost answer is tried again."""
    refs = {name: make_ref(name) for name in ("a", "b", "c" * 200)}
    nothing = make_plan([], {}, CONFIG, str)
    of = {name: planned([ref], nothing, CONFIG) for name, ref in refs.items()}
    server.fault = lambda request: fault if request.conditional and fault == "deaf" else ""
    atomic.keeps_conditions(dst)
    plan_file.write_plan(dst, of["a"])
    asked: list[str] = []

    def read_plan(dst: str) -> dict[str, PlannedShard]:
        found = real(dst)
        asked.append(dst)
        if len(asked) == 1:
            plan_file.write_plan(dst, of["b"])
        return found

    real = plan_file.read_plan
    monkeypatch.setattr(plan_file, "read_plan", read_plan)
    if fault == "lost":
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
        storage.use_options({})
        once = iter(["lost"])
        server.fault = lambda request: next(once, "") if request.conditional else ""
    plan_file.write_plan(dst, of["c" * 200])
    assert real(dst) == of["a"] | of["b"] | of["c" * 200]
    assert len(asked) >= 3
    assert server.names(dst) == ["_plan.json"]


def test_a_large_plan_goes_over_in_pieces(server: Server, dst: str) -> None:
    """As a file that is open, not as a hundred MB of memory."""
    nothing = make_plan([], {}, CONFIG, str)
    few, many = (
        planned([make_ref(f"{i:08d}") for i in range(n)], nothing, CONFIG) for n in (1, 20_000)
    )
    for shards in (few, many, few):
        plan_file.write_plan(dst, shards)
    assert plan_file.read_plan(dst) == many
    assert [r.method for r in server.asked if r.key.endswith(PLAN_FILE)].count("PUT") == 2


def test_shards_that_are_gone_are_removed(server: Server, dst: str) -> None:
    marker = commit_shard(dst)
    step = 0
    for step in itertools.count():
        left = itertools.count(step, -1)
        server.fault = lambda _, left=left: "" if next(left) > 0 else "InternalError"
        try:
            assert remove(dst, [marker]) == ["00000000"]
            break
        except UnavailableError:
            server.fault = lambda _: ""
            (marker,) = read_markers(dst).values() or (marker,)
            if isinstance(marker, ShardManifest):
                assert verify_shard(dst, marker) == []
    assert step >= 5
    server.fault = lambda _: ""
    assert server.names(dst) == []


def test_a_zombie_does_not_mark_a_done_shard_failed(server: Server, dst: str) -> None:
    commit_shard(dst)
    mark_failed(dst, make_ref(), config_of(), SourceError("cut"))
    assert_one_shard(server, dst)


# Answers that are lost, and kills


@pytest.mark.parametrize("stale", [False, True])
def test_the_lost_answer_of_a_marker_is_recognised(
    server: Server, dst: str, stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore repeats the write and is refused by its own first attempt."""
    old = commit_shard(dst, config=config_of("webdataset")) if stale else None
    atomic.keeps_conditions(dst)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    storage.use_options({})
    lost: list[Request] = []

    def lose(request: Request) -> str:
        if request.method == "PUT" and request.key.endswith("00000000.json"):
            lost.append(request)
            return "lost" if len(lost) == 1 else ""
        return ""

    server.fault = lose
    manifest = commit_shard(dst, f"{OTHER_JOB}1", replaces=old)
    assert len(lost) == 2 + stale  # a refused etag is offered once more, without its quotes
    assert assert_one_shard(server, dst) == manifest


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("stale", [False, True])
def test_a_kill_at_any_request(server: Server, dst: str, done: bool, stale: bool) -> None:
    """From some request on nothing arrives any more; that one is done or not."""
    old: ShardManifest | None = None
    for step in itertools.count():
        here = f"{dst}/{step}"
        if stale:
            old = commit_shard(here, f"{OTHER_JOB}1", config_of("webdataset"))
            mark_failed(here, make_ref(), config_of(), SourceError("cut"))
        atomic.keeps_conditions(here)
        left = itertools.count(step, -1)

        def die(_: Request, left: Iterator[int] = left) -> str:
            now = next(left)
            return "" if now > 0 else "lost" if now == 0 and done else "InternalError"

        server.fault = die
        try:
            commit_shard(here, f"{JOB}1", replaces=old)
            killed = False
        except UnavailableError:
            killed = True
        server.fault = lambda _: ""
        found = read_markers(here).get("00000000")
        if isinstance(found, ShardManifest):  # a reader finds the old shard or the new one, whole
            assert verify_shard(here, found) == []
        clean_staging(here)
        again = commit_shard(here, f"{JOB}2", replaces=old)
        clean_attempts(here, JOB, [again], [old] if old else [])
        assert assert_one_shard(server, here) == again
        if not killed:
            break
    assert step >= 4


def test_clean_attempts_leaves_what_may_be_in_use(server: Server, dst: str) -> None:
    manifest = commit_shard(dst)
    fingerprint = manifest.fingerprint[:8]
    mine = f"00000000-{fingerprint}-{JOB}2.tar"
    kept = {
        f"00000000-{fingerprint}-{OTHER_JOB}2.parquet": b"",  # another job's
        f"00000001-{fingerprint}-{JOB}2.parquet": b"",  # of a shard that is not done
        f"_x-{fingerprint}-{JOB}2.txt": b"",
    }
    server.put(dst, kept | {mine: b""})
    clean_attempts(dst, JOB, [manifest])
    assert sorted(server.names(dst)) == sorted((manifest.data_file, "00000000.json", *kept))
    # the manifest that the driver remembers may be an older one than the marker
    server.put(dst, {mine: b""})
    clean_attempts(dst, JOB, [dataclasses.replace(manifest, data_file=mine)])
    assert mine in server.names(dst)
    clean_attempts(dst, JOB, [dataclasses.replace(manifest, data_file="x.tar")])
    assert mine not in server.names(dst)
    assert manifest.data_file in server.names(dst)


# Uploads


def test_an_upload_that_breaks_leaves_nothing(
    server: Server, dst: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "PART_BYTES", 5 << 20)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(12 << 20))
    bucket = dst.split("/")[2]

    def uploads() -> list[Any]:
        return server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])

    for what in ("partNumber=3", "uploadId"):
        server.fault = lambda request, what=what: (
            "InternalError" if request.method != "DELETE" and what in request.query else ""
        )
        with pytest.raises(UnavailableError, match=rf"cannot write {dst}/a: InternalError"):
            atomic.upload(path, f"{dst}/a")
        server.fault = lambda _: ""
        assert server.names(dst) == []
        assert uploads() == []
    atomic.upload(path, f"{dst}/a")
    assert storage.read_bytes(f"{dst}/a") == path.read_bytes()


def test_an_upload_that_arrives_short_is_deleted(server: Server, dst: str) -> None:
    server.fault = lambda request: "short" if request.key.endswith(".parquet") else ""
    with pytest.raises(UnavailableError, match=r"of \d+ bytes \d+ bytes arrived"):
        commit_shard(dst)
    assert server.names(dst) == []


# Stores that ignore conditions


@pytest.mark.parametrize("how", ["deaf", "NotImplemented"])
def test_a_store_without_conditions(
    server: Server, dst: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = lambda request: how if request.conditional else ""
    check_destination(dst)
    assert f"{dst} ignores conditional writes" in caplog.text
    assert "only one at a time" in caplog.text
    first = commit_shard(dst)
    assert commit_shard(dst, f"{OTHER_JOB}1") == first
    with pytest.raises(StorageError, match="another job"):
        commit_shard(dst, f"{OTHER_JOB}2", config_of("webdataset"))
    second = commit_shard(dst, f"{OTHER_JOB}3", config_of("webdataset"), first)
    assert assert_one_shard(server, dst) == second


# Errors and secrets


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AccessDenied", "check what the credentials may do"),
        ("InvalidAccessKeyId", "the access key is unknown: set AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "the secret key is wrong"),
        ("ExpiredToken", "have expired: renew them"),
        ("RequestTimeTooSkewed", "clock is wrong: set it"),
        ("NoSuchBucket", "no such bucket: create it"),
    ],
)
def test_refusals_name_the_remedy(server: Server, dst: str, code: str, remedy: str) -> None:
    server.fault = lambda _: code
    with pytest.raises(StorageError, match=rf"cannot write {dst}/\S+: {code}.*{remedy}.*again"):
        check_destination(dst)
    with pytest.raises(StorageError, match=f"cannot read {dst}: {code}.*{remedy}"):
        read_markers(dst)
    with pytest.raises(SourceError, match=rf"cannot read {dst}/\S+: {code}.*{remedy}"):
        list_shards(f"{dst}/{{0..9}}.tar")
    with (
        pytest.raises(SourceError, match=f"cannot open {dst}/a: {code}.*{remedy}"),
        storage.open_read(f"{dst}/a"),
    ):
        pass
    server.fault = lambda request: "AccessDenied" if request.method == "HEAD" else ""
    with pytest.raises(SourceError, match="403 Forbidden; check the credentials"):
        storage.stat(f"{dst}/a")


@pytest.mark.parametrize("code", ["InternalError", "SlowDown"])
def test_troubles_that_pass_are_unavailable(server: Server, dst: str, code: str) -> None:
    ref = dataclasses.replace(make_ref(), urls=(f"{dst}/a.tar",))
    server.fault = lambda _: code
    calls: list[Callable[[], object]] = [
        lambda: check_destination(dst),
        lambda: list_shards(f"{dst}/{{0..9}}.tar"),
        lambda: list_shards(f"{dst}/*.tar"),
        lambda: list_shards(dst),
        lambda: storage.exists(f"{dst}/a"),
        lambda: list(read(ref, hashlib.sha256())),
        lambda: commit_shard(dst),
        lambda: mark_failed(dst, make_ref(), config_of(), SourceError("cut")),
        lambda: storage.write_bytes(f"{dst}/_progress.json", b"{}"),
    ]
    for call in calls:
        with pytest.raises(UnavailableError, match="store does not answer as it should"):
            call()


def test_a_missing_bucket_is_said(server: Server) -> None:
    src = "s3://there-is-no-such-bucket/in"
    for pattern in (f"{src}/{{0..9}}.tar", f"{src}/*.tar", src):
        with pytest.raises((SourceError, UsageError), match=r"no such bucket|matches nothing"):
            list_shards(pattern)
    with pytest.raises(StorageError, match="no such bucket"):
        check_destination(src)
    with pytest.raises(StorageError, match="no such bucket"):
        read_markers(src)


def test_an_endpoint_that_nobody_listens_at(
    server: Server, dst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from the environment, and an option goes over it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage.use_options({})
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        check_destination(dst)
    storage.use_options({"endpoint_url": server.endpoint})
    check_destination(dst)
    storage.use_options({"s3": {"endpoint_url": "http://127.0.0.1:9"}})
    with pytest.raises(UnavailableError):
        storage.stat(f"{dst}/_probe")


def test_without_credentials(
    server: Server, dst: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    storage.use_options({})
    with pytest.raises(StorageError, match=r"credentials.*AWS_ACCESS_KEY_ID.*anon"):
        check_destination(dst)
    with pytest.raises(SourceError, match=r"credentials.*AWS_ACCESS_KEY_ID.*anon"):
        storage.stat(f"{dst}/a")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    storage.use_options({})
    with pytest.raises(UsageError, match="nobody"):
        check_destination(dst)
    monkeypatch.delenv("AWS_PROFILE")
    storage.use_options({"key": "access", "secret": "another secret"})
    check_destination(dst)


def test_options_that_the_driver_does_not_know(server: Server, dst: str) -> None:
    storage.use_options({"secrt": SECRET})
    with pytest.raises(UsageError, match=r"--storage-options.*secrt") as caught:
        check_destination(dst)
    assert SECRET not in str(caught.value)


def test_secrets_are_seen_nowhere(
    server: Server, dst: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("DEBUG", "pipeline")
    storage.use_options({"key": "access-never-seen", "secret": f"{SECRET}-2"})
    texts = []
    for code in ("SignatureDoesNotMatch", "AccessDenied", "InternalError"):
        server.fault = lambda _, code=code: f"{code}"
        for call in (check_destination, read_markers, list_shards):
            with pytest.raises((StorageError, SourceError, UnavailableError)) as caught:
                call(dst)
            texts.append(str(caught.value))
    server.fault = lambda _: ""
    secret = f"cannot read it with access-never-seen and {SECRET}-2 or {SECRET}"
    mark_failed(dst, make_ref(), config_of(), SourceError(secret))
    commit_shard(dst, config=config_of("webdataset"))
    texts += [storage.read_bytes(f"{dst}/{n}").decode() for n in server.names(dst) if "json" in n]
    assert len(texts) == 10
    for text in (*texts, caplog.text):
        assert "never" not in text, text


# Reading


def test_a_stream_goes_on_where_it_was_cut(
    server: Server, dst: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = datacomp_tar(tmp_path / "a.tar", 6).read_bytes()
    server.put(dst, {"a.tar": data})
    monkeypatch.setattr(retry, "PATIENCE_S", 60)
    cuts = itertools.count()
    server.fault = lambda request: "cut" if request.method == "GET" and next(cuts) in (0, 1) else ""
    with storage.open_read(f"{dst}/a.tar") as stream:
        assert stream.read(1000) == data[:1000]
        assert stream.read() == data[1000:]
    assert next(cuts) == 3


@pytest.mark.parametrize("name", ["a.tar", "p.parquet"])
def test_a_source_that_is_cut_for_good_is_unavailable(
    server: Server, dst: str, name: str, tmp_path: Path
) -> None:
    """Neither a truncated tar, which would fail the shard for good, nor a shorter shard."""
    make = datacomp_tar if name == "a.tar" else image_parquet
    server.put(dst, {name: make(tmp_path / name).read_bytes()})
    (ref,) = list_shards(f"{dst}/{name}")
    server.fault = lambda request: "cut" if request.key.endswith(name) else ""
    with pytest.raises(UnavailableError, match=f"cannot read {dst}/{name} at byte 0"):
        convert_shard(ref, CONFIG, dst, select_backend("cpu"))
    server.fault = lambda _: ""
    assert server.names(dst) == [name]


def test_an_object_that_changes_while_it_is_read(server: Server, dst: str, tmp_path: Path) -> None:
    storage.use_options({"default_block_size": 1 << 16})
    server.put(dst, {"a": os.urandom(1 << 18)})
    with storage.open_read(f"{dst}/a") as stream:
        stream.read(1000)
        server.put(dst, {"a": os.urandom(1 << 17)})
        with pytest.raises(UnavailableError, match="at byte 1000"):
            stream.read()


def test_long_listings_and_folders_of_web_consoles(server: Server, dst: str) -> None:
    names = [f"{i:04d}.failed.json" for i in range(50)]
    server.put(dst, dict.fromkeys(names, b"x") | {"": b"", "sub/x": b""})
    server.asked.clear()
    server.fault = lambda _: "paged"
    assert list(storage.list_folder(dst)) == names
    assert len(server.asked) == 8
    assert storage.list_folder(f"{dst}/none") == {}
    assert storage.is_dir(dst)
    assert not storage.is_dir(f"{dst}/none")
    assert not storage.exists(f"{dst}/none")
    assert storage.exists(dst)


def test_threads_share_one_driver(server: Server, dst: str) -> None:
    urls = [f"{dst}/{i}" for i in range(64)]
    storage.use_options({})
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda url: storage.write_bytes(url, url.encode()), urls))
        assert list(pool.map(storage.read_bytes, urls)) == [url.encode() for url in urls]
        drivers = set(pool.map(lambda url: id(storage.driver(url)[0]), urls))
    assert len(drivers) == 1
    # a child has one of its own
    child = os.fork()
    if child == 0:
        os._exit(0 if storage.read_bytes(urls[0]) == urls[0].encode() else 1)
    assert os.waitpid(child, 0)[1] == 0
