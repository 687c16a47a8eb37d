"""The stage gvit in train(): both losses fall, a stopped run goes on exactly, what is frozen stays,
parts add up, wrong configurations are refused, and evaluation reads such a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import splatshard
from splatshard.jobs.cli.recipe import load_recipe
from splatshard.jobs.evaluate import main as evaluate
from splatshard.jobs.recipes.toys import shapes, write_tars
from splatshard.pipeline.data.random_numbers import uniform
from splatshard.pipeline.models.gaussian_space import drawn
from splatshard.pipeline.models.gvit import GViT, gamma_at
from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.train import losses
from splatshard.pipeline.train.augmentation import start_seeds
from splatshard.pipeline.train.batches import Feed
from splatshard.pipeline.train.checkpoint import latest, read_checkpoint
from splatshard.pipeline.train.distributed import World
from splatshard.pipeline.train.log import read_log
from splatshard.pipeline.train.loop import start_model, train, used_groups
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
    StemConfig,
)
from splatshard.schemas.plain import from_dict, to_dict
from splatshard.schemas.train import AugmentConfig, TrainConfig
from tests.training import CLASSES, curve, same_weights, toy_config, toy_patches, weights_of

ALONE = World(0, 1, torch.device("cpu"))
GUIDED = GViTLossConfig(ramp=(0.2, 0.6))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pictures of shapes, 32 px, in {folder}/images."""
    place = tmp_path_factory.mktemp("toy")
    write_tars(place / "images", list(shapes(90, 0)), 40)
    return place


def toy_gvit(**space: Any) -> ModelConfig:
    reader = EncoderConfig(
        width=16, layers=1, heads=2, stem=StemConfig(bands=2, hidden=16), resampler=None
    )
    config = GViTConfig(**{"gaussians": 9, "predictor": toy_patches(), "bands": 2} | space)
    return ModelConfig(encoder=reader, num_classes=CLASSES, gvit=config)


