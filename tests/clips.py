"""A tiny CLIP and its tokenizer in a folder, random but always the same; for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.utils import logging

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "photo", "of", "number", "red", "green", "photograph"]
BOS, EOS = "<s>", "</s>"
WIDTH, SIDE = 32, 32


def clip_folder(path: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """transformers' files of a CLIP of width 32 on images of 32 px, with parameters x `scale`."""
    torch.manual_seed(seed)
    towers = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = vocabulary_of()
    config = CLIPConfig(
        vision_config=towers | {"hidden_size": WIDTH, "image_size": SIDE, "patch_size": 8},
        text_config=towers
        | {
            "hidden_size": WIDTH,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 16,
            "bos_token_id": vocabulary[BOS],
            "eos_token_id": vocabulary[EOS],
        },
        projection_dim=24,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    logging.disable_progress_bar()
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def vocabulary_of() -> dict[str, int]:
    return {word: i for i, word in enumerate(["<unk>", *WORDS, BOS, EOS])}


def save_tokenizer(path: Path) -> None:
    """One token per word."""
    vocabulary = vocabulary_of()
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=special
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token="<unk>"
    ).save_pretrained(path)


def say_normalisation(path: Path, mean: list[float], std: list[float]) -> None:
    text = json.dumps({"image_mean": mean, "image_std": std})
    (path / "preprocessor_config.json").write_text(text)
