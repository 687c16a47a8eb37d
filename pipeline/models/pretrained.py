"""Weights from elsewhere; export.py has the way back.

    clip = load_clip("openai/clip-vit-base-patch16")        a name of transformers' hub, or a folder
    clip = load_clip("ViT-M-16.pt", activation="gelu")      an open_clip checkpoint, as it was saved
    init_from_clip(student, clip)                           blocks, norms, text; latents from its
                                                            position embeddings

open_clip keeps queries, keys and values in one matrix, its projections the other way round, and
some models scale what a block adds (`ls_1.gamma`): the scale goes into the layer before it, which
is the same function. A state dict does not say whether the MLPs have gelu (most of open_clip's) or
quick_gelu (OpenAI's weights, and models named so): the caller, or `open_clip_config.json`, must.

Measured against open_clip 3.3.0 with random weights (norms, biases and gammas too), float32, batch
of 2: embeddings up to 4.2 differ by at most 2.4e-6, images and texts, of ViT-M-16, M-16-alt, M-32,
B-16, B-32-quickgelu and L-14-quickgelu. In the tests a second implementation stands for open_clip.

Left out: open_clip's models with other text towers, attention pooling, or SigLIP's heads.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as read_safetensors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import SourceError, UnavailableError, UsageError
from splatshard.schemas.model import Activation, EncoderConfig, ModelConfig, TextConfig

if TYPE_CHECKING:
    pass

HEAD_WIDTH = 64  # of every model that open_clip's plain CLIP configs describe
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def load_clip(
    source: str, *, activation: Activation | None = None, tokenizer: str = ""
) -> SplatCLIP:
    """An RGB CLIP (PatchEncoder, text tower) in eval mode.

    `source`: a name on the Hugging Face hub or a folder that transformers wrote; a folder of an
    open_clip model on the hub (open_clip_config.json); or a checkpoint file of open_clip, .pt,
    .bin or .safetensors, which needs `activation`. `tokenizer`: name or folder, if not where
    `source` says. Raises UsageError when it cannot be loaded or is no such model.
    """
    if source.endswith((".pt", ".bin", ".safetensors")):
        if activation is None:
            raise UsageError(
                f"{source}: a checkpoint does not say which activation it was trained with: "
                "give gelu, or quick_gelu for OpenAI's weights and models named quickgelu"
            )
        model = from_open_clip(read_state(source), activation)
    elif (config := _open_clip_config(source)) is not None:
        quick = config.get("model_cfg", config).get("quick_gelu", False)
        files = [f"{source}/{x}" for x in OPEN_CLIP_FILES if fs.exists(f"{source}/{x}")]
        if not files:
            raise UsageError(f"{source}: holds none of {', '.join(OPEN_CLIP_FILES)}")
        model = from_open_clip(read_state(files[0]), "quick_gelu" if quick else "gelu")
        tokenizer = tokenizer or source
    else:
        model = from_transformers(_load_transformers(source), tokenizer or source)
    if tokenizer and model.config.text is not None:
        text = replace(model.config.text, tokenizer=tokenizer)
        model.config = replace(model.config, text=text)
    return model.eval()


def from_transformers(clip: CLIPModel, tokenizer: str) -> SplatCLIP:
    """transformers' CLIP as ours, with its weights; `tokenizer` is a name or folder."""
    model = SplatCLIP(config_of(clip.config, tokenizer))
    model.load_state_dict({our_name(k): v for k, v in clip.state_dict().items()})
    return model.eval()


