"""Reading for training: samples/s per core to a ready float32 batch, splats beside JPEG and peers.

    python -m benchmarks.read --folder FOLDER --peers-python peers/bin/python [--quick]

One process, one core (threads of torch and Arrow included), batches of 256. FOLDER keeps what is
read (read_data.py: fits take five minutes on one core, shards a few more); without it all is made
again. read_peers.py says how to install the peers; without them their lines are left out.

    Pillow 224    the reference of every ratio: webdataset and Pillow on JPEGs of 224 px, quality 95
    SplatDataset  our reader with its defaults, so shuffled, to TrainBatch: splats, sizes, keys,
                  captions, labels
    litdata, mosaicml-streaming   the same fp16 payloads, keys and captions, in order: to the same
                  floats, by numpy and torch, and to bytes alone

`warm`: files in the page cache and their checksums compared; epochs for --seconds, best of
--rounds, in each of which all readers run once. /CPU s is per second of CPU time instead, the
figure to trust where other processes want the core. `cold`: the files are dropped from this
machine's page cache (posix_fadvise) before one epoch, which also opens the data set and, for
SplatDataset, computes SHA-256; a virtual machine's host may still have them cached. `S3`: one epoch
from moto on another core by loopback, nothing cached locally; it measures moto as much as readers.

Bytes are per image, of the file (with caption, JSON and tar headers) and of the image in it.
PSNR is against the 224 px crop.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.read_data import Source, jpeg_tars, peer_samples, splat_shards
from benchmarks.read_images import BareLoop, ImageBatch, WebdatasetImages, missing, tars
from benchmarks.read_peers import PEERS, Peer
from benchmarks.read_s3 import S3, files
from benchmarks.record import save
from splatshard.pipeline.data import SplatDataset, TrainBatch

BATCH = 256
GOALS = {400: 63, 900: 38, 1600: 27, 3136: 13}
"""Twice the ratios over Pillow at 224 px that GaussianVision (arXiv 2509.22615) reports."""
QUALITY = 95
REFERENCE = "Pillow 224"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

Place = Literal["warm", "cold", "s3"]


@dataclass(frozen=True)
class Args:
    folder: Path | None = None
    """Keeps fits and shards between runs."""
    gaussians: tuple[int, ...] = (400, 900, 1600, 3136)
    codecs: tuple[str, ...] = ("fp16", "balanced", "compact")
    images: int = 400
    """Photographs, of 400; must divide it. The smaller, the sooner they are packed."""
    rounds: int = 3
    seconds: float = 0.6
    """Of each reader and round, at least."""
    quick: bool = False
    """One round of 0.3 s, 100 photographs."""
    places: tuple[Place, ...] = ("warm", "cold", "s3")
    peers_python: str = sys.executable
    """Interpreter that can import litdata and streaming."""
    core: int = -1
    """The one to run on, of those allowed; the S3 server runs on another."""


@dataclass(frozen=True)
class Timed:
    samples: int
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the table: a reader and what it reads. `run(place, seconds)` times it."""

    reader: str
    codec: str
    n: int | None
    file_bytes: float
    payload_bytes: float
    psnr: float
    run: Callable[[Place, float], Timed | None]


def timed(batches: Iterable[Any], size_of: Callable[[Any], int], seconds: float) -> Timed:
    """Whole epochs for `seconds` at least."""
    samples = 0
    begin, cpu = time.perf_counter(), time.process_time()
    while True:
        for batch in batches:
            samples += size_of(batch)
        wall = time.perf_counter() - begin
        if wall >= seconds:
            return Timed(samples, wall, time.process_time() - cpu)


def image_size(batch: ImageBatch) -> int:
    assert batch.pixels.dtype == torch.float32
    assert batch.pixels.shape[1:] == (3, 224, 224)
    assert batch.pixels.is_contiguous()
    return len(batch.keys)


def splat_size(batch: TrainBatch, n: int) -> int:
    assert batch.splats.colors.dtype == torch.float32
    assert batch.splats.colors.shape == (BATCH, n, 3)
    return int(batch.valid.sum())


