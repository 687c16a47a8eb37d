"""Training on images: a patch model learns, a stopped run goes on exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splatshard.pipeline.train.checkpoint import read_checkpoint
from splatshard.pipeline.train.loop import train
from splatshard.schemas.errors import UsageError
from splatshard.schemas.train import AugmentConfig
from tests.make import jpeg, write_tar
from tests.training import Stop, curve, images_config, same_weights, stop_after, toy_config

AUGMENT = AugmentConfig(height=32, width=32, rotation=20, contrast=0.2, crop_scale=(0.6, 1.0))


@pytest.mark.parametrize("stage", ["classify", "contrast"])
def test_the_loss_falls(shards: Path, tmp_path: Path, stage: str) -> None:
    train(images_config(shards, tmp_path, stage, steps=40, optim__lr=1e-2))
    losses = list(curve(tmp_path).values())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("stage", ["classify", "contrast"])
def test_a_stopped_run_goes_on_bitwise(shards: Path, tmp_path: Path, stage: str) -> None:
    """5 steps are an epoch; checkpoints are at 4 and 7. In parts, too."""
    options: dict[str, Any] = {"steps": 7, "augment": AUGMENT, "micro_batch": 8}
    whole = train(images_config(shards, tmp_path / "whole", stage, **options))
    with pytest.raises(Stop):
        train(images_config(shards, tmp_path / "cut", stage, **options), stop_after(6))
    cut = train(images_config(shards, tmp_path / "cut", stage, **options))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    a, b = read_checkpoint(whole.checkpoint), read_checkpoint(cut.checkpoint)
    assert same_weights(a.weights(), b.weights())
    assert a.state()["reader"] == b.state()["reader"]


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("distill", {}, "stage is distill, but the model reads images"),
        ("classify", {"data__num_gaussians": 8}, "data.num_gaussians is 8"),
        ("classify", {"augment": replace(AUGMENT, dropout=0.1)}, "augment.dropout is 0.1"),
        ("classify", {"augment": replace(AUGMENT, width=40)}, "images of 32 px: set both"),
        ("classify", {"data__src": ""}, "data.src is empty: the model reads images"),
        ("classify", {"data__batch_size": 100}, "has only 90 samples"),
    ],
)
def test_configurations_that_do_not_fit(
    shards: Path, tmp_path: Path, stage: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(images_config(shards, tmp_path, stage, **fields))


def test_a_sample_without_a_label_is_named_with_its_shard(tmp_path: Path, shards: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", jpeg(seed=i)) for i in range(16)])
    config = images_config(shards, tmp_path / "run", data__src=str(tmp_path / "a.tar"))
    with pytest.raises(UsageError, match=r"a\.tar: sample \d+ has no label"):
        train(config)
    config = images_config(shards, tmp_path / "run", "contrast", data__src=str(tmp_path / "a.tar"))
    with pytest.raises(UsageError, match=r"a\.tar: sample \d+ has no caption"):
        train(config)


def test_splat_weights_do_not_begin_a_patch_model(shards: Path, tmp_path: Path) -> None:
    train(toy_config(shards, tmp_path / "splats", steps=1))
    with pytest.raises(
        UsageError, match=r"lacks .* weights, .* give a run with this model\.encoder"
    ):
        train(images_config(shards, tmp_path / "patches", init=str(tmp_path / "splats")))
    train(images_config(shards, tmp_path / "first", steps=1))
    train(images_config(shards, tmp_path / "second", steps=1, init=str(tmp_path / "first")))
