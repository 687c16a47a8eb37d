"""The parts of training: losses against their definitions, gradients in parts, augmentation by
sample, schedule, groups, average, configuration and its overrides."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from splatshard.jobs.cli.recipe import load_recipe, with_settings
from splatshard.jobs.train import Shown, step_line
from splatshard.pipeline.data import ImageBatch, TrainBatch
from splatshard.pipeline.data.augment import Augment, augment
from splatshard.pipeline.data.random_numbers import sample_seeds, uniform
from splatshard.pipeline.models import build_model
from splatshard.pipeline.models.gvit import Guidance
from splatshard.pipeline.train.augmentation import augment_of, augmented
from splatshard.pipeline.train.batches import Step, augmented_batch
from splatshard.pipeline.train.distributed import World
from splatshard.pipeline.train.groups import Average, freeze, groups_of, make_optimizer
from splatshard.pipeline.train.losses import STAGES, clamp
from splatshard.pipeline.train.schedule import learning_rate
from splatshard.pipeline.train.step import Embedder, Gradients
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
    TextConfig,
)
from splatshard.schemas.train import (
    MAY_CHANGE,
    AugmentConfig,
    DataConfig,
    OptimConfig,
    TrainConfig,
    flat,
    from_dict,
    to_dict,
)
from tests.rows import HEIGHT, WIDTH, random_splats

ALONE = World(0, 1, torch.device("cpu"))
ENCODER = EncoderConfig(
    width=16,
    layers=2,
    heads=2,
    tokens=4,
    stem=StemConfig(bands=2, hidden=8),
    resampler=ResamplerConfig(heads=2),
)
TEXT = TextConfig(width=16, layers=1, heads=2, vocab_size=20, context_length=6, tokenizer="")
PREDICTS = GViTConfig(
    gaussians=6,
    predictor=EncoderConfig(
        input="patches", width=16, layers=1, heads=2, image_size=16, patch_size=8, tokens=4
    ),
)
OPTIM = OptimConfig(steps=10, lr=1e-2, warmup_steps=4)


def config_of(stage: str, **options: Any) -> TrainConfig:
    if stage == "gvit":
        model = ModelConfig(encoder=replace(ENCODER, resampler=None), num_classes=5, gvit=PREDICTS)
        loss = GViTLossConfig(ramp=(0, 0))
        return TrainConfig(stage=stage, model=model, optim=OPTIM, gvit=loss, **options)
    classify = stage == "classify"
    model = ModelConfig(
        encoder=ENCODER,
        text=None if classify else TEXT,
        embed_dim=8,
        num_classes=5 if classify else None,
    )
    return TrainConfig(stage=stage, model=model, optim=OPTIM, **options)  # type: ignore[arg-type]


def step_of(count: int = 7, seed: int = 0, stage: str = "") -> Step:
    """Splats, or images if the stage is gvit."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 19, (count, 6), generator=g)
    tokens[:, -1] = 19
    fields: dict[str, Any] = {
        "heights": torch.full((count,), HEIGHT, dtype=torch.int32),
        "widths": torch.full((count,), WIDTH, dtype=torch.int32),
        "keys": [str(i) for i in range(count)],
        "captions": ["a caption"] * count,
        "labels": torch.randint(5, (count,), generator=g),
        "teacher": torch.randn(count, 16, generator=g),
        "valid": torch.ones(count, dtype=torch.bool),
    }
    if stage == "gvit":
        pixels = torch.rand(count, 3, 16, 16, generator=g)
        batch = ImageBatch(pixels=pixels, **fields)
        return Step(batch, None, torch.arange(count), guidance=Guidance(0.7, 2.0))
    batch = TrainBatch(splats=random_splats(count, 6, seed), **fields)
    return Step(batch, tokens, torch.arange(count))


def model_of(config: TrainConfig) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config.model)
    if config.stage in ("classify", "gvit"):  # their heads begin with zeros
        nn.init.normal_(model.head.weight)  # type: ignore[union-attr,arg-type]
    return model


