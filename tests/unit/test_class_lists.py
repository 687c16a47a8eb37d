"""A label means the same class in all that a model is trained and evaluated on: by the lists of
classes that number the labels, folders or a ClassLabel, of which markers keep a digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splatshard.jobs import embed
from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import read_plan, write_plan
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.data import ImageDataset, SplatDataset
from splatshard.pipeline.evaluation.tasks import check_classes
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.train import checkpoint
from splatshard.pipeline.train.batches import constants_of
from splatshard.pipeline.train.trained import Trained, open_images
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig, class_list
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import EncoderConfig, ModelConfig, ResamplerConfig
from splatshard.schemas.train import DataConfig, OptimConfig, TrainConfig
from tests.make import image_folder, image_parquet
from tests.splat_shards import commit, rows_of
from tests.training import toy_patches
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
    with pytest.raises(UsageError, match=r"0/00000-\w+.parquet and .*numbered by different lists"):
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
    assert (code, f"{other}: its labels are numbered by other classes" in err) == (1, True)
    assert "convert it with --classes" in err
    assert run_job(capsys, run, other, "--task", "probe", "--train", other)[0] == 0  # its own


def test_a_probe_is_evaluated_by_the_classes_it_was_trained_on(
    tmp_path: Path, capsys: Capsys
) -> None:
    train = make_split(tmp_path / "train", 0, CLASSES)
    run, other = run_on(train, tmp_path / "run"), make_split(tmp_path / "val", 1, CLASSES[1:])
    code, _, err = run_job(capsys, run, other, "--task", "probe", "--train", train)
    assert (code, f"{other}: its labels are numbered by other classes" in err) == (1, True)


def test_images_have_the_lists_of_their_splats(tmp_path: Path) -> None:
    dataset = ImageDataset(
        str(image_folder(tmp_path / "in", CLASSES, 2)), image_size=8, batch_size=2
    )
    assert list(dataset.class_lists) == [class_list(CLASSES)]


# Hugging Face's ClassLabel

ORDERS = {"a": CLASSES, "b": ("cat", "ant", "bee"), "c": CLASSES}
OTHERWISE = "numbered by different lists of classes"
FITTING = ConvertConfig(decode=DecodeConfig(image_size=16), fit=FitConfig(num_gaussians=4, steps=1))


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, str]:
    """Parquet files whose ClassLabels have the same names, of which b has another order."""
    return {
        name: str(image_parquet(tmp_path / "in" / f"{name}.parquet", 6, classes=classes))
        for name, classes in ORDERS.items()
    }


def converted(table: str, dst: Path) -> str:
    dst.mkdir()
    (ref,) = list_shards(table)
    plan = make_plan([ref], {}, FITTING, str)
    write_plan(str(dst), planned([ref], plan, FITTING))
    convert_shard(ref, FITTING, str(dst), select_backend("cpu"))
    return str(dst)


def test_splats_of_several_class_labels(
    tables: dict[str, str], tmp_path: Path, capsys: Capsys, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c = (converted(table, tmp_path / name) for name, table in tables.items())
    assert SplatDataset([a, c], batch_size=2).class_lists.keys() == {class_list(CLASSES)}
    assert caplog.text == ""
    several = SplatDataset([a, b], batch_size=2)
    assert f"the labels of {a}/a-" in caplog.text
    assert OTHERWISE in caplog.text
    with pytest.raises(UsageError, match=f"{OTHERWISE}.*cast ClassLabels to one"):
        constants_of(several, config_of(tmp_path / "run"))
    run = run_on(a, tmp_path / "run")
    assert run_job(capsys, run, c, "--task", "classify")[0] == 0
    code, _, err = run_job(capsys, run, b, "--task", "classify")
    assert (code, f"{b}: its labels are numbered by other classes than" in err) == (1, True)
    assert "cast a ClassLabel to the names and order of the other" in err


def test_images_of_several_class_labels(
    tables: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def opened(*names: str) -> ImageDataset:
        caplog.clear()
        return ImageDataset({tables[n]: 1.0 for n in names}, image_size=8, batch_size=2)

    dataset = opened("a", "c")
    assert (dataset.classes, list(dataset.class_lists)) == (CLASSES, [class_list(CLASSES)])
    assert OTHERWISE not in caplog.text
    dataset = opened("a", "b")
    assert (dataset.classes, len(dataset.class_lists)) == ((), 2)
    assert OTHERWISE in caplog.text


def test_images_are_evaluated_by_the_classes_of_training(
    tables: dict[str, str], tmp_path: Path
) -> None:
    """Folders are numbered by them, which a file's ClassLabel cannot be."""
    model = ModelConfig(encoder=toy_patches(), num_classes=len(CLASSES))
    device, known = torch.device("cpu"), class_list(ORDERS["b"])
    trained = Trained(torch.nn.Identity(), model, "run", 1, "", device, classes=ORDERS["b"])
    folder = image_folder(tmp_path / "folders", CLASSES, 2)
    for src in (str(folder), tables["b"]):
        assert open_images(trained, src, 2).class_lists == {known}
    data = open_images(trained, tables["a"], 2)
    with pytest.raises(UsageError, match=f"{tables['a']}: its labels are numbered by other class"):
        check_classes(data, {known}, trained.url)


def test_embed_takes_a_class_label_as_it_is(tables: dict[str, str], tmp_path: Path) -> None:
    """Only folders are numbered anew."""
    dst = converted(tables["b"], tmp_path / "out")
    assert read_plan(dst)["b"].ref.labels == ORDERS["b"]
    options = embed.EmbedOptions(dst=dst, teacher="", src=tables["b"])
    (ref,) = embed.sources_of(dst, embed.done_shards(dst), options).values()
    assert ref.labels == ORDERS["b"]
