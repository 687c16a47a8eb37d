"""Weights: transformers' and open_clip's CLIP as ours, the export, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.export import save_clip
from splatshard.pipeline.models.pretrained import (
    from_open_clip,
    init_from_clip,
    load_clip,
    open_clip_config,
)
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import ModelConfig, ResamplerConfig
from tests.unit.toy_models import TOY, tokenizer_folder

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
IDS = torch.tensor([[8, 3, 4, 9, 0, 0], [8, 2, 5, 6, 7, 9]])
STUDENT = replace(TOY, resampler=ResamplerConfig(heads=4), activation="quick_gelu")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Path]:
    """A small CLIP of transformers, and the folder it was saved to with its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    size = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision = size | {"intermediate_size": 128, "image_size": 32, "patch_size": 8}
    text = size | {"intermediate_size": 64, "vocab_size": 10, "max_position_embeddings": 6}
    text |= {"eos_token_id": 9, "bos_token_id": 8, "pad_token_id": 0}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    clip = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    clip.save_pretrained(folder)
    tokenizer_folder(folder)
    return clip, folder


def test_transformers_clip_gives_the_same(theirs: tuple[CLIPModel, Path]) -> None:
    clip, folder = theirs
    ours = load_clip(str(folder))
    assert ours.config.text is not None
    assert ours.config.text.tokenizer == str(folder)
    assert not ours.training
    with torch.no_grad():
        image = clip.get_image_features(PIXELS).pooler_output
        text = clip.get_text_features(IDS).pooler_output
        torch.testing.assert_close(ours.encode_image(PIXELS), image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.encode_text(IDS), text, atol=1e-5, rtol=1e-5)
    assert ours.logit_scale.item() == clip.logit_scale.item()


def test_an_rgb_model_is_saved_as_transformers_does(
    theirs: tuple[CLIPModel, Path], tmp_path: Path
) -> None:
    ours = load_clip(str(theirs[1]))
    folder = str(tmp_path / "saved")
    save_clip(folder, ours)
    clip, again = CLIPModel.from_pretrained(folder).eval(), load_clip(folder)
    assert again.config == replace(
        ours.config,
        text=replace(ours.config.text, tokenizer=folder),  # type: ignore[type-var]
    )
    with torch.no_grad():
        for model in (again, theirs[0], clip):
            found = (
                (model.encode_image(PIXELS), model.encode_text(IDS))
                if isinstance(model, SplatCLIP)
                else (
                    model.get_image_features(PIXELS).pooler_output,
                    model.get_text_features(IDS).pooler_output,
                )
            )
            torch.testing.assert_close(found[0], ours.encode_image(PIXELS), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1], ours.encode_text(IDS), atol=1e-5, rtol=1e-5)


def test_only_an_rgb_clip_is_saved_so(theirs: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    teacher = load_clip(str(theirs[1]))
    student = SplatCLIP(ModelConfig(encoder=STUDENT, text=teacher.config.text, embed_dim=16))
    with pytest.raises(UsageError, match="only a model on patches"):
        save_clip(str(tmp_path / "saved"), student)


def test_student_starts_from_the_teacher(theirs: tuple[CLIPModel, Path]) -> None:
    teacher = load_clip(str(theirs[1]))
    student = SplatCLIP(ModelConfig(encoder=STUDENT, text=teacher.config.text, embed_dim=16))
    init_from_clip(student, teacher)
    ours, source = student.state_dict(), teacher.state_dict()
    shared = [k for k in ours if k in source]
    assert any(k.startswith("vision.encoder.layers.1.") for k in shared)
    assert all(torch.equal(ours[k], source[k]) for k in shared)
    positions = source["vision.embeddings.position_embedding.weight"]
    torch.testing.assert_close(ours["vision.resampler.latents"], positions[1:])  # 4 x 4 both
    cls = source["vision.embeddings.class_embedding"] + positions[0]
    torch.testing.assert_close(ours["vision.class_embedding"], cls)
    eight = replace(student.config, encoder=replace(STUDENT, tokens=8))
    init_from_clip(fewer := SplatCLIP(eight), teacher)
    rows = positions[1:].unflatten(0, (4, 4))  # anchors on 2 rows lie between those of 4
    expected = ((rows[0::2] + rows[1::2]) / 2).flatten(0, 1)
    torch.testing.assert_close(fewer.state_dict()["vision.resampler.latents"], expected)


def test_a_student_on_patches_is_the_teacher(theirs: tuple[CLIPModel, Path]) -> None:
    teacher = load_clip(str(theirs[1]))
    torch.manual_seed(1)
    student = SplatCLIP(teacher.config)
    init_from_clip(student, teacher)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in student.state_dict().items())
    other = replace(teacher.config.encoder, patch_size=16, tokens=4)
    with pytest.raises(UsageError, match=r"encoder\.patch_size = 16"):
        init_from_clip(SplatCLIP(replace(teacher.config, encoder=other)), teacher)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, "encoder.width = 64, the RGB model's is 32"),
        ({"layers": 3}, "encoder.layers = 3"),
        ({"activation": "gelu"}, "encoder.activation = gelu"),
    ],
)
def test_a_teacher_of_another_size_is_refused(
    theirs: tuple[CLIPModel, Path], change: dict[str, Any], message: str
) -> None:
    student = SplatCLIP(ModelConfig(encoder=replace(STUDENT, **change), embed_dim=16))
    with pytest.raises(UsageError, match=message):
        init_from_clip(student, load_clip(str(theirs[1])))


