"""explain: its scores against differences and plain twins, the pointing game on made scenes, and
the command on a toy run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from splatshard.jobs.__main__ import main
from splatshard.jobs.explain import explained
from splatshard.jobs.pages.explain_images import gaussians_of
from splatshard.jobs.pages.explain_picture import ellipses_of, outlines, shares
from splatshard.jobs.recipes.toys import shapes
from splatshard.pipeline.evaluation.explain import (
    SCORES,
    Box,
    block_attention,
    box_in_crop,
    covered,
    explain,
    pointing_hit,
    recorded,
    resampler_attention,
    saliency_map,
)
from splatshard.pipeline.fitting.fit import moved
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.source.decode import DecodedImage, decode
from splatshard.pipeline.splats import Splats, scales_and_angles
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.trained import Trained
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
)
from tests.make import encode
from tests.training import images_config, make_shards, toy_config

Capsys = pytest.CaptureFixture[str]

SIDE = 32
STEM = StemConfig(bands=2, hidden=16)
PLAIN = EncoderConfig(width=16, layers=2, heads=2, stem=STEM, resampler=None)
RESAMPLED = replace(PLAIN, tokens=4, resampler=ResamplerConfig(layers=2, heads=2, neighbours=3))


def model_of(encoder: EncoderConfig, seed: int = 0) -> Any:
    """A toy classifier of three classes whose weights are all large enough to show."""
    torch.manual_seed(seed)
    model = SplatClassifier(ModelConfig(encoder=encoder, num_classes=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
    return model


def splats_of(n: int = 7, padding: int = 0, seed: int = 0, batch: int = 1) -> Splats:
    g = torch.Generator().manual_seed(seed)
    scales = 1.5 + 2 * torch.rand(batch, n, 3, generator=g)
    mask = torch.arange(n).expand(batch, n) < n - padding
    return Splats(
        SIDE * torch.rand(batch, n, 2, generator=g),
        scales * torch.tensor([1.0, 0.4, 1.0]),
        torch.randn(batch, n, 3, generator=g) / 2,
        mask,
    )


def logits_of(model: SplatClassifier, splats: Splats) -> Tensor:
    sizes = torch.full((len(splats),), SIDE)
    with torch.no_grad():
        return model.head(model.encoder(splats, sizes, sizes))


# Scores


@pytest.mark.parametrize("encoder", [PLAIN, RESAMPLED], ids=["plain", "resampled"])
def test_gradients_are_those_of_differences(encoder: EncoderConfig) -> None:
    """In the frame of the fit: `moved` takes the steps, all eight of each Gaussian."""
    model, splats, n, step = model_of(encoder), splats_of(), 7, 3e-3
    found = explain(model, splats, SIDE, SIDE, 1)
    steps = step * torch.eye(n * 8).view(n * 8, n, 8)
    many = Splats(*(x.expand(n * 8, *x.shape[1:]) for x in _parts(splats)))
    up, down = (logits_of(model, moved(many, sign * steps, True))[:, 1] for sign in (1, -1))
    slopes = ((up - down) / (2 * step)).view(n, 8)
    torch.testing.assert_close(found.gradient, slopes.norm(dim=1), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("encoder", [PLAIN, RESAMPLED], ids=["plain", "resampled"])
def test_contributions_sum_to_what_the_colours_do(encoder: EncoderConfig) -> None:
    model, splats = model_of(encoder), splats_of()
    found = explain(model, splats, SIDE, SIDE, 1).contribution
    black = logits_of(model, replace(splats, colors=torch.zeros(1, 7, 3)))
    total = (logits_of(model, splats) - black)[0, 1]
    assert abs(total) > 0.1
    torch.testing.assert_close(found.sum(), total, rtol=0.02, atol=0)
    assert found.min() < 0 < found.max()


def test_a_contribution_is_gradient_times_colour_where_the_logit_is_linear() -> None:
    """Faint colours: there it is also what taking the Gaussian away takes from the logit."""
    model, splats = model_of(PLAIN), splats_of()
    faint = replace(splats, colors=1e-2 * splats.colors)
    found = explain(model, faint, SIDE, SIDE, 1).contribution
    without = faint.colors * (1 - torch.eye(7))[..., None]
    several = Splats(*(x.expand(7, *x.shape[1:]) for x in _parts(faint)))
    lost = logits_of(model, faint)[:, 1] - logits_of(model, replace(several, colors=without))[:, 1]
    torch.testing.assert_close(found, lost, rtol=0.1, atol=1e-3)


def _parts(splats: Splats) -> tuple[Tensor, ...]:
    return splats.means, splats.cholesky, splats.colors, splats.mask


def test_the_class_is_the_likeliest_unless_told() -> None:
    model, splats = model_of(PLAIN), splats_of()
    expected = logits_of(model, splats)[0]
    found = explain(model, splats, SIDE, SIDE)
    torch.testing.assert_close(found.logits, expected)
    assert found.label == expected.argmax()
    assert found.probabilities.sum() == pytest.approx(1)
    other = explain(model, splats, SIDE, SIDE, (found.label + 1) % 3)
    assert not torch.allclose(other.gradient, found.gradient)
    assert torch.equal(other.attention, found.attention)  # is not about a class


@pytest.mark.parametrize("encoder", [PLAIN, RESAMPLED], ids=["plain", "resampled"])
def test_padding_gets_nothing_and_changes_nothing(encoder: EncoderConfig) -> None:
    model, splats = model_of(encoder), splats_of(7, padding=2)
    splats.means[0, 5:] = torch.nan
    found = explain(model, splats, SIDE, SIDE, 0)
    alone = explain(model, Splats(*(x[:, :5] for x in _parts(splats))), SIDE, SIDE, 0)
    for name in ("gradient", "contribution", "attention"):
        assert (getattr(found, name)[5:] == 0).all()
        torch.testing.assert_close(getattr(found, name)[:5], getattr(alone, name))
    assert (found.attention[:5] > 0).all()
    assert found.attention.sum() + found.elsewhere.sum() == pytest.approx(1)


def test_an_exact_circle_still_has_a_gradient() -> None:
    splats = splats_of()
    splats.cholesky[0, 3] = torch.tensor([2.0, 0.0, 2.0])
    found = explain(model_of(PLAIN), splats, SIDE, SIDE)
    assert found.gradient.isfinite().all()
    assert (found.gradient > 0).all()


# Attention


def test_attention_of_a_block_makes_what_the_block_makes() -> None:
    """With one head: the weights times the values are the layer's output."""
    model = model_of(replace(PLAIN, heads=1))
    splats = splats_of(7, padding=2)
    with recorded(model.encoder) as seen:
        logits_of(model, splats)
    for block, (x, mask) in zip(model.encoder.encoder.layers, seen["blocks"], strict=True):
        weights = block_attention(block, x, mask)
        assert weights.shape == (1, 8, 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 8))
        assert (weights[..., 6:] == 0).all()
        y = block.layer_norm1(x)
        made = block.self_attn.out_proj(weights @ block.self_attn.v_proj(y))
        torch.testing.assert_close(made, block.self_attn(y, mask)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block_attention(block, x, mask, rows=1), weights[:, :1])


