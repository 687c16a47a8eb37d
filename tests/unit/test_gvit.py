"""GViT: draws, guidance, and the losses beside naive twins."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.models import gvit
from splatshard.pipeline.models.count import count
from splatshard.pipeline.models.encoder import run_blocks
from splatshard.pipeline.models.gaussian_space import NUMBERS, colored, drawn, gaussians_of, render
from splatshard.pipeline.models.gvit import GViT, distance_bias, gamma_at, guided, gvit_loss
from splatshard.pipeline.psnr import psnr
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
    StemConfig,
)
from splatshard.schemas.plain import from_dict, to_dict

SIDE = 21
"""Odd, and a multiple of the patches' 7 px."""
PREDICTOR = EncoderConfig(
    input="patches", width=24, layers=2, heads=3, image_size=SIDE, patch_size=7, tokens=9
)
SPACE = GViTConfig(gaussians=13, predictor=PREDICTOR, bands=3)
READER = EncoderConfig(width=24, layers=2, heads=3, stem=StemConfig(hidden=16), resampler=None)
CONFIG = ModelConfig(encoder=READER, num_classes=3, gvit=SPACE)
RENDERERS = ("sum", "alpha")


def model_of(seed: int = 0, loud: bool = True, **space: Any) -> GViT:
    """A toy model; `loud`: no weights at zero, so that all it computes shows."""
    torch.manual_seed(seed)
    model = GViT(replace(CONFIG, gvit=replace(SPACE, **space)))
    if loud:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    return model


