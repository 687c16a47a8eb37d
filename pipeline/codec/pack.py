"""Splats to payloads and back: the writer's side of the codecs.

    pack: Gaussians -> payloads, one per column        unpack: payloads -> Gaussians

schemas/FORMAT.md specifies the codecs byte by byte; `pipeline/codec` implements them. A payload is
`bytes` for fp16 (and q11, which is only read), and a dict of eight planes for balanced and compact.

With nested budgets every budget's own Gaussians are a payload, in a column of their own. They are
packed one after another, all with about the same step, each towards the fit's image of its budget,
and the last towards the target; so each takes up what the ones before it have lost. What those lost
against the target is not known before: the last may lose what they have left of the whole's limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from splatshard.pipeline.codec import Plane, column, decode_rows, fp16, planes, q11
from splatshard.pipeline.codec.layout import hilbert_tables
from splatshard.pipeline.codec.quantise import allowed_error, quantise, squared_errors
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.splats import Splats
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.splats import MAX_LOSS_DB, PLANAR, PLANES, splat_columns

Payload = bytes | dict[str, bytes]

ORDER_BITS = 10
LEAST_SHARE = 0.05
"""Of the error allowed, what the last budget is granted however little the others have left."""


def pack(
    splats: Splats,
    target: Tensor,
    codec: str,
    cutoff: float,
    backend: Backend,
    budgets: tuple[int, ...] = (),
) -> list[dict[str, Payload]]:
    """The payloads of each of B images by their columns; empty ones where the mask is.

    target    [B, 3, H, W], 0 to 1, on the backend's device as `splats`: what the loss is measured
              against
    budgets   of splats that are nested: rising numbers of Gaussians, the last is all of them

    Values outside a codec's range are clamped to it. Raises ValueError for an image with a Gaussian
    that is not finite (mask it out first, see `finite_images`).
    """
    finite = finite_images(splats)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"images {bad} of the batch have Gaussians that are not finite")
    splats = filled(splats)
    height, width = target.shape[2:]
    bounds = [0, *(budgets or (splats.mask.shape[1],))]
    parts = {
        name: splats.map(lambda x, b=begin, e=end: x[:, b:e].contiguous())
        for name, begin, end in zip(splat_columns(budgets), bounds[:-1], bounds[1:], strict=True)
    }
    columns: dict[str, Sequence[Payload]]
    if codec in PLANAR:
        columns = _pack_planar(splats, parts, target, codec, cutoff, backend)
    else:
        columns = {name: pack_fp16(part, height, width) for name, part in parts.items()}
    return [{name: rows[i] for name, rows in columns.items()} for i in range(len(splats))]


def _pack_planar(
    splats: Splats,
    parts: dict[str, Splats],
    target: Tensor,
    codec: str,
    cutoff: float,
    backend: Backend,
) -> dict[str, Sequence[Payload]]:
    """The payloads of each budget's Gaussians, `parts` of `splats`, by their columns."""
    height, width = target.shape[2:]
    whole = squared_errors(splats, target, None, cutoff, backend)
    allowed = allowed_error(whole[0], target, MAX_LOSS_DB[codec])
    *others, last = parts
    columns: dict[str, Sequence[Payload]] = {}
    fitted, stored = torch.zeros_like(target), None
    for name in others:
        part = parts[name]
        fitted = fitted + backend.render(part, height, width, cutoff)
        before = squared_errors(part, fitted, stored, cutoff, backend)
        share = allowed / splats.num_gaussians.clamp(min=1) * part.num_gaussians.clamp(min=1)
        packed = planes.encode(quantise(part, fitted, stored, share, before, cutoff, backend))
        own = unpack([{name: one} for one in packed], height, width, codec)
        image = backend.render(own.to(target.device), height, width, cutoff)
        stored = image if stored is None else stored + image
        columns[name] = packed
    before = squared_errors(parts[last], target, stored, cutoff, backend) if others else whole
    share = torch.maximum(allowed - (before[0] - whole[0]), LEAST_SHARE * allowed)
    codes = quantise(parts[last], target, stored, share, before, cutoff, backend)
    columns[last] = planes.encode(codes)
    return columns


def pack_fp16(splats: Splats, height: int, width: int) -> list[bytes]:
    """Splats [B, N] of images of `height` x `width` px to a payload each: 16 byte planes of halves,
    sorted by `spatial_order` of the stored means; empty ones where the mask is."""
    values = torch.cat((splats.means, splats.cholesky, splats.colors), -1).double().cpu().numpy()
    payloads: list[bytes] = []
    for gaussians, mask in zip(values, splats.mask.cpu().numpy(), strict=True):
        halves = fp16.to_halves(gaussians[mask], height, width)
        means = torch.from_numpy(halves[:, :2].astype(np.float64)) + torch.tensor(
            [width / 2, height / 2]
        )
        rows = halves[spatial_order(means, height, width).numpy()].astype("<f2")
        payloads.append(np.ascontiguousarray(rows.view(np.uint8).T).tobytes())
    return payloads


