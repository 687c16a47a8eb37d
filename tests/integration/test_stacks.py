"""docs/reading.md's blocks for Lightning, accelerate and transformers' Trainer, as they stand, on
two ranks that are stopped at an epoch's end and within one: each sample once an epoch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from splatshard.pipeline.data import SplatDataset, SplatTable
from tests.integration.stores import free_port
from tests.splat_shards import N, commit, rows_of

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reading.md").read_text()
STOPS = (4, 1, 99)
"""Steps after which a run is stopped; there are four in an epoch."""
LIGHTNING = "max_epochs=2, accelerator='cpu', devices=2, logger=False"
STACKS = {
    "Lightning": ("max_epochs=2", LIGHTNING, STOPS),
    "Lightning, 3 batches": ("max_epochs=2", f"{LIGHTNING}, limit_train_batches=3", (3, 99)),
    "accelerate": ("Accelerator()", "Accelerator(cpu=True)", STOPS),
    "Trainer of transformers": ("num_train_epochs=2", "num_train_epochs=2, use_cpu=True", STOPS),
}
"""By heading: what a machine without GPUs needs to be told, and when a run is stopped, first at an
epoch's end."""


class Stopped(Exception):
    """As a kill before a step."""


class Model(torch.nn.Module):
    """Takes a TrainBatch, or its dictionary, and keeps the labels that it saw."""

    accepts_loss_kwargs = False

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.layer, self.steps = torch.nn.Linear(2, 1), steps
        self.seen: list[list[int]] = []

    def forward(self, batch: Any = None, means: Any = None, labels: Any = None, **_: Any) -> Any:
        if batch is not None:
            means, labels = batch.splats.means, batch.labels
        if len(self.seen) == self.steps:
            raise Stopped
        self.seen.append(labels.tolist())
        loss = self.layer(means).mean()
        return {"loss": loss} if batch is None else loss


def module_of(model: Model) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> Any:
            return self.model(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def run_rank(*stacks: str) -> None:
    """What one process does: each block, again and again until it is through."""
    next(iter(SplatDataset("splats/", batch_size=1)))  # workers, forked, have the compiled kernel
    seen = {}
    for stack in stacks:
        Path(stack).mkdir(exist_ok=True)
        with contextlib.chdir(stack):
            seen[stack] = seen_by(stack)
    seen["table"] = seen_by_trainer()
    Path(f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


def seen_by(stack: str) -> list[list[int]]:
    """The labels of the steps of a block's runs."""
    given, told, stops = STACKS[stack]
    _, block = PAGE.split(f"### {stack.partition(',')[0]}\n")
    code = re.findall(r"^```python\n(.*?)^```$", block, re.M | re.S)[0]
    for text in (given, "splats/"):
        assert code.count(text) == 1, text
    code = code.replace(given, told).replace("splats/", "../splats/").replace("=1000", "=1")
    seen: list[list[int]] = []
    for steps in stops:
        model = Model(steps)
        names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
        if "module" in code:
            names["module"] = module_of(model)
        with contextlib.suppress(Stopped):
            exec(compile(code, stack, "exec"), names)
        seen += model.seen
    return seen


def seen_by_trainer() -> list[list[int]]:
    """What transformers' own Trainer reads of a table."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        "table", num_train_epochs=1, per_device_train_batch_size=64, use_cpu=True
    )
    model = Model(99)
    Trainer(model, arguments, train_dataset=SplatTable("splats/", num_gaussians=N)).train()
    return model.seen


Seen = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Seen]]:
    """512 samples whose labels are unique, and what two ranks saw of them."""
    folder = tmp_path_factory.mktemp("stacks")
    src = folder / "splats"
    src.mkdir()
    for shard in range(4):
        rows = rows_of(shard, 170)
        for i, row in enumerate(rows):
            row["label"] = 1000 * shard + i
        commit(str(src), f"{shard:05d}", rows)
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
    }
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    script = f"from tests.integration import test_stacks as t; t.run_rank(*{tuple(STACKS)})"
    running = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"}
        command = [sys.executable, "-W", "ignore", "-c", script]
        running.append(subprocess.Popen(command, cwd=folder, env=env | own))
    assert [process.wait(300) for process in running] == [0, 0]
    return str(src), [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("stack", STACKS)
def test_ranks_that_are_stopped_read_each_sample_once(
    ranks: tuple[str, list[Seen]], stack: str
) -> None:
    """They read what they would have read without stopping."""
    (src, seen), steps = ranks, STACKS[stack][2][0]
    for rank in (0, 1):
        dataset = SplatDataset(src, batch_size=64, rank=rank, world_size=2)
        first, second = ([b.labels.tolist() for b in dataset][:steps] for _ in range(2))
        assert seen[rank][stack] == first + second
    for epoch in (slice(0, steps), slice(steps, 2 * steps)):
        labels = [x for rank in seen for step in rank[stack][epoch] for x in step]
        assert len(labels) == len(set(labels)) == 128 * steps


def test_a_trainer_reads_a_table(ranks: tuple[str, list[Seen]]) -> None:
    src, seen = ranks
    labels = sorted(x for rank in seen for step in rank["table"] for x in step)
    assert labels == sorted(SplatTable(src)[:].labels.tolist())
