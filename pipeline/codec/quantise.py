"""Gaussians to integers: the lossy half of the codecs `balanced` and `compact`.

    step from the loss allowed -> repeat: class, geometry on its grid, colours solved, loss measured

An error of one parameter adds to the squared error of the image about

    |c|^2 pi det L * s * error^2,     s = 1 / 2 for a move by `error` standard deviations
                                      s = 3 / 4 for a diagonal of L that grows by that share
                                      s = 1 / 4 for l21 / l22

and an error of the colour pi det L * error^2. Rate theory (reverse water-filling) asks for steps
that make all of these equal: one step q for the colours times sqrt(pi det L), in an orthonormal
basis, and geometry steps that halve whenever the amplitude |c| sqrt(pi det L) doubles. In units of
q the amplitude is the length of the colour codes, which a reader has anyway: its octave is the
Gaussian's class, and nothing is stored for it. One geometry step for all would cost 1.2 bits more
for each of five parameters, so much do amplitudes differ.

Colours are linear given the geometry, so they are solved anew, against the image, once it is on its
grid; this takes up about a third of the error. Classes follow from the codes and codes from the
solution, so the two alternate. Last the geometry follows the final codes: the result is consistent
wherever the loop stopped. A solution is for the sum of the Gaussians, but images are shown clamped
to 0..1, which fits of white or black areas rely on: there it can lose more than it takes up,
however fine the step. Images that lose too much after three passes keep the colours of their fit,
and what they lose goes to nothing with the step.

Left out: rate-distortion optimised rounding; prediction of colours from neighbours; position steps
along the axes of each Gaussian (they would save 0.4 bits of 30 and no longer sort).
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from splatshard.pipeline.codec.layout import (
    CELLS_PER_OCTAVE,
    DIRECT,
    MAX_CODE,
    SHEAR_CELLS,
    SHEAR_UNIT,
    Codes,
    class_of,
    dequantise,
    level_of,
    middle,
    opponent,
    position_widths,
    shape_width,
    tokens,
)
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.solve_colors import solve_colors
from splatshard.pipeline.splats import Splats

PASSES = 2
SOLVED_PASSES, MAX_PASSES = 3, 12  # for images that lose too much
COLOR_STEPS = 3  # conjugate-gradient steps of each pass
FIRST_GUESS = 1.2  # on the step: solved colours take up about a third of the error foreseen
AIM = 0.97  # of the squared error allowed
FLOOR = 1e-6
"""Squared error per pixel and channel that every fit is granted: that of 60 dB."""

STEP_RANGE = (1e-20, 1e20)
SIZE_CELLS = (-20, 27)  # sqrt(l11 l22) from 2^-10 to 2^14 px
RATIO_CELLS = (-24, 23)  # sqrt(l11 / l22) from 2^-12 to 2^12
SHEAR_RANGE = (-DIRECT, DIRECT - 1)  # |l21 / l22| up to 5,961


def quantise(
    splats: Splats,
    target: Tensor,
    behind: Tensor,
    allowed: Tensor,
    cutoff: float,
    backend: Backend,
) -> Codes:
    """Codes whose Gaussians add at most `allowed` [B] to the squared error of `splats`, as images
    of `target` [B, 3, H, W]: of the steps tried, the coarsest that keeps to it, or where none does,
    as for Gaussians beyond the grid, the one that adds least.

    `behind` [B, 3, H, W] is what other Gaussians of the image render. An image's codes do not
    depend on the others in its batch (on a GPU: but for rounding). After PASSES one that keeps its
    limit is final and leaves the loop: few need more, and only they take the time of more.
    """
    fit_error = squared_error(splats, target, behind, cutoff, backend)
    first = FIRST_GUESS * (12 * allowed / (8 * splats.num_gaussians.clamp(min=1))).sqrt()
    left = torch.arange(len(splats), device=first.device)  # numbers of the images in the loop
    step, solved, best, result = first, splats, None, None
    for number in range(MAX_PASSES):
        if number == SOLVED_PASSES:
            step, solved = first, splats
        codes = on_grid(splats, solved, step, target)
        if number < SOLVED_PASSES:
            geometry = replace(rendered(codes, target), colors=solved.colors)
            solved = solve_colors(geometry, target - behind, COLOR_STEPS, cutoff, backend)
            codes = on_grid(splats, solved, step, target)
        error = squared_error(rendered(codes, target), target, behind, cutoff, backend)
        spent = (error - fit_error) / allowed
        best = (codes, spent) if best is None else better(best, (codes, spent), number < PASSES)
        step = codes.step * (AIM / spent.clamp(min=0.05)).sqrt().clamp(0.5, 1.5)
        if number < PASSES - 1:
            continue
        result = best[0] if result is None else placed(result, left, best[0])
        over = torch.nonzero(~(best[1] <= 1))[:, 0]  # on a GPU, the pass is waited for here
        if not len(over):
            break
        if len(over) < len(left):
            splats, solved, best = splats[over], solved[over], (best[0][over], best[1][over])
            left, step, first, fit_error, allowed, target, behind = (
                x[over] for x in (left, step, first, fit_error, allowed, target, behind)
            )
    assert result is not None  # MAX_PASSES are PASSES and more
    return result


def allowed_error(fit_error: Tensor, target: Tensor, max_loss_db: float) -> Tensor:
    """Squared error [B] that takes `max_loss_db` from the PSNR of a fit of `target` [B, 3, H, W]
    with `fit_error` [B], or from 60 dB."""
    return (10 ** (max_loss_db / 10) - 1) * fit_error.clamp(min=FLOOR * math.prod(target.shape[1:]))


def on_grid(splats: Splats, solved: Splats, step: Tensor, target: Tensor) -> Codes:
    """The colours of `solved` and the geometry of `splats`, [B, N] both, on the grid of `step` [B],
    for images as large as `target` [B, 3, H, W]."""
    height, width = target.shape[2:]
    level, cell_log = level_of(splats.num_gaussians, height, width)
    step, colors = color_codes(solved, step)
    classes = class_of(tokens(colors)[0])
    shape = shape_width(classes)

    l11, l21, l22 = torch.where(splats.mask[..., None], splats.cholesky.double(), 1).unbind(-1)
    log11, log22 = l11.log2(), l22.log2()
    size = place((log11 + log22) / 2 * CELLS_PER_OCTAVE, shape, SIZE_CELLS)
    ratio = place((log11 - log22) / 2 * CELLS_PER_OCTAVE, shape, RATIO_CELLS)
    # the slope l21 / l11 should outlive the rounding of l11 and l22
    shear = l21 / l11 * (2 * middle(ratio, shape) / CELLS_PER_OCTAVE).exp2()
    shear = place((shear / SHEAR_UNIT).asinh() * SHEAR_CELLS, shape, SHEAR_RANGE)

    width_x, width_y = position_widths(
        classes, size >> shape, ratio >> shape, shear >> shape, cell_log
    )
    side, last = max(height, width), (1 << level[:, None]) - 1
    centred = splats.means.double() - splats.means.new_tensor((width / 2, height / 2)).double()
    x, y = ((centred / (2 * side) + 0.5) * (1 << level)[:, None, None]).unbind(-1)
    return Codes(
        step,
        level,
        cell_log,
        colors,
        size,
        ratio,
        shear,
        place(x, width_x, (0, last)),
        place(y, width_y, (0, last)),
        shape,
        width_x,
        width_y,
        splats.mask,
    )


def color_codes(splats: Splats, step: Tensor) -> tuple[Tensor, Tensor]:
    """Steps [B], raised where codes would not fit and rounded as they are stored, and codes
    int64 [B, N, 3]."""
    size = (splats.cholesky[..., 0].double().log2() + splats.cholesky[..., 2].double().log2()) / 2
    scale = math.sqrt(math.pi) * size.exp2()
    amplitudes = splats.colors.double() * scale[..., None] @ opponent(size.device).T
    # a fit may be finite and yet too large to be rendered; what it gets need only be valid
    amplitudes = torch.where(splats.mask[..., None], amplitudes, 0).nan_to_num()
    if amplitudes.numel():
        step = torch.maximum(step, amplitudes.abs().flatten(1).amax(1) / (MAX_CODE - 2))
    step = step.nan_to_num(nan=STEP_RANGE[1]).clamp(*STEP_RANGE).float().double()
    codes = (amplitudes / step[:, None, None]).round().clamp(-MAX_CODE + 1, MAX_CODE - 1)
    return step, codes.long()


def place(value: Tensor, width: Tensor, cells: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Numbers int64 [B, N] of the cells that `value` [B, N] (in coarse cells) lies in, of those
    with 2^width ([B, N], bits) to a coarse one; clamped to the coarse `cells` from first to last,
    of which the last may be [B, 1]."""
    first, last = cells
    fine = (value * width.double().exp2()).floor()
    lowest, highest = first << width, (last + 1 << width) - 1
    return torch.minimum(torch.maximum(fine, lowest), highest).long()


