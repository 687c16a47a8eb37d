"""SplatDataset in processes that train together, without a word about ranks: each sample once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.splat_shards import make_dataset

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys, warnings
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader
from splatshard.pipeline.data import SplatDataset
from splatshard.schemas.errors import UsageError

warnings.simplefilter("ignore")

def main(src, out, rank):
    early = SplatDataset(src, batch_size=2, drop_last=False)  # before there is a process group
    if rank:
        dist.init_process_group(
            "gloo", init_method=f"file://{out}/group", rank=int(rank), world_size=2
        )
    read = {"alone": early}
    for context, workers in (("fork", 2), ("spawn", 1)):  # each spawned one loads torch
        dataset = SplatDataset(src, batch_size=2, drop_last=False, lanes=4)
        read[context] = DataLoader(
            dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
        )
    found = {
        name: [k for b in batches for k, v in zip(b.keys, b.valid.tolist()) if v]
        for name, batches in read.items()
    }
    options = {"batch_size": 2 + early.rank}  # not alike
    child = mp.get_context("fork").Process(target=SplatDataset, args=(src,), kwargs=options)
    child.start()
    child.join()  # the group's store is its parent's, and left alone
    found["refused"] = [child.exitcode]
    try:
        SplatDataset(src, **options)
    except UsageError as e:
        found["refused"].append(str(e))
    with open(f"{out}/{early.rank}.json", "w") as file:
        json.dump(found, file)
    if rank:
        dist.barrier()
        dist.destroy_process_group()

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize("launched", ["torchrun", "process group"])
def test_ranks_share_the_samples(tmp_path: Path, launched: str) -> None:
    """By itself, in forked workers and in spawned ones, which have no process group."""
    src, script = str(tmp_path / "shards"), tmp_path / "read.py"
    rows = make_dataset(src, [10, 7, 9])
    script.write_text(SCRIPT)
    unset = ("RANK", "WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), src, str(tmp_path)]
    if launched == "torchrun":
        run = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
        commands = [[sys.executable, *run, *command[1:], ""]]
    else:
        commands = [[*command, rank] for rank in ("0", "1")]
    running = [subprocess.Popen(each, cwd=ROOT, env=env) for each in commands]
    assert [process.wait(120) for process in running] == [0] * len(running)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    (exitcode, *refused), (another, *too) = first.pop("refused"), second.pop("refused")
    assert exitcode == another == 0
    if launched == "process group":  # whoever came second
        (said,) = refused + too
        assert "read different datasets, of batch_size" in said
    for name in first:
        assert sorted(first[name] + second[name]) == sorted(rows), name
        assert abs(len(first[name]) - len(second[name])) <= 1, name


GIVEN = """
import json, os, sys
import torch.multiprocessing as mp
from splatshard.pipeline.data import SplatDataset
from tests.splat_shards import keys_of

def read(dataset, rank, given):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dataset.set_epoch(1)
    given.put([keys_of(dataset) for epoch in range(2)])

if __name__ == "__main__":
    found = {}
    for method in ("fork", "spawn"):
        context, found[method] = mp.get_context(method), []
        dataset = SplatDataset(sys.argv[1], batch_size=2, drop_last=False)
        given = context.SimpleQueue()
        for rank in range(2):  # the second begins when the first is through
            process = context.Process(target=read, args=(dataset, rank, given))
            process.start()
            found[method].append(given.get())
            process.join()
        assert dataset.epoch == 0
    print(json.dumps(found))
"""


def test_ranks_that_are_given_a_dataset_do_not_move_each_other(tmp_path: Path) -> None:
    """A late one began with the epoch that the other was at, and others' samples were lost."""
    src, script = str(tmp_path / "shards"), tmp_path / "read.py"
    rows = make_dataset(src, [10, 7, 9])
    script.write_text(GIVEN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), src]
    found = json.loads(subprocess.check_output(command, cwd=ROOT, env=env, timeout=120))
    assert set(found) == {"fork", "spawn"}
    for method, (first, second) in found.items():
        for one, other in zip(first, second, strict=True):
            assert sorted(one + other) == sorted(rows), method
