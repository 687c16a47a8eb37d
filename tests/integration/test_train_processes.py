"""Training in several processes and in killed ones: torchrun, SIGKILL, Ray Train."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splatshard.pipeline.storage import fs
from splatshard.pipeline.train.checkpoint import latest
from splatshard.pipeline.train.loop import train
from splatshard.schemas.errors import UsageError
from splatshard.schemas.train import AugmentConfig, TrainConfig
from tests.integration.stores import Store
from tests.training import (
    curve,
    events,
    images_config,
    same_weights,
    toy_config,
    weights_of,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[2]
AUGMENT = AugmentConfig(height=32, width=32, rotation=15, dropout=0.2, crop_scale=(0.6, 1.0))


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, one thread per process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)


def write_recipe(path: Path, config: TrainConfig) -> str:
    """A recipe that makes `config`; its path."""
    imports = "from splatshard.schemas.model import *\nfrom splatshard.schemas.train import *\n"
    path.write_text(f"{imports}config = {config!r}\n")
    return str(path)


def close(a: Mapping[int, float], b: Mapping[int, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[k] - b[k]) < 2e-4 * abs(b[k]) for k in b)


def contrast_config(shards: Path, dst: Path, **fields: Any) -> TrainConfig:
    """All that several processes could get wrong: negatives, parts, freezing, augmentation."""
    return toy_config(
        shards, dst, "contrast",
        **{
            "steps": 9,
            "augment": AUGMENT,
            "optim__trainable": ("vision.*", "*_projection.*", "logit_scale"),
            "optim__later": ("text.*",),
            "optim__later_from": 3,
            "optim__final_lr": 1.0,
            "optim__ema": 0.9,
            **fields,
        },
    )  # fmt: skip


TWICE = """
import sys
import torch.distributed as dist
from dataclasses import replace
from splatshard.jobs.cli.recipe import load_recipe
from splatshard.pipeline.train.loop import train
config = load_recipe(sys.argv[1])
dist.init_process_group("gloo")  # once: torchrun's store keeps the addresses of the first one
train(replace(config, dst=config.dst + "/new"))
train(replace(config, dst=config.dst + "/resumed", micro_batch=3))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_are_one_with_the_whole_batch(shards: Path, tmp_path: Path) -> None:
    """From the start, and going on in the second epoch where one process ended; the latter in
    parts, too. Augmentation, loss, gradients and weights are the same up to rounding."""
    whole = train(contrast_config(shards, tmp_path / "whole"))
    train(contrast_config(shards, tmp_path / "two/resumed", steps=6))
    recipe = write_recipe(tmp_path / "recipe.py", contrast_config(shards, tmp_path / "two"))
    (tmp_path / "twice.py").write_text(TWICE)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_script(*launcher, f"{tmp_path}/twice.py", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("new", "resumed"):
        dst = tmp_path / "two" / name
        assert close(curve(dst), curve(tmp_path / "whole")), name
        assert close(curve(dst, "grad_norm"), curve(tmp_path / "whole", "grad_norm")), name
        found = latest(str(dst))
        assert found is not None
        ours, theirs = found.weights(), weights_of(whole.checkpoint)
        for key in theirs:
            assert torch.allclose(ours[key], theirs[key], atol=2e-4), (name, key)
    assert events(tmp_path / "two/resumed").count("start") == 2


ONCE = """
import sys
from splatshard.jobs.cli.recipe import load_recipe
from splatshard.pipeline.train.loop import train
train(load_recipe(sys.argv[1]))
"""


def test_two_processes_are_one_on_images(shards: Path, tmp_path: Path) -> None:
    """Into the second epoch, with an image that does not decode: what stands in for it does not
    depend on the batch that it is in."""
    images = shutil.copytree(shards / "images", tmp_path / "images")
    path = images / "00001.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x89PNG", b"\x89PIG", 2))  # of 40
    fields: dict[str, Any] = {
        "steps": 7,
        "augment": replace(AUGMENT, dropout=0.0, contrast=0.2),
        "data__src": str(images),
    }
    whole = train(images_config(shards, tmp_path / "whole", "contrast", **fields))
    config = images_config(shards, tmp_path / "two", "contrast", **fields)
    recipe = write_recipe(tmp_path / "recipe.py", config)
    (tmp_path / "once.py").write_text(ONCE)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_script(*launcher, f"{tmp_path}/once.py", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "does not decode and is replaced" in done.stderr
    assert close(curve(tmp_path / "two"), curve(tmp_path / "whole"))
    ours, theirs = weights_of(f"{tmp_path}/two/checkpoints/00000007"), weights_of(whole.checkpoint)
    for key in theirs:
        assert torch.allclose(ours[key], theirs[key], atol=2e-4), key


KILLED = """
import os, signal, sys
from splatshard.jobs.cli.recipe import load_recipe
from splatshard.pipeline.storage import atomic
from splatshard.pipeline.train.loop import train
moment = sys.argv[2]
def die(url):
    if "00000008" in url and url.endswith(moment):
        os.kill(os.getpid(), signal.SIGKILL)
def upload(path, url, real=atomic.upload):
    die(url)
    real(path, url)
def write(url, data, real=atomic.write):
    die(url)
    real(url, data)
atomic.upload, atomic.write = upload, write
train(load_recipe(sys.argv[1]))
"""


CHECKPOINTED: dict[str, Any] = {"steps": 10, "augment": AUGMENT, "optim__ema": 0.9}


@pytest.fixture(scope="module")
def whole(shards: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody kills."""
    dst = tmp_path_factory.mktemp("whole")
    train(toy_config(shards, dst, **CHECKPOINTED))
    return dst


@pytest.mark.parametrize("moment", ["model.safetensors", "state.pt", "config.json"])
def test_a_run_killed_while_it_writes_a_checkpoint(
    shards: Path, whole: Path, tmp_path: Path, moment: str
) -> None:
    """It goes on from the one before, to the same weights."""
    config = toy_config(shards, tmp_path / "cut", **CHECKPOINTED)
    (tmp_path / "killed.py").write_text(KILLED)
    recipe = write_recipe(tmp_path / "recipe.py", config)
    done = run_script(f"{tmp_path}/killed.py", recipe, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    found = latest(str(tmp_path / "cut"))
    assert found is not None
    assert found.step == 4
    assert max(curve(tmp_path / "cut")) == 8
    result = train(config)
    assert curve(tmp_path / "cut") == curve(whole)
    assert same_weights(weights_of(result.checkpoint), weights_of(f"{whole}/checkpoints/00000010"))
    names = sorted(p.name for p in (tmp_path / "cut/checkpoints").iterdir())
    assert names == ["00000004", "00000008", "00000010"]
    assert not list((tmp_path / "cut").rglob("_staging*"))


def test_a_killed_command_goes_on(shards: Path, tmp_path: Path) -> None:
    """`python -m jobs.train` twice; the first is killed at some moment, with its workers."""
    options = {"steps": 60, "augment": AUGMENT, "data__workers": 1}
    train(toy_config(shards, tmp_path / "whole", **options | {"data__workers": 0}))
    recipe = write_recipe(tmp_path / "recipe.py", toy_config(shards, tmp_path / "cut", **options))
    command = [sys.executable, "-m", "jobs.train", recipe]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    log = tmp_path / "cut/log.jsonl"
    while first.poll() is None and (not log.exists() or log.read_text().count("\n") < 20):
        time.sleep(0.02)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert len(curve(tmp_path / "cut")) < 60
    done = run_script("-m", "jobs.train", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert "60 steps are done" in done.stderr
    assert '"step": 60' in done.stdout
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray")
@pytest.mark.usefixtures("free_ray")
def test_ray_train_with_two_workers(shards: Path, tmp_path: Path) -> None:
    """The same as one process; its records come to the driver."""
    from splatshard.jobs.driver.ray_train import launch

    train(contrast_config(shards, tmp_path / "one"))
    told: list[Mapping[str, Any]] = []
    launch(contrast_config(shards, tmp_path / "two"), 2, told.append)
    assert close(curve(tmp_path / "two"), curve(tmp_path / "one"))
    assert [record["event"] for record in told] == events(tmp_path / "two")
    assert told[0]["processes"] == 2
    with pytest.raises(UsageError, match=r"--ray-workers 3: the cluster has 2 CPUs"):
        launch(contrast_config(shards, tmp_path / "many"), 3, told.append)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray")
@pytest.mark.usefixtures("free_ray")
def test_ray_workers_have_the_storage_options(shards: Path, moto: Store) -> None:
    from splatshard.jobs.driver.ray_train import launch

    moto.client().create_bucket(Bucket="options")
    known = moto.environment()
    options = {
        "endpoint_url": moto.endpoint,
        "key": known["AWS_ACCESS_KEY_ID"],
        "secret": known["AWS_SECRET_ACCESS_KEY"],
        "client_kwargs": {"region_name": known["AWS_REGION"]},
    }
    launch(toy_config(shards, "s3://options/a", steps=2), 1, lambda _: None, options)
    fs.use_options(options)
    try:
        assert list(curve("s3://options/a")) == [1, 2]
    finally:
        fs.use_options({})


def test_checkpoints_and_log_in_a_bucket(
    shards: Path, tmp_path: Path, moto: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a local disk: it goes on where it was stopped, and its log has no step twice."""
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    fs.use_options({})
    moto.client().create_bucket(Bucket="runs")

    def stop(record: Mapping[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 7:
            raise InterruptedError

    options = {"checkpoint__keep": 1, "optim__ema": 0.9}
    whole = train(toy_config(shards, tmp_path / "whole", steps=9, **options))
    config = toy_config(shards, "s3://runs/a/", steps=9, **options)
    with pytest.raises(InterruptedError):
        train(config, stop)
    result = train(config)
    assert curve("s3://runs/a") == curve(tmp_path / "whole")
    found = latest("s3://runs/a")
    assert found is not None
    assert found.url == result.checkpoint == "s3://runs/a/checkpoints/00000009"
    assert same_weights(found.weights(), weights_of(whole.checkpoint))
    keys = [o["Key"] for o in moto.client().list_objects_v2(Bucket="runs")["Contents"]]
    assert {key.split("/")[2] for key in keys if "checkpoints" in key} == {"00000009"}
    fs.use_options({})
