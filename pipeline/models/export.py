"""The trained encoder for elsewhere, and back; an RGB CLIP for transformers.

An encoder is exported as `model.safetensors` and `config.json`, written in this order, and used so:

    from splatshard.pipeline.models.export import load_encoder
    model = load_encoder("runs/1/encoder")
    embeddings = model.encode_image(batch)                  # TrainBatch -> [B, E]
"""

from __future__ import annotations

import json
from dataclasses import replace

from safetensors.torch import save as safetensors_bytes
from transformers import CLIPConfig, CLIPModel

from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.clip import SplatCLIP, load_tokenizer, text_config
from splatshard.pipeline.models.encoder import vision_config
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.models.pretrained import our_name, read_bytes, read_state
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import ModelConfig
from splatshard.schemas.plain import from_dict, to_dict


def save_encoder(folder: str, model: SplatCLIP | SplatClassifier | GViT) -> None:
    """Write `model` less its text tower to `folder`, for `load_encoder`.

    Raises StorageError and UnavailableError.
    """
    config = replace(model.config, text=None)
    dropped = ("text.", "text_projection.", "logit_scale")
    state = {
        k: v.detach().cpu() for k, v in model.state_dict().items() if not k.startswith(dropped)
    }
    state = {k: v.contiguous() for k, v in state.items()}
    fs.write_bytes(f"{folder}/model.safetensors", safetensors_bytes(state))
    text = json.dumps(to_dict(config), indent=1)
    fs.write_bytes(f"{folder}/config.json", text.encode())


def load_encoder(folder: str) -> SplatCLIP | SplatClassifier | GViT:
    """What `save_encoder` wrote, in eval mode, on the CPU: `encode_image(batch)` of a SplatCLIP
    without text tower, the logits of a SplatClassifier, or a GViT. Raises UsageError, SourceError
    where there is nothing, and UnavailableError."""
    try:
        config = from_dict(ModelConfig, json.loads(read_bytes(f"{folder}/config.json")))
    except ValueError as error:
        raise UsageError(f"{folder}/config.json: not a model's configuration: {error}") from error
    model = build_model(config)
    try:
        model.load_state_dict(read_state(f"{folder}/model.safetensors"))
    except RuntimeError as error:
        raise UsageError(f"{folder}: weights do not fit config.json: {error}") from error
    return model.eval()


def save_clip(folder: str, model: SplatCLIP) -> None:
    """Write an RGB CLIP as transformers does, with its tokenizer, for `load_clip`, `--teacher` and
    `init_clip`; the inverse of `from_transformers`. `folder` is local.

    Raises UsageError for a model on splats or without a text tower.
    """
    if not isinstance(model.vision, PatchEncoder) or model.text is None:
        raise UsageError(
            f"{folder}: only a model on patches with a text tower is a CLIP that transformers "
            "knows: save_encoder writes the others"
        )
    assert model.config.text is not None, "it has a text tower"
    config = CLIPConfig(
        vision_config=vision_config(model.config.encoder).to_dict(),
        text_config=text_config(model.config.text).to_dict(),
        projection_dim=model.config.embed_dim,
    )
    clip = CLIPModel(config)
    ours = model.state_dict()
    clip.load_state_dict({name: ours[our_name(name)] for name in clip.state_dict()})
    clip.save_pretrained(folder)
    load_tokenizer(model.config.text).save_pretrained(folder)
