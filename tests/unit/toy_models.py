"""Toy configurations, Gaussians and a tokenizer for tests of models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from splatshard.pipeline.data.batch import TrainBatch
from splatshard.pipeline.splats import Splats
from splatshard.schemas.model import EncoderConfig, StemConfig, TextConfig

BIASES = ("none", "distance", "overlap")
TOY = EncoderConfig(
    width=32, layers=2, heads=4, tokens=16, stem=StemConfig(hidden=24), image_size=32, patch_size=8
)
TOY_TEXT = TextConfig(width=24, layers=2, heads=2, vocab_size=60, context_length=8, tokenizer="")


def toy_splats(batch: int, count: int, side: float = 64, seed: int = 0) -> Splats:
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


def padded(splats: Splats, count: int, fill: float) -> Splats:
    """With padding of `fill` up to `count` Gaussians."""

    def pad(x: Tensor) -> Tensor:
        more = x.new_full((len(x), count - x.shape[1], x.shape[2]), fill)
        return torch.cat((x, more), 1)

    parts = (pad(x) for x in (splats.means, splats.cholesky, splats.colors))
    mask = torch.zeros(len(splats), count, dtype=torch.bool)
    mask[:, : splats.mask.shape[1]] = splats.mask
    return Splats(*parts, mask)


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
