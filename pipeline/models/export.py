"""An RGB CLIP that was trained here, for transformers; pretrained.py has the way back. All trained
models are saved by `splatshard.encoder(...).save_pretrained(folder)`."""

from __future__ import annotations

from transformers import CLIPConfig, CLIPModel

from splatshard.pipeline.models.clip import SplatCLIP, load_tokenizer, text_config
from splatshard.pipeline.models.encoder import vision_config
from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.models.pretrained import our_name
from splatshard.schemas.errors import UsageError


def save_clip(folder: str, model: SplatCLIP) -> None:
    """Write an RGB CLIP as transformers does, with its tokenizer, for `load_clip`, `--teacher` and
    `init_clip`; the inverse of `from_transformers`. `folder` is local.

    Raises UsageError for a model on splats or without a text tower.
    """
    if not isinstance(model.vision, PatchEncoder) or model.text is None:
        raise UsageError(
            f"{folder}: only a model on patches with a text tower is a CLIP that transformers "
            "knows: save_pretrained of splatshard.encoder writes the others"
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
