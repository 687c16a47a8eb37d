"""Models: masks, sets of any size, gradients, dtypes, the bias's twin, tokens of text, counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splatshard.pipeline.data.batch import TrainBatch
from splatshard.pipeline.models import (
    PatchEncoder,
    SplatClassifier,
    SplatCLIP,
    SplatEncoder,
    build_model,
)
from splatshard.pipeline.models.clip import load_tokenizer, tokenize
from splatshard.pipeline.models.count import STAGE2, count, share, stage2_text, table
from splatshard.pipeline.models.patches import normalised
from splatshard.pipeline.models.resampler import anchors, bias_features, dense_bias, evenly, split
from splatshard.pipeline.models.stem import features, normalised_means, without_padding
from splatshard.pipeline.splats import Splats, cholesky_from_scales_and_angles, covariances
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import (
    EncoderConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
    TextConfig,
)

BIASES = ("none", "distance", "overlap")
KINDS: list[dict[str, Any]] = [{"bias": x} for x in BIASES]
KINDS += [{"bias": "distance", "neighbours": 6}, {"absent": True}]
IDS = (*BIASES, "local", "no resampler")
TOY = EncoderConfig(
    width=32, layers=2, heads=4, tokens=16, stem=StemConfig(hidden=24), image_size=32, patch_size=8
)
TOY_TEXT = TextConfig(width=24, layers=2, heads=2, vocab_size=60, context_length=8, tokenizer="")


def splats_of(batch: int, count: int, side: float = 64, seed: int = 0) -> Splats:
    g = torch.Generator().manual_seed(seed)
    cholesky = torch.rand(batch, count, 3, generator=g) * 3 + 0.3
    return Splats(
        torch.rand(batch, count, 2, generator=g) * side,
        cholesky,
        torch.randn(batch, count, 3, generator=g) * 0.4,
        torch.ones(batch, count, dtype=torch.bool),
    )


def sizes(batch: int, side: int = 64) -> tuple[Tensor, Tensor]:
    side_B = torch.full((batch,), side, dtype=torch.int32)
    return side_B, side_B


def batch_of(splats: Splats, side: int = 64) -> TrainBatch:
    b = len(splats)
    height, width = sizes(b, side)
    nothing = torch.full((b,), -1)
    return TrainBatch(splats, height, width, [""] * b, [None] * b, nothing, None, nothing < 0)


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


def padded(splats: Splats, count: int, fill: float) -> Splats:
    """With padding of `fill` up to `count` Gaussians."""

    def pad(x: Tensor) -> Tensor:
        more = x.new_full((len(x), count - x.shape[1], x.shape[2]), fill)
        return torch.cat((x, more), 1)

    parts = (pad(x) for x in (splats.means, splats.cholesky, splats.colors))
    mask = torch.zeros(len(splats), count, dtype=torch.bool)
    mask[:, : splats.mask.shape[1]] = splats.mask
    return Splats(*parts, mask)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("fill", [0.0, 1e30, math.nan, math.inf])
def test_masks_leak_nothing(kind: dict[str, Any], fill: float) -> None:
    model, splats = encoder(**kind), splats_of(2, 20)
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
    ones = [splats_of(1, n, seed=n) for n in (1, 16, 37, 50)]
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
    model, splats = encoder(**kind), splats_of(2, 24, seed=seed)
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
    splats = padded(splats_of(2, 5), 9, math.nan)
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
    splats = splats_of(1, count)
    with torch.no_grad():
        assert model.tokens(splats, *sizes(1), tokens).shape == (1, tokens, 32)
        assert model(splats, *sizes(1), tokens).isfinite().all()
    built = encoder(replace(TOY, tokens=tokens))
    assert built(splats, *sizes(1)).shape == (1, 32)


def test_fewer_tokens_still_cover_the_image() -> None:
    chosen = anchors(196)[evenly(98, 196, torch.device("cpu"))]
    gaps = torch.cdist(anchors(3136), chosen).min(1).values
    assert gaps.max() < 2.5 * 2 / math.sqrt(98)
    assert len(anchors(98).unique(dim=0)) == 98
    assert anchors(196).abs().max() < 1
    assert anchors(7).shape == (7, 2)


def test_shards_of_other_sizes_look_alike() -> None:
    model, splats = encoder(), splats_of(2, 20)
    double = Splats(splats.means * 3.5, splats.cholesky * 3.5, splats.colors, splats.mask)
    with torch.no_grad():
        torch.testing.assert_close(
            model(double, *sizes(2, 224)), model(splats, *sizes(2)), atol=2e-4, rtol=1e-3
        )


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
    splats = without_padding(splats_of(2, 30))
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


@pytest.mark.parametrize("bias", ["distance", "overlap"])
def test_near_gaussians_weigh_more(bias: str) -> None:
    """With a steep slope a token depends on the Gaussians near its anchor, not on those far off."""
    model = encoder(bias=bias).resampler
    with torch.no_grad():
        model.layers[0].log_slope.fill_(4.0)
    splats = splats_of(1, 60)
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
    batch = batch_of(splats_of(2, 20))
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
        model(splats_of(2, 20), *sizes(2)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_bfloat16_autocast_is_near_float32() -> None:
    model, splats = encoder(), splats_of(4, 50)
    with torch.no_grad():
        exact = model(splats, *sizes(4))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(splats, *sizes(4))
    assert torch.nn.functional.cosine_similarity(exact, y.float()).min() > 0.995


def test_torch_export_finds_no_branch_on_data() -> None:
    """What torch.compile needs, without a compiler."""
    model, splats = encoder(), splats_of(2, 12)
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
    assert model(batch_of(splats_of(3, 10))).shape == (3, 7)
    rgb = build_model(replace(config, encoder=replace(TOY, input="patches")))
    assert isinstance(rgb.encoder, PatchEncoder)
    assert rgb(normalised(torch.rand(3, 3, 32, 32))).shape == (3, 7)


def test_right_padding_of_texts_needs_no_mask() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(encoder=TOY_RGB, text=TOY_TEXT, embed_dim=16)).eval()
    assert isinstance(model, SplatCLIP)
    short = torch.tensor([[3, 5, 59]])
    long = torch.tensor([[3, 5, 59, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = model.encode_text(short)
        for mask in (None, (long > 0).long()):
            torch.testing.assert_close(model.encode_text(long, mask), expected)
        assert not torch.allclose(model.encode_text(torch.tensor([[3, 6, 59]])), expected)


TOY_RGB = replace(TOY, input="patches")


def tokenizer_folder(path: Path, words: int = 6) -> Path:
    """A tokenizer of whole words, in transformers' layout; token 0 pads, the last ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(words)}
    vocab |= {"<s>": words + 2, "</s>": words + 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", words + 2), ("</s>", words + 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.save_pretrained(path)
    return path


def test_tokenizer_cuts_and_pads(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    config = replace(TOY_TEXT, vocab_size=10, context_length=5, tokenizer=str(folder))
    ids, mask = tokenize(load_tokenizer(config), ["w0 w1", "w0 w1 w2 w3 w4"], 5)
    assert ids.tolist() == [[8, 2, 3, 9, 0], [8, 2, 3, 4, 9]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1] * 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 49408}, "has 10 tokens, the text tower 49408"),
        ({"vocab_size": 10, "eos_token_id": 3}, "ends a text with token 9"),
        ({"tokenizer": "/nowhere/at-all"}, "cannot be loaded"),
    ],
)
def test_wrong_tokenizers_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = tokenizer_folder(tmp_path)
    config = replace(TOY_TEXT, **{"tokenizer": str(folder), **change})
    with pytest.raises(UsageError, match=message):
        load_tokenizer(config)


