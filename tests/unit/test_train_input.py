"""train() on bad input: it is named with its shard, where possible before the first step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from splatshard.pipeline.train import loop
from splatshard.pipeline.train.batches import open_dataset
from splatshard.pipeline.train.checkpoint import latest
from splatshard.pipeline.train.distributed import World
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.step import Gradients
from splatshard.schemas.errors import CorruptShardError, SplatshardError, UsageError
from splatshard.schemas.train import OptimConfig
from tests.training import changed, events, toy_config, weights_of, with_metadata, without_teacher


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the look at all shards, of which test_train_check.py is: what is wrong in tars, say,
    is found batch by batch."""
    monkeypatch.setattr(loop, "check_data", lambda *arguments: None)


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    number = table.schema.get_field_index(name)
    return table.set_column(number, table.schema.field(name), pa.array(values, table[name].type))


@pytest.mark.usefixtures("unchecked")
def test_captions_are_missing(shards: Path, tmp_path: Path) -> None:
    bad = changed(shards, tmp_path, lambda t: with_column(t, "caption", [None] * len(t)))
    wanted = r"sample \d+ has no caption, .*16 of 16.*: use a source with .*; if other samples have"
    with pytest.raises(UsageError, match=rf"{wanted} some, .*filter.*empty_captions"):
        train(toy_config(bad, tmp_path / "run", "contrast"))
    assert "step" not in events(tmp_path / "run")
    train(toy_config(bad, tmp_path / "keep", "contrast", steps=1, data__empty_captions="keep"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"has no label.*\(1 of 16 .* so\): leave .*data.filter"),
        (24, "has the label 24, and model.num_classes is 24"),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # few cores
@pytest.mark.parametrize("workers", [0, 1])
def test_labels_out_of_range(
    shards: Path, tmp_path: Path, label: int | None, message: str, workers: int
) -> None:
    """Also where another process reads them."""

    def change(table: pa.Table) -> pa.Table:
        keys = table["key"].to_pylist()
        labels = table["label"].to_pylist()
        found = [label if key == "000042" else v for key, v in zip(keys, labels, strict=True)]
        return with_column(table, "label", found)

    bad = changed(shards, tmp_path, change)
    with pytest.raises(UsageError, match=rf"splats/00001-.*\.parquet: sample 000042 {message}"):
        train(toy_config(bad, tmp_path / "run", steps=5, data__workers=workers))


def test_numbers_that_are_not_finite(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No writer stores them; a shard of someone else's may."""
    from splatshard.pipeline.data import block

    decode = block.decode_rows

    def broken(codec: Any, planes: Any, rows: Any, counts: Any, *rest: Any) -> None:
        decode(codec, planes, rows, counts, *rest)
        rest[2][0, 0, 3] = float("nan")

    monkeypatch.setattr(block, "decode_rows", broken)
    with pytest.raises(CorruptShardError, match=r"0000\d-.*: sample 0000\d\d has numbers that are"):
        train(toy_config(shards, tmp_path))


@pytest.mark.usefixtures("unchecked")
def test_the_teachers_column(shards: Path, tmp_path: Path) -> None:
    bad = changed(shards, tmp_path, without_teacher)
    with pytest.raises(UsageError, match=r"no teacher.s emb.*splatshard embed .*/splats --teacher"):
        train(toy_config(bad, tmp_path / "run", "distill"))
    both = f"{shards}/splats::{bad}/splats"
    with pytest.raises(UsageError, match="differ in their teacher"):
        train(toy_config(shards, tmp_path / "run", "distill", data__src=both))
    config = toy_config(shards, tmp_path / "run", "distill")
    encoder = replace(config.model.encoder, width=32)
    config = replace(config, model=replace(config.model, encoder=encoder))
    with pytest.raises(UsageError, match="of 16 numbers, the encoder makes 32"):
        train(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data__batch_size": 91},
            "batch_size is 91 on .* has only 90 samples .* choose at most 90",
        ),
        ({"data__src": ""}, "data.src is empty"),
        (
            {"optim__warmup_steps": 7},
            "optim.warmup_steps is 7, but optim.steps is 6, .* to at most that, .* for longer",
        ),
        (
            {"optim": OptimConfig(epochs=2)},
            r"warmup_steps is 500, but the run's 2 epochs are 10 \(5 each\)",
        ),
        (
            {"optim__later": ("head*",), "optim__later_from": 6},
            "optim.later_from is 6, but optim.steps is 6, .* never trained: set .* below that",
        ),
        (
            {"optim__later": ("head*",), "optim__warmup_steps": 6},
            "optim.warmup_steps is 6, but optim.steps is 6, .* never trained: set optim.later_from",
        ),
        (
            {"optim": OptimConfig(epochs=2, warmup_steps=1, later=("head*",), later_from=10)},
            r"later_from is 10, but the run's 2 epochs are 10 \(5 each\)",
        ),
        ({"dst": ""}, "dst is empty"),
        ({"device": "cuda:0"}, "device is 'cuda:0'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"optim__trainable": ("vision*",)}, r"'vision\*', which no parameter .* encoder.stem\*"),
        ({"init": "/nowhere"}, "init is /nowhere: no checkpoint"),
    ],
)
def test_configurations_that_do_not_fit(
    shards: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    if fields.get("device") == "cuda:0" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UsageError, match=message):
        train(toy_config(shards, **{"dst": tmp_path, **fields}))
    assert not (tmp_path / "checkpoints").exists()


def test_tasks_that_train_apart_are_warned(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`srun splatshard train`: each of them would train on all samples."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    dataset = open_dataset(toy_config(shards, tmp_path), World(0, 1, torch.device("cpu")))
    assert "start them with torchrun" not in caplog.text
    next(iter(dataset))
    assert "SLURM_NTASKS is 4, and this dataset is rank 0 of 1" in caplog.text
    assert "start them with torchrun" in caplog.text


def test_a_loss_that_is_not_finite_is_not_saved(shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, tmp_path, steps=8, optim__lr=9.9, optim__clip=None)
    train(replace(config, optim=replace(config.optim, lr=1e-3, steps=1, warmup_steps=0)))
    url = f"{tmp_path}/checkpoints/00000001"
    weights = weights_of(url)
    from safetensors.torch import save_file

    bad = {name: value * float("nan") for name, value in weights.items()}
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(SplatshardError, match="the loss is nan in step 1"):
        train(toy_config(shards, tmp_path / "new", init=str(tmp_path / "bad.safetensors")))
    assert latest(str(tmp_path / "new")) is None


@pytest.mark.parametrize("stopped", [False, True])
def test_a_gradient_that_is_not_finite_is_not_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """The loss is of the weights before; those after the step are NaN. `stopped`: in a step that is
    saved because somebody asks, and not recorded."""
    whole = Gradients.__call__

    def broken(self: Gradients, step: Any, number: int) -> Any:
        found = whole(self, step, number)
        if number == 3:
            next(p for p in self.embedder.parameters() if p.grad is not None).grad[0] = math.inf
        return found

    monkeypatch.setattr(Gradients, "__call__", broken)
    every = {"checkpoint__every": 8 if stopped else 4, "log__every": 8 if stopped else 1}
    config = toy_config(shards, tmp_path, steps=8, **every)
    asked = iter([0, 0, 0, 15]) if stopped else iter([0] * 8)
    with pytest.raises(SplatshardError, match=r"in step 4, its gradient's norm inf"):
        train(config, asked=lambda: next(asked))
    assert latest(str(tmp_path)) is None


def test_sources_whose_numbers_mean_different_things(shards: Path, tmp_path: Path) -> None:
    other = changed(shards, tmp_path, lambda table: with_metadata(table, {"cutoff": 2.5}))
    both = f"{shards}/splats::{other}/splats"
    with pytest.raises(
        UsageError, match=r"their cutoff: 1 of 2 folders have 2\.5, .*; 1 of 2 .* 3\.0, "
    ):
        train(toy_config(shards, tmp_path / "run", data__src=both))
