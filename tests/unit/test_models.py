"""Models: masks, sets of any size, gradients, dtypes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.encoder import SplatEncoder
from splatshard.pipeline.models.patches import PatchEncoder, normalised
from splatshard.pipeline.models.resampler import anchors
from splatshard.pipeline.models.stem import normalised_means
from splatshard.pipeline.splats import Splats
from splatshard.schemas.model import EncoderConfig, ModelConfig, ResamplerConfig
from tests.unit.toy_models import BIASES, TOY, TOY_TEXT, batch_of, padded, sizes, toy_splats

KINDS: list[dict[str, Any]] = [{"bias": x} for x in BIASES]
KINDS += [{"bias": "distance", "neighbours": 6}, {"absent": True}]
IDS = (*BIASES, "local", "no resampler")


def encoder(config: EncoderConfig = TOY, seed: int = 0, **resampler: Any) -> SplatEncoder:
    """With weights large enough that every part of the input shows in the output."""
    torch.manual_seed(seed)
    settings = None
    if not resampler.pop("absent", False):
        assert config.resampler is not None
        settings = replace(config.resampler, **{"heads": 4, "neighbours": 0, **resampler})
    model = SplatEncoder(replace(config, resampler=settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
    return model


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("fill", [0.0, 1e30, math.nan, math.inf])
def test_masks_leak_nothing(kind: dict[str, Any], fill: float) -> None:
    model, splats = encoder(**kind), toy_splats(2, 20)
    with torch.no_grad():
        without = model(splats, *sizes(2))
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                zeros = model(padded(splats, 33, 0.0), *sizes(2))
                filled = model(padded(splats, 33, fill), *sizes(2))
            assert torch.equal(filled, zeros)
            if dtype is None:
                torch.testing.assert_close(zeros, without, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_variable_n_equals_one_by_one(kind: dict[str, Any]) -> None:
    model = encoder(**kind)
    ones = [toy_splats(1, n, seed=n) for n in (1, 16, 37, 50)]
    parts = [padded(s, 50, math.nan) for s in ones]
    joined = Splats(*(torch.cat([getattr(s, f) for s in parts]) for f in Splats.__annotations__))
    with torch.no_grad():
        together = model(joined, *sizes(4))
        apart = torch.cat([model(s, *sizes(1)) for s in ones])
    torch.testing.assert_close(together, apart, atol=5e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@given(seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_order_of_gaussians_does_not_matter(kind: dict[str, Any], seed: int) -> None:
    model, splats = encoder(**kind), toy_splats(2, 24, seed=seed)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    parts = (splats.means, splats.cholesky, splats.colors, splats.mask)
    with torch.no_grad():
        torch.testing.assert_close(
            model(Splats(*(x[:, order] for x in parts)), *sizes(2)),
            model(splats, *sizes(2)),
            atol=5e-5,
            rtol=1e-4,
        )


def test_no_gaussians_give_the_same_whatever_the_padding() -> None:
    model = encoder()
    splats = padded(toy_splats(2, 5), 9, math.nan)
    splats.mask[1] = False
    with torch.no_grad():
        y = model(splats, *sizes(2))
        empty = model(Splats(*(x[1:, :1] for x in vars(splats).values())), *sizes(1))
    assert y.isfinite().all()
    torch.testing.assert_close(y[1:], empty, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [98, 196])
@pytest.mark.parametrize("count", [16, 400, 3136])
def test_any_number_of_gaussians_and_tokens(count: int, tokens: int) -> None:
    model = encoder(replace(TOY, tokens=196))
    splats = toy_splats(1, count)
    with torch.no_grad():
        assert model.tokens(splats, *sizes(1), tokens).shape == (1, tokens, 32)
        assert model(splats, *sizes(1), tokens).isfinite().all()
    built = encoder(replace(TOY, tokens=tokens))
    assert built(splats, *sizes(1)).shape == (1, 32)


def test_shards_of_other_sizes_look_alike() -> None:
    model, splats = encoder(), toy_splats(2, 20)
    double = Splats(splats.means * 3.5, splats.cholesky * 3.5, splats.colors, splats.mask)
    with torch.no_grad():
        torch.testing.assert_close(
            model(double, *sizes(2, 224)), model(splats, *sizes(2)), atol=2e-4, rtol=1e-3
        )


@pytest.mark.parametrize("bias", ["distance", "overlap"])
def test_near_gaussians_weigh_more(bias: str) -> None:
    """With a steep slope a token depends on the Gaussians near its anchor, not on those far off."""
    model = encoder(bias=bias).resampler
    with torch.no_grad():
        model.layers[0].log_slope.fill_(4.0)
    splats = toy_splats(1, 60)
    means = normalised_means(splats.means, *sizes(1))
    tokens = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(1))
    tokens.requires_grad_()
    y = model(tokens, splats, means, torch.full((1, 2), 64.0))
    (gradient,) = torch.autograd.grad(y[0, 5].square().sum(), tokens)
    d = torch.cdist(anchors(16)[5:6], means[0])[0]
    share = gradient[0].norm(dim=-1)
    assert share[d.argsort()[30:]].sum() < 1e-3 * share.sum()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_gradients_reach_every_parameter(kind: dict[str, Any], checkpointed: bool) -> None:
    torch.manual_seed(0)
    resampler = None if "absent" in kind else ResamplerConfig(heads=4, layers=2, **kind)
    config = replace(TOY, resampler=resampler, gradient_checkpointing=checkpointed)
    model = build_model(ModelConfig(encoder=config, text=TOY_TEXT, embed_dim=16)).train()
    ids = torch.tensor([[1, 5, 59, 0, 0, 0, 0, 0], [1, 5, 6, 7, 8, 9, 10, 59]])
    batch = batch_of(toy_splats(2, 20))
    image, text = model(batch, ids)
    loss = (image @ text.T * model.logit_scale.exp()).diagonal().sum()
    loss.backward()
    # the class token attends; tokens past the end of all texts have no use
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("k_proj.bias"):  # softmax ignores it
            assert parameter.grad.abs().max() > 0, name


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for flag in (False, True):
        torch.manual_seed(0)
        config = replace(TOY, gradient_checkpointing=flag, resampler=ResamplerConfig(heads=4))
        model = SplatEncoder(config).train()
        model(toy_splats(2, 20), *sizes(2)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_bfloat16_autocast_is_near_float32() -> None:
    model, splats = encoder(), toy_splats(4, 50)
    with torch.no_grad():
        exact = model(splats, *sizes(4))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(splats, *sizes(4))
    assert torch.nn.functional.cosine_similarity(exact, y.float()).min() > 0.995


def test_torch_export_finds_no_branch_on_data() -> None:
    """What torch.compile needs, without a compiler."""
    model, splats = encoder(), toy_splats(2, 12)
    names = ("means", "cholesky", "colors", "mask")

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, means: Tensor, cholesky: Tensor, colors: Tensor, mask: Tensor) -> Tensor:
            return self.model(Splats(means, cholesky, colors, mask), *sizes(2))

    values = tuple(getattr(splats, x) for x in names)
    program = torch.export.export(Flat(), values, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*values), model(splats, *sizes(2)))


def test_classifier_and_patches() -> None:
    config = ModelConfig(encoder=replace(TOY, resampler=ResamplerConfig(heads=4)), num_classes=7)
    model = build_model(config)
    assert isinstance(model, SplatClassifier)
    assert model(batch_of(toy_splats(3, 10))).shape == (3, 7)
    rgb = build_model(replace(config, encoder=replace(TOY, input="patches")))
    assert isinstance(rgb.encoder, PatchEncoder)
    assert rgb(normalised(torch.rand(3, 3, 32, 32))).shape == (3, 7)