def open_clip_state(
    width: int, layers: int, patch: int, text_width: int, scaled: bool = False
) -> dict[str, Tensor]:
    """A random state dict with open_clip's names and shapes (model.py of open_clip 3.3)."""
    g = torch.Generator().manual_seed(width + patch)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * (0.7 / max(shape[-1], 2) ** 0.5)

    def block(prefix: str, d: int) -> dict[str, Tensor]:
        shapes = {
            "ln_1.weight": (d,),
            "ln_1.bias": (d,),
            "attn.in_proj_weight": (3 * d, d),
            "attn.in_proj_bias": (3 * d,),
            "attn.out_proj.weight": (d, d),
            "attn.out_proj.bias": (d,),
            "ln_2.weight": (d,),
            "ln_2.bias": (d,),
            "mlp.c_fc.weight": (4 * d, d),
            "mlp.c_fc.bias": (4 * d,),
            "mlp.c_proj.weight": (d, 4 * d),
            "mlp.c_proj.bias": (d,),
        }
        if scaled and prefix.startswith("visual"):
            shapes |= {"ls_1.gamma": (d,), "ls_2.gamma": (d,)}
        return {f"{prefix}.{k}": random(*v) for k, v in shapes.items()}

    side = 2
    state = {
        "positional_embedding": random(6, text_width),
        "text_projection": random(text_width, 16),
        "logit_scale": torch.tensor(3.0),
        "visual.class_embedding": random(width),
        "visual.positional_embedding": random(side * side + 1, width),
        "visual.proj": random(width, 16),
        "visual.conv1.weight": random(width, 3, patch, patch),
        "token_embedding.weight": random(10, text_width),
        "ln_final.weight": random(text_width),
        "ln_final.bias": random(text_width),
    }
    for name in ("ln_pre", "ln_post"):
        state |= {f"visual.{name}.weight": random(width), f"visual.{name}.bias": random(width)}
    for i in range(layers):
        state |= block(f"visual.transformer.resblocks.{i}", width)
        state |= block(f"transformer.resblocks.{i}", text_width)
    return state


