"""Augmentation in parameter space: what is done to a picture, done to its Gaussians instead.

    whole image or random crop -> flip -> rotate, shear, zoom, shift -> hide -> dropout -> colours

Drawn first, as a `Plan`, then done, by `augment_with`; augment_pixels.py does the same to pixels.
Nothing is rendered. With I(p) the sum of the Gaussians at any point p, not only at pixel centres:

    affine    I'(A p + t) = I(p)         means A mu + t, covariances A Sigma A^T; exact, since the
                                         elliptical cutoff goes along with the covariance
    colours   I'(p) = M I(p)             colors M c for any 3x3 matrix M: brightness, saturation,
                                         hue and greyscale
    contrast  I'(p) = f I(p) + (1-f) m   no linear map of the colours, as it adds a constant to the
                                         picture and not to each Gaussian: see `contrast`
    dropout   the picture of the Gaussians that are left

All of it is exact up to rounding, on unclamped pictures. Where it differs from a pixel pipeline:
points are sampled, so zooming out is not low-pass filtered; beyond the old border the Gaussians go
on, and then it is black; boxes of crops are not on whole pixels; hue turns in YIQ (luma and greys
stay), since HSV is no linear space.

Batched, on any device, without a loop over images. Every random number comes from the generator
that is given, always as many for one configuration and batch shape, so that its state is all that
is needed to go on exactly.

Left out: what is no map of Gaussians to Gaussians (gamma, solarise, posterise; blur, because of the
cutoff), and mix-up, which would double N. Cached teacher embeddings are those of the picture before
all this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from splatshard.pipeline.splats import Splats
from splatshard.schemas.train import AugmentConfig

LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G, B in greyscale (ITU-R BT.601), as Pillow's."""

TO_YIQ = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
"""RGB to YIQ (NTSC). Greys have I = Q = 0, so that turning I and Q leaves them and the luma."""

FLAT = 4096.0
"""Standard deviation of a Gaussian that is constant over a picture, in diagonals of the picture:
exp(-q / 2) > 1 - 2^-26 everywhere, which is 1 in float32."""


DRAWS = 15
"""Random numbers per image, but for dropout, which takes one per Gaussian."""


@dataclass(frozen=True)
class Plan:
    """What is to be done to B images, drawn: the same for Gaussians and for pixels.

    matrix, offset  [B, 2, 2], [B, 2] in px: I'(A p + t) = I(p), to the augmented image
    colors          [B, 3, 3]: I'(p) = M I(p)
    contrast        [B]: then I'(p) = f I(p) + (1 - f) m, m the image's mean grey
    """

    matrix: Tensor
    offset: Tensor
    colors: Tensor
    contrast: Tensor


def draw_plan(draws: Tensor, heights: Tensor, widths: Tensor, config: AugmentConfig) -> Plan:
    """The plan that the numbers `draws` [B, DRAWS], from 0 to below 1, mean for images of
    `heights` x `widths` px (int [B])."""
    boxes = _random_boxes(draws[:, :4], heights.to(draws), widths.to(draws), config)
    placed = _box_map(boxes, config.height, config.width)
    matrix, offset = composed(_random_map(draws[:, 4:10], config), placed)
    return Plan(matrix, offset, *_random_colors(draws[:, 10:], config))


def augment(
    splats: Splats,
    heights: Tensor,
    widths: Tensor,
    config: AugmentConfig,
    generator: torch.Generator,
    cutoff: float = 3.0,
) -> Splats:
    """The B images of heights x widths px (int [B]), each augmented in its own way, to images of
    `config.height` x `config.width` px; see `augment_with`. A generator of the CPU gives the same
    augmentations wherever the splats are."""
    draws = torch.rand(len(splats), DRAWS, generator=generator, device=generator.device)
    plan = draw_plan(draws.to(splats.means), heights, widths, config)
    chance = None
    if config.dropout and splats.mask.shape[1]:
        chance = torch.rand(splats.mask.shape, generator=generator, device=generator.device)
        chance = chance.to(splats.means.device)
    return augment_with(splats, plan, config, chance, cutoff)