def pixels_of(batch: int, seed: int = 0, cells: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(batch, 3, cells, cells, generator=g)
    return F.interpolate(small, (SIDE, SIDE), mode="bilinear")


def seeds_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# Draws


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("start", ["image", "random"])
def test_the_first_gaussians_are_those_that_are_drawn(start: Any, renderer: Any) -> None:
    model, pixels = model_of(loud=False, start=start, renderer=renderer), pixels_of(2)
    out = model(pixels, seeds_of(3, 4))
    wanted = drawn(seeds_of(3, 4), 13, SIDE, SIDE, model.space)
    if start == "image":
        wanted = colored(wanted, pixels, model.space)
    assert (out.g - wanted).abs().max() < 0.1
    assert not out.logits.any()


def test_same_seeds_same_gaussians_wherever_in_a_batch() -> None:
    model, pixels = model_of().eval(), pixels_of(3)
    with torch.no_grad():
        whole = model(pixels, seeds_of(5, 6, 7)).g
        turned = model(pixels.flip(0), seeds_of(7, 6, 5)).g.flip(0)
        alone = model(pixels[1:2], seeds_of(6)).g
        others = model(pixels, seeds_of(5, 8, 7)).g
    torch.testing.assert_close(whole, turned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)
    assert (whole[1] - others[1]).abs().max() > 0.1
    torch.testing.assert_close(whole[::2], others[::2])
    assert torch.equal(
        drawn(seeds_of(5, 9), 7, 9, 9, SPACE)[1], drawn(seeds_of(9), 7, 9, 9, SPACE)[0]
    )


def test_the_residual_is_counted_in_the_configs_unit() -> None:
    pixels, moved = pixels_of(2), []
    for residual in (1.0, 0.25):
        model = model_of(residual=residual)
        g0 = model.predictor.g0(pixels, seeds_of(1, 2))
        moved.append(model(pixels, seeds_of(1, 2)).g - g0)
    torch.testing.assert_close(0.25 * moved[0], moved[1], atol=1e-5, rtol=1e-5)
    still = model_of(residual=0)
    assert torch.equal(still(pixels).g, still.predictor.g0(pixels))
    with pytest.raises(UsageError, match=r"gvit.residual = -1"):
        replace(SPACE, residual=-1)


def test_evaluation_draws_the_same_for_all() -> None:
    model = model_of().eval()
    pixels = pixels_of(1).expand(3, -1, -1, -1)
    with torch.no_grad():
        g = model(pixels).g
        torch.testing.assert_close(g, model(pixels).g)
    torch.testing.assert_close(g[:1].expand_as(g), g, atol=1e-5, rtol=1e-5)


def test_one_predictor_for_any_number_of_gaussians() -> None:
    model, pixels = model_of().eval(), pixels_of(2)
    for k in (1, 16, 64, 196):
        with torch.no_grad():
            out = model(pixels, seeds_of(1, 2), count=k)
        assert out.g.shape == (2, k, NUMBERS)
        assert out.splats.mask.shape == (2, k)
        assert out.logits.isfinite().all()


def test_the_order_of_gaussians_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = model_of().eval(), pixels_of(2)
    g0 = model.predictor.g0(pixels, seeds_of(1, 2))
    order = torch.randperm(g0.shape[1])
    with torch.no_grad():
        out = model(pixels, seeds_of(1, 2))
        monkeypatch.setattr(model.predictor, "g0", lambda *_: g0[:, order])
        turned = model(pixels)
    torch.testing.assert_close(out.g[:, order], turned.g, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.logits, turned.logits, atol=1e-4, rtol=1e-4)


def test_learned_gaussians_are_weights_of_their_number() -> None:
    model, pixels = model_of(start="learned"), pixels_of(2)
    out = model(pixels, seeds_of(1, 2), gamma=1.0)
    assert torch.equal(out.g, model(pixels, seeds_of(3, 4)).g)
    out.g.square().sum().backward()
    assert model.predictor.start is not None
    assert model.predictor.start.grad is not None
    assert model.predictor.start.grad.abs().min() > 0
    with pytest.raises(UsageError, match=r"14 Gaussians: this model has learned 13; only drawn"):
        model(pixels, count=14)


# Guidance


def entropy_of(model: GViT, g: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.classify(g, SIDE, SIDE), labels)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_one_guided_step_lowers_the_cross_entropy(seed: int, clip: float) -> None:
    """Of every sample, at fixed weights: a small step on g against the gradient that reaches it."""
    model, pixels = model_of(seed).eval(), pixels_of(5, seed)
    labels = torch.arange(5) % 3
    with torch.no_grad():
        g = model(pixels, torch.arange(5)).g
    for gamma in (0.25, 1.0):
        leaf = g.clone().requires_grad_()
        entropy_of(model, guided(leaf, gamma, clip), labels).backward()
        assert leaf.grad is not None
        step = 3e-4 * leaf.grad / leaf.grad.norm(dim=(1, 2), keepdim=True)
        with torch.no_grad():
            before, after = (
                F.cross_entropy(model.classify(x, SIDE, SIDE), labels, reduction="none")
                for x in (g, g - step)
            )
        assert (after < before).all()
        # as far as the gradient says, within the second order
        if clip == math.inf:
            slope = 5 * leaf.grad.norm(dim=(1, 2)) / gamma
            torch.testing.assert_close((before - after) / 3e-4, slope, rtol=0.15, atol=2e-3)


def test_guidance_scales_and_clips_the_gradient_alone() -> None:
    g = torch.randn(2, 3, NUMBERS).requires_grad_()
    wanted = torch.randn(2, 3, NUMBERS)
    wanted[0, 0, 0] = 50
    for scale in (1.0, 1e-3):  # of the loss: what is clipped is the same
        g.grad = None
        out = guided(g, 0.5, 2.0)
        assert torch.equal(out, g)
        (out * wanted * scale).sum().backward()
        assert g.grad is not None
        rms = wanted.square().mean((1, 2), keepdim=True).sqrt()
        clipped = torch.minimum(torch.maximum(wanted, -2 * rms), 2 * rms)
        torch.testing.assert_close(g.grad, 0.5 * scale * clipped)
    assert g.grad[0, 0, 0] < 0.5 * 1e-3 * 50 / 2


def gradients(model: GViT, gamma: float, clip: float = math.inf) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(pixels_of(3), seeds_of(1, 2, 3), gamma, clip)
    F.cross_entropy(out.logits, torch.arange(3)).backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("start", ["image", "random", "learned"])
def test_gamma_is_what_the_predictor_gets_of_the_cross_entropy(start: Any) -> None:
    model = model_of(start=start)
    none, half, whole = (gradients(model, gamma) for gamma in (0.0, 0.5, 1.0))
    assert not any(name.startswith("predictor.") for name in none)
    reader = {name for name in whole if not name.startswith("predictor.")}
    assert reader == none.keys()
    for name, value in whole.items():
        share = 1.0 if name in reader else 0.5
        torch.testing.assert_close(half[name], share * value, atol=1e-6, rtol=1e-4)
        if name in reader:
            torch.testing.assert_close(none[name], value, atol=1e-6, rtol=1e-4)
    clipped = gradients(model, 1.0, 1.5)
    last = "predictor.residual.2.weight"
    assert not torch.allclose(clipped[last], whole[last], rtol=1e-2)
    torch.testing.assert_close(clipped["head.weight"], whole["head.weight"])


def test_the_rendering_reaches_the_whole_predictor_whatever_gamma() -> None:
    model, pixels = model_of(), pixels_of(2)
    out = model(pixels, seeds_of(1, 2), 0.0)
    render(out.g, SIDE, SIDE, model.space).square().sum().backward()
    for name, parameter in model.predictor.named_parameters():
        if name.endswith("k_proj.bias"):  # softmax does not see it
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert last_gradient(model).abs().amax(1).min() > 0  # of all nine


def last_gradient(model: GViT) -> Tensor:
    """[9, D]"""
    gradient = dict(model.named_parameters())["predictor.residual.2.weight"].grad
    assert gradient is not None
    return gradient


def test_gamma_rises_from_the_ramps_begin_to_its_end() -> None:
    config = GViTLossConfig(gamma=0.8, ramp=(0.25, 0.75))
    values = [gamma_at(step, 8, config) for step in range(8)]
    assert values == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert gamma_at(0, 5, replace(config, ramp=(0, 0))) == 0.8
    assert gamma_at(4, 5, replace(config, gamma=0)) == 0


# The model as a whole


def test_gaussians_look_at_what_is_near() -> None:
    """The bias: minus a head's slope times the squared distance in patches, for Gaussians alone."""
    g0 = drawn(seeds_of(1, 2), 5, SIDE, SIDE, SPACE)
    bias = distance_bias(g0, PREDICTOR)
    assert bias.shape == (2, 3, 15, 15)
    assert not bias[:, :, :10].any()
    assert not bias[..., 0].any()
    means = gaussians_of(g0, SIDE, SIDE, SPACE)[0].means / 7
    corner = means.new_tensor((2.5, 1.5))  # patch 5 of 3 x 3
    wanted = (means[1, 3] - corner).square().sum()
    slopes = -bias[1, :, 13, 6] / wanted
    assert slopes[0] > slopes[1] > slopes[2] > 0
    near = (means[1, 3] - means[1, 0]).square().sum()
    torch.testing.assert_close(-bias[1, :, 13, 10] / near, slopes)
    assert not bias[1, :, 13, 13].any()


@pytest.mark.parametrize("options", [{}, {"bias": "none"}], ids=str)
def test_a_short_training_improves_the_picture(options: dict[str, Any]) -> None:
    """From grey, where there is much to improve; at this rate from any seed (of 12 tried)."""
    torch.manual_seed(0)
    space = replace(SPACE, start="random", residual=1.0, **options)
    model = GViT(replace(CONFIG, gvit=space))
    config = GViTLossConfig(reconstruction=10, ramp=(0, 0.5))
    pixels, labels = pixels_of(8, cells=2), torch.arange(8) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for step in range(80):
        out = model(pixels, torch.arange(8) + 100 * step, gamma_at(step, 80, config), config.clip)
        rendered = render(out.g, SIDE, SIDE, model.space)
        loss, metrics = gvit_loss(out.logits, labels, rendered, pixels, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(metrics)
    assert seen[0]["entropy"].item() == pytest.approx(math.log(3), abs=1e-4)
    assert seen[-1]["psnr"] > seen[0]["psnr"] + 1.5
    assert seen[-1]["reconstruction"] < 0.85 * seen[0]["reconstruction"]


def test_the_losses_parts() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    image, target = torch.rand(2, 4, 3, 9, 9)
    config = GViTLossConfig(classification=0.5, reconstruction=3, dssim=0)
    loss, metrics = gvit_loss(logits, labels, image, target, config)
    entropy, l1 = F.cross_entropy(logits, labels), (image - target).abs().mean()
    torch.testing.assert_close(loss, 0.5 * entropy + 3 * l1)
    torch.testing.assert_close(metrics["psnr"], psnr(image, target).mean().float())
    assert metrics["accuracy"] == (logits.argmax(1) == labels).float().mean()


def test_compositing_by_alpha_is_a_renderer_too() -> None:
    model = model_of(renderer="alpha")
    out = model(pixels_of(2), seeds_of(1, 2), 1.0)
    picture = render(out.g, SIDE, SIDE, model.space)
    assert picture.min() >= 0
    assert picture.max() <= 1
    (picture.square().sum() + out.logits.square().sum()).backward()
    assert last_gradient(model).abs().amax(1).min() > 0


def test_lower_precision_and_checkpointing_change_rounding_alone() -> None:
    model, pixels = model_of(), pixels_of(2)
    wanted = gradients(model, 1.0)
    encoders = replace(PREDICTOR, gradient_checkpointing=True)
    model.predictor.config = replace(model.space, predictor=encoders)
    for name, value in gradients(model, 1.0).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = model(pixels, seeds_of(1, 2))
    with torch.no_grad():
        full = model(pixels, seeds_of(1, 2))
    assert low.g.dtype == low.splats.means.dtype == torch.float32
    assert (low.g - full.g).abs().max() < 0.1 * full.g.abs().max()


def test_distances_are_exact_in_lower_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are differences of squares, which bfloat16 cannot take. Rounded at the end, once."""
    model, pixels = model_of(), pixels_of(2)
    seen: list[Tensor] = []

    def spy(tower: Any, x: Tensor, checkpointed: bool, bias: Tensor) -> Tensor:
        seen.append(bias)
        return run_blocks(tower, x, checkpointed, bias)

    monkeypatch.setattr(gvit, "run_blocks", spy)
    with torch.no_grad():
        model(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            model(pixels)
    exact, rounded = seen
    assert exact.dtype == torch.float32
    assert exact.max() == 0
    assert torch.equal(rounded, exact.bfloat16())


def test_configurations_go_to_json_and_back() -> None:
    learned = replace(CONFIG, gvit=replace(SPACE, start="learned", renderer="alpha"))
    for config in (CONFIG, learned, ModelConfig(num_classes=3)):
        assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(UsageError, match=r"gvit.predictor.image_size = 22: must be a multiple"):
        GViTConfig(predictor=replace(PREDICTOR, image_size=22))
    with pytest.raises(UsageError, match=r"gvit.predictor.input = splats"):
        GViTConfig(predictor=READER)
    with pytest.raises(UsageError, match=r"num_classes = None: GViT is a classifier"):
        ModelConfig(encoder=READER, gvit=SPACE)
    with pytest.raises(UsageError, match=r"gvit.ramp = \(0.6, 0.5\)"):
        GViTLossConfig(ramp=(0.6, 0.5))


def test_parameters_are_counted_by_group() -> None:
    groups = {c.name: c.total for c in count(model_of(), ())}
    predictor = sum(p.numel() for p in model_of().predictor.parameters())
    assert groups["predictor"] == predictor
    assert "other" not in groups