def gvit_config(
    folder: Path,
    dst: Path | str,
    *,
    model: ModelConfig | None = None,
    loss: GViTLossConfig | None = GUIDED,
    **fields: Any,
) -> TrainConfig:
    """As `toy_config`, of the stage gvit on the images."""
    fields = {"data__src": f"{folder}/images/*.tar"} | fields
    config = toy_config(folder, dst, **fields)
    return replace(config, stage="gvit", model=model or toy_gvit(), gvit=loss)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of 40 steps, with an average; from grey, since there both losses have far to fall."""
    model = toy_gvit(start="random")
    train(gvit_config(folder, folder / "run", model=model, steps=40, optim__ema=0.9))
    return folder / "run"


def test_both_losses_fall(run: Path) -> None:
    for name, share in (("loss", 0.9), ("entropy", 0.98), ("reconstruction", 0.8)):
        values = list(curve(run, name).values())
        assert sum(values[-5:]) < share * sum(values[:5]), name
    quality = list(curve(run, "psnr").values())
    assert sum(quality[-5:]) > sum(quality[:5]) + 5 * 1.0
    expected = [gamma_at(step, 40, GUIDED) for step in range(40)]
    assert list(curve(run, "gamma").values()) == pytest.approx(expected)
    assert (expected[0], expected[-1]) == (0, 1)
    (start,) = (r for r in read_log(str(run)) if r["event"] == "start")
    assert start["unused"] == []


class Stop(Exception):
    """In place of a kill."""


def stop(record: Mapping[str, Any]) -> None:
    if record["event"] == "step" and record["step"] == 6:
        raise Stop


def test_a_stopped_run_goes_on_bitwise(folder: Path, tmp_path: Path) -> None:
    """From the checkpoint of step 4, within the ramp; 5 steps are an epoch. Augmented, so that
    seeds have both their uses."""
    options = {"steps": 9, "optim__ema": 0.9, "augment": AugmentConfig(
        height=32, width=32, rotation=20, contrast=0.2)}  # fmt: skip
    whole = train(gvit_config(folder, tmp_path / "whole", **options))
    config = gvit_config(folder, tmp_path / "cut", **options)
    with pytest.raises(Stop):
        train(config, stop)
    cut = train(config)
    for name in ("loss", "gamma", "psnr"):
        assert curve(tmp_path / "cut", name) == curve(tmp_path / "whole", name)
    a, b = read_checkpoint(whole.checkpoint), read_checkpoint(cut.checkpoint)
    for name in ("model.safetensors", "ema.safetensors"):
        assert same_weights(a.weights(name), b.weights(name))


@pytest.mark.parametrize(
    "fields", [{"optim__steps": 8}, {"optim__steps": None, "optim__epochs": 1}]
)
def test_the_ramp_of_a_run_does_not_move(
    folder: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    train(gvit_config(folder, tmp_path, steps=2))
    config = gvit_config(folder, tmp_path)
    names = {name.removeprefix("optim__"): value for name, value in fields.items()}
    with pytest.raises(
        UsageError, match=r"were 2 and None in .*gvit\.ramp .* or choose another dst"
    ):
        train(replace(config, optim=replace(config.optim, **names)))


def test_guidance_changes_a_run_from_its_ramp_on(folder: Path, tmp_path: Path) -> None:
    """Until then guided and unguided are one; the ramp begins with step 3."""
    for name, gamma in (("guided", 1.0), ("unguided", 0.0)):
        loss = replace(GUIDED, gamma=gamma, ramp=(0.5, 0.5))
        train(gvit_config(folder, tmp_path / name, loss=loss, steps=6, optim__clip=None))
    guided, unguided = (curve(tmp_path / name, "grad_norm") for name in ("guided", "unguided"))
    assert [guided[n] == unguided[n] for n in range(1, 7)] == [True] * 3 + [False] * 3


def test_what_is_frozen_does_not_move(folder: Path, tmp_path: Path) -> None:
    """The predictor, with the classifier in training; and the reverse, guided."""
    loss = replace(GUIDED, ramp=(0, 0))
    for trained, patterns in (
        ("predictor", ("predictor.*",)),
        ("encoder", ("encoder.*", "head.*")),
    ):
        fields = {"optim__trainable": patterns, "checkpoint__every": 1, "checkpoint__keep": 9}
        train(gvit_config(folder, tmp_path / trained, loss=loss, steps=3, **fields))
        first, last = (weights_of(f"{tmp_path}/{trained}/checkpoints/{n:08d}") for n in (1, 3))
        moved = {n.split(".")[0] for n in first if not torch.equal(first[n], last[n])}
        assert moved == ({"predictor"} if trained == "predictor" else {"encoder", "head"})


@pytest.mark.parametrize("start", ["image", "random", "learned"])
@pytest.mark.parametrize("renderer", ["sum", "alpha"])
def test_all_parameters_are_used_before_the_ramp(start: Any, renderer: Any) -> None:
    """With several processes all that is trained must have a gradient in every step."""
    model = toy_gvit(start=start, renderer=renderer)
    config = gvit_config(Path(), "", model=model, loss=replace(GUIDED, gamma=0.0))
    network = start_model(config, None, None)
    groups = used_groups(network, losses.stage_of(config, ALONE.device), config, ALONE)
    assert set(groups.now) == {name for name, _ in network.named_parameters()}
    assert groups.unused == ()


def test_draws_are_the_samples_own_and_not_the_augmentations(folder: Path) -> None:
    config = gvit_config(folder, "", data__batch_size=30, model=toy_gvit())
    feed = iter(Feed(config, ALONE))
    epochs = [[next(feed) for _ in range(3)] for _ in range(2)]
    assert config.model.gvit is not None
    drawn_for: list[dict[str, torch.Tensor]] = []
    for steps in epochs:
        found = [drawn(start_seeds(s.seeds), 9, 32, 32, config.model.gvit) for s in steps]
        keys = [key for s in steps for key in s.batch.keys]
        drawn_for.append(dict(zip(keys, torch.cat(found), strict=True)))
    first, second = drawn_for
    assert first.keys() == second.keys()
    assert len({tuple(g.flatten().tolist()) for g in [*first.values(), *second.values()]}) == 180
    seeds = epochs[0][0].seeds
    gap = (uniform(start_seeds(seeds), 40) - uniform(seeds, 40)).abs()
    assert gap.min() > 1e-6  # of 1,200 numbers, at random
    assert 0.2 < gap.mean() < 0.47


def test_the_perceptual_tower_is_no_part_of_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    loaded: list[str] = []

    def load(source: str) -> PatchEncoder:
        loaded.append(source)
        torch.manual_seed(1)
        return PatchEncoder(toy_patches()).eval().requires_grad_(False)

    monkeypatch.setattr(losses, "load_tower", load)
    plain = train(gvit_config(folder, tmp_path / "plain", steps=2))
    loss = replace(GUIDED, perceptual=0.5, tower="weights")
    result = train(gvit_config(folder, tmp_path / "tower", loss=loss, steps=2))
    assert loaded == ["weights"]
    assert result.record["perceptual"] > 0
    parts = result.record["entropy"] + 10 * result.record["reconstruction"]
    assert result.record["loss"] == pytest.approx(parts + 0.5 * result.record["perceptual"])
    ours, theirs = weights_of(result.checkpoint), weights_of(plain.checkpoint)
    assert ours.keys() == theirs.keys()
    assert not same_weights(ours, theirs)


def test_low_precision_in_parts(folder: Path, tmp_path: Path) -> None:
    """Rendering and losses are float32 all the same: the same run but for the blocks' rounding."""
    for name, fields in (("fp32", {}), ("bf16", {"precision": "bf16", "micro_batch": 5})):
        train(gvit_config(folder, tmp_path / name, steps=3, **fields))
    for name, far in (("loss", 0.02), ("reconstruction", 0.02), ("psnr", 0.02)):
        ours, theirs = (curve(tmp_path / precision, name) for precision in ("bf16", "fp32"))
        assert ours == pytest.approx(theirs, rel=far)
        assert ours != theirs