def augment_with(
    splats: Splats, plan: Plan, config: AugmentConfig, chance: Tensor | None, cutoff: float = 3.0
) -> Splats:
    """The B images augmented by `plan`; `chance` [B, N] are dropout's numbers, from 0 to below 1;
    `cutoff` is that of the shard's metadata.

    N stays, but is one more with contrast. Gaussians that can no longer be seen, or that dropout
    took, are masked; masked entries come back as padding: zeros and l11 = l22 = 1.
    """
    splats = affine(splats, plan.matrix, plan.offset)
    splats = hide(splats, visible(splats, config.height, config.width, cutoff))
    if config.dropout and splats.mask.shape[1]:
        assert chance is not None, "dropout needs numbers"
        kept = _not_none(chance >= config.dropout, chance, splats.mask)
        splats = drop(splats, kept, 1 - config.dropout if config.rescale else 1.0)
    if changes_colors(config):
        splats = recolor(splats, plan.colors)
    if config.contrast:
        splats = contrast(splats, plan.contrast, config.height, config.width, cutoff)
    return splats


def changes_colors(config: AugmentConfig) -> bool:
    """Whether a plan's colour matrix is more than the identity."""
    return bool(config.brightness or config.saturation or config.hue or config.grayscale)


# Geometry

Map = tuple[Tensor, Tensor]
"""p -> A p + t for each image: A [B, 2, 2], t [B, 2] in px."""


def affine(splats: Splats, matrix: Tensor, offset: Tensor) -> Splats:
    """I'(A p + t) = I(p) for matrices A [B, 2, 2] that can be inverted and offsets t [B, 2] in px.

    A L is brought back to lower triangular form by a rotation from the right, which leaves A Sigma
    A^T as it is; through the covariance itself float32 would lose thin Gaussians to cancellation.
    """
    l11, l21, l22 = splats.cholesky.unbind(-1)
    a, b, c, d = matrix.flatten(1)[:, :, None].unbind(1)
    top_x, top_y = a * l11 + b * l21, b * l22  # rows of A L
    low_x, low_y = c * l11 + d * l21, d * l22
    first = torch.hypot(top_x, top_y)
    cholesky = torch.stack(
        (
            first,
            (top_x * low_x + top_y * low_y) / first,
            (a * d - b * c).abs() * l11 / first * l22,
        ),
        -1,
    )
    means = splats.means @ matrix.mT + offset[:, None]
    return replace(splats, means=means, cholesky=cholesky)


def composed(outer: Map, inner: Map) -> Map:
    """First `inner`, then `outer`."""
    matrix = outer[0] @ inner[0]
    return matrix, (outer[0] @ inner[1][..., None])[..., 0] + outer[1]


def flip(splats: Splats, widths: Tensor, chosen: Tensor | None = None) -> Splats:
    """Mirror left and right; of the B images of `widths` px ([B]) those `chosen` (bool [B], None:
    all)."""
    sign = splats.means.new_full((len(splats),), -1.0)
    if chosen is not None:
        sign = torch.where(chosen, sign, 1.0)
    one = torch.ones_like(sign)
    shift = torch.where(sign < 0, widths.to(sign), 0.0)
    return affine(splats, _diagonal(sign, one), torch.stack((shift, torch.zeros_like(shift)), -1))


def crop(splats: Splats, boxes: Tensor, height: int, width: int, cutoff: float = 3.0) -> Splats:
    """The part of each image in its box, zoomed to `height` x `width` px.

    boxes     [B, 4]  left, top, width, height in px; need not be whole, nor inside the image
    cutoff    standard deviations beyond which a Gaussian is zero, from the shard's metadata

    Gaussians that do not reach into the box are masked, and come back as padding.
    """
    splats = affine(splats, *_box_map(boxes.to(splats.means), height, width))
    return hide(splats, visible(splats, height, width, cutoff))


def visible(splats: Splats, height: int, width: int, cutoff: float = 3.0) -> Tensor:
    """bool [B, N]: whether a Gaussian may reach into the image, by the bounding box of its ellipse;
    a few that pass a corner are counted as visible. False for padding.

    Where nothing of an image is left all of its Gaussians count as visible: they render nothing all
    the same, and attention over an empty set would be NaN.
    """
    l11, l21, l22 = splats.cholesky.unbind(-1)
    reach = torch.stack((l11, torch.hypot(l21, l22)), -1) * (cutoff * (1 + 1e-5))  # and rounding
    side = constant((width, height), splats.means)
    inside = ((splats.means + reach > 0) & (splats.means - reach < side)).all(-1) & splats.mask
    return torch.where(inside.any(1, keepdim=True), inside, splats.mask)


