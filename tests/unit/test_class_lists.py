"""A label means the same class in all that a model is trained and evaluated on: by the lists of
class folders that number the labels, of which markers keep a digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splatshard.pipeline.data import ImageDataset, SplatDataset
from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.train import checkpoint
from splatshard.pipeline.train.batches import constants_of
from splatshard.schemas.config import class_list
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import EncoderConfig, ModelConfig, ResamplerConfig
from splatshard.schemas.train import DataConfig, OptimConfig, TrainConfig
from tests.make import image_folder
from tests.splat_shards import commit, rows_of
from tests.unit.evaluating import Capsys, run_job

CLASSES = ("ant", "bee", "cat")


def make_split(dst: Path, number: int, classes: tuple[str, ...], count: int = 9) -> str:
    """A shard whose labels are those of `classes`; CLASSES have as many."""
    rows = rows_of(number, count)
    for i, row in enumerate(rows):
        row["label"] = i % len(CLASSES)
    commit(str(dst), f"{number:05d}", rows, classes=classes)
    return str(dst)


def config_of(dst: Path) -> TrainConfig:
    encoder = EncoderConfig(
        width=16, layers=1, heads=2, tokens=4, resampler=ResamplerConfig(heads=2)
    )
    return TrainConfig(
        stage="classify",
        dst=str(dst),
        model=ModelConfig(encoder=encoder, num_classes=len(CLASSES)),
        data=DataConfig(src="elsewhere"),
        optim=OptimConfig(steps=1),
    )


def run_on(src: str, dst: Path) -> str:
    """A checkpoint of a model that says it was trained on `src`."""
    config = config_of(dst)
    model = build_model(config.model)
    shards: dict[str, Any] = {"data": "x", **constants_of(SplatDataset(src, batch_size=2), config)}
    checkpoint.save(str(dst), 7, model.state_dict(), None, {}, config, shards, keep=1)
    return str(dst)


def test_training_on_several_lists_is_refused(tmp_path: Path) -> None:
    parts = [
        make_split(tmp_path / str(i), i, classes)
        for i, classes in enumerate((CLASSES, CLASSES[1:]))
    ]
    dataset = SplatDataset(parts, batch_size=2)
    with pytest.raises(UsageError, match=r"0/00000-\w+.parquet and .*numbered by different class"):
        constants_of(dataset, config_of(tmp_path / "run"))
    found = constants_of(SplatDataset(parts[0], batch_size=2), config_of(tmp_path / "run"))
    assert found["class_list"] == class_list(CLASSES)


def test_a_classifier_is_evaluated_by_its_own_classes(tmp_path: Path, capsys: Capsys) -> None:
    """A split that lacks a folder was numbered without it, so its labels are other classes."""
    run = run_on(make_split(tmp_path / "train", 0, CLASSES), tmp_path / "run")
    same = make_split(tmp_path / "same", 1, CLASSES)
    unknown = make_split(tmp_path / "unknown", 2, ())  # .cls members, say
    other = make_split(tmp_path / "other", 3, CLASSES[1:])
    for src in (same, unknown):
        assert run_job(capsys, run, src, "--task", "classify")[0] == 0
    code, _, err = run_job(capsys, run, other, "--task", "classify")
    assert (code, f"{other}: its labels are numbered by other class folders" in err) == (1, True)
    assert "convert it with --classes" in err
    assert run_job(capsys, run, other, "--task", "probe", "--train", other)[0] == 0  # its own


def test_a_probe_is_evaluated_by_the_classes_it_was_trained_on(
    tmp_path: Path, capsys: Capsys
) -> None:
    train = make_split(tmp_path / "train", 0, CLASSES)
    run, other = run_on(train, tmp_path / "run"), make_split(tmp_path / "val", 1, CLASSES[1:])
    code, _, err = run_job(capsys, run, other, "--task", "probe", "--train", train)
    assert (code, f"{other}: its labels are numbered by other class folders" in err) == (1, True)


def test_images_have_the_lists_of_their_splats(tmp_path: Path) -> None:
    dataset = ImageDataset(
        str(image_folder(tmp_path / "in", CLASSES, 2)), image_size=8, batch_size=2
    )
    assert list(dataset.class_lists) == [class_list(CLASSES)]
