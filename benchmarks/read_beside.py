"""The reader of this build beside an older one's, in turns on the same core.

    git worktree add ../base 931aac8
    python -m benchmarks.read_beside --base ../base [--gaussians 400 1600] [--folder FOLDER]

Both read shards that they wrote themselves, of the same fits of 100 photographs, eight times each,
mirrored and turned (read_data.py), from the page cache to ready batches of 256: seconds of CPU
time per epoch, of all threads. Each number is the median of `rounds` epochs in turns, the ratio
that of the rounds' ratios. FOLDER keeps fits and shards; it takes some minutes to make them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from benchmarks.read import THREADS
from benchmarks.read_data import fits
from benchmarks.record import ROOT, save

IMAGES = 100
READER = """
import json, os, sys, time
import pyarrow as pa, torch
from pathlib import Path
from benchmarks.read_data import splat_shards
if Path("splatshard").exists():
    from splatshard.pipeline.data import SplatDataset
else:
    from pipeline.data import SplatDataset
torch.set_num_threads(1); pa.set_cpu_count(1); pa.set_io_thread_count(1)
n, codec, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
source = splat_shards(n, codec, folder, int(sys.argv[4]))["parquet"]
dataset = SplatDataset(
    source.url, batch_size=256, num_gaussians=n, drop_last=False, cache_dir=folder / "cache"
)
for _ in sys.stdin:
    begin, samples = time.process_time(), 0
    for batch in dataset:
        samples += int(batch.valid.sum())
    assert samples == source.rows, samples
    took = (time.process_time() - begin) / samples
    print(json.dumps({"s": took, "file_bytes": source.file_bytes, "psnr": source.psnr}), flush=True)
"""


@dataclass(frozen=True)
class Args:
    base: Path
    """A checkout of the older build."""
    gaussians: tuple[int, ...] = (400, 900, 1600, 3136)
    codecs: tuple[str, ...] = ("balanced", "fp16")
    rounds: int = 11
    folder: Path | None = None
    core: int = -1
    """The one to run on, of those allowed."""


def reader(build: Path, n: int, codec: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(build)} | dict.fromkeys(THREADS, "1")
    return subprocess.Popen(
        [sys.executable, "-c", READER, str(n), codec, str(folder), str(IMAGES)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        cwd=build, env=environment,
    )  # fmt: skip


def epoch(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def beside(builds: dict[str, Path], folders: dict[str, Path], n: int, codec: str, rounds: int):
    """A row of the result."""
    readers = {build: reader(path, n, codec, folders[build]) for build, path in builds.items()}
    for process in readers.values():  # opens, compiles, compares checksums
        epoch(process)
    found = [{build: epoch(process) for build, process in readers.items()} for _ in range(rounds)]
    for process in readers.values():
        process.communicate()
    row: dict[str, float | str] = {"num_gaussians": n, "codec": codec}
    for build in builds:
        row[f"samples_per_s_{build}"] = 1 / median(one[build]["s"] for one in found)
        row[f"file_bytes_{build}"] = found[0][build]["file_bytes"]
        row[f"psnr_{build}"] = found[0][build]["psnr"]
    row["ratio"] = median(one["base"]["s"] / one["this"]["s"] for one in found)
    print(
        "N={num_gaussians:<5} {codec:9} {samples_per_s_base:8,.0f} samples/s and core, now "
        "{samples_per_s_this:8,.0f}: {ratio:.2f}; {psnr_base:.2f} dB, now {psnr_this:.2f}".format(
            **row
        ),
        flush=True,
    )
    return row


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[args.core]})
    builds = {"base": args.base.resolve(), "this": ROOT}
    with ExitStack() as stack:
        made = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = {build: made.resolve() / build for build in builds}
        for n in args.gaussians:
            for build in builds:
                folders[build].mkdir(parents=True, exist_ok=True)
            fits(n, folders["this"], IMAGES)
            shared = folders["base"] / f"fits-{n}.npz"
            if not shared.exists():
                os.link(folders["this"] / shared.name, shared)
        rows = [
            beside(builds, folders, n, codec, args.rounds)
            for codec in args.codecs
            for n in args.gaussians
        ]
    commit = subprocess.run(
        ["git", "describe", "--always"], cwd=builds["base"], capture_output=True, text=True
    ).stdout.strip()
    save("read_beside", {"base_commit": commit, "images": IMAGES, "rows": rows})


if __name__ == "__main__":
    main()
