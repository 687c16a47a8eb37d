"""explain: scores and attention per Gaussian against differences and plain twins."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from splatshard.pipeline.evaluation.explain import (
    block_attention,
    explain,
    recorded,
    resampler_attention,
)
from splatshard.pipeline.fitting.fit import moved
from splatshard.pipeline.splats import Splats
from splatshard.schemas.model import (
    EncoderConfig,
    ResamplerConfig,
)
from tests.unit.explaining import PLAIN, RESAMPLED, SIDE, logits_of, model_of, padded_splats


@pytest.mark.parametrize("encoder", [PLAIN, RESAMPLED], ids=["plain", "resampled"])
def test_gradients_are_those_of_differences(encoder: EncoderConfig) -> None:
    """In the frame of the fit: `moved` takes the steps, all eight of each Gaussian."""
    model, splats, n, step = model_of(encoder), padded_splats(), 7, 3e-3
    found = explain(model, splats, SIDE, SIDE, 1)
    steps = step * torch.eye(n * 8).view(n * 8, n, 8)
    many = Splats(*(x.expand(n * 8, *x.shape[1:]) for x in _parts(splats)))
    up, down = (logits_of(model, moved(many, sign * steps, True))[:, 1] for sign in (1, -1))
    slopes = ((up - down) / (2 * step)).view(n, 8)
    torch.testing.assert_close(found.gradient, slopes.norm(dim=1), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("encoder", [PLAIN, RESAMPLED], ids=["plain", "resampled"])
def test_contributions_sum_to_what_the_colours_do(encoder: EncoderConfig) -> None:
    model, splats = model_of(encoder), padded_splats()
    found = explain(model, splats, SIDE, SIDE, 1).contribution
    black = logits_of(model, replace(splats, colors=torch.zeros(1, 7, 3)))
    total = (logits_of(model, splats) - black)[0, 1]
    assert abs(total) > 0.1
    torch.testing.assert_close(found.sum(), total, rtol=0.02, atol=0)
    assert found.min() < 0 < found.max()


def test_a_contribution_is_gradient_times_colour_where_the_logit_is_linear() -> None:
    """Faint colours: there it is also what taking the Gaussian away takes from the logit."""
    model, splats = model_of(PLAIN), padded_splats()
    faint = replace(splats, colors=1e-2 * splats.colors)
    found = explain(model, faint, SIDE, SIDE, 1).contribution
    without = faint.colors * (1 - torch.eye(7))[..., None]
    several = Splats(*(x.expand(7, *x.shape[1:]) for x in _parts(faint)))
    lost = logits_of(model, faint)[:, 1] - logits_of(model, replace(several, colors=without))[:, 1]
    torch.testing.assert_close(found, lost, rtol=0.1, atol=1e-3)


def _parts(splats: Splats) -> tuple[Tensor, ...]:
    return splats.means, splats.cholesky, splats.colors, splats.mask


def test_the_class_is_the_likeliest_unless_told() -> None:
    model, splats = model_of(PLAIN), padded_splats()
    expected = logits_of(model, splats)[0]
    found = explain(model, splats, SIDE, SIDE)
    torch.testing.assert_close(found.logits, expected)
    assert found.label == expected.argmax()
    assert found.probabilities.sum() == pytest.approx(1)
    other = explain(model, splats, SIDE, SIDE, (found.label + 1) % 3)
    assert not torch.allclose(other.gradient, found.gradient)
    assert torch.equal(other.attention, found.attention)  # is not about a class


@pytest.mark.parametrize("encoder", [PLAIN, RESAMPLED], ids=["plain", "resampled"])
def test_padding_gets_nothing_and_changes_nothing(encoder: EncoderConfig) -> None:
    model, splats = model_of(encoder), padded_splats(7, padding=2)
    splats.means[0, 5:] = torch.nan
    found = explain(model, splats, SIDE, SIDE, 0)
    alone = explain(model, Splats(*(x[:, :5] for x in _parts(splats))), SIDE, SIDE, 0)
    for name in ("gradient", "contribution", "attention"):
        assert (getattr(found, name)[5:] == 0).all()
        torch.testing.assert_close(getattr(found, name)[:5], getattr(alone, name))
    assert (found.attention[:5] > 0).all()
    assert found.attention.sum() + found.elsewhere.sum() == pytest.approx(1)


def test_an_exact_circle_still_has_a_gradient() -> None:
    splats = padded_splats()
    splats.cholesky[0, 3] = torch.tensor([2.0, 0.0, 2.0])
    found = explain(model_of(PLAIN), splats, SIDE, SIDE)
    assert found.gradient.isfinite().all()
    assert (found.gradient > 0).all()


# Attention


def test_attention_of_a_block_makes_what_the_block_makes() -> None:
    """With one head: the weights times the values are the layer's output."""
    model = model_of(replace(PLAIN, heads=1))
    splats = padded_splats(7, padding=2)
    with recorded(model.encoder) as seen:
        logits_of(model, splats)
    for block, (x, mask) in zip(model.encoder.encoder.layers, seen["blocks"], strict=True):
        weights = block_attention(block, x, mask)
        assert weights.shape == (1, 8, 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 8))
        assert (weights[..., 6:] == 0).all()
        y = block.layer_norm1(x)
        made = block.self_attn.out_proj(weights @ block.self_attn.v_proj(y))
        torch.testing.assert_close(made, block.self_attn(y, mask)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block_attention(block, x, mask, rows=1), weights[:, :1])