def test_a_run_begins_with_the_weights_of_another(folder: Path, run: Path) -> None:
    """Predictor and classifier, say of an unguided run; the average where there is one."""
    config = gvit_config(folder, "", init=str(run), loss=GViTLossConfig(ramp=(0, 0)))
    found = latest(str(run))
    assert found is not None
    state = start_model(config, None, None).state_dict()
    assert same_weights(state, found.weights("ema.safetensors"))


# Configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gvit": None}, r"gvit is None: the stage gvit wants a GViTLossConfig\(\)"),
        ({"model": ModelConfig(num_classes=3)}, "model.gvit is None: give it a GViTConfig"),
        ({"stage": "classify"}, "gvit is .*: of the stage gvit; this is classify: leave it"),
        ({"stage": "classify", "gvit": None}, "model.gvit is .*: .* this is classify: leave it"),
        ({"gvit": replace(GUIDED, perceptual=1.0)}, "gvit.tower is '': .*give a local folder"),
        ({"gvit": replace(GUIDED, perceptual=1.0, tower="/nowhere")}, "/nowhere"),
        ({"augment": AugmentConfig(height=64, width=64)}, "model reads images of 32 px"),
        ({"augment": AugmentConfig(height=32, width=32, dropout=0.1)}, "dropout"),
        ({"init_clip": "some"}, "init_clip is some: a classifier takes init alone"),
    ],
)
def test_configurations_that_do_not_fit(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(replace(gvit_config(folder, tmp_path), **changes))


def test_labels_and_gaussians_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    few = replace(toy_gvit(), num_classes=3)
    with pytest.raises(UsageError, match=r"sample .* has the label .*, and model.num_classes is 3"):
        train(gvit_config(folder, tmp_path, model=few))
    with pytest.raises(UsageError, match=r"data\.num_gaussians is 9, but the model reads images"):
        train(gvit_config(folder, tmp_path, data__num_gaussians=9))


def test_a_configuration_survives_json(folder: Path) -> None:
    loss = replace(GUIDED, perceptual=0.1, tower="clip")
    config = gvit_config(folder, "", model=toy_gvit(start="learned"), loss=loss)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", ["gvit_digits", "classify_digits"])
def test_the_arms_in_the_recipes_docstring(name: str) -> None:
    """Every `splatshard train` there is a configuration; each is another arm."""
    text = (ROOT / "jobs/recipes/gvit_digits.py").read_text().replace("\\\\\n", " ")
    commands = [
        line.split("splatshard train ")[1] for line in text.splitlines() if "ard train" in line
    ]
    arms = [words for words in map(shlex.split, commands) if words[0] == name]
    configs = [load_recipe(name, words[2::2]) for words in arms]
    assert len(arms) == (4 if name == "gvit_digits" else 2)
    for words in arms:
        assert set(words[1::2]) == {"--set"}
    if name == "gvit_digits":
        guided, unguided, learned, grey = configs
        assert all(c.gvit is not None and c.model.gvit is not None for c in configs)
        assert unguided == replace(guided, gvit=GViTLossConfig(gamma=0.0), data=unguided.data)
        starts = [c.model.gvit.start for c in (guided, learned, grey) if c.model.gvit is not None]
        assert starts == ["image", "learned", "random"]
    else:
        offline, patches = (c.model.encoder for c in configs)
        assert (offline.input, offline.resampler) == ("splats", None)
        assert patches.input == "patches"


# Evaluation


def results_of(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "results"
    assert evaluate([*arguments, "--output", str(out), "--device", "cpu"]) == 0
    return json.loads((out / "shapes.json").read_text())


def test_evaluation_of_a_run(folder: Path, run: Path, tmp_path: Path) -> None:
    data = f"shapes={folder}/images/*.tar"
    found = results_of(tmp_path, str(run), data)
    assert (found["task"], found["samples"]) == ("classify", 90)
    assert found["metrics"].keys() >= {"top1", "top5", "psnr"}
    trained = list(curve(run, "psnr").values())[-5:]
    assert abs(found["metrics"]["psnr"] - sum(trained) / 5) < 2
    chosen = results_of(tmp_path, str(run), data, "--metric", "psnr")
    assert chosen["main"] == {"metric": "psnr", "value": found["metrics"]["psnr"]}


def test_a_saved_model_says_the_same(run: Path, tmp_path: Path) -> None:
    embed = splatshard.encoder(str(run), device="cpu")
    assert isinstance(embed.model, GViT)
    embed.save_pretrained(tmp_path / "saved")
    loaded = splatshard.encoder(tmp_path / "saved", device="cpu")
    pixels = torch.rand(3, 32, 32)
    assert torch.equal(loaded.logits(pixels), embed.logits(pixels))
    assert torch.equal(loaded(pixels), embed(pixels))


def test_a_linear_probe_on_the_gaussians(folder: Path, run: Path, tmp_path: Path) -> None:
    images = f"{folder}/images/*.tar"
    found = results_of(tmp_path, str(run), f"shapes={images}", "--task", "probe", "--train", images)
    assert found["metrics"]["top1"] > 3 / CLASSES