def unpack(payloads: list[dict[str, Payload]], height: int, width: int, codec: str) -> Splats:
    """Payloads of B images of `height` x `width` px, by column, to float32 splats [B, N].

    Every column is padded to its largest payload, with masked unit Gaussians of no colour. Raises
    CorruptShardError for an unknown codec and for damaged payloads.
    """
    rows = np.arange(len(payloads))
    heights, widths = np.full(len(rows), height, np.int32), np.full(len(rows), width, np.int32)
    parts = [np.zeros((len(rows), 0, 8), np.float32)]
    masks = [np.zeros((len(rows), 0), bool)]
    for name in payloads[0] if payloads else ():
        own = [payload[name] for payload in payloads]
        counts = np.array([gaussians_in(one, codec) for one in own], np.int32)
        n = int(counts.max())
        values = np.zeros((len(rows), n, 8), np.float32)
        values[..., 2] = values[..., 4] = 1
        decode_rows(codec, columns_of(own, codec), rows, counts, heights, widths, values)
        parts.append(values)
        masks.append(np.arange(n) < counts[:, None])
    values = torch.from_numpy(np.concatenate(parts, 1))
    means, cholesky, colors = (x.contiguous() for x in values.split((2, 3, 3), -1))
    return Splats(means, cholesky, colors, torch.from_numpy(np.concatenate(masks, 1)))


def unpack_row(row: dict[str, Any], metadata: dict[str, Any], budget: int | None = None) -> Splats:
    """The Gaussians of one row [1, N], or the first `budget` of them, of a shard with these
    `schemas.splats.shard_metadata`; raises as `unpack`."""
    budgets = metadata.get("budgets", [])
    names = splat_columns(budgets)
    if budget is not None:
        names = names[: budgets.index(budget) + 1]
    payloads = [{name: row[name] for name in names}]
    return unpack(payloads, row["height"], row["width"], metadata["codec"])


def columns_of(payloads: list[Payload], codec: str) -> dict[str, Plane]:
    """The payloads of one column as `decode_rows` takes them."""
    if codec in PLANAR:
        planar = cast("list[dict[str, bytes]]", payloads)
        return {name: column([one[name] for one in planar]) for name in PLANES}
    return {"": column(cast("list[bytes]", payloads))}


def gaussians_in(payload: Payload, codec: str) -> int:
    """Number of Gaussians, from the lengths alone. Raises CorruptShardError as `unpack`."""
    if (codec in PLANAR) != isinstance(payload, dict):
        raise CorruptShardError(f"a {type(payload).__name__} is no payload of codec {codec!r}")
    if isinstance(payload, dict):
        return planes.count(payload)
    size, header = {"fp16": (16, 0), "q11": (q11.BYTES, q11.HEADER_BYTES)}.get(codec, (0, 0))
    if not size:
        raise CorruptShardError(f"unknown codec {codec!r}: upgrade splatshard")
    count, rest = divmod(len(payload) - header, size)
    if payload and (rest or count < 1):
        raise CorruptShardError(
            f"a {codec} payload of {len(payload)} bytes is not {header} bytes and a multiple of "
            f"{size}"
        )
    return count if payload else 0


def finite_images(splats: Splats) -> Tensor:
    """bool [B]: whether every Gaussian the mask keeps is finite."""
    values = torch.cat((splats.means, splats.cholesky, splats.colors), -1)
    return (values.isfinite().all(-1) | ~splats.mask).all(-1)


def filled(splats: Splats) -> Splats:
    """The same splats [B, N] with unit Gaussians of no colour where the mask is empty."""
    mask = splats.mask[..., None]
    means, colors = (torch.where(mask, x, 0) for x in (splats.means, splats.colors))
    unit = splats.cholesky.new_tensor((1.0, 0.0, 1.0))
    return Splats(means, torch.where(mask, splats.cholesky, unit), colors, splats.mask)


def spatial_order(means: Tensor, height: int, width: int) -> Tensor:
    """Permutation int64 [..., N] that puts `means` [..., N, 2] (px) into Hilbert order.

    The curve runs over 2^10 x 2^10 cells of the square whose side is the longer side of the image;
    positions outside count as on its border. Ties keep their order.
    """
    cells = (means.double() * (2**ORDER_BITS / max(height, width))).floor()
    x, y = cells.clamp(0, 2**ORDER_BITS - 1).long().unbind(-1)
    return torch.argsort(hilbert_tables(ORDER_BITS)[0][y, x], dim=-1, stable=True)
