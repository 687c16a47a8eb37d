"""CLIP with a splat encoder (or its RGB twin) for the images.

    B samples, L text tokens, D width, E embedding

Text tower and tokenizer are transformers'. Names: vision, visual_projection, text,
text_projection, logit_scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedConfig

from splatshard.pipeline.data.batch import ImageBatch, TrainBatch
from splatshard.pipeline.models.classifier import encode, make_encoder
from splatshard.pipeline.models.encoder import ATTENTION
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import ModelConfig, TextConfig
from splatshard.schemas.saved import MODEL_TYPE

INITIAL_TEMPERATURE = 0.07  # arXiv 2103.00020


class SplatCLIP(nn.Module):
    """Images and texts to one space. Without `config.text`, the image side alone (stage 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.width
        self.vision = make_encoder(config)
        self.visual_projection = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=width**-0.5)
        self.text: CLIPTextModel | None = None
        if config.text is not None:
            self.text = CLIPTextModel(text_config(config.text))
            if config.encoder.gradient_checkpointing:
                layers: Any = self.text.encoder.layers
                for layer in layers:  # the model's own switch changed its name
                    layer.gradient_checkpointing = True
                    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
            nn.init.normal_(self.text_projection.weight, std=config.text.width**-0.5)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))

    def encode_image(self, inputs: TrainBatch | ImageBatch | Tensor) -> Tensor:
        """A batch, or normalised pixels [B, 3, H, W], to [B, E] that are not unit vectors."""
        return self.visual_projection(encode(self.vision, inputs))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids int64 [B, L], with a mask of the same shape or none, to [B, E]; not normalised.
        Without a mask faster, and the same for texts padded on the right: what follows the end of a
        text is not seen from there."""
        assert self.text is not None, "this model has no text tower"
        output = self.text(input_ids=input_ids, attention_mask=attention_mask)
        return self.text_projection(output.pooler_output)

    def forward(
        self,
        inputs: TrainBatch | ImageBatch | Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, E] of the images and, where ids are given, of the texts."""
        image_BE = self.encode_image(inputs)
        if input_ids is None:
            return image_BE, None
        return image_BE, self.encode_text(input_ids, attention_mask)


def text_config(config: TextConfig) -> CLIPTextConfig:
    """transformers' configuration of the text tower."""
    return CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=round(config.width * config.mlp_ratio),
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context_length,
        hidden_act=config.activation,
        layer_norm_eps=config.layer_norm_eps,
        bos_token_id=max(0, config.vocab_size - 2),
        eos_token_id=config.eos,
        pad_token_id=None,
        **ATTENTION,
    )


def load_tokenizer(config: TextConfig) -> Any:
    """The tokenizer of `config.tokenizer`, padding on the right.

    Raises UsageError where it cannot be loaded or has another vocabulary than the text tower:
    without network or cache, transformers may return one of a few tokens and say nothing.
    """
    name = config.tokenizer
    own: dict[str, Any] = {}  # of a saved model
    again = "fetch or save the model again, with the files of its tokenizer"
    try:
        with _local(name) as folder:
            # beside a saved model's config.json, whose model_type transformers complains about
            own = {"config": PreTrainedConfig()} if _is_saved_model(folder) else {}
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **own)
    except Exception as error:  # transformers raises many kinds, also for a missing network
        why = str(error).strip().partition("\n")[0].rstrip(": ")
        remedy = "give a local folder with its files, or load it once with network"
        raise UsageError(
            f"tokenizer {name}: cannot be loaded ({why}): {again if own else remedy}"
        ) from error
    if len(tokenizer) != config.vocab_size:
        remedy = "give a local folder that holds tokenizer.json, or vocab.json and merges.txt"
        raise UsageError(
            f"tokenizer {name}: has {len(tokenizer)} tokens, the text tower {config.vocab_size}: "
            f"its files are missing or of another model; {again if own else remedy}"
        )
    if tokenizer.eos_token_id != config.eos:
        raise UsageError(
            f"tokenizer {name}: ends a text with token {tokenizer.eos_token_id}, the text tower "
            f"expects {config.eos}: {again if own else 'set text.eos_token_id'}"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _local(name: str) -> Iterator[str]:
    """`name`, or a local copy of a tokenizer's files at a URL."""
    if "://" not in name:
        yield name
        return
    with TemporaryDirectory() as folder:
        for url in fs.find(name):
            file = url.removeprefix(f"{name.rstrip('/')}/")
            if file.endswith((".json", ".txt", ".model")) and "/" not in file:
                (Path(folder) / file).write_bytes(fs.read_bytes(url))
        yield folder


def _is_saved_model(folder: str) -> bool:
    try:
        values = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, length]: cut and padded to `length`, ending with the end token."""
    out = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    return out["input_ids"], out["attention_mask"]
