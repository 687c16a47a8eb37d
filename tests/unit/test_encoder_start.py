"""Starts that an encoder predicts: as the model says, at any size and number, by its weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.jobs.convert import main as convert
from splatshard.jobs.recipes.toys import shapes, write_tars
from splatshard.pipeline.fitting import encoder_start
from splatshard.pipeline.fitting.encoder_start import predict, resolve_encoder
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.fitting.start import initial_splats
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.splats import Splats
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.trained import load_trained
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import UsageError
from tests.training import toy_config, toy_patches
from tests.unit.test_train_gvit import gvit_config, toy_gvit

CPU = select_backend("cpu")
SIDE = 32
"""Of the toy encoder's images, px."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of shapes and a short run on them, with an average."""
    place = tmp_path_factory.mktemp("toy")
    write_tars(place / "images", list(shapes(90, 0)), 40)
    train(gvit_config(place, place / "run", steps=20, optim__ema=0.9))
    return place


def pictures(side: int = SIDE, count: int = 3) -> Tensor:
    """Smooth ones, [count, 3, side, side]."""
    g = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 4, 4, generator=g)
    return F.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)


def values(splats: Splats) -> Tensor:
    return torch.cat((splats.means, splats.cholesky, splats.colors), -1)


@pytest.mark.parametrize("count", [9, 1, 14])
def test_it_is_what_the_model_says(folder: Path, count: int) -> None:
    init = resolve_encoder(f"encoder:{folder}/run", count)
    target = pictures()
    model = load_trained(str(folder / "run"), "auto", torch.device("cpu")).model
    assert isinstance(model, GViT)
    with torch.no_grad():
        wanted = model(target, count=count).splats
    assert torch.allclose(values(predict(target, init, count)), values(wanted), atol=1e-5)


def test_parts_are_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = resolve_encoder(f"encoder:{folder}/run", 9)
    whole = predict(pictures(), init, 9)
    monkeypatch.setattr(encoder_start, "ATTENTION", 1)
    assert torch.allclose(values(predict(pictures(), init, 9)), values(whole), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (20, 20)])
def test_another_size_is_the_same_picture(folder: Path, height: int, width: int) -> None:
    """Predicted at the encoder's size, drawn at the target's."""
    init = resolve_encoder(f"encoder:{folder}/run", 9)
    target = F.interpolate(pictures(), (height, width), mode="bilinear", antialias=True)
    seen = F.interpolate(target, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    small = CPU.render(predict(seen, init, 9), SIDE, SIDE, 3.0)
    large = CPU.render(predict(target, init, 9), height, width, 3.0)
    shown = F.interpolate(small, (height, width), mode="bicubic", antialias=True)
    assert psnr(large, shown).min() > 30


def test_its_colours_are_solved(folder: Path) -> None:
    init = resolve_encoder(f"encoder:{folder}/run", 9)
    config = FitConfig(num_gaussians=9, init=init)
    target = pictures()
    raw = psnr(CPU.render(predict(target, init, 9), SIDE, SIDE, 3.0), target)
    start = initial_splats(target, config, CPU)
    solved = psnr(CPU.render(start, SIDE, SIDE, 3.0), target)
    assert bool((solved > raw).all())
    assert torch.allclose(start.means, predict(target, init, 9).means)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_few_steps_lead_nearer(folder: Path, steps: int) -> None:
    """And not away from what was predicted, as full steps do."""
    target = pictures()
    config = FitConfig(
        num_gaussians=9, init=resolve_encoder(f"encoder:{folder}/run", 9), steps=steps
    )
    start = CPU.render(initial_splats(target, config, CPU), SIDE, SIDE, 3.0)
    fitted = CPU.render(fit(target, config, CPU)[0], SIDE, SIDE, 3.0)
    assert psnr(fitted, target).mean() > psnr(start, target).mean()


@pytest.mark.integration
def test_convert_writes_the_weights_into_the_recipe(
    folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Other weights under the same name are another configuration."""
    run = tmp_path / "run"
    train(gvit_config(folder, run, steps=2))
    options = ["--num-gaussians", "12", "--image-size", "24", "--steps", "2", "--workers", "1"]
    options += ["--init", f"encoder:{run}", "--limit", "20"]
    source, dst = f"{folder}/images/*.tar", str(tmp_path / "splats")
    assert convert([source, dst, *options]) == 0
    (marker,) = read_markers(dst).values()
    init = marker.inputs["recipe"]["fit"]["init"]
    trained = load_trained(str(run), "auto", torch.device("cpu"))
    assert init == f"encoder:{trained.url}#{trained.weights[:16]}"
    assert convert([source, dst, *options]) == 0
    assert "everything is already done" in capfd.readouterr().err
    shutil.rmtree(run)
    train(gvit_config(folder, run, steps=3))
    assert convert([source, dst, *options]) == 1
    assert "recipe.fit.init" in capfd.readouterr().err


def test_a_worker_with_other_weights_stops(folder: Path) -> None:
    init = resolve_encoder(f"encoder:{folder}/run", 9)
    other = init[:-4] + ("0000" if init[-4:] != "0000" else "1111")
    with pytest.raises(UsageError, match="give every worker the same files"):
        predict(pictures(), other, 9)


def test_what_cannot_be_a_start_is_refused(folder: Path, tmp_path: Path) -> None:
    patches = replace(toy_gvit(), gvit=None, encoder=toy_patches())
    config = toy_config(folder, tmp_path / "patches", steps=1)
    images = replace(config.data, src=f"{folder}/images/*.tar")
    train(replace(config, model=patches, data=images, augment=None))
    with pytest.raises(UsageError, match="predicts no Gaussians"):
        resolve_encoder(f"encoder:{tmp_path}/patches", 9)
    for name, space, message in (
        ("alpha", {"renderer": "alpha"}, "composited"),
        ("learned", {"start": "learned"}, "gives 9 Gaussians"),
    ):
        train(gvit_config(folder, tmp_path / name, steps=1, model=toy_gvit(**space)))
        with pytest.raises(UsageError, match=message):
            resolve_encoder(f"encoder:{tmp_path}/{name}", 10)
    assert resolve_encoder(f"encoder:{tmp_path}/learned", 9)
    with pytest.raises(UsageError, match="has no checkpoint"):
        resolve_encoder(f"encoder:{tmp_path}/nothing", 9)


@pytest.mark.parametrize("init", ["encoder", "encoder:", "uniform"])
def test_unknown_starts_are_refused(init: str) -> None:
    with pytest.raises(UsageError, match="choose adaptive, grid, random"):
        FitConfig(init=init)