# Losses and gradients


def test_the_contrastive_loss_is_clips() -> None:
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 8, generator=g), dim=1) for _ in range(2))
    loss, metrics = STAGES["contrast"].loss(
        (image, text, torch.tensor(7.0)), step_of(6), config_of("contrast"), ALONE
    )
    logits = (7 * image @ text.mT).double()
    rows, columns = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    assert loss.item() == pytest.approx(-(rows + columns).mean().item() / 2, rel=1e-6)
    assert metrics["logit_scale"] == 7


def test_distillation_is_the_distance_of_unit_vectors() -> None:
    step = step_of()
    assert step.batch.teacher is not None
    loss, metrics = STAGES["distill"].loss(
        (3 * step.batch.teacher,), step, config_of("distill"), ALONE
    )
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert metrics["cosine"].item() == pytest.approx(1)
    loss, _ = STAGES["distill"].loss((-step.batch.teacher,), step, config_of("distill"), ALONE)
    assert loss.item() == pytest.approx(4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [1, 3, 6])
def test_gradients_in_parts_are_those_of_the_whole(stage: str, size: int) -> None:
    """7 samples: parts need not be equal. All negatives stay."""
    found = []
    for micro_batch in (None, size):
        config = config_of(stage, micro_batch=micro_batch)
        model = model_of(config)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        embedder = Embedder(model, STAGES[stage])
        loss, metrics = Gradients(embedder, STAGES[stage], config, ALONE, scaler)(
            step_of(stage=stage), 0
        )
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss, metrics, gradients))
    (loss, metrics, whole), (loss_of_parts, metrics_of_parts, parts) = found
    assert loss_of_parts.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, value in metrics.items():
        assert metrics_of_parts[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert whole.keys() == parts.keys()
    assert stage != "contrast" or "logit_scale" in parts
    largest = max(g.abs().max().item() for g in whole.values())
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-3, atol=1e-5 * largest), name


