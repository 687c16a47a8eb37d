"""Gaussians to integers: the lossy half of the codecs `balanced` and `compact`.

    step from the loss allowed -> class, geometry on its grid -> colours solved, loss foreseen
        -> a step that fits -> class, geometry and colours on their grid, loss measured: repeated

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
grid; this takes up about a third of the error. One gradient is enough for it, and with it the loss
is foreseen to a few percent, so that most images need one or two steps. Classes follow from the
codes and codes from the solution; where a class changes, the geometry follows. So few do that the
solution is kept for all further steps. It is for the sum of the Gaussians, but images are shown
clamped to 0..1, which fits of white or black areas rely on: there it can lose more than it takes
up, however fine the step. Images that lose too much after three passes keep the colours of their
fit, and what they lose goes to nothing with the step.

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
    MAX_CODE,
    RATIO_CELLS,
    SHEAR_CELLS,
    SHEAR_RANGE,
    SHEAR_UNIT,
    SIZE_CELLS,
    STEP_RANGE,
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
from splatshard.pipeline.kernels.solve_colors import solve_colors, square_norm
from splatshard.pipeline.splats import Splats

PASSES = 2  # at most, for images that keep to their limit
SOLVED_PASSES, MAX_PASSES = 3, 12  # for images that lose too much
COLOR_STEPS = 5  # conjugate-gradient steps of a pass, where the backend has no `color_change`
FIRST_GUESS = 1.2  # on the step: solved colours take up about a third of the error foreseen
AIM = 0.985  # of the squared error allowed
FORESEEN_AIM = 0.98  # the same of what is foreseen
WELL_SPENT = 0.93  # an image that spends as much, and no more than allowed, is final at once
FLOOR = 1e-6
"""Squared error per pixel and channel that every fit is granted: that of 60 dB."""


def quantise(
    splats: Splats,
    target: Tensor,
    behind: Tensor | None,
    allowed: Tensor,
    before: Tensor,
    cutoff: float,
    backend: Backend,
) -> Codes:
    """Codes whose Gaussians add at most `allowed` [B] to the squared error of `splats`, as images
    of `target` [B, 3, H, W]: of the steps tried, the coarsest that keeps to it, or where none does,
    as for Gaussians beyond the grid, the one that adds least.

    `behind` [B, 3, H, W] is what other Gaussians of the image render, if any; `before` [2, B] are
    the `squared_errors` of `splats`. An image's codes do not depend on the others in its batch (on
    a GPU: but for rounding). One that is final leaves the loop, and few need more than a pass.
    """
    front = target if behind is None else target - behind
    first = FIRST_GUESS * (12 * allowed / (8 * splats.num_gaussians.clamp(min=1))).sqrt()
    codes = on_grid(splats, splats, first, target)
    solved, error, seen = resolved(codes, splats, front, cutoff, backend)
    foreseen = (error + rounding_error(codes, splats, seen) - before[1]) / allowed
    step, best, result = next_step(codes.step, foreseen, FORESEEN_AIM), None, None
    left = torch.arange(len(splats), device=first.device)  # numbers of the images in the loop
    for number in range(MAX_PASSES):
        if number == SOLVED_PASSES:
            step, solved = first, splats
        codes = on_grid(splats, solved, step, target)
        error, _ = squared_errors(rendered(codes, target), target, behind, cutoff, backend)
        spent = (error - before[0]) / allowed
        best = (codes, spent) if best is None else better(best, (codes, spent), number < PASSES)
        step = next_step(codes.step, spent, AIM)
        result = best[0] if result is None else placed(result, left, best[0])
        final = best[1] <= 1
        if number < PASSES - 1:
            final &= best[1] >= WELL_SPENT
        over = torch.nonzero(~final)[:, 0]  # on a GPU, the pass is waited for here
        if not len(over):
            break
        if len(over) < len(left):
            splats, solved, best = splats[over], solved[over], (best[0][over], best[1][over])
            left, step, first, allowed, target = (
                x[over] for x in (left, step, first, allowed, target)
            )
            before, behind = before[:, over], None if behind is None else behind[over]
    assert result is not None  # MAX_PASSES are one and more
    return result


def next_step(step: Tensor, spent: Tensor, aim: float) -> Tensor:
    """The step [B] that should spend `aim` of the error allowed, after one that spends `spent` [B]
    of it."""
    change = (aim / spent.clamp(min=0.05)).sqrt().nan_to_num(1)
    return step * change.clamp(0.5, 1.5)


def resolved(
    codes: Codes, splats: Splats, front: Tensor, cutoff: float, backend: Backend
) -> tuple[Splats, Tensor, Tensor]:
    """The geometry of `codes` with the colours of `splats` [B, N] solved anew for images `front`
    [B, 3, H, W]; the squared error [B] of its sum, as foreseen; the share [B, N] of each Gaussian's
    squared weight that the image sees, or 1 where that is not known."""
    geometry = replace(rendered(codes, front), colors=splats.colors)
    if backend.color_change:
        change, error, square = backend.color_change(geometry, front, cutoff)
        seen = square / square_norm(geometry.cholesky)
        return replace(geometry, colors=geometry.colors + change), error, seen
    found = backend.loss_and_grad(geometry, front, cutoff)
    solved = solve_colors(geometry, front, COLOR_STEPS, cutoff, backend, found.colors)
    change = solved.colors - geometry.colors
    # the loss is a parabola along the change, and lowest at its end
    loss = found.loss.double() + (found.colors * change).sum((1, 2), dtype=torch.float64) / 2
    seen = torch.ones_like(solved.means[..., 0])
    return solved, loss * math.prod(front.shape[1:]), seen


def rounding_error(codes: Codes, splats: Splats, seen: Tensor) -> Tensor:
    """Squared error [B] that rounding the colours of `splats` to those of `codes` adds where that
    share [B, N] is seen, but for overlaps."""
    error = (amplitudes(splats) - codes.step[:, None, None] * codes.colors).square().sum(-1)
    return torch.where(codes.mask, error * seen, 0).sum(1)


def allowed_error(fit_error: Tensor, target: Tensor, max_loss_db: float) -> Tensor:
    """Squared error [B] that takes `max_loss_db` from the PSNR of a fit of `target` [B, 3, H, W]
    with `fit_error` [B], or from 60 dB."""
    return (10 ** (max_loss_db / 10) - 1) * fit_error.clamp(min=FLOOR * math.prod(target.shape[1:]))


def on_grid(splats: Splats, solved: Splats, step: Tensor, target: Tensor) -> Codes:
    """The colours of `solved` and the geometry of `splats`, [B, N] both, on the grid of `step` [B],
    for images as large as `target` [B, 3, H, W]."""
    height, width = target.shape[2:]
    if splats.means.device.type != "cpu":
        return on_grid_anywhere(splats, solved, step, height, width)
    from splatshard.pipeline.codec import pack_kernel  # numba takes a second to import

    return pack_kernel.on_grid(splats, solved, step, height, width)


def on_grid_anywhere(
    splats: Splats, solved: Splats, step: Tensor, height: int, width: int
) -> Codes:
    """The twin of `pack_kernel.on_grid`, in torch: [B, N] splats on any device."""
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
    values = amplitudes(splats)
    if values.numel():
        step = torch.maximum(step, values.abs().flatten(1).amax(1) / (MAX_CODE - 2))
    step = step.nan_to_num(nan=STEP_RANGE[1]).clamp(*STEP_RANGE).float().double()
    codes = (values / step[:, None, None]).round().clamp(-MAX_CODE + 1, MAX_CODE - 1)
    return step, codes.long()


def amplitudes(splats: Splats) -> Tensor:
    """Colours times sqrt(pi det L) in the opponent basis, float64 [B, N, 3]; 0 where the mask is.

    A fit may be finite and yet too large to be rendered; what it gets need only be valid.
    """
    scale = (math.pi * splats.cholesky[..., 0].double() * splats.cholesky[..., 2].double()).sqrt()
    values = splats.colors.double() * scale[..., None] @ opponent(scale.device).T
    return torch.where(splats.mask[..., None], values, 0).nan_to_num()


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


def squared_errors(
    splats: Splats, target: Tensor, behind: Tensor | None, cutoff: float, backend: Backend
) -> Tensor:
    """Sums over pixels and channels, float64 [2, B], of the error of splats [B, N] in front of
    `behind` (nothing: None), against `target`, both [B, 3, H, W]: clamped to 0..1, as images are
    shown, and of the sum itself."""
    if backend.squared_errors:
        return backend.squared_errors(splats, target, behind, cutoff)
    height, width = target.shape[2:]
    image = backend.render(splats, height, width, cutoff)
    image = image if behind is None else image + behind
    shown = (image.clamp(0, 1) - target.clamp(0, 1)).square_()
    both = torch.stack((shown, (image - target).square_()))
    return both.sum((2, 3, 4), dtype=torch.float64)