def config_of(config: CLIPConfig, tokenizer: str) -> ModelConfig:
    """Our configuration of transformers' CLIP. Raises UsageError for what ours cannot say."""
    given: Any = config  # its fields are declared wider than those of a CLIP are
    vision, text = given.vision_config, given.text_config
    side, patch = vision.image_size, vision.patch_size
    encoder = EncoderConfig(
        input="patches",
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
        activation=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        tokens=(side // patch) ** 2,
        patch_size=patch,
        image_size=side,
    )
    return ModelConfig(
        encoder=encoder,
        embed_dim=given.projection_dim,
        text=TextConfig(
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            mlp_ratio=text.intermediate_size / text.hidden_size,
            activation=text.hidden_act,
            layer_norm_eps=text.layer_norm_eps,
            vocab_size=text.vocab_size,
            context_length=text.max_position_embeddings,
            # configs of OpenAI's models say 2 by mistake; transformers then takes the largest id
            eos_token_id=-1 if text.eos_token_id == 2 else text.eos_token_id,
            tokenizer=tokenizer,
        ),
    )


def from_open_clip(state: dict[str, Tensor], activation: Activation) -> SplatCLIP:
    """The model of an open_clip state dict (`visual.transformer.resblocks...`), its size read from
    the shapes. Raises UsageError where it is of another kind."""
    state = {k.removeprefix("module."): v for k, v in state.items()}
    # models of open_clip's class CustomTextCLIP keep the same text tower under another name
    state = {k.removeprefix("text."): v for k, v in state.items()}
    wanted = ("visual.conv1.weight", "visual.proj", "token_embedding.weight", "text_projection")
    for name in wanted:
        if name not in state:
            raise UsageError(f"open_clip checkpoint: no {name}: only plain CLIP ViTs are known")
    model = SplatCLIP(open_clip_config(state, activation))
    try:
        model.load_state_dict(converted(state))
    except RuntimeError as error:
        raise UsageError(f"open_clip checkpoint: not a plain CLIP ViT: {error}") from error
    return model.eval()


def open_clip_config(state: dict[str, Tensor], activation: Activation) -> ModelConfig:
    """Sizes from the shapes of an open_clip state dict."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    patches = len(state["visual.positional_embedding"]) - 1
    vocab, text_width = state["token_embedding.weight"].shape
    hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    text_hidden = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    return ModelConfig(
        embed_dim=state["visual.proj"].shape[1],
        encoder=EncoderConfig(
            input="patches",
            width=width,
            layers=_count(state, "visual.transformer.resblocks."),
            heads=max(1, width // HEAD_WIDTH),
            mlp_ratio=hidden / width,
            activation=activation,
            tokens=patches,
            patch_size=patch,
            image_size=round(patches**0.5) * patch,
        ),
        text=TextConfig(
            width=text_width,
            layers=_count(state, "transformer.resblocks."),
            heads=max(1, text_width // HEAD_WIDTH),
            mlp_ratio=text_hidden / text_width,
            activation=activation,
            vocab_size=vocab,
            context_length=len(state["positional_embedding"]),
        ),
    )


TOWERS = {
    "visual.class_embedding": "vision.embeddings.class_embedding",
    "visual.positional_embedding": "vision.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision.pre_layrnorm",
    "visual.ln_post": "vision.post_layernorm",
    "visual.transformer.resblocks": "vision.encoder.layers",
    "token_embedding.weight": "text.embeddings.token_embedding.weight",
    "positional_embedding": "text.embeddings.position_embedding.weight",
    "ln_final": "text.final_layer_norm",
    "transformer.resblocks": "text.encoder.layers",
    "logit_scale": "logit_scale",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""open_clip's names to ours; in_proj, the projections and ls_*.gamma have rules of their own."""


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict under our names; see the module's docstring."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ("visual.proj", "text_projection"):
            out[("visual" if name == "visual.proj" else "text") + "_projection.weight"] = value.T
        elif name.endswith(".gamma") or name == "attn_mask":  # below; a constant of old versions
            continue
        else:
            tower = next((x for x in TOWERS if f"{name}.".startswith(f"{x}.")), None)
            if tower is None:
                raise UsageError(f"open_clip checkpoint: unknown parameter {name}")
            out |= _in_block(TOWERS[tower] + name.removeprefix(tower), value)
    for name, gamma in state.items():
        if name.endswith(".gamma"):  # x + gamma * (W y + b)
            block, scale = name.removesuffix(".gamma").rsplit(".", 1)
            tower = next(x for x in TOWERS if block.startswith(f"{x}."))
            layer = {"ls_1": "self_attn.out_proj", "ls_2": "mlp.fc2"}[scale]
            prefix = f"{TOWERS[tower]}{block.removeprefix(tower)}.{layer}"
            out[f"{prefix}.weight"] = out[f"{prefix}.weight"] * gamma[:, None]
            out[f"{prefix}.bias"] = out[f"{prefix}.bias"] * gamma
    return {k: v.contiguous() for k, v in out.items()}


def _in_block(name: str, value: Tensor) -> dict[str, Tensor]:
    """One parameter under the names it has within a block, if it is in one."""
    for part in ("weight", "bias"):
        if name.endswith(f".attn.in_proj_{part}"):
            block = name.removesuffix(f".attn.in_proj_{part}")
            thirds = zip("qkv", value.chunk(3), strict=True)
            return {f"{block}.self_attn.{x}_proj.{part}": y for x, y in thirds}
    for theirs, ours in BLOCK.items():
        if f".{theirs}." in name:
            return {name.replace(f".{theirs}.", f".{ours}."): value}
    return {name: value}


def read_state(path: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint file: safetensors, or torch.save of one, or of a training
    checkpoint that holds one as `state_dict`. Nothing in it is executed.

    Raises UsageError, SourceError and UnavailableError.
    """
    try:
        if path.endswith(".safetensors"):
            return read_safetensors(read_bytes(path))
        with fs.open_read(path) as stream:
            state = torch.load(stream, map_location="cpu", weights_only=True)
    except (SourceError, UnavailableError):
        raise
    except Exception as error:  # safetensors, pickle, zip and storage each have their own
        raise UsageError(f"{path}: cannot be read as a checkpoint ({error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"{path}: holds no state dict")
    return state


def init_from_clip(student: SplatCLIP, clip: SplatCLIP) -> None:
    """Give `student` what it shares with `clip` (RGB): blocks, norms, CLS, projections, the text
    tower if it has one. Of a student on splats the latents become the position embeddings; one on
    patches gets all there is.

    Raises UsageError where the sizes differ.
    """
    assert isinstance(clip.vision, PatchEncoder), "the teacher's input is patches"
    ours, theirs = student.config, clip.config
    for name in ("width", "layers", "heads", "mlp_ratio", "activation", "layer_norm_eps"):
        _same(f"encoder.{name}", getattr(ours.encoder, name), getattr(theirs.encoder, name))
    _same("embed_dim", ours.embed_dim, theirs.embed_dim)
    if isinstance(student.vision, PatchEncoder):
        for name in ("patch_size", "image_size"):
            _same(f"encoder.{name}", getattr(ours.encoder, name), getattr(theirs.encoder, name))
        student.vision.load_state_dict(clip.vision.state_dict())
    else:
        student.vision.init_from_patches(clip.vision.state_dict())
    student.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    if student.text is None:
        return
    assert clip.text is not None, "the teacher has a text tower"
    assert ours.text is not None
    assert theirs.text is not None
    for name in ("width", "layers", "heads", "mlp_ratio", "activation", "vocab_size", "eos"):
        _same(f"text.{name}", getattr(ours.text, name), getattr(theirs.text, name))
    student.text.load_state_dict(clip.text.state_dict())
    student.text_projection.load_state_dict(clip.text_projection.state_dict())
    with torch.no_grad():
        student.logit_scale.copy_(clip.logit_scale)


def read_bytes(url: str) -> bytes:
    with fs.open_read(url) as stream:
        return stream.read()


def _load_transformers(source: str) -> CLIPModel:
    try:
        return CLIPModel.from_pretrained(source)
    except Exception as error:  # transformers raises many kinds, also for a missing network
        raise UsageError(
            f"{source}: no CLIP can be loaded from there ({error}): "
            "give a name on the Hugging Face hub, a folder or an open_clip checkpoint"
        ) from error


def _open_clip_config(folder: str) -> dict[str, Any] | None:
    """open_clip_config.json of a local folder."""
    path = f"{folder}/open_clip_config.json"
    return json.loads(read_bytes(path)) if fs.exists(path) else None


def our_name(name: str) -> str:
    """transformers' name to ours."""
    for theirs, ours in (("vision_model.", "vision."), ("text_model.", "text.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Blocks under `prefix`."""
    return len({k.split(prefix)[1].split(".")[0] for k in state if k.startswith(prefix)})


def _same(name: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise UsageError(f"{name} = {ours}, the RGB model's is {theirs}: they must be equal")