def run_here(
    opened: Callable[[str], Iterable[Any]],
    size_of: Callable[[Any], int],
    source: Source,
    s3: S3,
    place: Place,
    seconds: float,
) -> Timed | None:
    if place == "s3":
        return timed(opened(s3.uploaded(source.url)), size_of, 0)
    batches = opened(source.url)
    if place == "cold":
        for path in files(source.url):
            evict(path)
        return timed(batches, size_of, 0)
    first = sum(map(size_of, batches))  # opens, compares checksums, compiles
    assert first == source.rows, f"{source.url}: {first} of {source.rows} samples"
    return timed(batches, size_of, seconds)


def evict(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def image_arms(folder: Path, s3: S3, images: int) -> Iterator[Arm]:
    small, original = jpeg_tars(folder, images, QUALITY), jpeg_tars(folder, images, None)

    def arm(name: str, source: Source, make: Callable[[str], Iterable[Any]]) -> Arm:
        where = {
            name: value for name, value in asdict(source).items() if name not in ("url", "rows")
        }
        run = partial(run_here, make, image_size, source, s3)
        return Arm(reader=name, codec="jpeg", n=None, run=run, **where)

    def through_webdataset(decoder: str, url: str, batch: int = BATCH) -> WebdatasetImages:
        return WebdatasetImages(s3.pipes(url) if "://" in url else tars(url), decoder, batch)

    def in_memory(url: str) -> BareLoop:
        return BareLoop(tars(url), "Pillow")

    yield arm(REFERENCE, small, partial(through_webdataset, "Pillow"))
    yield arm("Pillow 224, batches of 32", small, partial(through_webdataset, "Pillow", batch=32))
    bare = arm("Pillow 224, bare loop", small, in_memory)
    warm = bare.run
    yield replace(
        bare, run=lambda place, seconds: warm(place, seconds) if place == "warm" else None
    )
    for decoder in ("simplejpeg", "torchvision"):
        if reason := missing(decoder):
            print(f"left out: {decoder}: {reason}")
            continue
        yield arm(f"{decoder} 224", small, partial(through_webdataset, decoder))
        yield arm(f"{decoder} original", original, partial(through_webdataset, decoder))
    yield arm("Pillow original", original, partial(through_webdataset, "Pillow"))
    yield arm("Pillow draft original", original, partial(through_webdataset, "draft"))


def splat_arms(folder: Path, s3: S3, args: Args) -> Iterator[Arm]:
    for n in args.gaussians:
        for codec in args.codecs:
            for format, source in splat_shards(n, codec, folder, args.images).items():

                def opened(url: str, n: int = n) -> SplatDataset:
                    cache = folder / "cache"
                    shutil.rmtree(cache, ignore_errors=True)
                    return SplatDataset(
                        url, batch_size=BATCH, num_gaussians=n, drop_last=False, cache_dir=cache
                    )

                yield Arm(
                    reader=f"SplatDataset {format}",
                    codec=codec,
                    n=n,
                    file_bytes=source.file_bytes,
                    payload_bytes=source.payload_bytes,
                    psnr=source.psnr,
                    run=partial(run_here, opened, partial(splat_size, n=n), source, s3),
                )


def peer_arms(folder: Path, s3: S3, args: Args, peer: Peer, versions: dict) -> Iterator[Arm]:
    for name in PEERS:
        versions[name] = peer.ask(verb="version", peer=name)
        if "error" in versions[name]:
            print(f"left out: {name}: {versions[name]['error']}")
            continue
        for n in args.gaussians:
            source = splat_shards(n, "fp16", folder, args.images)["parquet"]
            url = folder / f"{name}-{n}"
            note = folder / f"{name}-{n}.json"
            if not note.exists():
                samples = peer_samples(source, n, folder)
                written = peer.ask(verb="write", peer=name, samples=samples, folder=str(url))
                note.write_text(json.dumps(written))
            written = json.loads(note.read_text())

            def run(
                place: Place, seconds: float, name: str, n: int, url: str, rows: int, output: str
            ) -> Timed | None:
                cache = folder / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                answer = peer.ask(
                    verb="run",
                    peer=name,
                    url=s3.uploaded(url) if place == "s3" else url,
                    cache=str(cache),
                    n=n,
                    output=output,
                    seconds=seconds if place == "warm" else 0,
                    rows=rows,
                    evict=files(url) if place == "cold" else [],
                )
                if "error" in answer:
                    print(f"{name} {n} {place}: {answer['error']}")
                    return None
                return Timed(**answer)

            for output in ("floats", "bytes"):
                yield Arm(
                    reader=f"{name} to {output}",
                    codec="fp16",
                    n=n,
                    file_bytes=written["file_bytes"],
                    payload_bytes=16 * n,
                    psnr=source.psnr,
                    run=partial(run, name=name, n=n, url=str(url), rows=source.rows, output=output),
                )


def measure(arms: list[Arm], args: Args) -> list[dict[str, Any]]:
    """Each arm at each place, the best of the rounds; as rows of the result."""
    best: dict[tuple[int, Place], Timed] = {}
    for place in args.places:
        for round in range(args.rounds):
            print(f"{place}, round {round + 1}", flush=True)
            for i, arm in enumerate(arms):
                new = arm.run(place, args.seconds)
                old = best.get((i, place))
                if new and new.samples and (old is None or rate(new) > rate(old)):
                    best[i, place] = new
    rows = []
    for i, arm in enumerate(arms):
        row = {name: getattr(arm, name) for name in ("reader", "codec", "n")}
        row |= {name: getattr(arm, name) for name in ("file_bytes", "payload_bytes", "psnr")}
        for place in args.places:
            if found := best.get((i, place)):
                row |= {place: rate(found), f"{place}_per_cpu_s": found.samples / found.cpu_s}
        rows.append(row)
    reference = next((row for row in rows if row["reader"] == REFERENCE), {})
    for row in rows:
        for place in args.places:
            if place in row and place in reference:
                row[f"{place}_ratio"] = row[place] / reference[place]
                cpu = f"{place}_per_cpu_s"
                row[f"{cpu}_ratio"] = row[cpu] / reference[cpu]
    return rows


def rate(found: Timed) -> float:
    return found.samples / found.wall_s


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("reader", "codec"):
        table.add_column(name, no_wrap=True)
    numbers = ("N", "dB", "B/file", "B/image", "warm /s", "x Pillow", "/CPU s", "x Pillow")
    for name in (*numbers, "goal", "cold /s", "x Pillow", "S3 /s", "x Pillow"):
        table.add_column(name, justify="right", no_wrap=True)

    def number(row: dict[str, Any], name: str, form: str = ",.0f") -> str:
        value = row.get(name)
        return "" if value is None or value != value else format(value, form)

    for row in rows:
        goal = GOALS.get(row["n"], "") if row["reader"].startswith("Splat") else ""
        table.add_row(
            row["reader"],
            row["codec"],
            number(row, "n", "d"),
            number(row, "psnr", ".2f"),
            *(number(row, name) for name in ("file_bytes", "payload_bytes")),
            number(row, "warm"),
            number(row, "warm_ratio", ".1f"),
            number(row, "warm_per_cpu_s"),
            number(row, "warm_per_cpu_s_ratio", ".1f"),
            str(goal),
            number(row, "cold"),
            number(row, "cold_ratio", ".1f"),
            number(row, "s3"),
            number(row, "s3_ratio", ".1f"),
        )
    Console(width=160).print(table)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        args = replace(args, rounds=1, seconds=0.3, images=100)
    cores = sorted(os.sched_getaffinity(0))
    os.environ.update(dict.fromkeys(THREADS, "1"))
    os.sched_setaffinity(0, {cores[args.core]})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    versions: dict[str, Any] = {"webdataset": metadata.version("webdataset")}
    with contextlib.ExitStack() as stack:
        made = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(made).resolve() / f"{args.images}-photographs"
        folder.mkdir(parents=True, exist_ok=True)
        other = next((c for c in cores if c != cores[args.core]), cores[0])
        s3 = stack.enter_context(S3(other, folder / "moto.log"))
        os.environ.update(s3.environment())
        peer = stack.enter_context(Peer(args.peers_python, dict(os.environ), folder / "peers.log"))
        arms = list(image_arms(folder, s3, args.images))
        arms += splat_arms(folder, s3, args)
        arms += peer_arms(folder, s3, args, peer, versions)
        begin = time.perf_counter()
        rows = measure(arms, args)
        took = time.perf_counter() - begin
    show(rows)
    load, _, _ = os.getloadavg()
    goals = {str(n): goal for n, goal in GOALS.items()}
    save("read", {"versions": versions, "load": load, "took_s": took, "goals": goals, "rows": rows})


if __name__ == "__main__":
    main()
