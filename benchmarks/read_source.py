"""Reading source shards: samples/s and MB/s of `pipeline.source.read`, its floor, and a peer.

    python -m benchmarks.read_source [--rounds 9]

The four tars of datacomp-sample, from the page cache, as they are and as webdataset's writer (so
img2dataset) would have written them, with a header extension before each member. One thread reads
all four; two threads of one process read all four each. The best of the rounds counts, in each of
which all contenders run once. CPU time per sample is the figure to trust where other processes want
the cores as well (the load is recorded).

    hash        SHA-256 alone over the same blocks: nobody who checks what he read is faster
    read        members grouped, parsed and checked, every byte hashed, truncation noticed
    webdataset  its reader as a dataset, members grouped; hashes nothing
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tyro
import webdataset

from benchmarks.record import DATA, save
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.pipeline.source.tar import BLOCK_BYTES

THREADS = (1, 2)
EXTENSIONS = ("jpg", "txt", "json")


@dataclass(frozen=True)
class Args:
    rounds: int = 9


def hash_alone(tars: Sequence[Path]) -> None:
    for path in tars:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)


def read_ours(tars: Sequence[Path]) -> None:
    for path in tars:
        (ref,) = list_shards(str(path))
        for _ in read(ref, hashlib.sha256()):
            pass


def read_webdataset(tars: Sequence[Path]) -> None:
    for _ in webdataset.WebDataset([str(path) for path in tars], shardshuffle=False):
        pass


CONTENDERS: dict[str, Callable[[Sequence[Path]], None]] = {
    "hash": hash_alone,
    "read": read_ours,
    "webdataset": read_webdataset,
}


def rewrite(tars: Sequence[Path], folder: Path) -> Iterator[Path]:
    """The same samples through webdataset's writer."""
    for path in tars:
        with webdataset.TarWriter(str(folder / path.name)) as writer:
            for sample in webdataset.WebDataset([str(path)], shardshuffle=False):
                writer.write({k: v for k, v in sample.items() if k in ("__key__", *EXTENSIONS)})
        yield folder / path.name


def timed(
    function: Callable[[Sequence[Path]], None], tars: Sequence[Path], threads: int
) -> tuple[float, float]:
    """Wall time in s, and CPU time in s per thread."""

    def work() -> float:
        start = time.thread_time()
        function(tars)
        return time.thread_time() - start

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        cpu = [done.result() for done in [pool.submit(work) for _ in range(threads)]]
        return time.perf_counter() - start, sum(cpu) / threads


def measure(tars: Sequence[Path], layout: str, rounds: int) -> list[dict[str, Any]]:
    size_bytes = sum(path.stat().st_size for path in tars)
    samples = sum(1 for path in tars for _ in read(*list_shards(str(path)), hashlib.sha256()))
    rows = []
    for threads in THREADS:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            for name, function in CONTENDERS.items():
                times[name].append(timed(function, tars, threads))
        for name in CONTENDERS:
            wall, cpu = (min(column) for column in zip(*times[name], strict=True))
            row = {
                "layout": layout,
                "reader": name,
                "threads": threads,
                "samples_per_s": threads * samples / wall,
                "mb_per_s": threads * size_bytes / wall / 1e6,
                "cpu_us_per_sample": 1e6 * cpu / samples,
            }
            rows.append(row)
            print(
                f"{layout:11} {threads} threads  {name:11} {row['samples_per_s']:8,.0f} samples/s "
                f"{row['mb_per_s']:7,.0f} MB/s  {row['cpu_us_per_sample']:6.1f} µs CPU per sample",
                flush=True,
            )
    return rows


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    tars = sorted((DATA / "datacomp-sample" / "shards").glob("*.tar"))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(tars, "as given", args.rounds)
        rows += measure(list(rewrite(tars, Path(folder))), "webdataset's", args.rounds)
    load, _, _ = os.getloadavg()
    version = metadata.version("webdataset")
    save("read_source", {"webdataset": version, "load": load, "rows": rows})


if __name__ == "__main__":
    main()