@pytest.mark.parametrize("bias", ["none", "distance", "overlap"])
def test_attention_of_the_resampler_makes_what_it_makes(bias: Any) -> None:
    config = ResamplerConfig(layers=1, heads=1, neighbours=3, bias=bias)
    model = model_of(replace(RESAMPLED, resampler=config))
    with recorded(model.encoder) as seen:
        logits_of(model, splats_of(7, padding=2))
    layer, (x, tokens, *features) = model.encoder.resampler.layers[0], seen["resampler"][0]
    weights = resampler_attention(layer, x, tokens, *features)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4))
    assert (weights[..., 5:] == 0).all()
    made = layer.out_proj(weights @ layer.v_proj(tokens))
    expected = layer.attend(layer.norm1(x), tokens, *features)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_attention_without_a_resampler_is_the_last_row_of_cls() -> None:
    model, splats = model_of(PLAIN), splats_of()
    found = explain(model, splats, SIDE, SIDE)
    with recorded(model.encoder) as seen:
        logits_of(model, splats)
    block, x = model.encoder.encoder.layers[-1], seen["blocks"][-1][0]
    y = block.layer_norm1(x)[0]
    rows = []
    for head in range(2):
        own = slice(8 * head, 8 * head + 8)
        q, k = block.self_attn.q_proj(y)[0, own], block.self_attn.k_proj(y)[:, own]
        rows.append((k @ q / math.sqrt(8)).softmax(0))
    expected = torch.stack(rows).mean(0)
    torch.testing.assert_close(torch.cat((found.elsewhere, found.attention)), expected)


