"""Fitting speed and quality on a GPU: against the arithmetic bound, the dense reference and peers.

    python -m benchmarks.gpu_fit                                # on a machine with a GPU
    python -m benchmarks.gpu_fit --gaussians 16 --batch 1 2 --steps 3 --image-size 32 --backend cpu

Columns: images/s of a whole fit (start, steps, relocation; no decoding or packing);
image-iterations/s (images/s times steps); the share of the bound; mean PSNR in dB of the first
images; peak memory of the device. Rows:

    batched     `fit` with the backend, batches of photographs repeated to fill them
    unbatched   the same fit, one image after another: what a fitter without batches can reach
    reference   dense torch, loss and gradient of 4 images, nothing else of a step
    gsplat      gsplat's batched alpha rasteriser, forward and backward on the fitted splats with
                opacity 0.5 (its own cut at alpha 1/255 then lies at 3.1 deviations, ours at 3);
                no optimiser step. Where gsplat and its kernels are installed
    GaussianImage   its summing rasteriser, forward and backward, image by image (it has no
                batches); where its fork of gsplat is the one that is installed

The bound. Per Gaussian-pixel evaluation 38 FLOP forward and backward (2 exp run beside them on
other units, at a sixteenth of the fp32 rate, so they bind less), and per pixel and step 22 bytes to
and from memory (target, residual); evaluations are counted on the fitted splats. The machine's fp32
rate and copy bandwidth are measured first, by a large fp32 matrix product and a large copy. The
bound is the larger of the two times; it leaves out the optimiser, lists and launches.

Then the time to the PSNR that `--preset paper` reaches (without pruning): that of the smallest
budget of the default recipe that gets there.

A run without CUDA says "toy": true in its JSON, and writes it only with --save.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_kernel import count_evaluations
from benchmarks.record import machine, sample_images, save
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.kernels import reference
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.gsplat_alpha import load_gsplat, render_alpha
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import PRESETS, FitConfig
from splatshard.schemas.errors import BackendError

FLOP_PER_EVALUATION = 38
BYTES_PER_PX = 22
REFERENCE_IMAGES = 4
UNBATCHED_IMAGES = 16
PEER_IMAGES = 64
COUNTED_IMAGES = 2
CUTOFF = 3.0


@dataclass(frozen=True)
class Args:
    gaussians: tuple[int, ...] = (400, 900, 1600, 3136, 4900)
    batch: tuple[int, ...] = (1, 64, 1024, 4096)
    steps: int = 100
    image_size: int = 224
    images: int = 16
    """Different photographs; a batch repeats them. PSNR is their mean."""
    repeats: int = 3
    """The fastest of these runs counts, after one that is not counted."""
    backend: str = "auto"
    paper_steps: int = 3000
    budgets: tuple[int, ...] = (5, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200, 300)
    """Steps tried for the time to the published recipe's PSNR."""
    save: bool = False
    """Write the JSON also without CUDA."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do: FLOP/s in fp32 and bytes/s of a copy, read and write counted."""

    flops: float
    bytes_per_s: float

    def image_iterations_per_s(self, evaluations: float, pixels: int) -> float:
        """The bound, for `evaluations` per image and step on images of `pixels` px."""
        compute = FLOP_PER_EVALUATION * evaluations / self.flops
        return 1 / max(compute, BYTES_PER_PX * pixels / self.bytes_per_s)


def seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Of the fastest of `repeats` calls, after one that is not counted."""

    def once() -> float:
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """The most device memory that `work` had allocated; None without CUDA."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def measure_ceilings(device: torch.device) -> Ceilings:
    """A fp32 matrix product (no TF32: torch's default) and a copy, both beyond any cache."""
    side, floats = (8192, 1 << 28) if device.type == "cuda" else (512, 1 << 22)
    a = torch.randn(side, side, device=device)
    product = torch.empty_like(a)
    rate = 2 * side**3 / seconds(lambda: torch.mm(a, a, out=product), 10, device)
    source = torch.zeros(floats, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), 10, device)
    return Ceilings(flops=rate, bytes_per_s=copied)


def fill(images: Tensor, batch: int) -> Tensor:
    """The first `batch` of `images` [D, 3, H, W] repeated without end."""
    return images[torch.arange(batch, device=images.device) % len(images)].contiguous()


def batched(images: Tensor, n: int, batch: int, args: Args, backend: Backend) -> dict[str, Any]:
    """One row: whole fits of batches."""
    target = fill(images, batch)
    config = FitConfig(num_gaussians=n, steps=args.steps)
    took = seconds(lambda: fit(target, config, backend), args.repeats, target.device)
    peak = peak_bytes(lambda: fit(target, config, backend), target.device)
    quality = mean_psnr(fit(target, config, backend)[0], target, backend, len(images))
    return row("batched", n, batch, batch / took, batch * args.steps / took, quality, peak)


