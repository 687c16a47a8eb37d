"""litdata and mosaicml-streaming reading the same payload, for `benchmarks.read`.

A peer is timed by this file running as a script under an interpreter of its own, since neither
installs beside this package: mosaicml-streaming 0.13 wants numpy below 2.2 and transformers below
5, and both bring torchvision, of which there is no build for a CPU's torch. So:

    python -m venv peers
    peers/bin/pip install torch==2.13.0 litdata mosaicml-streaming
    python -m benchmarks.read --peers-python peers/bin/python

One JSON request a line comes in, one JSON answer a line goes out. Only the peers, numpy and torch
are imported here. A sample is key, caption and the bytes of an fp16 payload, as both store best:
uncompressed. `floats` makes of them what our reader gives: float32 [B, N, 8] and the lists of keys
and captions. `bytes` stops before that, so nobody can say that our decoding made them slow.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PEERS = ("litdata", "streaming")
BATCH = 256
SIZE = 224


class Peer:
    """A process that runs this file under another interpreter; used as a context."""

    def __init__(self, python: str, environment: dict[str, str], log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [python, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; {"error": ...} where the peer could not give one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": "its process died"}


def batch_of(samples: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """fp16 payloads to float32 [B, N, 8] (x, y, l11, l21, l22 in px, r, g, b); keys, captions."""
    payloads = b"".join([sample["splats"] for sample in samples])
    planes = np.frombuffer(payloads, np.uint8).reshape(len(samples), 8, 2, n)
    halves = planes[:, :, 1].astype(np.int16)
    halves <<= 8
    halves |= planes[:, :, 0]
    values = torch.from_numpy(halves).view(torch.float16).permute(0, 2, 1).float().contiguous()
    values[..., :2] += SIZE / 2
    return {"splats": values, **texts_of(samples)}


def texts_of(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [sample[name] for sample in samples] for name in ("key", "caption")}


def write(peer: str, samples: str, folder: str) -> dict[str, Any]:
    """Write the samples of the npz file `samples` as the peer's data set in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    with np.load(samples) as file:
        payloads, texts = file["payloads"], json.loads(file["texts"].tobytes())
    rows = [
        {"key": key, "caption": caption, "splats": payload.tobytes()}
        for (key, caption), payload in zip(texts, payloads, strict=True)
    ]
    if peer == "litdata":
        from litdata.streaming.writer import BinaryWriter

        os.makedirs(folder)
        writer = BinaryWriter(folder, chunk_bytes=64 << 20)
        for i, row in enumerate(rows):
            writer[i] = row
        writer.done()
        writer.merge()
    else:
        from streaming import MDSWriter

        columns = {"key": "str", "caption": "str", "splats": "bytes"}
        with MDSWriter(out=folder, columns=columns) as writer:
            for row in rows:
                writer.write(row)
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"file_bytes": size / len(rows), "rows": len(rows)}


def loader(peer: str, url: str, cache: str, collate: Callable[[list[Any]], Any]) -> Any:
    """What the peer's documentation says to iterate over, in this process; from `url`, through the
    folder `cache` where it is on S3."""
    if peer == "litdata":
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming import downloader

        remote = url.startswith("s3://")
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # the server here has no TLS
        options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} if remote else {}
        where = {"cache_dir": cache, "storage_options": options} if remote else {}
        return StreamingDataLoader(
            StreamingDataset(url, shuffle=False, drop_last=False, **where),
            batch_size=BATCH,
            num_workers=0,
            collate_fn=collate,
        )
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    where = {"remote": url, "local": cache} if url.startswith("s3://") else {"local": url}
    dataset = StreamingDataset(**where, shuffle=False, batch_size=BATCH)
    return DataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=collate)


def run(
    peer: str,
    url: str,
    cache: str,
    n: int,
    output: str,
    seconds: float,
    rows: int,
    evict: list[str],
) -> dict[str, Any]:
    """Time whole epochs for `seconds` at least; one, after `evict` left the page cache, if 0."""
    collate = texts_of if output == "bytes" else lambda samples: batch_of(samples, n)
    batches = loader(peer, url, cache, collate)
    if seconds:
        first = next(iter(batches))  # opens what it opens once
        assert output == "bytes" or first["splats"].shape == (BATCH, n, 8)
    for path in evict:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    samples = 0
    begin, cpu = time.perf_counter(), time.process_time()
    while True:
        for batch in batches:
            samples += len(batch["key"])
        wall = time.perf_counter() - begin
        if wall >= seconds:
            break
    assert samples % rows == 0, f"{samples} samples in whole epochs of {rows}"
    return {"samples": samples, "wall_s": wall, "cpu_s": time.process_time() - cpu}


def version(peer: str) -> dict[str, Any]:
    """The peer's version; raises what its import raises."""
    if peer == "streaming":
        let_torchvision_import()
    module = __import__(peer)
    return {"version": module.__version__, "torch": torch.__version__, "numpy": np.__version__}


def let_torchvision_import() -> None:
    """streaming imports torchvision, for vision data sets that are not used here. Beside a CPU's
    torch its compiled half does not load, and it fails for lack of its first two operators'
    schemas; given these, its Python half imports."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


VERBS: dict[str, Callable[..., dict[str, Any]]] = {"version": version, "write": write, "run": run}


def serve(requests: Iterator[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the peers print what they like
    torch.set_num_threads(1)
    for line in requests:
        request = json.loads(line)
        try:
            answer = VERBS[request.pop("verb")](**request)
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(iter(sys.stdin))