def test_rollout_is_the_product_of_whole_matrices() -> None:
    """Over one graph of CLS, four latents and seven Gaussians, which keep what they have."""
    model, splats = model_of(RESAMPLED), splats_of()
    found = explain(model, splats, SIDE, SIDE)
    with recorded(model.encoder) as seen:
        logits_of(model, splats)
    flow = torch.eye(12)
    for layer, arguments in zip(model.encoder.resampler.layers, seen["resampler"], strict=True):
        step = torch.eye(12)
        step[1:5] /= 2
        step[1:5, 5:] = resampler_attention(layer, *arguments)[0] / 2
        flow = step @ flow
    for block, arguments in zip(model.encoder.encoder.layers, seen["blocks"], strict=True):
        step = torch.eye(12)
        step[:5, :5] = (block_attention(block, *arguments)[0] + torch.eye(5)) / 2
        flow = step @ flow
    torch.testing.assert_close(torch.cat((found.elsewhere, found.attention)), flow[0])


# The map and the pointing game


def scenes(count: int, seed: int) -> tuple[Splats, Tensor, list[Box]]:
    """Clutter of 16 blue and green Gaussians; in those of class 1 the first one is red, and boxes
    are around the first one."""
    splats = splats_of(16, seed=seed, batch=count)
    splats.cholesky[:] = torch.tensor([1.6, 0.0, 2.0])
    splats.colors[:] = splats.colors.abs().clamp(0.2, 0.8)
    splats.colors[..., 0] = 0
    labels = torch.arange(count) % 2
    splats.colors[labels == 1, 0] = torch.tensor([0.7, 0.0, 0.0])
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in splats.means[:, 0].tolist()]
    return splats, labels, boxes