def open_clip_forward(
    state: dict[str, Tensor], pixels: Tensor, ids: Tensor, quick: bool
) -> tuple[Tensor, Tensor]:
    """open_clip's functions of a state dict, written down from its definition alone: torch's own
    multi-head attention, projections from the right, the text's place by the largest id."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x: Tensor, prefix: str, mask: Tensor | None) -> Tensor:
        for i in range(2):
            p = f"{prefix}transformer.resblocks.{i}"
            y = norm(x, f"{p}.ln_1").transpose(0, 1)
            y = F.multi_head_attention_forward(
                y,
                y,
                y,
                x.shape[-1],
                x.shape[-1] // 64,
                state[f"{p}.attn.in_proj_weight"],
                state[f"{p}.attn.in_proj_bias"],
                None,
                None,
                False,
                0.0,
                state[f"{p}.attn.out_proj.weight"],
                state[f"{p}.attn.out_proj.bias"],
                need_weights=False,
                attn_mask=mask,
            )[0].transpose(0, 1)
            x = x + state.get(f"{p}.ls_1.gamma", torch.ones(())) * y
            y = norm(x, f"{p}.ln_2") @ state[f"{p}.mlp.c_fc.weight"].T
            y = y + state[f"{p}.mlp.c_fc.bias"]
            y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
            y = y @ state[f"{p}.mlp.c_proj.weight"].T + state[f"{p}.mlp.c_proj.bias"]
            x = x + state.get(f"{p}.ls_2.gamma", torch.ones(())) * y
        return x

    kernel = state["visual.conv1.weight"]
    x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    cls = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat((cls, x), 1) + state["visual.positional_embedding"]
    x = blocks(norm(x, "visual.ln_pre"), "visual.", None)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = norm(blocks(x, "", torch.full((6, 6), -torch.inf).triu(1)), "ln_final")
    return image, x[torch.arange(len(x)), ids.argmax(1)] @ state["text_projection"]


SIZES = [  # width, layers, patch, text width: those of B/32, B/16, L/14 and M-16, less layers
    pytest.param((768, 2, 32, 512), "quick_gelu", id="ViT-B-32-quickgelu"),
    pytest.param((768, 2, 16, 512), "gelu", id="ViT-B-16"),
    pytest.param((1024, 2, 14, 768), "gelu", id="ViT-L-14"),
    pytest.param((512, 2, 16, 512), "gelu", id="ViT-M-16"),
    pytest.param((512, 2, 16, 384, True), "gelu", id="ViT-M-16-alt"),
]


@pytest.mark.parametrize(("size", "activation"), SIZES)
def test_open_clip_gives_the_same(size: Any, activation: Any) -> None:
    state = open_clip_state(*size)
    pixels = torch.randn(2, 3, 2 * size[2], 2 * size[2], generator=torch.Generator().manual_seed(0))
    model = from_open_clip({f"module.{k}": v for k, v in state.items()}, activation)
    assert model.config.encoder.heads * 64 == size[0]
    with torch.no_grad():
        image, text = open_clip_forward(state, pixels, IDS, activation == "quick_gelu")
        torch.testing.assert_close(model.encode_image(pixels), image, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(model.encode_text(IDS), text, atol=2e-5, rtol=2e-5)
    assert model.logit_scale.item() == 3.0


def test_open_clip_itself_gives_the_same() -> None:
    """Where open_clip can be imported (it needs torchvision)."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    theirs = open_clip.create_model("ViT-M-16").eval()
    ours = from_open_clip(theirs.state_dict(), "gelu")
    pixels = torch.randn(1, 3, 224, 224)
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, :4] = torch.tensor([49406, 320, 1125, 49407])
    with torch.no_grad():
        args = {"atol": 2e-5, "rtol": 2e-5}
        torch.testing.assert_close(ours.encode_image(pixels), theirs.encode_image(pixels), **args)
        torch.testing.assert_close(ours.encode_text(ids), theirs.encode_text(ids), **args)


def test_open_clip_sizes_are_read_from_shapes() -> None:
    config = open_clip_config(open_clip_state(512, 2, 16, 384), "quick_gelu")
    encoder, text = config.encoder, config.text
    assert text is not None
    assert (encoder.width, encoder.heads, encoder.layers) == (512, 8, 2)
    assert (encoder.patch_size, encoder.image_size, encoder.tokens) == (16, 32, 4)
    assert (text.width, text.heads, text.vocab_size, text.context_length) == (384, 6, 10, 6)
    assert (encoder.activation, config.embed_dim) == ("quick_gelu", 16)


def test_open_clip_files(tmp_path: Path) -> None:
    state = open_clip_state(64, 1, 8, 64)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    save_file(state, tmp_path / "open_clip_model.safetensors")
    ours = load_clip(str(tmp_path / "epoch_3.pt"), activation="gelu", tokenizer="/some/folder")
    assert ours.config.text is not None
    assert ours.config.text.tokenizer == "/some/folder"
    config = {"model_cfg": {"quick_gelu": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    hub = load_clip(str(tmp_path))
    assert hub.config.encoder.activation == "quick_gelu"
    for name, value in hub.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    with pytest.raises(UsageError, match="which activation"):
        load_clip(str(tmp_path / "epoch_3.pt"))


@pytest.mark.parametrize("wrong", ["visual.proj", "token_embedding.weight"])
def test_other_open_clip_models_are_refused(wrong: str) -> None:
    state = open_clip_state(64, 1, 8, 64)
    del state[wrong]
    with pytest.raises(UsageError, match=f"no {wrong}"):
        from_open_clip(state, "gelu")
    more = open_clip_state(64, 1, 8, 64) | {"visual.attn_pool.query": torch.zeros(2)}
    with pytest.raises(UsageError, match=r"unknown parameter visual\.attn_pool"):
        from_open_clip(more, "gelu")
    less = open_clip_state(64, 2, 8, 64)
    del less["visual.transformer.resblocks.1.ln_1.weight"]
    with pytest.raises(UsageError, match="not a plain CLIP ViT"):
        from_open_clip(less, "gelu")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"nonsense")
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(UsageError, match="cannot be read as a checkpoint"):
            load_clip(str(tmp_path / name), activation="gelu")
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(UsageError, match="holds no state dict"):
        load_clip(str(tmp_path / "b.pt"), activation="gelu")
    with pytest.raises(UsageError, match="no CLIP can be loaded"):
        load_clip(str(tmp_path))
