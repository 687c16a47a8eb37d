"""Features of Gaussians for the stem, and the bias of the resampler beside its dense twin."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from splatshard.pipeline.models.resampler import anchors, bias_features, dense_bias, evenly, split
from splatshard.pipeline.models.stem import features, normalised_means, without_padding
from splatshard.pipeline.splats import Splats, cholesky_from_scales_and_angles, covariances
from splatshard.schemas.model import StemConfig
from tests.unit.toy_models import BIASES, sizes, toy_splats


def test_fewer_tokens_still_cover_the_image() -> None:
    chosen = anchors(196)[evenly(98, 196, torch.device("cpu"))]
    gaps = torch.cdist(anchors(3136), chosen).min(1).values
    assert gaps.max() < 2.5 * 2 / math.sqrt(98)
    assert len(anchors(98).unique(dim=0)) == 98
    assert anchors(196).abs().max() < 1
    assert anchors(7).shape == (7, 2)


def test_features_are_of_order_one_and_turn_with_half_a_turn() -> None:
    scales = torch.tensor([[[4.0, 2.0], [4.0, 2.0], [3.0, 3.0]]])
    angles = torch.tensor([[0.3, 0.3 + math.pi, 1.0]])
    cholesky = cholesky_from_scales_and_angles(scales, angles)
    means = torch.full((1, 3, 2), 20.0)
    mask = torch.ones(1, 3, dtype=torch.bool)
    splats = Splats(means, cholesky, torch.full((1, 3, 3), 0.25), mask)
    config = StemConfig(bands=2)
    side = torch.tensor([64.0])
    x = features(splats, normalised_means(means, *sizes(1)), side, config)
    torch.testing.assert_close(x[0, 0], x[0, 1], atol=1e-4, rtol=1e-4)
    assert x.shape[-1] == 2 + 8 + 2 + 2 + 3
    log_scale = (math.log(4 / 64) - config.log_scale_mean) / config.log_scale_std
    assert x[0, 0, 10] == pytest.approx(log_scale, abs=1e-4)
    angle = (math.sin(0.6), math.cos(0.6))
    assert x[0, 0, 12:14].tolist() == pytest.approx(angle, abs=1e-4)
    assert x[0, 2, 12:14].abs().max() < 0.3  # a circle has no angle
    assert x[0, 0, 14:].abs().max() < 1e-6
    assert x[0, 0, :2].tolist() == pytest.approx((2 * 20 / 64 - 1,) * 2)


@pytest.mark.parametrize("angle", ["unit", "weighted"])
def test_features_of_a_circle_have_a_gradient(angle: Literal["unit", "weighted"]) -> None:
    """Where models learn Gaussians, some become exactly round."""
    cholesky = torch.tensor([[[1.0, 0.0, 1.0], [3.0, 0.0, 3.0]]], requires_grad=True)
    means, colors = torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)
    splats = Splats(means, cholesky, colors, torch.ones(1, 2, dtype=torch.bool))
    config = StemConfig(angle=angle)
    x = features(splats, means, torch.tensor([64.0]), config)
    x.square().sum().backward()
    assert cholesky.grad is not None
    assert cholesky.grad.isfinite().all()
    assert x[..., -5:-3].abs().max() == 0


def test_a_weighted_angle_fades_as_a_gaussian_becomes_round() -> None:
    """Its length is that of (s1^2 - s2^2) / (s1^2 + s2^2), so small changes of the shape are small
    changes of the features: the unit angle of nearly round ones jumps."""
    scales = torch.tensor([[[3.0, 1.0], [3.001, 3.0], [3.001, 3.0]]])
    cholesky = cholesky_from_scales_and_angles(scales, torch.tensor([[0.3, 0.3, 1.9]]))
    means, colors = torch.zeros(1, 3, 2), torch.zeros(1, 3, 3)
    splats = Splats(means, cholesky, colors, torch.ones(1, 3, dtype=torch.bool))
    found = {
        angle: features(splats, means, torch.tensor([64.0]), StemConfig(angle=angle))[0, :, -5:-3]
        for angle in ("unit", "weighted")
    }
    turn = torch.tensor((math.sin(0.6), math.cos(0.6)))
    torch.testing.assert_close(found["unit"][0], turn, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["weighted"][0], 0.8 * turn, atol=1e-4, rtol=0)
    assert (found["unit"][1] - found["unit"][2]).norm() > 1.9
    assert (found["weighted"][1] - found["weighted"][2]).norm() < 1e-3


@pytest.mark.parametrize("bias", BIASES)
def test_bias_equals_its_dense_twin(bias: str) -> None:
    splats = without_padding(toy_splats(2, 30))
    means = normalised_means(splats.means, *sizes(2)) * 3.5
    cov = covariances(splats.cholesky) / 9**2
    places = anchors(49) * 3.5
    q, k = bias_features(bias, places, means, cov, splats.mask)
    dense = dense_bias(bias, places, means, cov)
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 0.02), (torch.float16, 0.002)):
        a, b = split(q, k, dtype)
        assert a.dtype == b.dtype == dtype
        got = torch.einsum("tj,bnj->btn", a.double(), b.double())
        # softmax ignores what all Gaussians of a latent share
        error = (got - dense) - (got - dense).mean(-1, keepdim=True)
        assert error.abs().max() < bound
