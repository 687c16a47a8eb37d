"""Gaussians and codes for tests of the codecs balanced and compact."""

from __future__ import annotations

from dataclasses import fields

import torch
from hypothesis import strategies as st

from splatshard.pipeline.codec import quantise
from splatshard.pipeline.codec.layout import (
    SHEAR_UNIT,
    Codes,
    dequantise,
)
from splatshard.pipeline.splats import Splats
from tests.rows import HEIGHT, WIDTH, values_of

SIGNALLING_NAN = b"\x00\x00\x81\x7f"
"""A float32 that numpy warns of when it is cast; Hypothesis met it once."""
SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))
"""Height and width, px."""

GAUSSIANS = st.lists(
    st.tuples(
        st.floats(-1e6, 1e6),
        st.floats(-1e6, 1e6),
        st.floats(2.0**-40, 2.0**40),
        st.floats(-1e6, 1e6),
        st.floats(2.0**-40, 2.0**40),
        *(st.floats(-1e5, 1e5) for _ in range(3)),
    ),
    min_size=1,
    max_size=20,
)
STEPS = st.floats(1e-6, 10)


def batch_of(gaussians: list[tuple[float, ...]]) -> Splats:
    """One image of float64 Gaussians."""
    values = torch.tensor(gaussians, dtype=torch.float64)[None]
    mask = torch.ones(values.shape[:2], dtype=torch.bool)
    return Splats(values[..., :2], values[..., 2:5], values[..., 5:], mask)


def plausible(batch: int, n: int, height: int, width: int, seed: int = 0) -> Splats:
    """Gaussians as fits have them, for images of any size; some lie outside, some are masked."""
    g = torch.Generator().manual_seed(seed)
    side = torch.tensor([width, height])
    means = (torch.rand(batch, n, 2, generator=g) * 1.5 - 0.25) * side
    cholesky = torch.randn(batch, n, 3, generator=g) * 2
    cholesky[..., ::2] = cholesky[..., ::2].exp2()
    colors = torch.randn(batch, n, 3, generator=g) * torch.rand(batch, n, 1, generator=g) ** 4 * 2
    return Splats(means, cholesky, colors, torch.rand(batch, n, generator=g) < 0.9)


def grid(splats: Splats, step: float, height: int = HEIGHT, width: int = WIDTH) -> Codes:
    """Codes of `splats` with their own colours."""
    steps = torch.full((len(splats),), step, dtype=torch.float64)
    return quantise.on_grid(splats, splats, steps, torch.zeros(len(splats), 3, height, width))


def sizes_of(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((batch,), height), torch.full((batch,), width)


def assert_same_codes(found: Codes, wanted: Codes) -> None:
    """Gaussians may be in another order, and padded otherwise."""
    for name in ("step", "level", "cell_log"):
        kept = wanted.mask.any(1)
        assert torch.equal(
            getattr(found, name)[kept].double(), getattr(wanted, name)[kept].double()
        ), name
    names = [f.name for f in fields(Codes) if getattr(wanted, f.name).ndim > 1]
    for i in range(len(wanted.step)):
        tables = []
        for codes in (found, wanted):
            rows = [getattr(codes, name)[i][codes.mask[i]] for name in names if name != "mask"]
            rows = [row if row.ndim > 1 else row[:, None] for row in rows]
            tables.append(sorted(torch.cat(rows, 1).tolist()))
        assert tables[0] == tables[1]


def twin(codes: Codes, height: int, width: int) -> torch.Tensor:
    """[B, N, 8] by `layout.dequantise`, 0 where the mask is."""
    values = values_of(dequantise(codes, *sizes_of(len(codes.step), height, width)))
    return torch.where(codes.mask[..., None], values, 0)


def assert_values_close(found: torch.Tensor, wanted: torch.Tensor, side: float) -> None:
    """To a few roundings of float32: of the value, of the side for places, of the largest colour
    for colours, which are sums."""
    found, wanted = found.double(), wanted.double()
    scale = wanted.abs().clone()
    scale[..., :2] = scale[..., :2] + side
    scale[..., 3] = scale[..., 3] + scale[..., 4] * SHEAR_UNIT
    scale[..., 5:] = scale[..., 5:].norm(dim=-1, keepdim=True)
    error = (found - wanted).abs()
    assert (error <= 16 * 2.0**-24 * scale + 1e-37).all(), (error / scale).nan_to_num().max()
