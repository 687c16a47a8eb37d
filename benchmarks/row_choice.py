"""Which rows a step of the fit looks at: in turn, in blue-noise orders, or by residual energy.

    python -m benchmarks.row_choice [--images 6] [--first 20] [--shards 1 2 3] [--kodak]

Every choice looks at as many rows per step as the default does (pipeline/fitting/rows.py), and
takes as many steps; mean PSNR in dB of float32 splats. Rows that are not evenly spaced make no
picture that the kernels know, so a step here draws all rows and multiplies the residual of each by
a weight, 0 for those that are not looked at: slower than the fit, but the same gradient. What a
choice would cost in a kernel of its own is left out, so a choice that does not win here does not
win. `in turn` is the default, and must agree with `fit` itself, which is the first line.

The energy of a row is the sum of its squared residuals, known exactly at each step (a fit would
only know what it has looked at): an upper bound of what choosing by it can gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.nested import kodak_images
from benchmarks.record import sample_images, save
from splatshard.pipeline.fitting.fit import TorchStep, fit
from splatshard.pipeline.fitting.rows import PHASES, row_stride
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig

Choice = Callable[[int, Tensor, int, torch.Generator], Tensor]
"""choice(step, energy [B, H], stride, generator) -> weights of the rows [B, H]."""


@dataclass(frozen=True)
class Args:
    images: int = 6
    """Photographs of each shard."""
    first: int = 20
    """Number of the first of them within its shard."""
    shards: tuple[int, ...] = (1, 2, 3)
    """Of datacomp-sample; constants were tuned on 1 to 3, 0 is for reporting."""
    kodak: bool = False
    """Centre crops of 12 of Kodak's photographs instead."""
    gaussians: tuple[int, ...] = (400, 1600, 3136)
    steps: int = 150
    name: str = "row_choice"


class ChosenRows(TorchStep):
    """A step of the fit on the rows that `choice` weighs."""

    def __init__(
        self, target: Tensor, config: FitConfig, stride: int, *, choice: Choice, backend: Backend
    ) -> None:
        super().__init__(target, config, 1, backend)
        self.whole, self.one_in, self.choice = target, stride, choice
        self.generator = torch.Generator().manual_seed(0)
        self.taken = 0

    def step(self, splats: Splats, *given: Any, **named: Any) -> Splats:
        """`TorchStep.step` of splats [B, N], with a target whose residual is the weighted one."""
        image = self.backend.render(splats, *self.whole.shape[2:], self.config.cutoff)
        residual = image - self.whole
        energy = residual.square().sum((1, 3))
        weights = self.choice(self.taken, energy, self.one_in, self.generator)
        self.taken += 1
        self.target = image - weights[:, None, :, None] * residual
        moments, _, *others = given
        return super().step(splats, moments, 0, *others, **named)


def chosen(rows: Tensor, height: int) -> Tensor:
    """Weight 1 for the rows of the indices [R] or [B, R], 0 for others: [1, H] or [B, H]."""
    rows = rows if rows.dim() == 2 else rows[None]
    return torch.zeros(len(rows), height).scatter_(1, rows, 1.0)


def in_turn(step: int, energy: Tensor, stride: int, _: torch.Generator) -> Tensor:
    """The default: every `stride`-th row, phases in turn."""
    height = energy.shape[1]
    return chosen(torch.arange(PHASES[stride][step % stride], height, stride), height)


def random_phase(_: int, energy: Tensor, stride: int, generator: torch.Generator) -> Tensor:
    """Every `stride`-th row, any phase."""
    height = energy.shape[1]
    phase = int(torch.randint(stride, (), generator=generator))
    return chosen(torch.arange(phase, height, stride), height)


def jittered(_: int, energy: Tensor, stride: int, generator: torch.Generator) -> Tensor:
    """One row of each `stride` neighbours, any."""
    return chosen(one_each(torch.ones_like(energy[:1]), stride, generator)[0], energy.shape[1])