@cache
def seeing_red() -> SplatClassifier:
    """A tiny model that learned to tell whether there is a red Gaussian."""
    torch.manual_seed(0)
    encoder = replace(PLAIN, layers=1)
    model = SplatClassifier(ModelConfig(encoder=encoder, num_classes=2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    sizes = torch.full((64,), SIDE)
    for step in range(120):
        splats, labels, _ = scenes(64, 100 + step)
        loss = F.cross_entropy(model.head(model.encoder(splats, sizes, sizes)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    return model.eval()


def pointing(
    model: SplatClassifier, count: int, label: int = 1, turn: int = 0
) -> tuple[dict[str, float], float]:
    """The pointing game on scenes of the class `label`: shares of hits by score, and of chance.
    With `turn` a scene has the box of another one."""
    splats, _, boxes = scenes(2 * count, 7)
    boxes = boxes[turn:] + boxes[:turn]
    hits: dict[str, float] = dict.fromkeys(SCORES, 0.0)
    chance = 0.0
    for i in range(label, 2 * count, 2):
        found = explain(model, splats[i : i + 1], SIDE, SIDE, 1)
        chance += covered([boxes[i]], SIDE, SIDE).float().mean().item() / count
        for name in SCORES:
            scores = getattr(found, name)
            saliency = saliency_map(found.splats, scores, SIDE, SIDE, 3.0, select_backend("cpu"))
            hits[name] += pointing_hit(saliency, [boxes[i]]) / count
    return hits, chance


def test_a_trained_model_points_at_the_object() -> None:
    hits, chance = pointing(seeing_red(), 12)
    assert chance < 0.08
    assert min(hits.values()) > 0.9


def test_a_model_that_knows_nothing_is_near_chance() -> None:
    """On clutter, as what is red stands out to random weights too, and with boxes that are not
    around Gaussians: maps are large where many are, and boxes around one hold its neighbours."""
    models = [model_of(replace(PLAIN, layers=1), seed) for seed in range(4)]
    games = [pointing(model, 8, 0, 2) for model in models]
    for name in SCORES:
        assert abs(np.mean([hits[name] - chance for hits, chance in games])) < 0.12


def test_the_map_is_largest_where_the_only_one_that_matters_is() -> None:
    splats = splats_of(6)
    scores = torch.tensor([0.0, 0, 0, 2.5, 0, 0])
    found = saliency_map(splats, scores, SIDE, SIDE, 3.0, select_backend("cpu"))
    y, x = divmod(int(found.argmax()), SIDE)
    mean = splats.means[0, 3]
    assert (mean - torch.tensor([x + 0.5, y + 0.5])).abs().max() <= 0.71
    assert 0.8 * 2.5 < found.max() <= 2.5
    assert (found >= 0).all()
    assert found.shape == (SIDE, SIDE)


def test_pointing_by_hand() -> None:
    saliency = torch.zeros(4, 6)
    assert not pointing_hit(saliency, [(0, 0, 6, 4)])  # says nothing
    saliency[1, 4] = 1
    assert pointing_hit(saliency, [(4, 1, 5, 2)])
    assert pointing_hit(saliency, [(0, 0, 1, 1), (3, 0, 6, 2)])
    assert not pointing_hit(saliency, [(0, 0, 4, 4)])
    assert not pointing_hit(saliency, [(0, 2, 6, 4)])
    assert covered([(0, 0, 3, 4), (2, 0, 3, 4)], 4, 6).float().mean() == 0.5


@pytest.mark.parametrize(("width", "height"), [(90, 60), (48, 100), (64, 64)])
def test_a_box_goes_with_the_crop(width: int, height: int) -> None:
    """A white rectangle in a black image is in the crop where its box is."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[24:50, 20:40] = 255
    crop = decode(encode(pixels, "PNG"), "it", DecodeConfig(image_size=40)).pixels
    box = box_in_crop((20, 24, 40, 50), width, height, 40)
    assert box is not None
    inside = covered([box], 40, 40).numpy()
    assert (inside == (crop[..., 0] > 127)).mean() > 0.99
    assert box_in_crop((0, 0, 5, 5), 100, 60, 40) is None
    assert box_in_crop((10, 0, 60, 30), 100, 60, 60) == (0, 0, 40, 30)


# The picture


def test_outlines_are_one_standard_deviation() -> None:
    splats = splats_of(3)
    offsets = ellipses_of(splats) - splats.means[0][:, None]
    scales, angles = scales_and_angles(splats.cholesky[0])
    along = offsets @ torch.stack((angles.cos(), angles.sin()), -1)[..., None]
    torch.testing.assert_close(along.amax((1, 2)), scales[:, 0], rtol=0.02, atol=0)


def test_high_scores_are_bright_and_all_zero_is_drawn() -> None:
    splats, pixels = splats_of(2), np.zeros((SIDE, SIDE, 3), np.float32)
    splats.means[0] = torch.tensor([[8.0, 16.0], [24.0, 16.0]])
    panel = np.asarray(outlines(pixels, splats, np.array([0.0, 3.0], np.float32), 4))
    assert panel[:, 64:, 1].max() > 150 > panel[:, :64].max()
    assert (shares(np.zeros(3, np.float32)) == 0).all()
    assert shares(np.array([-1.0, 1, 4], np.float32)).tolist() == [0, 0.5, 1]


# The command


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{it}/splats, {it}/run, a classifier of them, and {it}/a.png to c.png."""
    folder = make_shards(tmp_path_factory.mktemp("toys"), count=18, per_shard=18)
    train(toy_config(folder, folder / "run", steps=2))
    for name, (image, _, _) in zip("abc", shapes(3, 5), strict=True):
        image.resize((48, 32)).save(folder / f"{name}.png")
    lines = ["image,left,top,right,bottom", *(f"{name}.png,8,0,40,16" for name in "ab")]
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_command_writes_pictures_and_numbers(toys: Path, capsys: Capsys) -> None:
    images = [f"{toys}/{name}.png" for name in "ab"]
    (toys / "names.txt").write_text("".join(f"name {i}\n" for i in range(24)))
    flags = ["--boxes", f"{toys}/boxes.csv", "--classnames", f"{toys}/names.txt", "--json"]
    assert main(["explain", f"{toys}/run", *images, "--label", "3", *flags]) == 0
    out, err = capsys.readouterr()
    output = Path(json.loads(out.splitlines()[-1])["output"])
    assert output == toys / "run/explain/00000002"
    assert sorted(p.name for p in output.iterdir()) == ["a.json", "a.png", "b.json", "b.png"]
    found = json.loads((output / "a.json").read_text())
    assert (found["label"], found["class"], found["size"]) == (3, "name 3", 32)
    assert found["step"] == 2
    assert [len(x) for x in found["gaussians"].values()] == [8] * 6  # of the shards
    assert sum(found["gaussians"]["attention"]) + found["attention_elsewhere"] == pytest.approx(1)
    assert max(found["gaussians"]["gradient"]) > 0
    assert found["boxes"] == [[0, 0, 32, 16]]
    assert found["chance"] == 0.5
    assert found["psnr"] > 10
    for name, (_, y) in found["maximum"].items():
        assert found["hit"][name] == (y < 16)
    with Image.open(output / "a.png") as picture:
        assert picture.width > 5 * 288
    assert "pointing game, 2 images: " in err
    assert "chance 50.0 %" in err


def test_json_lines_of_boxes_and_another_folder(toys: Path, tmp_path: Path, capsys: Capsys) -> None:
    box = {"image": f"{toys}/c.png", "left": 12, "top": 4, "right": 20.5, "bottom": 9}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(box) + "\n")
    flags = ["--boxes", f"{tmp_path}/boxes.jsonl", "--output", f"{tmp_path}/out"]
    assert main(["explain", f"{toys}/run", f"{toys}/c.png", *flags, "--num-gaussians", "5"]) == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "out/c.json").read_text())
    assert found["boxes"] == [[4, 4, 12.5, 9]]
    assert found["label"] == found["predicted"]
    assert len(found["gaussians"]["means"]) == 5


def _broken(toys: Path) -> list[str]:
    (toys / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    return ["run", "broken.png"]


def _other_boxes(toys: Path) -> list[str]:
    return ["run", "c.png", "--boxes", "boxes.csv"]


def _no_columns(toys: Path) -> list[str]:
    (toys / "none.csv").write_text("a.png,1,2,3,4\n")
    return ["run", "a.png", "--boxes", "none.csv"]


def _outside(toys: Path) -> list[str]:
    (toys / "far.csv").write_text("image,left,top,right,bottom\na.png,1,2,300,400\n")
    return ["run", "a.png", "--boxes", "far.csv"]


def _empty_box(toys: Path) -> list[str]:
    (toys / "empty.csv").write_text("image,left,top,right,bottom\na.png,9,2,3,4\n")
    return ["run", "a.png", "--boxes", "empty.csv"]


def _few_names(toys: Path) -> list[str]:
    (toys / "few.txt").write_text("one\ntwo\n")
    return ["run", "a.png", "--classnames", "few.txt"]


def _patches(toys: Path) -> list[str]:
    train(images_config(toys, toys / "patches", steps=1))
    return ["patches", "a.png"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: ["run", "nothing.png"], "nothing.png"),
        (_broken, "give an image file (JPEG"),
        (lambda _: ["run", "a.png", "--label", "24"], "24 classes, choose 0 to 23"),
        (lambda _: ["run", "a.png", "--label", "-1"], "--label -1: classes are numbered from 0"),
        (lambda _: ["splats", "a.png"], "has no checkpoint: give the dst of a splatshard train"),
        (lambda _: ["run", "a.png", "x/a.png"], "would both be written to a.png"),
        (lambda _: ["run", "a.png", "--num-gaussians", "0"], "--num-gaussians 0: choose 1"),
        (_other_boxes, "has no box for"),
        (_no_columns, "its first line must be image,left,top,right,bottom"),
        (_outside, "is not within its 48x32 px"),
        (_empty_box, "line 2: the box (9, 2, 3, 4) is empty"),
        (_few_names, "few.txt has 2 names, the model has 24 classes"),
        (_patches, "a classifier of patches, which has no Gaussians"),
    ],
)
def test_bad_input_is_one_line(
    toys: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capsys,
    make: Callable[[Path], list[str]],
    words: str,
) -> None:
    monkeypatch.chdir(toys)
    assert main(["explain", *make(toys)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("splatshard: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_without_its_shards_a_run_wants_to_be_told(
    toys: Path, tmp_path: Path, capsys: Capsys
) -> None:
    shards = toys / "splats"
    away = shards.rename(toys / "elsewhere")
    try:
        arguments = ["explain", f"{toys}/run", f"{toys}/a.png", "--output", str(tmp_path)]
        assert main(arguments) == 1
        assert "give --image-size and --num-gaussians" in capsys.readouterr().err
        assert main([*arguments, "--image-size", "24", "--num-gaussians", "6"]) == 0
    finally:
        away.rename(shards)
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["size"], len(found["gaussians"]["means"])) == (24, 6)


def toy_gvit(**space: Any) -> ModelConfig:
    predictor = EncoderConfig(
        input="patches", width=16, layers=1, heads=2, image_size=24, patch_size=8, tokens=9
    )
    gvit = GViTConfig(gaussians=10, predictor=predictor, bands=2, **space)
    return ModelConfig(encoder=PLAIN, num_classes=24, gvit=gvit)


def test_the_command_takes_runs_of_gvit(toys: Path, tmp_path: Path, capsys: Capsys) -> None:
    images = images_config(toys, tmp_path / "gvit", steps=1)
    train(replace(images, stage="gvit", model=toy_gvit(), gvit=GViTLossConfig()))
    arguments = ["explain", f"{tmp_path}/gvit", f"{toys}/a.png"]
    assert main([*arguments, "--boxes", f"{toys}/boxes.csv"]) == 0
    assert "pointing game, 1 image: " in capsys.readouterr().err
    found = json.loads((tmp_path / "gvit/explain/00000001/a.json").read_text())
    assert (found["size"], len(found["gaussians"]["means"])) == (24, 10)
    assert main([*arguments, "--image-size", "32"]) == 1
    assert "the model reads 24 px: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("renderer", ["sum", "alpha"])
def test_gvit_is_explained_by_the_gaussians_it_predicts(renderer: Any) -> None:
    config = toy_gvit(renderer=renderer)
    torch.manual_seed(0)
    model = GViT(config).eval()
    nn.init.normal_(model.head.weight)
    trained = Trained(model, config, "run", 1, "", torch.device("cpu"))
    pixels = np.asarray(next(shapes(1))[0].resize((24, 24)))
    size, take = gaussians_of(trained, None, None)
    decoded = DecodedImage(pixels.copy(), 48, 24)
    result = explained(
        trained, decoded, take, None, list("abcdefghijklmnopqrstuvwx"), [(0, 0, 24, 24)]
    )
    assert (size, result["size"], len(result["gaussians"]["means"])) == (24, 24, 10)
    assert result["hit"] == {"gradient": True, "contribution": True, "attention": True}
    assert result["attention_kind"] == "last block"
    with torch.no_grad():
        output = model(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255)
    expected = output.logits.softmax(1)[0]
    assert result["probability"] == pytest.approx(expected.max().item(), rel=1e-4)
    assert result["picture"].startswith(b"\x89PNG")
    assert gaussians_of(trained, None, 6)[1](torch.zeros(1, 3, 24, 24))[0].mask.shape == (1, 6)
