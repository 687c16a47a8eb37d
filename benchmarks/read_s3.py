"""An S3 server for `benchmarks.read`: moto in a process of its own, on a core of its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BUCKET = "read"


def files(folder: str) -> list[str]:
    """All files below `folder`."""
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


class S3:
    """A moto server on `core`, started when first asked; ends with the block."""

    def __init__(self, core: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._core, self._log = core, log
        self._process: subprocess.Popen[bytes] | None = None
        self._uploaded: set[str] = set()

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "S3_ENDPOINT_URL": self.endpoint,  # streaming's name for it
            "AWS_ACCESS_KEY_ID": "read",
            "AWS_SECRET_ACCESS_KEY": "read",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> S3:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def _client(self) -> Any:
        import boto3

        client = boto3.client("s3", endpoint_url=self.endpoint)
        if self._process is None:
            command = [
                sys.executable,
                "-m",
                "moto.server",
                "-H",
                "127.0.0.1",
                "-p",
                str(self._port),
            ]
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(command, stdout=log, stderr=log)
            os.sched_setaffinity(self._process.pid, {self._core})
            for _ in range(200):
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", self._port), 1).close()
                    break
                time.sleep(0.1)
            client.create_bucket(Bucket=BUCKET)
        return client

    def uploaded(self, folder: str) -> str:
        """The URL of a copy of `folder`."""
        name = Path(folder).name
        if name not in self._uploaded:
            client = self._client()
            for path in files(folder):
                client.upload_file(path, BUCKET, f"{name}/{Path(path).relative_to(folder)}")
            self._uploaded.add(name)
        return f"s3://{BUCKET}/{name}"

    def pipes(self, url: str) -> list[str]:
        """The tars below `url` as webdataset reads them from S3: by a command in a pipe."""
        client, prefix = self._client(), url.removeprefix(f"s3://{BUCKET}/")
        found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix + "/")["Contents"]
        keys = sorted(entry["Key"] for entry in found if entry["Key"].endswith(".tar"))
        signed = [
            client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": key})
            for key in keys
        ]
        return [f"pipe:curl -sf {shlex.quote(url)}" for url in signed]
