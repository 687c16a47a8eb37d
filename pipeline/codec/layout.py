"""The grid that `balanced` and `compact` put Gaussians on: integers to parameters, tables, widths.

schemas/FORMAT.md specifies it; in short, for an image of W x H px, S = max(W, H):

    k       colour codes in an orthonormal opponent basis: c = basis^T k q / (sqrt(pi) 2^size)
    class   octave of |k|, from the tokens of k alone
    size    (log2 l11 + log2 l22) / 2, ratio (log2 l11 - log2 l22) / 2: cells of half an octave
    shear   asinh(l21 / l22 / 4): cells of 1/8
    x, y    cells of a square of side 2 S around the image, visited along a Hilbert curve

Each coarse cell is a symbol for the entropy coder, and the place within it plain bits, as many as
the class asks for. Everything here works on torch tensors of any device, whole batches at once.
Tables are kept, and made on the CPU: other streams would not wait for the kernels of the first.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from splatshard.pipeline.splats import Splats

CELLS_PER_OCTAVE = 2
SHEAR_UNIT = 4.0
SHEAR_CELLS = 8  # per unit of asinh
MAX_WIDTH = 12  # bits within a cell
MAX_LEVEL = 10
CELLS_PER_GAUSSIAN = 16  # of the image's area, about

DIRECT = 64  # codes from -64 to 63 are a token each; beyond, four tokens per octave and sign
MAX_CODE = 2**21
HEADER = struct.Struct("<fBb")
"""Of the plane `bits`: step, level, cell_log."""
STEP_RANGE = (1e-20, 1e20)
SIZE_CELLS = (-20, 27)  # sqrt(l11 l22) from 2^-10 to 2^14 px
RATIO_CELLS = (-24, 23)  # sqrt(l11 / l22) from 2^-12 to 2^12
SHEAR_RANGE = (-DIRECT, DIRECT - 1)  # |l21 / l22| up to 5,961
OPPONENT = (
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)),
)
"""Rows are luminance, red - blue, purple - green; orthonormal, so that squared errors stay."""


@dataclass(frozen=True)
class Codes:
    """B images of N Gaussians as integers: int64 [B, N] but where said otherwise.

    step      float64 [B]: q
    level     [B]; 2^level cells per side of the square
    cell_log  [B]; log2 of a cell's side in px, in half octaves, rounded
    colors    [B, N, 3]
    size, ratio, shear, x, y: the coarse cell times 2^width plus the place within it; x and y count
              from the left and upper side of the square
    width     of size, ratio and shear, in bits;  width_x, width_y
    mask      bool [B, N]; padding is False
    """

    step: Tensor
    level: Tensor
    cell_log: Tensor
    colors: Tensor
    size: Tensor
    ratio: Tensor
    shear: Tensor
    x: Tensor
    y: Tensor
    width: Tensor
    width_x: Tensor
    width_y: Tensor
    mask: Tensor

    def __getitem__(self, index: slice | Tensor) -> Codes:
        """Images of the batch; a slice or an index tensor, so that the batch dimension stays."""
        return Codes(*(getattr(self, field.name)[index] for field in fields(self)))


def tokens(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int64 [...] (|code| < MAX_CODE) to tokens 0..255, and the value and width of their
    extra bits; int64 [...] each."""
    magnitude = codes.abs()
    octave = magnitude.clamp(min=DIRECT).double().log2().floor().long()
    width = octave - 2
    far = 2 * DIRECT + DIRECT * (codes < 0) + 4 * (octave - 6) + (magnitude >> width & 3)
    direct = (codes >= -DIRECT) & (codes < DIRECT)
    zero = torch.zeros_like(codes)
    extra = magnitude - (magnitude >> width << width)
    return (
        torch.where(direct, codes + DIRECT, far),
        torch.where(direct, zero, extra),
        torch.where(direct, zero, width),
    )


