"""The parts of training: losses by their definitions, gradients in parts, the lines of a run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from splatshard.jobs.cli.recipe import load_recipe
from splatshard.jobs.train import Shown, step_line
from splatshard.pipeline.train.batches import augmented_batch
from splatshard.pipeline.train.distributed import World
from splatshard.pipeline.train.losses import STAGES, clamp
from splatshard.pipeline.train.step import Embedder, Gradients
from tests.unit.train_steps import ALONE, config_of, model_of, step_of


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
            batch = augmented_batch(step.batch, small, step.seeds, 3.0)
            gradients(replace(step, batch=batch), number)
    assert copies.found == []


def test_the_logit_scale_stays_below_100() -> None:
    model = model_of(config_of("contrast"))
    model.logit_scale.data.fill_(9)  # type: ignore[union-attr,operator]
    clamp(model)
    assert model.logit_scale.exp().item() == pytest.approx(100)  # type: ignore[union-attr,operator]
    clamp(model_of(config_of("classify")))  # has none


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
