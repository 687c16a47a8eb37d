"""The whole job of this build beside an older one's, in turns on the same machine.

    git worktree add ../base 931aac8
    python -m benchmarks.convert_beside --base ../base [--gaussians 400 1600]

Both convert datacomp-sample's four shards, `copies` times under other names, with their own
defaults. Steady: images per second between the moment when every worker has published its first
shard and the last one; of the command: from typing it to its end. Each number is the best of
`rounds`, whose order alternates; the ratios are of this build to the base.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.convert_job import worker_peaks_bytes
from benchmarks.record import DATA, ROOT, save

IMAGES_PER_SHARD = 100


@dataclass(frozen=True)
class Args:
    base: Path
    """A checkout of the older build."""
    gaussians: tuple[int, ...] = (400, 1600)
    copies: int = 2
    workers: int = 2
    rounds: int = 2
    name: str = "convert_beside"


def run_job(build: Path, source: Path, dst: Path, n: int, workers: int) -> dict:
    """One conversion by the checkout `build`."""
    command = [sys.executable, "-m", "jobs.convert", str(source), str(dst), "--json"]
    command += ["--num-gaussians", str(n), "--workers", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(build)}
    begin = time.perf_counter()
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=build,
        env=environment,
    )  # fmt: skip
    peaks: dict[int, int] = {}
    while job.poll() is None:
        peaks |= worker_peaks_bytes()
        time.sleep(0.1)
    wall = time.perf_counter() - begin
    assert job.returncode == 0, f"{build}: exit {job.returncode}"
    assert job.stdout is not None
    summary = json.loads(job.stdout.read().splitlines()[-1])
    published = sorted(path.stat().st_mtime for path in dst.glob("*.parquet"))
    after = (len(published) - workers) * IMAGES_PER_SHARD
    return {
        "images_per_s_of_command": summary["samples"] / wall,
        "images_per_s_steady": after / (published[-1] - published[workers - 1]),
        "psnr": summary["psnr_mean"],
        "shard_bytes_per_image": summary["shard_bytes"] / summary["samples"],
        "worker_peak_bytes": max(peaks.values()),
    }


def best(rows: list[dict]) -> dict:
    """The highest rates of several runs, and what does not vary."""
    rates = {
        name: max(row[name] for row in rows) for name in rows[0] if name.startswith("images_per_s")
    }
    return rows[0] | rates


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    builds = {"base": args.base.resolve(), "this": ROOT}
    found: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        for tar in sorted((DATA / "datacomp-sample" / "shards").glob("*.tar")):
            for copy in range(args.copies):
                (source / f"{tar.stem}-{copy}.tar").symlink_to(tar)
        for n in args.gaussians:
            rows: dict[str, list[dict]] = defaultdict(list)
            for round_ in range(args.rounds):
                for build in sorted(builds, reverse=round_ % 2 == 1):
                    dst = Path(folder) / f"{build}-{n}-{round_}"
                    rows[build].append(run_job(builds[build], source, dst, n, args.workers))
            result = {build: best(own) for build, own in rows.items()}
            ratios = {
                name: result["this"][name] / result["base"][name]
                for name in result["base"]
                if name != "psnr"
            }
            found.append({"num_gaussians": n, **result, "ratios": ratios, "rounds": rows})
            for build in builds:
                print(
                    "N={n:<5} {build:4} {images_per_s_steady:6.2f} images/s steady, "
                    "{images_per_s_of_command:6.2f} of the command, {psnr:.3f} dB, "
                    "{shard_bytes_per_image:.0f} B, worker {mb:.0f} MB".format(
                        n=n,
                        build=build,
                        mb=result[build]["worker_peak_bytes"] / 1e6,
                        **result[build],
                    )
                )
            print("        ratios: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    commit = subprocess.run(
        ["git", "describe", "--always"], cwd=builds["base"], capture_output=True, text=True
    ).stdout.strip()
    save(args.name, {"base_commit": commit, "images": 400 * args.copies, "rows": found})


if __name__ == "__main__":
    main()
