"""What the pipeline costs around fitting, and how two workers do beside one.

    python -m benchmarks.overhead [--gaussians 400] [--repeats 2]

Runs `python -m jobs.convert` on all of datacomp-sample with one worker and with two, in turn.

- overhead: share of the workers' seconds, from being loaded to the end of their last shard, in
  which no fit runs. Everything counts: reading, decoding, packing, checking, hashing, committing,
  and waiting for the driver.
- scaling: images per worker and second with two workers over that with one. What the machine itself
  allows is measured beside it: the same fits in one plain process and in two, without Ray.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.record import DATA, save

SOURCE = DATA / "datacomp-sample" / "shards"
FITTED_ALONE = 48
"""Images of the plain processes, fitted again and again for PLAIN_S."""
PLAIN_S = 20.0


@dataclass(frozen=True)
class Args:
    gaussians: int = 400
    repeats: int = 2
    plain: bool = False
    """Only fit, in this process, and print images/s."""


def fit_plainly(gaussians: int) -> float:
    """Images per second of fits alone in this process, with one thread."""
    import hashlib
    import os
    from itertools import islice

    from splatshard.jobs.driver.worker import THREADS

    os.environ.update(THREADS)
    import torch

    from splatshard.pipeline.convert import decode_sample, planes
    from splatshard.pipeline.fitting.fit import fit
    from splatshard.pipeline.kernels.select import select_backend
    from splatshard.pipeline.source.listing import list_shards
    from splatshard.pipeline.source.read import read
    from splatshard.schemas.config import ConvertConfig, FitConfig

    torch.set_num_threads(1)
    config = ConvertConfig(fit=FitConfig(num_gaussians=gaussians))
    backend = select_backend("cpu")
    samples = islice(read(list_shards(str(SOURCE))[0], hashlib.sha256()), FITTED_ALONE)
    images = [image.pixels for _, image in (decode_sample(s, config) for s in samples) if image]
    batches = [
        planes(torch.stack([torch.from_numpy(p) for p in images[i : i + 16]]))
        for i in range(0, len(images), 16)
    ]
    fit(batches[0][:1], config.fit, backend)  # compiles
    begin, fitted = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < PLAIN_S:
        batch = batches[fitted // 16 % len(batches)]
        fit(batch, config.fit, backend)
        fitted += len(batch)
    return fitted / elapsed


def plain(gaussians: int, processes: int) -> float:
    """Images per second and process of that many at once."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--plain"]
    command += ["--gaussians", str(gaussians)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    return statistics.mean(float(process.communicate()[0]) for process in running)


def convert(gaussians: int, workers: int, dst: Path) -> dict:
    command = [sys.executable, "-m", "jobs.convert", str(SOURCE), str(dst), "--json"]
    command += ["--num-gaussians", str(gaussians), "--workers", str(workers)]
    job = subprocess.run(command, capture_output=True, text=True, check=True)
    summary = json.loads(job.stdout.splitlines()[-1])
    stages = {name: s / summary["worker_s"] for name, s in summary["stage_s"].items()}
    return {
        "workers": workers,
        "images_per_worker_s": summary["images_converted"] / summary["worker_s"],
        "overhead": 1 - stages["fit"],
        "stage_share": stages,
        "psnr_mean": summary["psnr_mean"],
        "wall_s": summary["wall_s"],
    }


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.plain:
        print(fit_plainly(args.gaussians))
        return
    rows, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for workers in (1, 2):
                rows.append(convert(args.gaussians, workers, Path(folder) / f"{workers}-{repeat}"))
                alone.append({"processes": workers, "each": plain(args.gaussians, workers)})
                print(json.dumps(rows[-1]), json.dumps(alone[-1]), flush=True)

    def middle(values: list[dict], key: str, number: int, value: str) -> float:
        return statistics.median(row[value] for row in values if row[key] == number)

    rate = {n: middle(rows, "workers", n, "images_per_worker_s") for n in (1, 2)}
    each = {n: middle(alone, "processes", n, "each") for n in (1, 2)}
    result = {
        "num_gaussians": args.gaussians,
        "overhead_2_workers": middle(rows, "workers", 2, "overhead"),
        "overhead_1_worker": middle(rows, "workers", 1, "overhead"),
        "scaling_1_to_2": rate[2] / rate[1],
        "scaling_of_plain_fits": each[2] / each[1],
        "runs": rows,
        "plain_fits": alone,
    }
    print(
        "N={num_gaussians}: overhead {overhead_2_workers:.1%} with 2 workers, "
        "{overhead_1_worker:.1%} with 1; 1 to 2 workers scale at {scaling_1_to_2:.3f}, plain fits "
        "at {scaling_of_plain_fits:.3f}".format(**result)
    )
    save("overhead", [result])


if __name__ == "__main__":
    main()