def test_parameters_of_the_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    """The accounting of count.py's docstring, printed."""
    config = EncoderConfig()
    text = TextConfig()
    with torch.device("meta"):
        rgb = build_model(ModelConfig(encoder=replace(config, input="patches"), text=text))
        model = build_model(ModelConfig(encoder=config, text=text))
    vision = sum(c.total for c in count(rgb) if c.name.startswith("vision"))
    assert vision == 38_587_392  # open_clip's ViT-M-16: 38.6 M
    frozen, thawed = count(model, STAGE2), count(model, stage2_text(12))
    print(table(frozen), table(thawed), sep="\n")
    assert "other" not in {c.name for c in frozen}
    assert share(frozen) == pytest.approx(0.097, abs=0.0006)
    assert share(thawed) == pytest.approx(0.138, abs=0.009)  # what remains: see count.py
    assert "trainable share 9.7 %" in capsys.readouterr().out


def test_count_follows_requires_grad_and_names_of_classifiers() -> None:
    model = build_model(ModelConfig(encoder=TOY_RGB, num_classes=3))
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    counts = {c.name: c for c in count(model)}
    assert counts["head"].trainable == counts["head"].total == 33 * 3
    assert counts["all"].trainable == counts["head"].total
    assert "other" not in counts
    assert counts["all"].total == sum(p.numel() for p in model.parameters())


def test_config_round_trip() -> None:
    import json

    config = ModelConfig(encoder=replace(TOY, gradient_checkpointing=True), text=TOY_TEXT)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    values = config.to_dict()
    values["encoder"]["colour"] = 1
    with pytest.raises(UsageError, match="no field 'colour'"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderConfig(width=30, heads=4), "multiple of 4 heads"),
        (lambda: EncoderConfig(input="patches", tokens=98), "196 tokens"),
        (lambda: EncoderConfig(input="pixels"), "splats, patches"),
        (lambda: ResamplerConfig(bias="near"), "choose one of"),
        (lambda: ModelConfig(num_classes=1), "at least 2"),
        (lambda: ModelConfig(num_classes=3, text=TOY_TEXT), "no text tower"),
        (lambda: TextConfig(eos_token_id=49408), "below the vocabulary"),
        (lambda: StemConfig(color_std=(1.0, 0.0, 1.0)), "must be positive"),
    ],
)
def test_bad_configs(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
