"""Whole Kodak photographs, 768 x 512 px, with as many Gaussians as the peers publish.

    python -m benchmarks.any_size [--steps 150] [--name any_size]
    python -m benchmarks.any_size --gaussians --growing --name any_size_growing

As convert does it: `--resize none --codec balanced` with each number of Gaussians. `--growing` is
`--target-psnr` with `--max-gaussians` (see pipeline/fitting/grow.py); photographs at 224 px also
get one number for all, the mean of what they got. PSNR in dB of the fit and of the stored bytes,
the codec's loss with fp16 beside it, and seconds of CPU time of one thread per image: decoding, fit
and packing. Bytes are those of the payload in a tar. Means over the images, 12 of Kodak's 24; the
least PSNR beside it.

PEERS are published figures, each with its source, over all 24 and on GPUs. What could not be read
at its source is left out: Fast-2DGS (arXiv 2512.12774), whose code crops to 512 x 512 px,
Instant-GI after its fine-tuning, and Image-GS (arXiv 2407.01866), whose images are others.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.record import DATA, save
from splatshard.pipeline.codec.planes import join
from splatshard.pipeline.convert import decode_batches, fit_batches, pack_batch
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.runtime.batching import batch_limit
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import RawSample, read
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig, PackConfig

PEERS = [
    {
        "method": "GaussianImage",
        "gaussians": 70_000,
        "psnr": 44.08,
        "s_per_image": 106.59,
        "device": "V100",
        "source": "arXiv 2403.08551, table 1 (Cholesky); 70,000: issue 6 of its repository",
    },
    {
        "method": "GaussianImage",
        "gaussians": 9_000,
        "psnr": 32.05,
        "s_per_image": 29.94,
        "device": "RTX 4090",
        "source": "its code as run by a user, github.com/Xinjie-Q/GaussianImage issue 6",
    },
    {
        "method": "Instant-GI, network alone",
        "gaussians": 43_435,
        "psnr": 30.00,
        "s_per_image": 0.23,
        "device": "a GPU that is not named",
        "source": "README of github.com/whoiszzj/Instant-GI, branch dev (GPU version, retrained)",
    },
]


@dataclass(frozen=True)
class Args:
    images: int = 12
    gaussians: tuple[int, ...] = (9_000, 30_000, 43_435, 65_536)
    steps: int = 150
    growing: bool = False
    backend: str = "cpu"
    name: str = "any_size"


def measure(samples: list[RawSample], config: ConvertConfig, backend: Backend) -> dict[str, Any]:
    """A row of the results; seconds on a GPU are wall time."""
    clock = time.process_time if backend.device.type == "cpu" else time.perf_counter
    limit, timer, begin = batch_limit(config, backend.device), StageTimer(), clock()
    decoded = decode_batches(samples, limit, config, backend.device, timer)
    batches = list(fit_batches(decoded, config, backend, limit, timer))
    rows = [dict(row) for batch in batches for row in pack_batch(batch, config, backend)]
    seconds = clock() - begin
    assert all(row["status"] == "ok" for row in rows)
    halves = replace(config, pack=PackConfig(codec="fp16"))
    fp16 = [row["psnr_loss"] for batch in batches for row in pack_batch(batch, halves, backend)]
    values = {name: np.array([row[name] for row in rows]) for name in ("psnr", "psnr_loss")}
    numbers = [row["num_gaussians"] for row in rows]
    return {
        "gaussians": float(np.mean(numbers)),
        "gaussians_from_to": [min(numbers), max(numbers)],
        "steps": config.fit.steps,
        "psnr_fit": float((values["psnr"] + values["psnr_loss"]).mean()),
        "psnr": float(values["psnr"].mean()),
        "psnr_least": float(values["psnr"].min()),
        "fp16_loss": float(np.mean(fp16)),
        "bytes": float(np.mean([len(join(row["splats"])) for row in rows])),
        "s_per_image": seconds / len(rows),
    }


def grow(kodak: list[RawSample], backend: Backend) -> list[dict[str, Any]]:
    """Rows of photographs that get as many Gaussians as they need."""
    (ref,) = list_shards(str(DATA / "datacomp-sample/shards/00000000.tar"), limit=16)
    small = list(read(ref, hashlib.sha256()))
    square = ConvertConfig(fit=FitConfig(target_psnr=30, max_gaussians=8000))
    rows = []
    for target, begin in ((30, 400), (34, 400), (34, 1600)):
        fitting = replace(square.fit, target_psnr=target, num_gaussians=begin)
        row = measure(small, replace(square, fit=fitting), backend)
        rows.append({"set": "datacomp, 224 px", "target": target, "begin": begin, **row})
        fixed = FitConfig(num_gaussians=round(row["gaussians"]))
        row = measure(small, replace(square, fit=fixed), backend)
        rows.append({"set": "datacomp, 224 px", "target": None, **row})
    fitting = FitConfig(gaussians_per_megapixel=10_000, target_psnr=36, max_gaussians=65_536)
    config = ConvertConfig(decode=DecodeConfig(resize="none"), fit=fitting)
    rows.append({"set": "kodak, whole", "target": 36, **measure(kodak, config, backend)})
    return rows


def main() -> None:
    import tyro

    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    backend = select_backend(args.backend)
    paths = sorted((DATA / "kodak").glob("*.png"))[: args.images]
    samples = [RawSample(path.stem, path.read_bytes(), path.name) for path in paths]
    whole = ConvertConfig(decode=DecodeConfig(resize="none"), fit=FitConfig(steps=args.steps))
    measure(samples[:1], replace(whole, fit=FitConfig(steps=2)), backend)  # compile
    rows = []
    for n in args.gaussians:
        config = replace(whole, fit=replace(whole.fit, num_gaussians=n))
        rows.append(measure(samples, config, backend))
        print("{gaussians:8,.0f} {psnr:6.2f} dB {s_per_image:.2f} s".format(**rows[-1]), flush=True)
    results: dict[str, Any] = {"images": len(samples), "beside_other_work": True, "fixed": rows}
    if args.growing:
        results["growing"] = grow(samples, backend)
    save(args.name, results | {"peers": PEERS})


if __name__ == "__main__":
    main()
