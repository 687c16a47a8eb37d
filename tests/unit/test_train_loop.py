"""train(): the loss falls, what is frozen stays, a run that was stopped goes on exactly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.train.batches import Feed
from splatshard.pipeline.train.checkpoint import initial_weights, latest, read_checkpoint
from splatshard.pipeline.train.distributed import World
from splatshard.pipeline.train.groups import groups_of, make_optimizer
from splatshard.pipeline.train.log import read_log
from splatshard.pipeline.train.loop import resume, train
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.train import AugmentConfig
from tests.training import (
    Stop,
    changed,
    curve,
    events,
    same_weights,
    stop_after,
    toy_config,
    weights_of,
    without_teacher,
)

STAGES = ("classify", "distill", "contrast")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_falls(shards: Path, tmp_path: Path, stage: str) -> None:
    config = toy_config(shards, tmp_path, stage, steps=40, optim__ema=0.9)
    result = train(config)
    losses = list(curve(tmp_path).values())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert result.steps == 40
    assert result.record["loss"] == losses[-1]
    found = latest(str(tmp_path))
    assert found is not None
    assert (found.url, found.step, found.train_config()) == (result.checkpoint, 40, config)
    assert not same_weights(found.weights(), found.weights("ema.safetensors"))
    if stage == "distill":
        (start,) = [r for r in read_log(str(tmp_path)) if r["event"] == "start"]
        assert "logit_scale" in start["unused"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stopped", [5, 8, 11])
def test_a_stopped_run_goes_on_bitwise(
    shards: Path, tmp_path: Path, stage: str, stopped: int
) -> None:
    """5 steps are an epoch; checkpoints are at 4, 8 and 12, so steps are done a second time."""
    options = {
        "steps": 13,
        "optim__ema": 0.9,
        "augment": AugmentConfig(height=32, width=32, rotation=20, dropout=0.2, contrast=0.2),
    }
    whole = train(toy_config(shards, tmp_path / "whole", stage, **options))
    with pytest.raises(Stop):
        train(toy_config(shards, tmp_path / "cut", stage, **options), stop_after(stopped))
    cut = train(toy_config(shards, tmp_path / "cut", stage, **options))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert list(curve(tmp_path / "cut")) == list(range(1, 14))
    a, b = read_checkpoint(whole.checkpoint), read_checkpoint(cut.checkpoint)
    assert same_weights(a.weights(), b.weights())
    assert same_weights(a.weights("ema.safetensors"), b.weights("ema.safetensors"))
    assert a.state()["reader"] == b.state()["reader"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # few cores
def test_it_goes_on_with_more_workers_and_more_steps(shards: Path, tmp_path: Path) -> None:
    """The learning rate is constant here, since more steps stretch the cosine."""
    same = {"optim__final_lr": 1.0, "augment": AugmentConfig(height=32, width=32, shift=0.1)}
    train(toy_config(shards, tmp_path / "whole", steps=9, **same))
    train(toy_config(shards, tmp_path / "cut", steps=3, **same))
    train(toy_config(shards, tmp_path / "cut", steps=9, data__workers=2, data__lanes=4, **same))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert events(tmp_path / "cut").count("start") == 2


def test_the_optimiser_suits_the_device_on_which_a_run_goes_on(
    shards: Path, tmp_path: Path
) -> None:
    """A checkpoint of a CPU would make a GPU's AdamW a slow one, and fp16's fail."""
    config = toy_config(shards, tmp_path, steps=4)
    train(config)
    found = latest(str(tmp_path))
    assert found is not None
    parameters = found.state()["optimizer"]["param_groups"][0]["params"]
    model = build_model(config.model)
    groups = groups_of(model, config.optim)
    optimizer = torch.optim.AdamW(make_optimizer(model, groups, config.optim).param_groups)
    for group in optimizer.param_groups:
        group["fused"] = True
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert resume(found, config, Feed(config, ALONE), optimizer, scaler, None) == 4
    assert len(optimizer.param_groups[0]["params"]) == len(parameters)
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]


def test_a_finished_run_has_nothing_to_do(shards: Path, tmp_path: Path) -> None:
    config = toy_config(shards, tmp_path, steps=2)
    first, again = train(config), train(config)
    assert (again.steps, again.checkpoint, again.record) == (2, first.checkpoint, {})


def test_frozen_parameters_do_not_move(shards: Path, tmp_path: Path) -> None:
    """Those of `later` from their step on, and not before."""
    fields = {
        "optim__trainable": ("vision.stem.*", "*_projection.*"),
        "optim__later": ("text.*",),
        "optim__later_from": 3,
        "checkpoint__every": 1,
        "checkpoint__keep": 9,
    }
    train(toy_config(shards, tmp_path, "contrast", steps=5, **fields))
    at = {n: weights_of(f"{tmp_path}/checkpoints/{n:08d}") for n in (1, 3, 5)}

    def moved(a: int, b: int) -> set[str]:
        return {n.split(".")[0] for n in at[a] if not torch.equal(at[a][n], at[b][n])}

    def moved_in_vision(a: int, b: int) -> set[str]:
        names = [n for n in at[a] if n.startswith("vision.")]
        return {n.split(".")[1] for n in names if not torch.equal(at[a][n], at[b][n])}

    assert moved(1, 3) == {"vision", "visual_projection", "text_projection"}
    assert moved(3, 5) == {"vision", "visual_projection", "text_projection", "text"}
    assert moved_in_vision(1, 5) == {"stem"}


def test_stage_two_begins_with_the_weights_of_stage_one(shards: Path, tmp_path: Path) -> None:
    one = train(toy_config(shards, tmp_path / "one", "distill", steps=2))
    still = {"optim__trainable": ("logit_scale",), "init": str(tmp_path / "one")}
    two = train(toy_config(shards, tmp_path / "two", "contrast", steps=1, **still))
    a, b = weights_of(one.checkpoint), weights_of(two.checkpoint)
    assert {n for n in a if not torch.equal(a[n], b[n])} == {"logit_scale"}
    three = train(toy_config(shards, tmp_path / "3", steps=1, init=one.checkpoint, optim__lr=1e-9))
    c = weights_of(three.checkpoint)
    for name in (n for n in a if n.startswith("vision.")):
        assert torch.allclose(a[name], c[name.replace("vision.", "encoder.", 1)], atol=1e-6)


def test_weights_to_begin_with_are_the_average_where_there_is_one(
    shards: Path, tmp_path: Path
) -> None:
    """As evaluation takes it; a file that is named is taken as it is."""
    one = train(toy_config(shards, tmp_path / "one", steps=3, optim__ema=0.9)).checkpoint
    average, named = initial_weights(one)[0], initial_weights(f"{one}/model.safetensors")[0]
    found = read_checkpoint(one)
    assert same_weights(average, found.weights("ema.safetensors"))
    assert same_weights(named, found.weights())
    assert not same_weights(average, named)
    plain = train(toy_config(shards, tmp_path / "plain", steps=1)).checkpoint
    assert same_weights(initial_weights(plain)[0], weights_of(plain))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_and_the_rest_of_the_options(
    shards: Path, tmp_path: Path, precision: str
) -> None:
    config = toy_config(
        shards, tmp_path, "contrast", precision=precision, micro_batch=6, log__tensorboard=True
    )
    encoder = replace(config.model.encoder, gradient_checkpointing=True)
    train(replace(config, model=replace(config.model, encoder=encoder)))
    assert list((tmp_path / "tensorboard").glob("events*"))
    (record, *_) = [r for r in read_log(str(tmp_path)) if r["event"] == "step"]
    wanted = {"lr", "grad_norm", "images_per_s", "data_wait_share", "memory_bytes", "logit_scale"}
    assert wanted <= record.keys()


# Checkpoints


def test_a_checkpoint_of_another_configuration(shards: Path, tmp_path: Path) -> None:
    train(toy_config(shards, tmp_path, steps=2))
    with pytest.raises(UsageError, match=r"optim\.lr was 0\.003 and is 0\.001.*another dst"):
        train(toy_config(shards, tmp_path, steps=4, optim__lr=1e-3))
    with pytest.raises(UsageError, match=r"augment\.dropout"):
        train(toy_config(shards, tmp_path, steps=4, augment=AugmentConfig(dropout=0.1)))


def test_a_checkpoint_of_other_shards(shards: Path, tmp_path: Path) -> None:
    train(toy_config(shards, tmp_path / "run", steps=2))
    other = changed(shards, tmp_path, without_teacher)
    with pytest.raises(UsageError, match="saved with data"):
        train(toy_config(other, tmp_path / "run", steps=4))


def test_the_last_checkpoints_stay(shards: Path, tmp_path: Path) -> None:
    fields = {"checkpoint__every": 2, "checkpoint__keep": 2}
    train(toy_config(shards, tmp_path, steps=7, **fields))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000006", "00000007"]


def test_what_was_not_written_whole_is_no_checkpoint(shards: Path, tmp_path: Path) -> None:
    """config.json comes last. The folder of one that was killed goes with the next checkpoint."""
    whole = train(toy_config(shards, tmp_path / "whole", steps=9))
    config = toy_config(shards, tmp_path / "cut", steps=9)
    with pytest.raises(Stop):
        train(config, stop_after(8))
    torn = tmp_path / "cut/checkpoints/00000006"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    found = latest(str(tmp_path / "cut"))
    assert found is not None
    assert found.step == 4
    result = train(config)
    assert same_weights(weights_of(result.checkpoint), weights_of(whole.checkpoint))
    assert not torn.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_damaged_checkpoint_is_named(shards: Path, tmp_path: Path, name: str) -> None:
    url = train(toy_config(shards, tmp_path, steps=2)).checkpoint
    path = Path(url, name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=rf"{name} is damaged.*delete the folder {url}"):
        train(toy_config(shards, tmp_path, steps=4))
    path.unlink()
    with pytest.raises(CorruptShardError, match=f"{name} is missing"):
        train(toy_config(shards, tmp_path, steps=4))
    shutil.rmtree(url)
    assert train(toy_config(shards, tmp_path, steps=4)).steps == 4


def test_a_run_does_not_begin_with_weights_for_other_inputs(shards: Path, tmp_path: Path) -> None:
    url = train(toy_config(shards, tmp_path / "one", steps=1)).checkpoint
    config = toy_config(shards, tmp_path / "two", init=url)
    stem = replace(config.model.encoder.stem, log_scale_mean=-2.0)
    encoder = replace(config.model.encoder, stem=stem)
    with pytest.raises(UsageError, match=r"stem\.log_scale_mean was -3\.6 and is -2\.0"):
        train(replace(config, model=replace(config.model, encoder=encoder)))
    marker = json.loads(Path(url, "config.json").read_text())
    marker["shards"]["cutoff"] = 2.5
    Path(url, "config.json").write_text(json.dumps(marker))
    with pytest.raises(UsageError, match=r"cutoff was 2\.5 and is 3\.0"):
        train(config)