def unbatched(images: Tensor, n: int, args: Args, backend: Backend) -> dict[str, Any]:
    """One row: the same fits, one image after another."""
    config = FitConfig(num_gaussians=n, steps=args.steps)
    target = fill(images, min(UNBATCHED_IMAGES, max(args.batch)))

    def one_by_one() -> list[Splats]:
        return [fit(image[None], config, backend)[0] for image in target]

    took = seconds(one_by_one, 1, target.device)
    each = zip(one_by_one(), target, strict=True)
    quality = sum(mean_psnr(s, image[None], backend, 1) for s, image in each) / len(target)
    rate = len(target) / took
    return row("unbatched", n, 1, rate, rate * args.steps, quality, None)


def dense(images: Tensor, splats: Splats, n: int) -> dict[str, Any]:
    """One row: loss and gradient by the dense reference, on the same device."""
    target = images[: min(REFERENCE_IMAGES, len(splats))]
    splats = splats[: len(target)]
    work = lambda: reference.loss_and_grad(splats, target, CUTOFF)  # noqa: E731
    took = seconds(work, 1, target.device)
    peak = peak_bytes(work, target.device)
    return row("reference", n, len(target), None, len(target) / took, None, peak)


def gsplat_alpha(images: Tensor, splats: Splats, n: int, batch: int, repeats: int) -> dict:
    """One row: forward and backward through gsplat."""
    target = fill(images, batch)
    opacities = torch.full(splats.mask.shape, 0.5, device=target.device)
    splats, opacities = repeated(splats, batch), fill(opacities, batch)

    def work() -> None:
        leaves = [x.detach().requires_grad_() for x in (splats.means, splats.cholesky)]
        leaves += [splats.colors.detach().requires_grad_(), opacities.detach().requires_grad_()]
        image = render_alpha(Splats(*leaves[:3], splats.mask), leaves[3], *target.shape[2:])
        torch.autograd.grad((image - target).square().mean(), leaves)

    took = seconds(work, repeats, target.device)
    return row("gsplat", n, batch, None, batch / took, None, peak_bytes(work, target.device))


def gaussian_image(images: Tensor, splats: Splats, n: int, repeats: int) -> dict[str, Any]:
    """One row: forward and backward through GaussianImage's rasteriser."""
    from gsplat.project_gaussians_2d import project_gaussians_2d
    from gsplat.rasterize_sum import rasterize_gaussians_sum

    height, width = images.shape[2:]
    tiles = (-(-width // 16), -(-height // 16), 1)
    size = images.new_tensor([width, height])
    opacity, background = images.new_ones(n, 1), images.new_zeros(3)
    count = min(PEER_IMAGES, len(splats))

    def work() -> None:
        for b in range(count):
            means = (splats.means[b] / size * 2 - 1).requires_grad_()
            cholesky, colors = (
                x[b].detach().requires_grad_() for x in (splats.cholesky, splats.colors)
            )
            xys, depths, radii, conics, hits = project_gaussians_2d(
                means, cholesky, height, width, tiles
            )
            image = rasterize_gaussians_sum(
                xys, depths, radii, conics, hits, colors, opacity, height, width, 16, 16,
                background=background, return_alpha=False,
            )  # fmt: skip
            error = image.reshape(height, width, 3).permute(2, 0, 1) - images[b % len(images)]
            torch.autograd.grad(error.square().mean(), (means, cholesky, colors))

    took = seconds(work, repeats, images.device)
    return row("GaussianImage", n, 1, None, count / took, None, peak_bytes(work, images.device))


def repeated(splats: Splats, batch: int) -> Splats:
    return splats[torch.arange(batch, device=splats.means.device) % len(splats)]


def mean_psnr(splats: Splats, target: Tensor, backend: Backend, count: int) -> float:
    """Of the first `count` images at most, before packing."""
    target = target[:count]
    image = backend.render(splats[: len(target)], *target.shape[2:], CUTOFF)
    return psnr(image, target).mean().item()


def row(
    kind: str,
    n: int,
    batch: int,
    images_per_s: float | None,
    image_iterations_per_s: float,
    quality: float | None,
    peak: int | None,
) -> dict[str, Any]:
    return {
        "kind": kind,
        "num_gaussians": n,
        "batch": batch,
        "images_per_s": images_per_s,
        "image_iterations_per_s": image_iterations_per_s,
        "psnr": quality,
        "peak_bytes": peak,
    }


def rows_of(
    images: Tensor, n: int, args: Args, backend: Backend, bound: Ceilings, absent: dict[str, str]
) -> list[dict[str, Any]]:
    """All rows for one N but those of `absent` peers, printed as they come."""
    splats, _ = fit(images, FitConfig(num_gaussians=n, steps=args.steps), backend)
    height, width = images.shape[2:]
    counted = splats[:COUNTED_IMAGES].to(torch.device("cpu"))
    evaluations = count_evaluations(counted, height, width) / len(counted)
    limit = bound.image_iterations_per_s(evaluations, height * width)
    works: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"batch {b}": partial(batched, images, n, b, args, backend) for b in args.batch},
        "unbatched": lambda: unbatched(images, n, args, backend),
        "reference": lambda: dense(images, splats, n),
        "gsplat": lambda: gsplat_alpha(images, splats, n, max(args.batch), args.repeats),
        "GaussianImage": lambda: gaussian_image(images, splats, n, args.repeats),
    }
    rows = []
    for name, work in works.items():
        if name in absent:
            continue
        try:
            found = work()
        except torch.cuda.OutOfMemoryError as e:
            print(f"{n:6} {name}: {e}")
            continue
        found |= {
            "evaluations_per_px": evaluations / (height * width),
            "bound_image_iterations_per_s": limit,
            "share_of_bound": found["image_iterations_per_s"] / limit,
        }
        rows.append(found)
        print(describe(found), flush=True)
    return rows


