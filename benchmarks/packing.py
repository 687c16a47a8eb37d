"""What packing with `balanced` costs, beside another build of this repository in the same run.

    git worktree add ../base COMMIT
    python -m benchmarks.packing --base ../base [--gaussians 400 900 1600 3136] [--images 32]

Photographs of datacomp-sample are fitted once, with the default steps. Then each build packs them
by `pack`, 16 at a time on one thread, as a worker does: the least of `repeats` runs counts, and
builds take turns. Bytes are those of a Parquet file (columns of all images, zstd) and of a tar
(each image by itself, Brotli). `lock_ms` is for how long the packing thread holds Python's lock, as
sampled from another thread (CPython 3.11).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import torch
import tyro

from benchmarks.record import commit, sample_images, save
from splatshard.pipeline.codec.pack import pack, unpack
from splatshard.pipeline.codec.planes import join
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig
from splatshard.schemas.splats import PLANES

CODEC, CUTOFF, TOGETHER = "balanced", 3.0, 16
PAUSE_US = 50


@dataclass(frozen=True)
class Args:
    base: Path | None = None
    """The other build: a checkout."""
    gaussians: tuple[int, ...] = (400, 900, 1600, 3136)
    images: int = 32
    repeats: int = 3
    turns: int = 2
    fits: Path | None = None
    """A folder that keeps the fits for the next time."""
    alone: bool = False
    """Only measure this build on those fits, and print JSON."""


def save_fits(args: Args, folder: Path) -> None:
    target, backend = sample_images(args.images, shard=1), select_backend("cpu")
    for n in args.gaussians:
        if (folder / f"{n}.pt").exists():
            continue
        parts = [
            fit(target[i : i + TOGETHER], FitConfig(num_gaussians=n), backend)[0]
            for i in range(0, len(target), TOGETHER)
        ]
        fields = [torch.cat(same) for same in zip(*(p.fields for p in parts), strict=True)]
        torch.save((target, fields), folder / f"{n}.pt")


def lock_sampler() -> Any:
    """A function of a flag: the share of samples, until it is set, in which a thread has the
    lock."""
    running = ctypes.CFUNCTYPE(ctypes.c_void_p)(("_PyThreadState_UncheckedGet", ctypes.pythonapi))
    pause = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint)(("usleep", ctypes.CDLL(None)))

    @numba.njit(nogil=True)
    def sample(stop):
        held, total = 0, 0
        while not stop[0]:
            held += running() != 0
            total += 1
            pause(np.uint32(PAUSE_US))
        return held / max(total, 1)

    return sample


def lock_share(work: Any) -> float:
    """Share of the time of `work()` in which this thread holds the lock."""
    sample, stop, found = lock_sampler(), np.zeros(1, np.uint8), []
    sample(np.ones(1, np.uint8))  # compiles
    thread = threading.Thread(target=lambda: found.append(sample(stop)))
    thread.start()
    work()
    stop[0] = 1
    thread.join()
    return found[0]


def measure(path: Path, repeats: int) -> dict[str, float]:
    torch.set_num_threads(1)
    target, fields = torch.load(path)
    splats, backend = Splats(*fields), select_backend("cpu")
    parts = [slice(i, i + TOGETHER) for i in range(0, len(target), TOGETHER)]

    def work() -> list[Any]:
        return [
            row
            for part in parts
            for row in pack(splats[part], target[part], CODEC, CUTOFF, backend)
        ]

    payloads = work()  # compiles
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin) / len(target))
    size = target.shape[2:]
    stored = backend.render(unpack(payloads, *size, CODEC), *size, CUTOFF)
    loss = psnr(backend.render(splats, *size, CUTOFF), target) - psnr(stored, target)
    rows = [row["splats"] for row in payloads]
    columns = [b"".join(row[name] for row in rows) for name in PLANES]
    return {
        "ms": min(times),
        "lock_ms": min(times) * lock_share(work),
        "parquet_bytes": sum(len(pa.compress(one, "zstd", asbytes=True)) for one in columns)
        / len(rows),
        "tar_bytes": float(np.mean([len(join(row)) for row in rows])),
        "loss_mean": float(loss.mean()),
        "loss_max": float(loss.max()),
    }


def measure_build(root: Path, args: Args, fits: Path) -> dict[str, dict[str, float]]:
    """What the build in `root` takes, by number of Gaussians."""
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", "--fits", str(fits)]
    command += ["--repeats", str(args.repeats), "--gaussians", *map(str, args.gaussians)]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.alone and args.fits:
        found = {n: measure(args.fits / f"{n}.pt", args.repeats) for n in args.gaussians}
        print(json.dumps({"commit": commit(), **found}))
        return
    here = Path(__file__).resolve().parent.parent
    builds = {"this": here} | ({"base": args.base.resolve()} if args.base else {})
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        fits = (args.fits or Path(folder)).resolve()
        save_fits(args, fits)
        for _ in range(args.turns):
            for name, root in builds.items():
                found = measure_build(root, args, fits)
                old = results.setdefault(name, found)
                for n in map(str, args.gaussians):
                    old[n] |= {key: min(old[n][key], found[n][key]) for key in ("ms", "lock_ms")}
    for n in map(str, args.gaussians):
        for name in builds:
            row = results[name][n]
            print(
                f"N={n} {name}: {row['ms']:.2f} ms per image, the lock for {row['lock_ms']:.2f}; "
                f"{row['parquet_bytes']:.0f} bytes in Parquet, {row['tar_bytes']:.0f} in a tar; "
                f"{row['loss_mean']:.4f} dB lost, at most {row['loss_max']:.4f}"
            )
    save("packing", {"images": args.images, **results})


if __name__ == "__main__":
    main()
