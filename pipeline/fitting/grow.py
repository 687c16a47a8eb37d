"""As many Gaussians as an image needs for a PSNR: few at first, more where the error is.

    fit -> below the target? -> more Gaussians for what is left -> all of them fitted on -> again

A round predicts how many are needed, from the dB that are missing (DB_PER_DOUBLING), starts the new
ones as a tier of nested budgets does (where the squared error is, as wide as the spacing among all)
and lets all of them move together. It ends early once the target is reached. Numbers lie on a grid
of GRID to the octave, so that images of a batch that need about as many go on together; what an
image gets does not depend on the others.

Measured on 12 photographs of 224 px, 150 steps a round, from 400 Gaussians to 32 dB: 1,150 on
average in 0.115 s each; fitted anew with the predicted number in each round, 1,260 in 0.141 s. With
half the steps a round 1,270 in 0.093 s. A cautious prediction (4.5 dB) gives 8 % fewer in a third
more time, a bold one (3 dB) 10 % more in 8 % less.

Left out: taking Gaussians away again where a round has overshot.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from splatshard.pipeline.fitting.fit import fit, optimize
from splatshard.pipeline.fitting.nested import CONTRAST, MIN_RMS, detail_splats, root_mean_square
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats, cat
from splatshard.schemas.config import FitConfig

DB_PER_DOUBLING = 4.0
"""By which twice the Gaussians are better; 2.9 to 3.9 where fits of 400 to 3136 are compared."""
GRID = 8
LEAST, MOST = 1 / GRID, 3.0  # octaves that a round adds


def fit_growing(target: Tensor, config: FitConfig, backend: Backend) -> tuple[Splats, Tensor]:
    """Fit `target` [B, 3, H, W] (0 to 1, on the backend's device) to `config.target_psnr` with
    `config.num_gaussians` or more, at most `config.max_gaussians`.

    Returns splats [B, N], whose mask says which an image has, and the steps of all rounds together,
    int64 [B].
    """
    height, width = target.shape[2:]
    with torch.no_grad():
        first, steps = fit(target, config, backend)
        done: list[Splats | None] = [None] * len(target)
        waiting = [(torch.arange(len(target)), first)]
        while waiting:
            index, splats = waiting.pop()
            own = target[index.to(target.device)]
            error = own - backend.render(splats, height, width, config.cutoff)
            wanted = numbers(psnr(own - error, own).cpu(), splats.mask.shape[1], config)
            for number in wanted.unique().tolist():
                chosen = (wanted == number).nonzero()[:, 0]
                here = chosen.to(target.device)
                if number == splats.mask.shape[1]:
                    for i in chosen.tolist():
                        done[int(index[i])] = splats[i : i + 1]
                    continue
                grown, taken = more(splats[here], own[here], error[here], number, config, backend)
                steps[index[chosen]] += taken
                waiting.append((index[chosen], grown))
        found = [splats for splats in done if splats is not None]
        most = max(splats.mask.shape[1] for splats in found)
        return cat([padded(splats, most) for splats in found]), steps


def numbers(quality: Tensor, count: int, config: FitConfig) -> Tensor:
    """How many Gaussians images with a PSNR of `quality` [B] dB are to have after their `count`,
    int64 [B]: as many where that is enough, there may be no more, or the fit has diverged."""
    assert config.target_psnr is not None
    assert config.max_gaussians is not None
    missing = config.target_psnr - quality.double()
    octaves = (missing / DB_PER_DOUBLING).clamp(LEAST, MOST)
    begun = math.log2(count / config.num_gaussians)
    grid = ((begun + octaves) * GRID).round().div(GRID).clamp(min=begun + LEAST)
    wanted = (config.num_gaussians * grid.exp2()).round().clamp(count + 1, config.max_gaussians)
    enough = ~(missing > 0) | (count >= config.max_gaussians)
    return torch.where(enough, count, wanted.nan_to_num(count).long())


def more(
    splats: Splats, target: Tensor, error: Tensor, number: int, config: FitConfig, backend: Backend
) -> tuple[Splats, Tensor]:
    """`splats` [B, N] and further Gaussians for the `error` [B, 3, H, W] = target - rendering that
    they leave, `number` in all, fitted on together; and the steps taken, int64 [B]."""
    config = replace(config, init="adaptive", num_gaussians=number)
    own = replace(config, num_gaussians=number - splats.mask.shape[1])
    gain = CONTRAST / root_mean_square(error).clamp(min=MIN_RMS)
    new = detail_splats(error * gain[:, None, None, None], number, own, backend)
    new = replace(new, colors=new.colors / gain[:, None, None])
    return optimize(cat([splats, new], dim=1), target, config.steps, config, backend)


def padded(splats: Splats, count: int) -> Splats:
    """`splats` [B, N] with masked entries of zeros up to `count`."""
    new = count - splats.mask.shape[1]
    return splats.map(lambda x: torch.cat((x, x.new_zeros(len(x), new, *x.shape[2:])), 1))