def describe(found: dict[str, Any]) -> str:
    def cell(value: float | None, form: str, width: int) -> str:
        return (format(value, form) if value is not None else "-").rjust(width)

    mib = found["peak_bytes"] / 2**20 if found["peak_bytes"] is not None else None
    return (
        f"{found['num_gaussians']:6} {found['kind']:13} {found['batch']:5}"
        f"{cell(found['images_per_s'], ',.1f', 11)}"
        f"{cell(found['image_iterations_per_s'], ',.0f', 13)}"
        f"{cell(100 * found['share_of_bound'], '.2f', 9)} %"
        f"{cell(found['psnr'], '.2f', 8)}{cell(mib, ',.0f', 10)}"
    )


def time_to_paper(images: Tensor, n: int, args: Args, backend: Backend) -> dict[str, Any]:
    """Seconds per image of the smallest budget that reaches the published recipe's PSNR."""
    paper = replace(PRESETS["paper"].fit, num_gaussians=n, steps=args.paper_steps)
    goal = mean_psnr(fit(images, paper, backend)[0], images, backend, len(images))
    found: dict[str, Any] = {"num_gaussians": n, "paper_psnr": goal, "steps": None}
    found["paper_steps"] = args.paper_steps
    target = fill(images, max(args.batch))
    for steps in args.budgets:
        config = FitConfig(num_gaussians=n, steps=steps)
        quality = mean_psnr(fit(images, config, backend)[0], images, backend, len(images))
        if quality >= goal:
            took = seconds(lambda c=config: fit(target, c, backend), args.repeats, target.device)
            found |= {"steps": steps, "psnr": quality, "s_per_image": took / len(target)}
            break
    return found


def peers() -> dict[str, str]:
    """What keeps each peer out of the table; empty text where it is in."""
    reasons = {"gsplat": "", "GaussianImage": ""}
    try:
        load_gsplat()
    except BackendError as e:
        reasons["gsplat"] = str(e)
    try:
        import gsplat.rasterize_sum  # noqa: F401
    except ImportError as e:
        reasons["GaussianImage"] = f"{e}: its fork of gsplat is not installed"
    return reasons


def main(argv: list[str] | None = None) -> dict[str, Any]:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__, args=argv)
    backend = select_backend(args.backend)
    device = backend.device
    toy = device.type != "cuda"
    name = torch.cuda.get_device_name(device) if not toy else machine()["cpu"]
    images = sample_images(args.images, size=args.image_size).to(device)
    bound = measure_ceilings(device)
    print(f"{name}, backend {backend.name}{', a toy run: no GPU' if toy else ''}")
    print(f"fp32 {bound.flops / 1e12:.2f} TFLOP/s, copy {bound.bytes_per_s / 1e9:,.0f} GB/s")
    absent = {peer: reason for peer, reason in peers().items() if reason}
    for peer, reason in absent.items():
        print(f"without {peer}: {reason}")
    print("     N rows          batch   images/s image-iter/s  of bound   PSNR  peak MiB")
    rows = []
    for n in args.gaussians:
        rows += rows_of(images, n, args, backend, bound, absent)
    paper = []
    for n in args.gaussians:
        paper.append(time_to_paper(images, n, args, backend))
        print(paper_line(paper[-1]), flush=True)
    results = {
        "toy": toy,
        "device": name,
        "backend": backend.name,
        "steps": args.steps,
        "image_size": args.image_size,
        "fp32_flops": bound.flops,
        "copy_bytes_per_s": bound.bytes_per_s,
        "absent": absent,
        "rows": rows,
        "time_to_paper": paper,
    }
    if args.save or not toy:
        save("gpu_fit_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"), results)
    return results


def paper_line(found: dict[str, Any]) -> str:
    text = "{num_gaussians:6} paper after {paper_steps} steps: {paper_psnr:.2f} dB; ours "
    if found["steps"] is None:
        return (text + "does not get there within the budgets tried").format(**found)
    return (text + "{psnr:.2f} dB after {steps}, {ms:.3f} ms per image").format(
        **found, ms=1e3 * found["s_per_image"]
    )


if __name__ == "__main__":
    main()