def rendered(codes: Codes, target: Tensor) -> Splats:
    """The Gaussians [B, N] of `codes` as a reader gets them, float32, for images as large as
    `target` [B, 3, H, W]."""
    height, width = (torch.full_like(codes.level, size) for size in target.shape[2:])
    splats = dequantise(codes, height, width)
    return Splats(splats.means.float(), splats.cholesky.float(), splats.colors.float(), splats.mask)


def better(
    old: tuple[Codes, Tensor], new: tuple[Codes, Tensor], coarser: bool
) -> tuple[Codes, Tensor]:
    """Image by image, of codes and their spent share of the allowed loss [B]: the ones that keep to
    it, and if both do, `coarser` or the old ones; else the ones that spend less."""
    (codes, spent), (old_codes, old_spent) = new, old
    saves = (spent <= 1) & (codes.step > old_codes.step) & coarser
    wins = torch.where(old_spent <= 1, saves, spent < old_spent)

    def choose(name: str) -> Tensor:
        a, b = getattr(codes, name), getattr(old_codes, name)
        return torch.where(wins.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    chosen = Codes(*(choose(field.name) for field in fields(Codes)))
    return chosen, torch.where(wins, spent, old_spent)


def placed(codes: Codes, images: Tensor, own: Codes) -> Codes:
    """`codes` with those of `images` (their numbers, int64 [K]) replaced by the K of `own`."""
    pairs = ((getattr(codes, field.name), getattr(own, field.name)) for field in fields(Codes))
    return Codes(*(values.index_copy(0, images, others) for values, others in pairs))


def squared_error(
    splats: Splats, target: Tensor, behind: Tensor, cutoff: float, backend: Backend
) -> Tensor:
    """Sum over pixels and channels, float64 [B], of the error of splats [B, N] as they are shown in
    front of `behind`, against `target`, both [B, 3, H, W]."""
    height, width = target.shape[2:]
    image = (backend.render(splats, height, width, cutoff) + behind).clamp_(0, 1)
    squares = (image - target.clamp(0, 1)).square_()
    if len(squares) == 1:  # alone it would be added up in parts, one per thread of the CPU
        return squares.expand(2, -1, -1, -1).sum((1, 2, 3), dtype=torch.float64)[:1]
    return squares.sum((1, 2, 3), dtype=torch.float64)
