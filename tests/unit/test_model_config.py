"""Configurations of models, their tokenizers, and their parameters, counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splatshard.jobs.cli.recipe import load_recipe
from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.clip import SplatCLIP, load_tokenizer, tokenize
from splatshard.pipeline.models.count import Count, count, table
from splatshard.pipeline.train.groups import groups_of
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import (
    EncoderConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
    TextConfig,
)
from tests.unit.toy_models import TOY_RGB, TOY_TEXT, tokenizer_folder


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


def test_parameters_of_the_published_size() -> None:
    """The accounting of count.py's docstring, of the recipe of stage 2."""
    config = load_recipe("jobs/recipes/contrast_stage2.py")
    with torch.device("meta"):
        patches = replace(config.model.encoder, input="patches")
        rgb = build_model(replace(config.model, encoder=patches))
        model = build_model(config.model)
    vision = sum(c.total for c in count(rgb, ()) if c.name.startswith("vision"))
    assert vision == 38_587_392  # open_clip's ViT-M-16: 38.6 M
    groups = groups_of(model, config.optim)
    counts = count(model, groups.now, groups.later)
    assert "other" not in {c.name for c in counts}
    whole = counts[-1]
    assert whole.trained / whole.total == pytest.approx(0.097, abs=0.0006)
    share = (whole.trained + whole.later) / whole.total
    assert share == pytest.approx(0.138, abs=0.009)  # what remains: see count.py
    text = table(counts, groups.later_from)
    assert "from step 500\n" in text
    assert text.endswith("9.7 % are trained, 13.0 % from step 500 on")
    assert "from" not in table(counts)


def test_a_classifiers_parameters_are_counted_by_group() -> None:
    model = build_model(ModelConfig(encoder=TOY_RGB, num_classes=3))
    counts = {c.name: c for c in count(model, ["head.weight"], ["head.bias"])}
    assert counts["head"] == Count("head", 33 * 3, 32 * 3, 3)
    assert (counts["all"].trained, counts["all"].later) == (32 * 3, 3)
    assert "other" not in counts
    assert counts["all"].total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderConfig(width=30, heads=4), "multiple of 4 heads"),
        (lambda: EncoderConfig(input="patches", tokens=98), "196 tokens"),
        (lambda: EncoderConfig(input="pixels"), "choose one of splats, patches"),
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
