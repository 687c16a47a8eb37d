"""How busy the stages keep a device of a given speed: a GPU's conversion without the GPU.

    python -m benchmarks.busy_share [--images-per-s 100 200 300] [--shards 4] [--shards-at-once 1 2]

The real `convert_shard` with its threads, on real tars, as a worker runs it; only the fit is
replaced by a wait of the time that a device of that speed would take, one batch after another.
Busy is the share of the time, from the first read to the last commit, in which the device has a
batch. Beyond what the cores can decode the share must fall; `limit` is that rate, measured first.

It shows whether the stages overlap, within a shard and between shards. It says nothing about
how fast a GPU is.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import tyro

from benchmarks.record import DATA, save
from splatshard.jobs.driver.worker import THREADS

os.environ.update(THREADS)

import torch
from torch import Tensor

from splatshard.pipeline import convert
from splatshard.pipeline.fitting.start import initial_splats
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import ConvertConfig, FitConfig, PackConfig


@dataclass(frozen=True)
class Args:
    images_per_s: tuple[float, ...] = (100, 200, 300, 400)
    shards: int = 8
    """Source shards of 100 samples, datacomp-sample's four in turn."""
    shards_at_once: tuple[int, ...] = (1, 2)
    batch_size: int = 32


@contextmanager
def device_of(images_per_s: float) -> Iterator[Backend]:
    """A backend on which stages overlap as on a GPU, and whose fits take that long; they give every
    image the same Gaussians. The device's other work (planes, PSNR of what was packed) is left
    out."""
    config = FitConfig(num_gaussians=400)
    pattern = initial_splats(torch.rand(1, 3, 224, 224), config, select_backend("cpu"))
    device = threading.Lock()

    def fit(target: Tensor, config: FitConfig, backend: Backend) -> tuple[Splats, Tensor]:
        with device:
            time.sleep(len(target) / images_per_s)
        return pattern[[0] * len(target)], torch.full((len(target),), config.steps)

    def nothing(*arguments: object) -> Tensor:
        return torch.empty(0)

    def squared_errors(splats: Splats, target: Tensor, *_: object) -> Tensor:
        return torch.full((2, len(target)), 100.0, dtype=torch.float64)

    backend = Backend(
        name="waiting", device=torch.device("cpu"), render=nothing, loss_and_grad=nothing
    )
    with (
        mock.patch.object(convert, "fit", fit),
        mock.patch.object(convert, "squared_errors", squared_errors),
        mock.patch.object(convert, "planes", lambda pixels: pixels),
        mock.patch.object(convert, "overlaps", return_value=True),
    ):
        yield backend


def run(args: Args, images_per_s: float, at_once: int) -> dict:
    """Convert the shards on `at_once` threads, as a worker does."""
    sources = list_shards(str(DATA / "datacomp-sample" / "shards"))
    work = [replace(sources[i % len(sources)], name=f"{i:08d}") for i in range(args.shards)]
    config = ConvertConfig(batch_size=args.batch_size, pack=PackConfig(codec="fp16"))  # no device
    timer = StageTimer()
    with (
        tempfile.TemporaryDirectory() as dst,
        device_of(images_per_s) as backend,
        ThreadPoolExecutor(at_once) as pool,
    ):
        begin = time.perf_counter()
        done = list(
            pool.map(
                lambda ref: convert.convert_shard(ref, config, dst, backend, timer=timer), work
            )
        )
        wall_s = time.perf_counter() - begin
    images = sum(manifest.samples for manifest in done)
    return {
        "device_images_per_s": images_per_s,
        "shards_at_once": at_once,
        "images_per_s": images / wall_s,
        "busy": min(1.0, images / images_per_s / wall_s),
    }


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rows = [run(args, 1e9, 2)]
    print(f"limit: {rows[0]['images_per_s']:.0f} images/s with a device that takes no time")
    for speed in args.images_per_s:
        for at_once in args.shards_at_once:
            rows.append(run(args, speed, at_once))
            print(
                "device {device_images_per_s:.0f} images/s, {shards_at_once} shard(s) at once: "
                "{images_per_s:.1f} images/s, busy {busy:.1%}".format(**rows[-1]),
                flush=True,
            )
    save("busy_share", {"batch_size": args.batch_size, "shards": args.shards, "rows": rows})


if __name__ == "__main__":
    main()