def _box_map(boxes: Tensor, height: int, width: int) -> Map:
    scale = constant((width, height), boxes) / boxes[:, 2:]
    return torch.diag_embed(scale), -scale * boxes[:, :2]


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack((x, y), -1))


def _random_boxes(draws: Tensor, heights: Tensor, widths: Tensor, config: AugmentConfig) -> Tensor:
    """Boxes [B, 4] as `crop` takes them, inside the images; draws [B, 4] in 0..1."""
    area, ratio, x, y = draws.unbind(1)
    if config.crop_scale == (1.0, 1.0):
        return torch.stack((0 * widths, 0 * heights, widths, heights), -1)
    area = _between(area, config.crop_scale) * heights * widths
    ratio = _between(ratio, tuple(map(math.log, config.crop_ratio))).exp()
    width, height = (area * ratio).sqrt().minimum(widths), (area / ratio).sqrt().minimum(heights)
    return torch.stack((x * (widths - width), y * (heights - height), width, height), -1)


def _random_map(draws: Tensor, config: AugmentConfig) -> Map:
    """Flip, shear, rotation and zoom about the centre of the new image, and a shift."""
    flipped, angle, slope, zoom, *shift = draws.unbind(1)
    one = torch.ones_like(angle)
    angle = _either_way(angle, math.radians(config.rotation))
    slope = _either_way(slope, math.radians(config.shear)).tan()
    zoom = _between(zoom, tuple(map(math.log, config.zoom))).exp()
    sign = torch.where(flipped < config.flip, -one, one)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rotation = torch.stack((cos, -sin, sin, cos), -1).unflatten(1, (2, 2))
    shear = torch.stack((one, slope, 0 * one, one), -1).unflatten(1, (2, 2))
    matrix = rotation @ shear @ _diagonal(sign, one)
    side = constant((config.width, config.height), draws)
    offset = (
        side / 2 - (matrix @ side / 2) + _either_way(torch.stack(shift, -1), config.shift) * side
    )
    return matrix, offset


# Colours


def recolor(splats: Splats, matrix: Tensor) -> Splats:
    """I'(p) = M I(p) for matrices M [B, 3, 3] that act on columns (R, G, B)."""
    return replace(splats, colors=splats.colors @ matrix.mT)


def brightness_matrix(factor: Tensor) -> Tensor:
    """[B] factors to [B, 3, 3]."""
    return factor[:, None, None] * torch.eye(3, dtype=factor.dtype, device=factor.device)


def saturation_matrix(factor: Tensor) -> Tensor:
    """[B] factors of the distance to greyscale to [B, 3, 3]: 1 changes nothing, 0 is greyscale."""
    gray = constant((LUMA,) * 3, factor)
    return brightness_matrix(factor) + (1 - factor)[:, None, None] * gray


def hue_matrix(angle: Tensor) -> Tensor:
    """[B] angles in radians to [B, 3, 3], which turn I and Q in YIQ; luma and greys stay."""
    to_yiq, from_yiq = (constant(rows, angle) for rows in _yiq())
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = (zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos)
    rotation = torch.stack(rows, -1).unflatten(1, (3, 3))
    return from_yiq @ rotation @ to_yiq


@cache
def _yiq() -> tuple[Values, Values]:
    """TO_YIQ, whose greys are grey to the last digit, and its inverse."""
    to_yiq = torch.tensor(TO_YIQ, dtype=torch.float64)
    to_yiq[0] /= to_yiq[0].sum()
    to_yiq[1:] -= to_yiq[1:].mean(1, keepdim=True)
    there, back = (tuple(map(tuple, x.tolist())) for x in (to_yiq, torch.linalg.inv(to_yiq)))
    return there, back


