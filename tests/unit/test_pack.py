"""Payloads as a writer makes them: fp16's bounds, order, padding, and bytes that are no payload.

test_codec.py has balanced and compact.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splatshard.pipeline.codec.pack import (
    finite_images,
    gaussians_in,
    pack,
    spatial_order,
    unpack,
    unpack_row,
)
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.splats import Splats
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.splats import CODECS, PLANAR, PLANES, shard_metadata
from tests.rows import CUTOFF, HEIGHT, WIDTH, packed, random_splats, target_of, values_of
from tests.unit.codes import GAUSSIANS


def one_gaussian_each(gaussians: list[tuple[float, ...]]) -> Splats:
    """A batch of images of one Gaussian, so that the order plays no part."""
    values = torch.tensor(gaussians, dtype=torch.float64)[:, None]
    mask = torch.ones(len(gaussians), 1, dtype=torch.bool)
    return Splats(values[..., :2], values[..., 2:5], values[..., 5:], mask)


def round_trip(splats: Splats) -> np.ndarray:
    """Values after fp16, float64 [B, N, 8]."""
    return values_of(unpack(packed(splats, "fp16"), HEIGHT, WIDTH, "fp16")).double().numpy()


@given(GAUSSIANS)
def test_fp16_is_within_half_a_unit_in_the_last_place(gaussians: list[tuple[float, ...]]) -> None:
    splats = one_gaussian_each(gaussians)
    found = round_trip(splats)[:, 0]
    wanted = values_of(splats).numpy()[:, 0]
    wanted[:, [2, 4]] = np.maximum(wanted[:, [2, 4]], 2.0**-14)
    centre = np.array([WIDTH / 2, HEIGHT / 2, *[0] * 6])
    wanted = (wanted - centre).clip(-65504, 65504)
    below = np.abs(wanted).clip(0, 65000)  # spacing(65504) overflows
    half = np.spacing(below.astype(np.float16)).astype(float) / 2
    single = 2.0**-23 * (np.abs(wanted) + centre)  # adding the centre in single precision
    assert (np.abs(found - centre - wanted) <= half + single).all()


@given(GAUSSIANS)
def test_fp16_is_finite_and_positive_and_packs_to_itself(
    gaussians: list[tuple[float, ...]],
) -> None:
    batch = one_gaussian_each(gaussians)
    one_image = Splats(*(x.transpose(0, 1) for x in vars(batch).values()))
    payloads = packed(one_image, "fp16")
    stored = unpack(payloads, HEIGHT, WIDTH, "fp16")
    assert len(payloads[0]["splats"]) == 16 * len(gaussians)
    assert finite_images(stored).all()
    assert (stored.cholesky[..., ::2] > 0).all()
    again = unpack(packed(stored, "fp16"), HEIGHT, WIDTH, "fp16")
    assert torch.equal(values_of(again), values_of(stored))


def test_gaussians_are_kept_whatever_their_order() -> None:
    splats = random_splats(1, 200)
    backwards = Splats(*(x.flip(1) for x in vars(splats).values()))
    found, found_backwards = (round_trip(s)[0] for s in (splats, backwards))
    assert sorted(found.tolist()) == sorted(found_backwards.tolist())
    alone = Splats(*(x.transpose(0, 1) for x in vars(splats).values()))
    assert sorted(found.tolist()) == sorted(round_trip(alone)[:, 0].tolist())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("budgets", [(), (3, 9)])
def test_padding_is_masked_and_harmless(codec: str, budgets: tuple[int, ...]) -> None:
    splats = random_splats(3, 9)
    counts = torch.tensor([9, 0, 4])
    splats = replace(splats, mask=torch.arange(9) < counts[:, None])
    payloads = packed(splats, codec, budgets)
    empty = dict.fromkeys(PLANES, b"") if codec in PLANAR else b""
    assert payloads[1] == dict.fromkeys(payloads[0], empty)
    own = [[gaussians_in(p, codec) for p in payload.values()] for payload in payloads]
    assert own == ([[3, 6], [0, 0], [3, 1]] if budgets else [[9], [0], [4]])
    found = unpack(payloads, HEIGHT, WIDTH, codec)
    assert found.mask.equal(splats.mask)
    assert (found.cholesky[..., ::2][~found.mask] == 1).all()
    assert (found.colors[~found.mask] == 0).all()
    alone = unpack(payloads[2:], HEIGHT, WIDTH, codec)
    assert torch.equal(values_of(alone)[0], values_of(found)[2, :4])


def test_no_images_and_only_empty_images() -> None:
    assert unpack([], HEIGHT, WIDTH, "fp16").means.shape == (0, 0, 2)
    assert unpack([{"splats": b""}] * 2, HEIGHT, WIDTH, "q11").means.shape == (2, 0, 2)
    assert packed(random_splats(2, 0), "fp16") == [{"splats": b""}] * 2


def test_a_budget_of_a_row_without_some_is_all_of_it() -> None:
    (payload,) = packed(random_splats(1, 6), "fp16")
    row = payload | {"height": HEIGHT, "width": WIDTH}
    for metadata in (shard_metadata("fp16", CUTOFF, {}), {"format_version": 1, "codec": "fp16"}):
        assert unpack_row(row, metadata).num_gaussians.tolist() == [6]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["means", "cholesky", "colors"])
def test_values_that_are_not_finite_name_the_image(field: str, value: float, codec: str) -> None:
    splats = random_splats(3, 4)
    target = target_of(splats)
    getattr(splats, field)[1, 2, 1] = value
    backend = select_backend("reference")
    with pytest.raises(ValueError, match=r"images \[1\]"):
        pack(splats, target, codec, CUTOFF, backend)
    assert finite_images(splats).tolist() == [True, False, True]
    masked = replace(splats, mask=splats.mask & finite_images(splats)[:, None])
    (_, empty, _) = pack(masked, target, codec, CUTOFF, backend)
    assert gaussians_in(empty["splats"], codec) == 0


@pytest.mark.parametrize(("codec", "size"), [("fp16", 15), ("fp16", 1), ("q11", 4), ("q11", 16)])
def test_a_payload_of_the_wrong_length_is_corrupt(codec: str, size: int) -> None:
    with pytest.raises(CorruptShardError, match=f"{codec} payload of {size} bytes"):
        unpack([{"splats": b""}, {"splats": bytes(size)}], HEIGHT, WIDTH, codec)


@pytest.mark.parametrize("name", PLANES)
@pytest.mark.parametrize("change", [-1, 1])
def test_planes_of_different_lengths_are_corrupt(name: str, change: int) -> None:
    (payload,) = packed(random_splats(1, 5), "balanced")
    plane = payload["splats"][name]
    payload["splats"][name] = (plane + b"\0")[: len(plane) + change]
    words = "do not fit together"
    with pytest.raises(CorruptShardError, match=words):
        unpack([payload], HEIGHT, WIDTH, "balanced")


def test_payloads_of_another_codec_are_corrupt() -> None:
    (planes,), (bytes_,) = (
        packed(random_splats(1, 5), "compact"),
        packed(random_splats(1, 5), "fp16"),
    )
    for payload, codec in ((planes, "fp16"), (planes, "q11"), (bytes_, "compact")):
        with pytest.raises(CorruptShardError, match=f"is no payload of codec '{codec}'"):
            unpack([payload], HEIGHT, WIDTH, codec)


def test_an_unknown_codec_is_corrupt() -> None:
    with pytest.raises(CorruptShardError, match="unknown codec 'zip'"):
        unpack([{"splats": b"1"}], HEIGHT, WIDTH, "zip")


@pytest.mark.parametrize("codec", ["fp16", "q11"])
@given(data=st.binary(max_size=100))
def test_any_bytes_unpack_or_are_corrupt(codec: str, data: bytes) -> None:
    try:
        splats = unpack([{"splats": data}], HEIGHT, WIDTH, codec)
    except CorruptShardError:
        return
    assert splats.means.shape[1] == gaussians_in(data, codec)


@given(st.integers(0, 200), st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 9))
def test_spatial_order_is_a_permutation(n: int, height: int, width: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    means = (torch.rand(2, n, 2, generator=g) * 3 - 1) * max(height, width)
    order = spatial_order(means, height, width)
    assert order.sort(-1).values.equal(torch.arange(n).expand(2, n))
    assert order.equal(spatial_order(means.double(), height, width))


def test_spatial_order_walks_from_cell_to_neighbouring_cell() -> None:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    means = torch.stack((x, y), -1).reshape(-1, 2) + 0.5
    path = means[spatial_order(means, 32, 32)]
    assert ((path[1:] - path[:-1]).abs().sum(-1) == 1).all()
    assert path[0].tolist() == [0.5, 0.5]
    assert path[-1].tolist() == [31.5, 0.5]


def test_gaussians_of_one_cell_keep_their_order() -> None:
    means = torch.tensor([[5.0, 5.0], [1.0, 1.0], [5.0, 5.0], [5.0, 5.0]])
    assert spatial_order(means, 64, 64).tolist() == [1, 0, 2, 3]