@pytest.mark.parametrize("bias", ["none", "distance", "overlap"])
def test_attention_of_the_resampler_makes_what_it_makes(bias: Any) -> None:
    config = ResamplerConfig(layers=1, heads=1, neighbours=3, bias=bias)
    model = model_of(replace(RESAMPLED, resampler=config))
    with recorded(model.encoder) as seen:
        logits_of(model, padded_splats(7, padding=2))
    layer, (x, tokens, *features) = model.encoder.resampler.layers[0], seen["resampler"][0]
    weights = resampler_attention(layer, x, tokens, *features)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4))
    assert (weights[..., 5:] == 0).all()
    made = layer.out_proj(weights @ layer.v_proj(tokens))
    expected = layer.attend(layer.norm1(x), tokens, *features)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_attention_without_a_resampler_is_the_last_row_of_cls() -> None:
    model, splats = model_of(PLAIN), padded_splats()
    found = explain(model, splats, SIDE, SIDE)
    with recorded(model.encoder) as seen:
        logits_of(model, splats)
    block, x = model.encoder.encoder.layers[-1], seen["blocks"][-1][0]
    y = block.layer_norm1(x)[0]
    rows = []
    for head in range(2):
        own = slice(8 * head, 8 * head + 8)
        q, k = block.self_attn.q_proj(y)[0, own], block.self_attn.k_proj(y)[:, own]
        rows.append((k @ q / math.sqrt(8)).softmax(0))
    expected = torch.stack(rows).mean(0)
    torch.testing.assert_close(torch.cat((found.elsewhere, found.attention)), expected)


def test_rollout_is_the_product_of_whole_matrices() -> None:
    """Over one graph of CLS, four latents and seven Gaussians, which keep what they have."""
    model, splats = model_of(RESAMPLED), padded_splats()
    found = explain(model, splats, SIDE, SIDE)
    with recorded(model.encoder) as seen:
        logits_of(model, splats)
    flow = torch.eye(12)
    for layer, arguments in zip(model.encoder.resampler.layers, seen["resampler"], strict=True):
        step = torch.eye(12)
        step[1:5] /= 2
        step[1:5, 5:] = resampler_attention(layer, *arguments)[0] / 2
        flow = step @ flow
    for block, arguments in zip(model.encoder.encoder.layers, seen["blocks"], strict=True):
        step = torch.eye(12)
        step[:5, :5] = (block_attention(block, *arguments)[0] + torch.eye(5)) / 2
        flow = step @ flow
    torch.testing.assert_close(torch.cat((found.elsewhere, found.attention)), flow[0])
