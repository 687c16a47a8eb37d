"""Payload codecs: error bounds, order, padding, and payloads that are not what they should be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.pack import finite_images, gaussians_in, pack, spatial_order, unpack
from pipeline.splats import Splats
from schemas.errors import CorruptShardError
from schemas.splats import CODECS, HEADER_BYTES
from tests.rows import CODEC_NAMES, HEIGHT, WIDTH, random_splats, values_of

SIDE = np.array([WIDTH, HEIGHT])

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


def one_gaussian_each(gaussians: list[tuple[float, ...]]) -> Splats:
    """A batch of images of one Gaussian, so that the order plays no part."""
    values = torch.tensor(gaussians, dtype=torch.float64)[:, None]
    mask = torch.ones(len(gaussians), 1, dtype=torch.bool)
    return Splats(values[..., :2], values[..., 2:5], values[..., 5:], mask)


def round_trip(splats: Splats, codec: str) -> np.ndarray:
    """Unpacked values, float64 [B, N, 8]."""
    unpacked = unpack(pack(splats, HEIGHT, WIDTH, codec), HEIGHT, WIDTH, codec)
    return values_of(unpacked).double().numpy()


@given(GAUSSIANS)
def test_fp16_is_within_half_a_unit_in_the_last_place(gaussians: list[tuple[float, ...]]) -> None:
    splats = one_gaussian_each(gaussians)
    found = round_trip(splats, "fp16")[:, 0]
    wanted = values_of(splats).numpy()[:, 0]
    wanted[:, [2, 4]] = np.maximum(wanted[:, [2, 4]], 2.0**-14)
    centre = np.array([WIDTH / 2, HEIGHT / 2, *[0] * 6])
    wanted = (wanted - centre).clip(-65504, 65504)
    below = np.abs(wanted).clip(0, 65000)  # spacing(65504) overflows
    half = np.spacing(below.astype(np.float16)).astype(float) / 2
    single = 2.0**-23 * (np.abs(wanted) + centre)  # adding the centre in single precision
    assert (np.abs(found - centre - wanted) <= half + single).all()


@given(GAUSSIANS)
def test_q11_is_within_half_a_step(gaussians: list[tuple[float, ...]]) -> None:
    splats = one_gaussian_each(gaussians)
    found, wanted = round_trip(splats, "q11")[:, 0], values_of(splats).numpy()[:, 0]
    position = wanted[:, :2].clip(-SIDE / 2, SIDE * 1.5)
    assert (np.abs(found[:, :2] - position) <= 2 * SIDE / 65535 / 2 + 1e-5).all()
    diagonal = wanted[:, [2, 4]].clip(2.0**-5, 2.0 ** (1023 / 64 - 5))
    assert (np.abs(np.log2(found[:, [2, 4]] / diagonal)) <= 1 / 128 + 1e-6).all()
    slope = wanted[:, 3] / np.maximum(wanted[:, 2], 2.0**-5)
    shear = np.arcsinh(slope * found[:, 2] / found[:, 4] / 2).clip(-2047 / 384, 2047 / 384)
    assert (np.abs(np.arcsinh(found[:, 3] / found[:, 4] / 2) - shear) <= 0.5 / 384 + 1e-6).all()
    scale = np.abs(wanted[:, 5:]).max(1, keepdims=True).astype(np.float32).astype(float)
    scale = np.where(scale > 0, scale, 1)
    codes = [np.sign(c) * np.sqrt(np.abs(c) / scale) * 127 for c in (found[:, 5:], wanted[:, 5:])]
    assert (np.abs(codes[0] - codes[1]) <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("codec", CODEC_NAMES)
@given(GAUSSIANS)
def test_what_is_stored_is_finite_and_positive_and_packs_to_itself(
    codec: str, gaussians: list[tuple[float, ...]]
) -> None:
    batch = one_gaussian_each(gaussians)
    one_image = Splats(*(x.transpose(0, 1) for x in vars(batch).values()))
    payloads = pack(one_image, HEIGHT, WIDTH, codec)
    stored = unpack(payloads, HEIGHT, WIDTH, codec)
    assert len(payloads[0]) == HEADER_BYTES[codec] + CODECS[codec] * len(gaussians)
    assert finite_images(stored).all()
    assert (stored.cholesky[..., ::2] > 0).all()
    assert pack(stored, HEIGHT, WIDTH, codec) == payloads


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_gaussians_are_kept_whatever_their_order(codec: str) -> None:
    splats = random_splats(1, 200)
    backwards = Splats(*(x.flip(1) for x in vars(splats).values()))
    found, found_backwards = (round_trip(s, codec)[0] for s in (splats, backwards))
    assert sorted(found.tolist()) == sorted(found_backwards.tolist())
    alone = Splats(*(x.transpose(0, 1) for x in vars(splats).values()))
    wanted = round_trip(alone, codec)[:, 0]
    columns = slice(0, 8 if codec == "fp16" else 5)  # q11 scales colours by their largest
    assert sorted(found[:, columns].tolist()) == sorted(wanted[:, columns].tolist())


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_padding_is_masked_and_harmless(codec: str) -> None:
    splats = random_splats(3, 9)
    counts = torch.tensor([9, 0, 4])
    splats = replace(splats, mask=torch.arange(9) < counts[:, None])
    payloads = pack(splats, HEIGHT, WIDTH, codec)
    assert payloads[1] == b""
    assert [gaussians_in(p, codec) for p in payloads] == [9, 0, 4]
    found = unpack(payloads, HEIGHT, WIDTH, codec)
    assert found.mask.equal(splats.mask)
    assert (found.cholesky[..., ::2][~found.mask] == 1).all()
    assert (found.colors[~found.mask] == 0).all()
    alone = unpack(payloads[2:], HEIGHT, WIDTH, codec)
    assert torch.equal(values_of(alone)[0], values_of(found)[2, :4])


def test_no_images_and_only_empty_images() -> None:
    assert unpack([], HEIGHT, WIDTH, "fp16").means.shape == (0, 0, 2)
    assert unpack([b"", b""], HEIGHT, WIDTH, "q11").means.shape == (2, 0, 2)
    assert pack(random_splats(2, 0), HEIGHT, WIDTH, "q11") == [b"", b""]


def test_a_black_sample_has_the_scale_zero() -> None:
    black = random_splats(1, 5)
    black = replace(black, colors=torch.zeros_like(black.colors))
    (payload,) = pack(black, HEIGHT, WIDTH, "q11")
    assert payload[:4] == bytes(4)
    assert (unpack([payload], HEIGHT, WIDTH, "q11").colors == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["means", "cholesky", "colors"])
def test_values_that_are_not_finite_name_the_image(field: str, value: float) -> None:
    splats = random_splats(3, 4)
    getattr(splats, field)[1, 2, 1] = value
    with pytest.raises(ValueError, match=r"images \[1\]"):
        pack(splats, HEIGHT, WIDTH, "fp16")
    assert finite_images(splats).tolist() == [True, False, True]
    masked = replace(splats, mask=splats.mask & finite_images(splats)[:, None])
    assert pack(masked, HEIGHT, WIDTH, "fp16")[1] == b""


@pytest.mark.parametrize(("codec", "size"), [("fp16", 15), ("fp16", 1), ("q11", 4), ("q11", 16)])
def test_a_payload_of_the_wrong_length_is_corrupt(codec: str, size: int) -> None:
    with pytest.raises(CorruptShardError, match=f"{codec} payload of {size} bytes"):
        unpack([b"", bytes(size)], HEIGHT, WIDTH, codec)


def test_an_unknown_codec_is_corrupt() -> None:
    with pytest.raises(CorruptShardError, match="unknown codec 'zip'"):
        unpack([], HEIGHT, WIDTH, "zip")


@pytest.mark.parametrize("codec", CODEC_NAMES)
@given(data=st.binary(max_size=100))
def test_any_bytes_unpack_or_are_corrupt(codec: str, data: bytes) -> None:
    try:
        splats = unpack([data], HEIGHT, WIDTH, codec)
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
