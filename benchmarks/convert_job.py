"""The whole job as a user runs it: images/s, time to first shard, bytes, PSNR, worker memory.

    python -m benchmarks.convert_job [--gaussians 400] [--limit 400]

Runs `python -m jobs.convert` on datacomp-sample with an embedded Ray, then `jobs.verify`; wall time
includes starting Python and Ray. Memory is the largest resident set (VmHWM) that any worker process
reached, shared libraries and Ray's shared memory included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.record import DATA, save


@dataclass(frozen=True)
class Args:
    gaussians: tuple[int, ...] = (400, 1600, 3136, 4900)
    limit: int = 400
    """Samples to convert, of 400."""
    workers: int = 2
    steps: int = 150


def worker_peaks_bytes() -> dict[int, int]:
    """Peak resident set of every Ray worker process that is alive, by process id."""
    peaks = {}
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes()
            if command.startswith(b"ray::"):
                status = (process / "status").read_text()
                high = next(x for x in status.splitlines() if x.startswith("VmHWM"))
                peaks[int(process.name)] = int(high.split()[1]) * 1024
        except (OSError, StopIteration):
            continue
    return peaks


def run_job(n: int, args: Args, folder: str) -> dict:
    source = str(DATA / "datacomp-sample" / "shards")
    dst = f"{folder}/{n}"
    command = [sys.executable, "-m", "jobs.convert", source, dst, "--json"]
    command += ["--num-gaussians", str(n), "--steps", str(args.steps)]
    command += ["--workers", str(args.workers), "--limit", str(args.limit)]
    start = time.perf_counter()
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peaks: dict[int, int] = {}
    while job.poll() is None:
        peaks |= worker_peaks_bytes()
        time.sleep(0.1)
    wall = time.perf_counter() - start
    assert job.stdout is not None
    summary = json.loads(job.stdout.read().splitlines()[-1])
    subprocess.run([sys.executable, "-m", "jobs.verify", dst], check=True, capture_output=True)
    return {
        "num_gaussians": n,
        "command_wall_s": wall,
        "images_per_s_of_command": summary["samples"] / wall,
        "worker_peak_bytes": max(peaks.values()),
        **summary,
    }


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n in args.gaussians:
            rows.append(run_job(n, args, folder))
            print(
                "N={num_gaussians:<5} {ok} of {samples} images  {images_per_s_of_command:6.2f} "
                "images/s of the command  first shard {time_to_first_shard_s:6.1f} s  "
                "{psnr_mean:.2f} dB  {bytes_per_image:.0f} B/image  worker {mb:.0f} MB".format(
                    **rows[-1], mb=rows[-1]["worker_peak_bytes"] / 1e6
                ),
                flush=True,
            )
    save("convert_job", rows)


if __name__ == "__main__":
    main()
