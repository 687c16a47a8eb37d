"""SIGTERM and Ctrl-C to training processes: a checkpoint of the step they were in, and the same
command goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splatshard.pipeline.train.checkpoint import latest
from splatshard.pipeline.train.log import read_log
from splatshard.pipeline.train.loop import train
from splatshard.schemas.train import TrainConfig
from tests.integration.test_train_processes import AUGMENT, ROOT, close, write_recipe
from tests.training import curve, events, same_weights, toy_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

JOB = ("-m", "jobs.train")
TORCHRUN = (
    *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "jobs.train"),
)


STEPS = 130
"""Of which two processes do fewer in the second after which they agree on the last one."""


@pytest.fixture(scope="module")
def whole(shards: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    dst = tmp_path_factory.mktemp("whole")
    train(config_of(shards, dst, 0))
    return dst


def config_of(shards: Path, dst: Path, workers: int, steps: int = STEPS) -> TrainConfig:
    """Without a checkpoint before the end, unless a signal brings one."""
    return toy_config(
        shards, dst, steps=steps, augment=AUGMENT, optim__ema=0.9,
        checkpoint__every=1000, data__workers=workers, log__every=7,
    )  # fmt: skip


def run_until_signalled(
    number: int, dst: Path, *arguments: str, to_all: bool = False
) -> tuple[int, str]:
    """Run Python with these arguments, send the signal once there are some steps in the log of
    `dst`; exit code and standard error."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = dst / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 4):
        time.sleep(0.02)
    assert process.poll() is None, process.stderr and process.stderr.read()
    send = os.killpg if to_all else os.kill
    send(process.pid, number)
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def stopped_at(dst: Path) -> int:
    """The step of the checkpoint that the signal brought, which is the only one."""
    found = latest(str(dst))
    assert found is not None
    assert [p.name for p in (dst / "checkpoints").iterdir()] == [f"{found.step:08d}"]
    (stop,) = [record for record in read_log(str(dst)) if record["event"] == "stop"]
    assert (stop["step"], stop["url"]) == (found.step, found.url)
    return found.step


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # few cores
@pytest.mark.parametrize(
    ("number", "code", "to_all"),
    [(signal.SIGTERM, 143, False), (signal.SIGTERM, 143, True), (signal.SIGINT, 130, True)],
)
def test_a_signal_saves_the_step(
    shards: Path, whole: Path, tmp_path: Path, number: int, code: int, to_all: bool
) -> None:
    """Also when the reading process gets it (`to_all`): Ctrl-C and Slurm signal all of them."""
    config = config_of(shards, tmp_path / "cut", 1)
    recipe = write_recipe(tmp_path / "recipe.py", config)
    found, told = run_until_signalled(number, tmp_path / "cut", *JOB, recipe, to_all=to_all)
    assert found == code, told
    step = stopped_at(tmp_path / "cut")
    assert 14 <= step < STEPS
    words = "terminated" if number == signal.SIGTERM else "interrupted"
    assert f"{words}; run the same command again to continue (saved: " in told
    assert f"checkpoints/{step:08d})" in told
    assert told.count("stopping after the current batch") == 1
    assert "Traceback" not in told
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    again = subprocess.run(
        [sys.executable, *JOB, recipe], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert curve(tmp_path / "cut") == curve(whole)
    found, undisturbed = latest(str(tmp_path / "cut")), latest(str(whole))
    assert found is not None
    assert undisturbed is not None
    assert found.step == undisturbed.step == STEPS
    assert same_weights(found.weights(), undisturbed.weights())
    assert same_weights(found.weights("ema.safetensors"), undisturbed.weights("ema.safetensors"))


@pytest.mark.slow
def test_a_signal_to_torchrun(shards: Path, whole: Path, tmp_path: Path) -> None:
    """It passes it on; both processes end after the same step."""
    config = config_of(shards, tmp_path / "cut", 0)
    recipe = write_recipe(tmp_path / "recipe.py", config)
    code, told = run_until_signalled(signal.SIGTERM, tmp_path / "cut", *TORCHRUN, recipe)
    assert code != 0
    assert 14 <= stopped_at(tmp_path / "cut") < STEPS, told
    assert told.count("terminated; run the same command") == 1, told
    train(config)
    assert close(curve(tmp_path / "cut"), curve(whole))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray")
def test_a_signal_to_the_driver_of_ray(shards: Path, tmp_path: Path) -> None:
    steps = 300
    config = config_of(shards, tmp_path / "cut", 0, steps)
    recipe = write_recipe(tmp_path / "recipe.py", config)
    code, told = run_until_signalled(
        signal.SIGTERM, tmp_path / "cut", *JOB, recipe, "--ray-workers", "2"
    )
    assert code == 143, told
    assert 14 <= stopped_at(tmp_path / "cut") < steps, told
    assert "terminated; run the same command again to continue (saved: " in told
    assert "start" in events(tmp_path / "cut")