@lru_cache(maxsize=4)
def token_tables(device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token, int64 [256]: the code with all extra bits 0, the extra bits' width, and 1 or
    -1, their sign."""
    token = torch.arange(256)
    far = token - 2 * DIRECT
    octave, sign = 6 + far % DIRECT // 4, torch.where(far >= DIRECT, -1, 1)
    direct = token < 2 * DIRECT
    width = torch.where(direct, 0, octave - 2)
    base = torch.where(direct, token - DIRECT, sign * ((4 + far % 4) << width))
    return base.to(device), width.to(device), torch.where(direct, 1, sign).to(device)


def class_of(color_tokens: Tensor) -> Tensor:
    """Class of Gaussians [...] from the tokens [..., 3] of their colours: floor(log2 |k|) of the
    codes without their extra bits, 0 for k = 0."""
    base = token_tables(color_tokens.device)[0][color_tokens]
    square = base.square().sum(-1)
    return torch.floor(square.clamp(min=1).double().log2() / 2 + 1e-9).long()


def shape_width(classes: Tensor) -> Tensor:
    """Bits within the cells of size, ratio and shear, by class: int64 [...] to [...]."""
    return (classes - 1).clamp(0, MAX_WIDTH)


def position_widths(
    classes: Tensor, size: Tensor, ratio: Tensor, shear: Tensor, cell_log: Tensor
) -> tuple[Tensor, Tensor]:
    """Bits within the cells of x and y, from classes and the coarse cells of the shape, int64 [B,
    N], and from `cell_log` [B].

    A place is known to 2^-class standard deviations (those along a row or column), computed in half
    octaves.
    """
    base = 2 * classes + cell_log[:, None] + 1
    slant = slant_table(shear.device)[shear + DIRECT]
    width_x = base - (size + ratio + 1) + slant >> 1
    width_y = base - (size - ratio) >> 1
    return width_x.clamp(0, MAX_WIDTH), width_y.clamp(0, MAX_WIDTH)


@lru_cache(maxsize=4)
def slant_table(device: torch.device | None = None) -> Tensor:
    """Of each cell of shear + 64, int64 [128]: log2(1 + s^2), rounded, for s in its middle."""
    middle = (torch.arange(-DIRECT, DIRECT, dtype=torch.double) + 0.5) / SHEAR_CELLS
    return (1 + (SHEAR_UNIT * middle.sinh()).square()).log2().round().long().to(device)


def level_of(count: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Level and cell_log [B] for images of `count` [B] Gaussians."""
    square = 2 * max(height, width)
    cell = (height * width / (CELLS_PER_GAUSSIAN * count.clamp(min=1).double())).sqrt()
    level = (square / cell).log2().round().long().clamp(0, MAX_LEVEL)
    cell_log = 2 * (math.log2(square) - level)
    return level, cell_log.round().long()


def dequantise(codes: Codes, heights: Tensor, widths: Tensor) -> Splats:
    """Gaussians in the middle of their cells, float64; image sizes int64 [B] in px."""
    size = middle(codes.size, codes.width) / CELLS_PER_OCTAVE
    ratio = middle(codes.ratio, codes.width) / CELLS_PER_OCTAVE
    shear = SHEAR_UNIT * (middle(codes.shear, codes.width) / SHEAR_CELLS).sinh()
    l11, l22 = (size + ratio).exp2(), (size - ratio).exp2()
    side = torch.maximum(heights, widths).double()[:, None]
    cell = 2 * side / codes.level.double().exp2()[:, None]
    x = middle(codes.x, codes.width_x) * cell - side + widths[:, None] / 2
    y = middle(codes.y, codes.width_y) * cell - side + heights[:, None] / 2
    scale = codes.step[:, None] / math.sqrt(math.pi) * (-size).exp2()
    colors = codes.colors.double() * scale[..., None] @ opponent(codes.colors.device)
    return Splats(
        torch.stack((x, y), -1), torch.stack((l11, shear * l22, l22), -1), colors, codes.mask
    )


def middle(place: Tensor, width: Tensor) -> Tensor:
    """The middles float64 [...] of the cells `place` [...], of which 2^width ([...], bits) make a
    coarse one, in coarse cells."""
    return (place.double() + 0.5) * torch.exp2(-width.double())


@lru_cache(maxsize=4)
def opponent(device: torch.device | None = None) -> Tensor:
    """OPPONENT as float64 [3, 3]."""
    return torch.tensor(OPPONENT, dtype=torch.double, device=device)


def hilbert_curve(level: int) -> Tensor:
    """Place on a Hilbert curve of each cell [y, x], int64 [2^level, 2^level].

    A curve of twice the side is four copies: mirrored on the diagonal (top left), twice as it is
    (bottom), mirrored on the other diagonal (top right).
    """
    curve = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(level):
        cells = curve.numel()
        top = torch.cat((curve.T, 3 * cells + curve.T.flip(0, 1)), 1)
        bottom = torch.cat((cells + curve, 2 * cells + curve), 1)
        curve = torch.cat((top, bottom))
    return curve


@lru_cache(maxsize=16)
def hilbert_tables(level: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """`hilbert_curve`, int64 [2^level, 2^level], and the cell y 2^level + x of each place, int64
    [4^level]."""
    curve = hilbert_curve(level)
    return curve.to(device), torch.argsort(curve.flatten()).to(device)