def contrast(
    splats: Splats, factor: Tensor, height: int, width: int, cutoff: float = 3.0
) -> Splats:
    """I'(p) = f I(p) + (1 - f) m in images of `height` x `width` px, f being `factor` [B].

    m is the grey of `mean_color`. The constant (1 - f) m is one more Gaussian at the end, N + 1 in
    all, in the middle of the image and so wide that it is flat over it (FLAT): 1 to within 2^-26.
    Masked where f = 1 or the image has no Gaussians.
    """
    gray = mean_color(splats, height, width, cutoff) @ constant(LUMA, splats.colors)
    means = constant((width / 2, height / 2), splats.means).expand(len(splats), 1, 2)
    wide = FLAT * math.hypot(height, width)
    cholesky = constant((wide, 0.0, wide), splats.cholesky).expand(len(splats), 1, 3)
    colors = ((1 - factor) * gray)[:, None, None].expand(-1, 1, 3)
    mask = ((factor != 1) & splats.mask.any(1))[:, None]
    return Splats(
        torch.cat((splats.means, means), 1),
        torch.cat((splats.cholesky, cholesky), 1),
        torch.cat((splats.colors * factor[:, None, None], colors), 1),
        torch.cat((splats.mask, mask), 1),
    )


def mean_color(splats: Splats, height: int, width: int, cutoff: float = 3.0) -> Tensor:
    """Mean colour [B, 3] of images of `height` x `width` px, from each Gaussian's integral,
    2 pi l11 l22 (1 - exp(-cutoff^2 / 2)). An estimate where they stick out of the image: none
    counts as larger than the image."""
    weight = splats.cholesky[..., 0] * splats.cholesky[..., 2]
    weight = weight * (2 * math.pi * -math.expm1(-(cutoff**2) / 2) / (height * width))
    weight = torch.where(splats.mask, weight.clamp(max=1), 0)
    return (weight[:, None] @ splats.colors)[:, 0]


def _random_colors(draws: Tensor, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Brightness, saturation, hue and greyscale as one matrix [B, 3, 3], and contrast's factors
    [B]; draws [B, 5]."""
    brightness, contrast_, saturation, hue, gray = draws.unbind(1)
    factor = 1 + _either_way(saturation, config.saturation)
    factor = torch.where(gray < config.grayscale, 0.0, factor)
    matrix = saturation_matrix(factor)
    if config.hue:
        matrix = matrix @ hue_matrix(_either_way(hue, math.radians(config.hue)))
    matrix = matrix * (1 + _either_way(brightness, config.brightness))[:, None, None]
    return matrix, 1 + _either_way(contrast_, config.contrast)


# Which Gaussians there are


def drop(splats: Splats, keep: Tensor, share: float = 1.0) -> Splats:
    """Only the Gaussians that `keep` (bool [B, N]) says, their colours divided by `share`.

    With `share` the probability of keeping one, the expected picture is that of all of them.
    """
    splats = hide(splats, keep)
    return replace(splats, colors=splats.colors / share) if share != 1 else splats


def hide(splats: Splats, keep: Tensor) -> Splats:
    """Mask all but `keep` (bool [B, N]); what is masked becomes padding, so that nothing leaks."""
    mask = (splats.mask & keep)[..., None]
    unit = constant((1.0, 0.0, 1.0), splats.cholesky)
    return Splats(
        torch.where(mask, splats.means, 0),
        torch.where(mask, splats.cholesky, unit),
        torch.where(mask, splats.colors, 0),
        mask[..., 0],
    )


def _not_none(keep: Tensor, chance: Tensor, mask: Tensor) -> Tensor:
    """`keep`, and the Gaussian of the best chance in each image."""
    best = torch.where(mask, chance, -1.0).argmax(1, keepdim=True)
    return keep.scatter(1, best, True)


# Numbers

Values = tuple[float, ...] | tuple[tuple[float, ...], ...]


def constant(values: Values, like: Tensor) -> Tensor:
    """`values` as a tensor, [K] or [K, L] as they are nested, of `like`'s dtype on its device, not
    to be written to. It is made once, since a copy to a GPU waits until that has done all it was
    given before.

    Not for modules that torch may compile, which warns of caches.
    """
    return _constant(values, like.dtype, like.device)


@lru_cache(maxsize=64)
def _constant(values: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else it could not take part in gradients later
        return torch.tensor(values, dtype=dtype, device=device)


def _between(draws: Tensor, limits: tuple[float, ...]) -> Tensor:
    return limits[0] + draws * (limits[1] - limits[0])


def _either_way(draws: Tensor, limit: float) -> Tensor:
    return (2 * draws - 1) * limit