def permuted(step: int, energy: Tensor, stride: int, _: torch.Generator) -> Tensor:
    """One row of each `stride` neighbours, each of them once in `stride` steps, in an order of
    these neighbours' own."""
    height = energy.shape[1]
    generator = torch.Generator().manual_seed(step // stride)
    orders = torch.rand(height // stride, stride, generator=generator).argsort(1)
    return chosen(torch.arange(0, height, stride) + orders[:, step % stride], height)


def blue_noise(step: int, energy: Tensor, stride: int, _: torch.Generator) -> Tensor:
    """The next rows of one blue-noise order of all."""
    height = energy.shape[1]
    count = height // stride
    start = step % stride * count
    return chosen(torch.tensor(blue_noise_order(height, height, 0)[start : start + count]), height)


def new_blue_noise(step: int, energy: Tensor, stride: int, _: torch.Generator) -> Tensor:
    """The first rows of another blue-noise order in each step."""
    height = energy.shape[1]
    return chosen(torch.tensor(blue_noise_order(height, height // stride, step)), height)


def blue_noise_order(height: int, count: int, seed: int) -> list[int]:
    """`count` of `height` rows, each the farthest from those before it of some candidates
    (Mitchell, Spectrally optimal sampling for distribution ray tracing, 1991); round the border."""
    generator = torch.Generator().manual_seed(seed)
    distance = torch.full((height,), float(height))
    order: list[int] = []
    for taken in range(count):
        left = (distance > 0).nonzero()[:, 0]
        tried = left[torch.randperm(len(left), generator=generator)[: 8 * (taken + 1)]]
        row = int(tried[distance[tried].argmax()])
        order.append(row)
        away = (torch.arange(height) - row).abs()
        distance = torch.minimum(distance, torch.minimum(away, height - away).float())
    return order


def by_energy(
    _: int, energy: Tensor, stride: int, generator: torch.Generator, power: float, weighted: bool
) -> Tensor:
    """One row of each `stride` neighbours, drawn in proportion to its energy's `power` and a
    tenth; `weighted` by 1 / (stride p), which makes the gradient's mean the full one."""
    share = shares(energy, stride, power)
    rows = one_each(share.flatten(1), stride, generator)
    weights = chosen(rows, energy.shape[1])
    return weights / (stride * share.flatten(1)) if weighted else weights


def spaced_by_energy(
    step: int, energy: Tensor, stride: int, _: torch.Generator, power: float, weighted: bool
) -> Tensor:
    """Rows evenly spaced in the running sum of their energy's `power` and a tenth, from an offset
    in turn: the default's rows where all have the same energy. `weighted` as in `by_energy`."""
    height = energy.shape[1]
    count = height // stride
    share = energy.clamp_min(1e-12).pow(power)
    share = count * (0.9 * share / share.sum(1, keepdim=True) + 0.1 / height)
    share = share.clamp(max=1.0)
    marks = torch.arange(count) + (PHASES[stride][step % stride] + 0.5) / stride
    rows = torch.searchsorted(share.cumsum(1), marks.expand(len(share), -1).contiguous())
    weights = chosen(rows.clamp(max=height), height + 1)[:, :height]
    return weights / (stride * share) if weighted else weights


def most_energy(step: int, energy: Tensor, stride: int, _: torch.Generator) -> Tensor:
    """The row of most energy of each `stride` neighbours in every other step, the default's rows in
    the others."""
    if step % 2:
        return in_turn(step // 2, energy, stride, _)
    blocks = energy.unflatten(1, (-1, stride))
    return chosen(blocks.argmax(2) + torch.arange(0, energy.shape[1], stride), energy.shape[1])


def shares(energy: Tensor, stride: int, power: float) -> Tensor:
    """[B, H / stride, stride]: probability of each row among its neighbours."""
    blocks = energy.clamp_min(1e-12).pow(power).unflatten(1, (-1, stride))
    return 0.9 * blocks / blocks.sum(2, keepdim=True) + 0.1 / stride


def one_each(share: Tensor, stride: int, generator: torch.Generator) -> Tensor:
    """One row of each `stride` neighbours, drawn by `share` [B, H]: indices [B, H / stride]."""
    blocks = share.unflatten(1, (-1, stride))
    drawn = torch.multinomial(blocks.flatten(0, 1), 1, generator=generator)
    return drawn.view(len(share), -1) + torch.arange(0, share.shape[1], stride)


CHOICES: dict[str, Choice] = {
    "in turn": in_turn,
    "evenly spaced, any phase": random_phase,
    "jittered": jittered,
    "permuted": permuted,
    "one blue-noise order": blue_noise,
    "a blue-noise set each step": new_blue_noise,
    "energy, weighted": partial(by_energy, power=1.0, weighted=True),
    "root of energy, weighted": partial(by_energy, power=0.5, weighted=True),
    "energy": partial(by_energy, power=1.0, weighted=False),
    "spaced by energy, weighted": partial(spaced_by_energy, power=1.0, weighted=True),
    "spaced by root of energy, weighted": partial(spaced_by_energy, power=0.5, weighted=True),
    "spaced by energy": partial(spaced_by_energy, power=1.0, weighted=False),
    "spaced by root of energy": partial(spaced_by_energy, power=0.5, weighted=False),
    "spaced by fourth root of energy": partial(spaced_by_energy, power=0.25, weighted=False),
    "most energy every other step": most_energy,
}


def measured(target: Tensor, n: int, steps: int) -> Iterator[tuple[str, float]]:
    """(choice, mean PSNR) of fits to `target` [B, 3, H, W], the fit itself first."""
    backend = select_backend("cpu")
    config = FitConfig(num_gaussians=n, steps=steps)
    height, width = target.shape[2:]
    stride = row_stride(config, height, width)
    # where the stride does not divide the height, the last rows go the way of the default
    target = target[:, :, : height // stride * stride].contiguous()
    config = replace(config, row_stride=stride)

    def quality(engine: Backend) -> float:
        splats, _ = fit(target, config, engine)
        image = backend.render(splats, *target.shape[2:], config.cutoff)
        return psnr(image, target).mean().item()

    yield f"fit, one row in {stride}", quality(backend)
    for name, choice in CHOICES.items():
        make = partial(ChosenRows, choice=choice, backend=backend)
        yield name, quality(replace(backend, make_step=make))


def main() -> None:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    if args.kodak:
        target = kodak_images(12)
    else:
        every = [sample_images(args.first + args.images, shard) for shard in args.shards]
        target = torch.cat([images[args.first :] for images in every])
    rows = []
    for n in args.gaussians:
        base = 0.0
        for i, (name, quality) in enumerate(measured(target, n, args.steps)):
            base = quality if i == 0 else base
            rows.append({"num_gaussians": n, "rows": name, "psnr": quality})
            print(f"N={n:<5} {name:42} {quality:6.2f} dB {quality - base:+.2f}", flush=True)
    save(args.name, {"images": len(target), "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