def test_both_passes_of_a_part_see_the_same_random_numbers() -> None:
    """A model with dropout: the cached features' gradients must meet the same masks."""
    config = config_of("contrast", micro_batch=3)
    model = model_of(config)
    seen: list[torch.Tensor] = []

    def noisy(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        mask = torch.rand(len(output))
        seen.append(mask)
        return output * mask[:, None]

    model.visual_projection.register_forward_hook(noisy)  # type: ignore[union-attr]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    stage = STAGES["contrast"]
    Gradients(Embedder(model, stage), stage, config, ALONE, scaler)(step_of(), 5)
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert not torch.equal(seen[0], seen[1])


class Copies(TorchDispatchMode):
    """Notes what a GPU's process would wait for: numbers that become tensors, and tensors that go
    to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, out)) if isinstance(x, Tensor)}
        if "lift_fresh" in str(func) or ("copy" in str(func) and len(devices) > 1):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("stage", ["classify", "distill", "contrast", "gvit"])
def test_a_step_copies_nothing_to_the_device(
    monkeypatch: pytest.MonkeyPatch, stage: str, device: str
) -> None:
    """From the second step on, once the samples are there. The device meta, which is not where
    tensors are made, shows copies, and does not let anybody read a number."""
    recipe = "gvit_imagenet" if stage == "gvit" else "classify_imagenet"
    augment = load_recipe(f"jobs/recipes/{recipe}.py").augment
    assert augment
    small = replace(augment, height=16, width=16, hue=10)
    config = config_of(stage)
    if config.model.gvit:  # the CPU's kernel of a sum gets and gives arrays
        space = replace(config.model.gvit, renderer="alpha")
        config = replace(config, model=replace(config.model, gvit=space))
    if device == "meta":  # unknown to autocast
        monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())
    here = World(0, 1, torch.device(device))
    stages, scaler = STAGES[stage], torch.amp.GradScaler("cpu", enabled=False)
    model = model_of(config).to(here.device)
    gradients = Gradients(Embedder(model, stages), stages, config, here, scaler)
    for number in range(2):
        step = step_of(stage=stage)
        step = replace(step.to(here.device), guidance=step.guidance)
        with Copies() as copies:
            batch = augmented_batch(step.batch, augment_of(small, 3.0), step.seeds)
            gradients(replace(step, batch=batch), number)
    assert copies.found == []


def test_the_logit_scale_stays_below_100() -> None:
    model = model_of(config_of("contrast"))
    model.logit_scale.data.fill_(9)  # type: ignore[union-attr,operator]
    clamp(model)
    assert model.logit_scale.exp().item() == pytest.approx(100)  # type: ignore[union-attr,operator]
    clamp(model_of(config_of("classify")))  # has none


# Augmentation

ALL = AugmentConfig(
    height=40, width=56, crop_scale=(0.4, 0.9), flip=0.5, rotation=20, shear=10, zoom=(0.8, 1.2),
    shift=0.1, brightness=0.3, contrast=0.3, saturation=0.4, hue=20, grayscale=0.2, dropout=0.3,
    rescale=True,
)  # fmt: skip


def test_the_same_options_as_the_augmentation_itself() -> None:
    ours = {f.name: f.default for f in fields(AugmentConfig)}
    theirs = {f.name: f.default for f in fields(Augment) if f.name != "cutoff"}
    assert ours == theirs
    assert augment_of(ALL, 2.5) == Augment(**to_dict(ALL), cutoff=2.5)


def test_it_is_augment_with_other_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    splats, config, seeds = random_splats(5, 12), augment_of(ALL, 3.0), torch.arange(5)
    side = torch.tensor([HEIGHT] * 5), torch.tensor([WIDTH] * 5)
    numbers = uniform(seeds, 15 + 12)
    draws = iter((numbers[:, :15], numbers[:, 15:]))
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: next(draws))
    expected = augment(splats, *side, config, torch.Generator())
    found = augmented(splats, *side, config, seeds)
    for name in ("means", "cholesky", "colors", "mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_samples_augmentation_is_its_own() -> None:
    """Whatever batch it is in, and however far that is padded."""
    config = augment_of(replace(ALL, contrast=0), 3.0)
    splats, seeds = random_splats(6, 9), sample_seeds("abcdef", 1, 2)
    sides = torch.full((6,), HEIGHT), torch.full((6,), WIDTH)
    whole = augmented(splats, *sides, config, seeds)
    order = torch.tensor([4, 1])
    part = augmented(splats[order], *(s[order] for s in sides), config, seeds[order])
    for name in ("means", "cholesky", "colors"):
        a, b = getattr(part, name), getattr(whole, name)[order]
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.equal(part.mask, whole.mask[order])
    assert torch.equal(uniform(seeds, 5), uniform(seeds, 9)[:, :5])


def test_uniform_numbers() -> None:
    numbers = uniform(sample_seeds([str(i) for i in range(2000)], 3), 50)
    assert 0 <= numbers.min() < 1e-3
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(numbers.var() - 1 / 12) < 0.002
    assert len(numbers.unique()) > 0.99 * numbers.numel()
    both = torch.stack((numbers[:, :-1].flatten(), numbers[:, 1:].flatten()))
    assert abs(torch.corrcoef(both)[0, 1]) < 0.01
    assert not torch.equal(sample_seeds(["a"], 1, 2), sample_seeds(["a"], 1, 3))


# Schedule, groups, average


def test_the_learning_rate() -> None:
    config = OptimConfig(steps=110, lr=2.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(110, 110, config) == pytest.approx(0.2)
    assert learning_rate(0, 1, replace(config, warmup_steps=0)) == 2.0


def test_weight_decay_of_matrices_alone() -> None:
    config = config_of("contrast")
    model = model_of(config)
    optimizer = make_optimizer(model, groups_of(model, OPTIM), OPTIM)
    decayed, others = (group["params"] for group in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    plain = {id(p) for p in others}
    names = {name for name, p in model.named_parameters() if id(p) in plain}
    assert "logit_scale" in names
    assert all(p.ndim >= 2 for p in decayed)
    assert len(decayed) + len(others) == len(list(model.parameters()))
    assert {n.rsplit(".", 1)[-1] for n in names if "norm" in n} == {"weight", "bias"}


def test_no_weight_decay_of_learned_gaussians() -> None:
    config = config_of("gvit")
    assert config.model.gvit is not None
    learned = replace(config.model.gvit, start="learned")
    model = model_of(replace(config, model=replace(config.model, gvit=learned)))
    start = dict(model.named_parameters())["predictor.start"]
    decayed, others = (
        g["params"] for g in make_optimizer(model, groups_of(model, OPTIM), OPTIM).param_groups
    )
    assert any(p is start for p in others)
    assert not any(p is start for p in decayed)


def test_freezing_takes_gradients_away() -> None:
    model = model_of(config_of("contrast"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    groups = groups_of(model, replace(OPTIM, trainable=("vision.stem.*",), later=("logit_scale",)))
    assert groups.later_from == OPTIM.warmup_steps
    freeze(model, groups.at(3))
    kept = {name for name, p in model.named_parameters() if p.grad is not None}
    assert kept == {n for n, _ in model.named_parameters() if n.startswith("vision.stem.")}
    assert kept == {name for name, p in model.named_parameters() if p.requires_grad}
    freeze(model, groups.at(4))
    assert model.logit_scale.requires_grad  # type: ignore[union-attr]


def test_the_average_follows_the_weights() -> None:
    model = nn.Linear(2, 1)
    start = model.weight.detach().clone()
    average = Average(model, 0.9)
    with torch.no_grad():
        model.weight += 1
    average.update(model, 0)
    assert torch.allclose(average.values["weight"], start + 0.9)
    average.update(model, 10_000)
    assert torch.allclose(average.values["weight"], start + 0.9 + 0.1 * 0.1)


# Configuration


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
        ("precision=int8", "precision is 'int8': choose fp32, bf16, fp16"),
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
    with pytest.raises(UsageError, match=r"no such recipe"):
        load_recipe(str(tmp_path / "other.py"))


RECIPES = sorted(Path(__file__).parents[2].glob("jobs/recipes/[a-z]*_*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_how_to_run_it(path: Path) -> None:
    config = load_recipe(str(path))
    text = path.read_text()
    assert f"splatshard train jobs/recipes/{path.name}" in text
    assert "Expected" in text
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    with torch.device("meta"):
        model = build_model(config.model)
        groups_of(model, config.optim)


# What people see


def test_lines_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "event": "step",
        "step": 120,
        "loss": 1.23456,
        "accuracy": 0.5,
        "lr": 5e-4,
        "images_per_s": 1234.5,
        "data_wait_share": 0.031,
        "memory_bytes": 1.2e9,
        "eta_s": 70.0,
    }
    with Shown() as shown:
        shown({"event": "step", **record})
        shown({"event": "checkpoint", "step": 120, "url": "x"})
    assert step_line(record, 500) == (
        "120/500  loss 1.235  accuracy 0.5  lr 5.0e-04  1,234 images/s  waits 3 %  1.2 GB  "
        "1 min 10 s left"
    )
    assert capsys.readouterr().err.count("\n") == 1


@given(st.integers(1, 400), st.integers(0, 50), st.floats(0, 1))
def test_the_learning_rate_stays_in_its_bounds(steps: int, warmup: int, final: float) -> None:
    config = OptimConfig(steps=steps, lr=1.0, warmup_steps=warmup, final_lr=final)
    for step in range(steps):
        rate = learning_rate(step, steps, config)
        assert 0 <= rate <= 1
        assert math.isfinite(rate)
