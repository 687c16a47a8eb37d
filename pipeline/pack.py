"""Splats to payload bytes and back.

    pack: Gaussians -> quantise -> spatial order -> byte planes     unpack: planes -> Gaussians

schemas/FORMAT.md specifies both codecs byte by byte. `fp16` is eight IEEE halves per Gaussian.
`q11` is 11 bytes per Gaussian, and one colour scale per sample:

    x, y      16 bits each over the image and half a side around it
    l11, l22  10 bits each, steps of 1/64 octave from 1/32 px to 2026 px
    shear     12 bits of s = l21 / l22 = (r - 1/r) / 2 * sin(2 angle) for axis ratio r. An error
              of s moves points by that many standard deviations whatever r is; the same error of
              an angle moves them by r - 1/r times as many. Steps of 1/192 around 0, growing as
              sinh so that axis ratios up to 413 fit
    r, g, b   8 bits each, sign and square root of the magnitude

On 16 DataComp images at 224 px and 100 steps, dB lost on average (largest), and bytes per Gaussian
after zstd level 3:

    N = 400, 27.6 dB      fp16 0.004 (0.011), 14.6      q11 0.03 (0.12), 10.7
    N = 1600, 33.6 dB     fp16 0.04 (0.16), 14.0        q11 0.12 (0.41), 10.6

Stored values quantise to themselves: pack(unpack(payload)) == payload.

Gaussians are stored in Hilbert order of their quantised positions. On smooth random fields with 10
to 20 % noise and N = 1600, zstd level 3 leaves 12.65 of 16 bytes; Morton order leaves 12.75, rows
13.09, no order 13.87.

Left out: re-solving the colours after the geometry is quantised, and entropy coding. Both belong to
the compact codec; its two functions go into `_CODECS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.splats import Splats
from schemas.errors import CorruptShardError
from schemas.splats import CODECS, HEADER_BYTES

Array = NDArray[np.float64]
"""Gaussians of one image, [N, 8]: x, y, l11, l21, l22 in px, r, g, b."""

HALF_MAX = 65504.0
HALF_MIN_DIAGONAL = 2.0**-14
"""px; the smallest normal half, so that a stored diagonal is never zero."""

Q11_STEPS_PER_OCTAVE = 64
Q11_MIN_OCTAVE = -5
Q11_SHEAR_STEPS = 384
Q11_SHEAR_UNIT = 2.0

ORDER_BITS = 10


def pack(splats: Splats, height: int, width: int, codec: str) -> list[bytes]:
    """The payload of each of the B images of `height` x `width` px; b"" where the mask is empty.

    Values outside a codec's range are clamped to it. Raises ValueError for an image with a Gaussian
    that is not finite (mask it out first, see `finite_images`) and CorruptShardError for an unknown
    codec.
    """
    encode, _ = _functions(codec)
    finite = finite_images(splats)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"images {bad} of the batch have Gaussians that are not finite")
    values = torch.cat((splats.means, splats.cholesky, splats.colors), -1)
    arrays = values.detach().double().cpu().numpy()
    masks = splats.mask.cpu().numpy()
    return [
        encode(array[mask], height, width) if mask.any() else b""
        for array, mask in zip(arrays, masks, strict=True)
    ]


def unpack(payloads: list[bytes], height: int, width: int, codec: str) -> Splats:
    """Payloads of B images of `height` x `width` px to float32 splats, padded to the largest N.

    Padding is a masked unit Gaussian of no colour. Raises CorruptShardError for an unknown codec
    and for a payload whose length the codec cannot have.
    """
    _, decode = _functions(codec)
    counts = [gaussians_in(payload, codec) for payload in payloads]
    shape = (len(payloads), max(counts, default=0))
    values = np.zeros((*shape, 8), np.float32)
    values[..., 2] = values[..., 4] = 1
    mask = np.arange(shape[1]) < np.array(counts, np.int64).reshape(-1, 1)
    with np.errstate(invalid="ignore", over="ignore"):  # damaged payloads may hold anything
        for row, payload, count in zip(values, payloads, counts, strict=True):
            if count:
                row[:count] = decode(payload, height, width)
    means, cholesky, colors = torch.from_numpy(values).split((2, 3, 3), -1)
    return Splats(
        means.contiguous(), cholesky.contiguous(), colors.contiguous(), torch.from_numpy(mask)
    )


def gaussians_in(payload: bytes, codec: str) -> int:
    """Number of Gaussians, from the length alone; raises CorruptShardError as `unpack`."""
    _functions(codec)
    count, rest = divmod(len(payload) - HEADER_BYTES[codec], CODECS[codec])
    if not payload:
        return 0
    if rest or count < 1:
        raise CorruptShardError(
            f"a {codec} payload of {len(payload)} bytes is not {HEADER_BYTES[codec]} bytes and a "
            f"multiple of {CODECS[codec]}"
        )
    return count


def finite_images(splats: Splats) -> Tensor:
    """bool [B]: whether every Gaussian the mask keeps is finite."""
    values = torch.cat((splats.means, splats.cholesky, splats.colors), -1)
    return (values.isfinite().all(-1) | ~splats.mask).all(-1)


def spatial_order(means: Tensor, height: int, width: int) -> Tensor:
    """Permutation int64 [..., N] that puts `means` [..., N, 2] (px) into Hilbert order.

    The curve runs over 2^10 x 2^10 cells of the square whose side is the longer side of the image;
    positions outside count as on its border. Ties keep their order.
    """
    cells = (means.double() * (2**ORDER_BITS / max(height, width))).floor()
    x, y = cells.clamp(0, 2**ORDER_BITS - 1).long().unbind(-1)
    return torch.argsort(_hilbert_index()[y, x], dim=-1, stable=True)


@lru_cache(maxsize=1)
def _hilbert_index() -> Tensor:
    """Place of each cell [y, x] on the curve, int32 [2^10, 2^10].

    A curve of twice the side is four copies: mirrored on the diagonal (top left), twice as it is
    (bottom), mirrored on the other diagonal (top right). Looked up, for computing places for one
    image at a time took three quarters of packing: 0.63 ms instead of 0.16 ms for 400 Gaussians.
    """
    curve = torch.zeros(1, 1, dtype=torch.int32)
    for _ in range(ORDER_BITS):
        cells = curve.numel()
        top = torch.cat((curve.T, 3 * cells + curve.T.flip(0, 1)), 1)
        bottom = torch.cat((cells + curve, 2 * cells + curve), 1)
        curve = torch.cat((top, bottom))
    return curve


def _sorted_planes(codes: NDArray, means: Array, height: int, width: int) -> bytes:
    """Byte planes of `codes` [N, K], after sorting its rows by the decoded `means` [N, 2] in px."""
    order = spatial_order(torch.from_numpy(means), height, width).numpy()
    little_endian = codes.dtype.newbyteorder("<")
    rows = np.ascontiguousarray(codes[order], little_endian)
    return np.ascontiguousarray(rows.view(np.uint8).reshape(len(rows), -1).T).tobytes()


def _rows(payload: bytes, offset: int, row_bytes: int) -> NDArray[np.uint8]:
    """Inverse of the byte planes: uint8 [N, row_bytes], C order."""
    return np.ascontiguousarray(
        np.frombuffer(payload, np.uint8, -1, offset).reshape(row_bytes, -1).T
    )


def _encode_fp16(gaussians: Array, height: int, width: int) -> bytes:
    centre = np.array([width / 2, height / 2])
    values = gaussians.copy()
    values[:, :2] -= centre
    values[:, [2, 4]] = np.maximum(values[:, [2, 4]], HALF_MIN_DIAGONAL)
    halves = values.clip(-HALF_MAX, HALF_MAX).astype(np.float16)
    return _sorted_planes(halves, halves[:, :2] + centre, height, width)


def _decode_fp16(payload: bytes, height: int, width: int) -> Array:
    values = _rows(payload, 0, 16).view("<f2").astype(np.float64)
    values[:, :2] += (width / 2, height / 2)
    return values


def _encode_q11(gaussians: Array, height: int, width: int) -> bytes:
    side = np.array([width, height])
    colors = gaussians[:, 5:]
    scale = np.float32(min(np.abs(colors).max(), np.finfo(np.float32).max))
    position = (np.rint((gaussians[:, :2] / side + 0.5) / 2 * 65535)).clip(0, 65535).astype(int)
    diagonal = np.maximum(gaussians[:, [2, 4]], 2.0**Q11_MIN_OCTAVE)
    steps = np.rint((np.log2(diagonal) - Q11_MIN_OCTAVE) * Q11_STEPS_PER_OCTAVE)
    steps = steps.clip(0, 1023).astype(int)
    # l21 follows the stored l11, so that the slope l21 / l11 survives the rounding of the diagonal
    stored = _q11_diagonal(steps)
    shear = gaussians[:, 3] / diagonal[:, 0] * stored[:, 0] / stored[:, 1]
    turns = np.rint(np.arcsinh(shear / Q11_SHEAR_UNIT) * Q11_SHEAR_STEPS)
    turns = turns.clip(-2047, 2047).astype(int) + 2048
    root = np.sqrt(np.abs(colors) / scale).clip(0, 1) if scale > 0 else np.zeros_like(colors)
    color = (np.sign(colors) * np.rint(127 * root)).astype(int)
    low = steps[:, 0] & 3 | (steps[:, 1] & 3) << 2 | (turns & 15) << 4
    shape = np.stack((steps[:, 0] >> 2, steps[:, 1] >> 2, turns >> 4, low), 1)
    split = np.stack((position & 255, position >> 8), 2).reshape(-1, 4)
    codes = np.concatenate((split, shape, color & 255), 1).astype(np.uint8)
    means = _q11_position(position, side)
    return scale.astype("<f4").tobytes() + _sorted_planes(codes, means, height, width)


def _decode_q11(payload: bytes, height: int, width: int) -> Array:
    codes = _rows(payload, HEADER_BYTES["q11"], 11)
    scale = np.frombuffer(payload, "<f4", 1).astype(np.float64)
    wide = codes.astype(int)
    steps = wide[:, 4:6] << 2 | np.stack((wide[:, 7] & 3, wide[:, 7] >> 2 & 3), 1)
    turns = (wide[:, 6] << 4 | wide[:, 7] >> 4) - 2048
    root = codes[:, 8:].view(np.int8).astype(np.float64) / 127
    diagonal = _q11_diagonal(steps)
    shear = Q11_SHEAR_UNIT * np.sinh(turns / Q11_SHEAR_STEPS)
    values = np.empty((len(codes), 8))
    values[:, :2] = _q11_position(wide[:, :4:2] | wide[:, 1:4:2] << 8, np.array([width, height]))
    values[:, 2], values[:, 3], values[:, 4] = (
        diagonal[:, 0],
        shear * diagonal[:, 1],
        diagonal[:, 1],
    )
    values[:, 5:] = root * np.abs(root) * scale
    return values


def _q11_diagonal(steps: NDArray[np.int64]) -> Array:
    return 2.0 ** (steps / Q11_STEPS_PER_OCTAVE + Q11_MIN_OCTAVE)


def _q11_position(codes: NDArray[np.int64], side: NDArray[np.int64]) -> Array:
    return (codes / 65535 * 2 - 0.5) * side


_CODECS: dict[
    str, tuple[Callable[[Array, int, int], bytes], Callable[[bytes, int, int], Array]]
] = {
    "fp16": (_encode_fp16, _decode_fp16),
    "q11": (_encode_q11, _decode_q11),
}


def _functions(
    codec: str,
) -> tuple[Callable[[Array, int, int], bytes], Callable[[bytes, int, int], Array]]:
    if codec not in _CODECS:
        raise CorruptShardError(
            f"unknown codec {codec!r}; this build knows {', '.join(_CODECS)}: upgrade splatshard"
        )
    return _CODECS[codec]
