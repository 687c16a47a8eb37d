"""The configuration of training: JSON, settings, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from splatshard.jobs.cli.recipe import load_recipe, with_settings
from splatshard.jobs.train import main
from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.train.groups import groups_of
from splatshard.pipeline.train.losses import STAGES
from splatshard.schemas.errors import UsageError
from splatshard.schemas.plain import flat, from_dict, to_dict
from splatshard.schemas.train import (
    MAY_CHANGE,
    DataConfig,
    TrainConfig,
)
from tests.unit.train_steps import ALL, config_of


@pytest.mark.parametrize("stage", STAGES)
def test_a_configuration_survives_json(stage: str) -> None:
    config = config_of(
        stage,
        augment=ALL,
        data=DataConfig(src="a::b", weights=(0.3, 0.7), filter=(("psnr", ">=", 25.0),)),
    )
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_what_may_change_are_fields() -> None:
    names = [name for name, _ in flat(to_dict(config_of("classify")))]
    for field in MAY_CHANGE:
        assert any(name == field or name.startswith(f"{field}.") for name in names), field


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=1", "optim.lr", 1.0),
        ("data.src=/a b/c=d", "data.src", "/a b/c=d"),
        ("data.src=7", "data.src", "7"),
        ("data.num_gaussians=None", "data.num_gaussians", None),
        ("data.num_gaussians=64", "data.num_gaussians", 64),
        ("compile=True", "compile", True),
        ("precision=bf16", "precision", "bf16"),
        ("optim.trainable=('a*', 'b')", "optim.trainable", ["a*", "b"]),
        ("optim.trainable=vision.*", "optim.trainable", ["vision.*"]),
        ("data.filter=[('psnr', '>=', 25)]", "data.filter", [("psnr", ">=", 25.0)]),
        ("augment.flip=0.5", "augment.flip", 0.5),
        ("augment=None", "augment", None),
        ("model.encoder.stem.bands=3", "model.encoder.stem.bands", 3),
    ],
)
def test_a_setting(setting: str, name: str, value: Any) -> None:
    config = with_settings(config_of("contrast"), [setting])
    assert dict(flat(to_dict(config)))[name] == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lr", "write field=value"),
        ("optim.rate=1", "there is no field rate: choose one of steps, epochs, lr"),
        ("optim.lr.x=1", "there is no field x: it has no fields"),
        ("optim.lr=fast", "optim.lr is 'fast': it must be a number"),
        ("data.workers=1.5", "data.workers is 1.5: it must be a whole number"),
        ("compile=1", "compile is 1: it must be True or False"),
        ("precision=int8", "precision is 'int8': choose one of fp32, bf16, fp16"),
        ("optim.betas=0.9", "optim.betas is .*: it must have 2 parts"),
        (
            "optim.epochs=3",
            "optim.steps, optim.epochs is .*: give one of them.*--set optim.epochs=None",
        ),
        ("optim=3", "it is a group"),
        ("model.text=None", "contrastive training needs a text tower"),
        ("stage=classify", "model.num_classes is None"),
    ],
)
def test_a_setting_that_does_not_fit(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_settings(config_of("contrast"), [setting])


def test_settings_are_taken_together() -> None:
    config = with_settings(config_of("contrast"), ["optim.steps=None", "optim.epochs=3"])
    assert (config.optim.steps, config.optim.epochs) == (None, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", "must make a TrainConfig named config"),
        ("1 / 0", "the recipe fails with ZeroDivisionError"),
        ("config = (", "the recipe fails with SyntaxError"),
        (
            "from splatshard.schemas.train import DataConfig\nDataConfig(workers=-1)",
            "data.workers is -1",
        ),
    ],
)
def test_a_recipe_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe(str(tmp_path / "recipe.py"))
    with pytest.raises(UsageError, match=r"no such recipe; there are .*classify_digits, .* or "):
        load_recipe(str(tmp_path / "other.py"))
    (tmp_path / "recipe.toml").write_text("[data]\n")
    with pytest.raises(UsageError, match=r"a recipe is a Python file"):
        load_recipe(str(tmp_path / "recipe.toml"))


RECIPES = sorted(Path(__file__).parents[2].glob("jobs/recipes/[a-z]*_*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_how_to_run_it(path: Path) -> None:
    config = load_recipe(str(path))
    text = path.read_text()
    assert f"splatshard train {path.stem} " in text
    assert load_recipe(path.stem) == config  # found by its name, wherever one stands
    assert "Expected" in text
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    with torch.device("meta"):
        model = build_model(config.model)
        groups_of(model, config.optim)


def test_a_dry_run_counts_parameters_by_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without shards. What is chosen, but not used by the stage, is not trained."""
    recipe = str(Path("jobs/recipes/distill_shapes.py").resolve())
    monkeypatch.chdir(tmp_path)
    assert main([recipe, "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    model = build_model(load_recipe(recipe).model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    stem = sum(size for name, size in sizes.items() if name.startswith("vision.stem."))
    assert found["groups"]["stem"] == {"name": "stem", "total": stem, "trained": stem, "later": 0}
    assert f"{'stem':18} {stem:12,} {stem:12,}" in err
    projection = found["groups"]["vision projection"]
    assert projection["trained"] == 0 < projection["total"]
    assert "visual_projection.weight" in found["unused"]
    unused = sum(sizes[name] for name in found["unused"])
    assert f"{unused:,} more are chosen, but the loss of distill does not depend on them" in err
    assert found["parameters"] == sum(sizes.values()) == found["trainable"] + unused
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--set", "optim.epochs=None", "--set", "optim.steps=5"]
    assert main(["jobs/recipes/distill_shapes.py", "--dry-run", *short]) == 1
    assert "optim.warmup_steps is 30, but optim.steps is 5" in capsys.readouterr().err
