"""S3 servers for tests: moto in a process of its own, and Ceph's RADOS gateway where installed.

Both are real HTTP servers on a free port of the loopback, started empty and gone with the tests;
clients reach them through the usual AWS environment (`Store.environment`), and both answer to the
same credentials, so that a test can be pointed at either.

moto keeps objects in memory, checks neither signature nor clock and starts in two seconds; it is a
process because its work would otherwise share a GIL with the test. Ceph is what people run: it
checks signatures and clocks, and has its own opinion of conditional writes. One monitor, one OSD in
memory, one gateway, no manager: 12 s and everything below one folder. Traps: without
authentication the monitors' default of secure connections is refused, hence all modes are `crc`;
the folder's path must be short, since unix sockets lie in it; pools of one copy must be allowed.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.running import wait_until

ACCESS_KEY = "chaos-access"
SECRET_KEY = "chaos-secret-never-to-be-seen"  # tests look for it in logs and markers
REGION = "us-east-1"

MOTO = """
import os, sys, threading

def end_with_parent():
    sys.stdin.read()
    os._exit(0)

threading.Thread(target=end_with_parent, daemon=True).start()
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""

CEPH_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

CEPH_CONF = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}]
public_network = 127.0.0.0/8
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
ms_cluster_mode = crc
ms_service_mode = crc
ms_client_mode = crc
ms_bind_msgr1 = false
run_dir = {folder}
admin_socket =
log_file = {folder}/$name.log
mon_cluster_log_file = /dev/null
mon_data = {folder}/mon
mon_allow_pool_size_one = true
mon_data_avail_warn = 1
mon_data_avail_crit = 1
mon_max_pg_per_osd = 1000
osd_data = {folder}/osd
osd_objectstore = memstore
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
memstore_device_bytes = 1073741824
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port}
"""


@dataclass(frozen=True)
class Store:
    """A running server at `endpoint`, an `http://host:port`."""

    name: str
    endpoint: str

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """What a client needs to be told; `endpoint` where a proxy stands in front."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, endpoint: str = "", **config: Any) -> Any:
        """A boto3 client; `config` goes to botocore's Config."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name=REGION,
            config=Config(**config),
        )

    def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        """Store `objects` in `bucket`, which is created when absent."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for key, data in objects.items():
            client.put_object(Bucket=bucket, Key=key, Body=data)

    def objects(self, url: str, contents: str = "") -> dict[str, bytes]:
        """All objects below `s3://bucket/prefix` by relative key; only keys that end in `contents`
        are fetched, the others are b""."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {
            key.removeprefix(prefix): client.get_object(Bucket=bucket, Key=key)["Body"].read()
            if key.endswith(contents)
            else b""
            for key in keys
        }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def process(command: Sequence[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server that ends with the block."""
    with log.open("ab") as stream:
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, **options
        )
    try:
        yield server
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.kill()
        server.wait(30)


def listening(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until `server` accepts connections."""

    def connected() -> bool:
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    wait_until(connected, f"{server.args} listens on port {port}")


@contextmanager
def moto_store(folder: Path) -> Iterator[Store]:
    """An empty moto server; its log lies in `folder`."""
    port, log = free_port(), folder / "moto.log"
    with process([sys.executable, "-c", MOTO, str(port)], log) as server:
        listening(server, port, log)
        yield Store("moto", f"http://127.0.0.1:{port}")


def missing_ceph() -> str:
    """Why Ceph cannot run here; "" when it can."""
    missing = [name for name in CEPH_PROGRAMS if shutil.which(name) is None]
    return f"no {', '.join(missing)}: apt-get install ceph-mon ceph-osd radosgw" if missing else ""


@contextmanager
def ceph_store(folder: Path) -> Iterator[Store]:
    """An empty Ceph with its gateway, all below `folder`."""
    port = free_port()
    ceph_folders(folder, port)
    conf = ("-c", str(folder / "ceph.conf"))
    osd = str(uuid.uuid4())
    with ExitStack() as servers:

        def serve(program: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
            log = folder / f"{program}.out"
            return servers.enter_context(process([program, "-f", *arguments, *conf], log)), log

        ceph_run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"), *conf)
        serve("ceph-mon", "-i", "a")
        ceph_run("ceph", *conf, "osd", "new", osd)
        ceph_run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd, *conf)
        serve("ceph-osd", "-i", "0")
        gateway, log = serve("radosgw", "-n", "client.rgw.a")
        ceph_run(
            *("radosgw-admin", *conf, "user", "create", "--uid=test", "--display-name=test"),
            *(f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"),
        )
        listening(gateway, port, log)
        yield Store("ceph", f"http://127.0.0.1:{port}")


def ceph_folders(folder: Path, port: int) -> None:
    """Configuration, monitor map and empty folders."""
    fsid, mon_port = str(uuid.uuid4()), free_port()
    text = CEPH_CONF.format(fsid=fsid, mon_port=mon_port, folder=folder, port=port)
    (folder / "ceph.conf").write_text(text)
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    address = f"[v2:127.0.0.1:{mon_port}]"
    ceph_run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, f"{folder}/monmap")


def ceph_run(*command: str) -> None:
    """Run to the end; what it printed goes into the assertion when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
