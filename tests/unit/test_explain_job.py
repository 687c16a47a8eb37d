"""The command explain on toy runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from splatshard.jobs.__main__ import main
from splatshard.jobs.explain import explained
from splatshard.jobs.pages.explain_images import gaussians_of
from splatshard.jobs.recipes.toys import shapes
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.source.decode import DecodedImage
from splatshard.pipeline.train import trained as trained_module
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.trained import Trained
from splatshard.schemas.config import DecodeConfig, FitConfig
from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
)
from tests.training import images_config, make_shards, toy_config
from tests.unit.explaining import PLAIN

Capsys = pytest.CaptureFixture[str]


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


def test_shards_of_whole_pictures(
    toys: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their crops are no squares: those are explained where their side is given."""
    whole = DecodeConfig(resize="shortest"), FitConfig(num_gaussians=8, steps=1)
    monkeypatch.setattr(trained_module, "recipe_of", lambda src: whole)
    command = ["explain", f"{toys}/run", f"{toys}/c.png", "--output", f"{toys}/whole"]
    assert main(command) == 1
    assert "--resize shortest, and explain makes squares: give --image-size" in (
        capsys.readouterr().err
    )
    assert main([*command, "--image-size", "16"]) == 0
    assert json.loads((toys / "whole/c.json").read_text())["size"] == 16


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
        assert "to explain --image-size and --num-gaussians" in capsys.readouterr().err
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
