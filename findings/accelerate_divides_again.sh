#!/usr/bin/env bash
# accelerate 1.15.0 reads the DataLoader of an IterableDataset on rank 0 alone and hands each rank a part of every batch.
# With a dataset that divides itself among the ranks, as streaming ones do, rank 0 has only its own part: the other
# parts are never read, in no epoch, without a word. dispatch_batches=False is no way out: then every rank reads its
# part and keeps only some of that.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU build), Python 3.11, 2 ranks, samples 0 to 19 in batches of 2:
#   as it comes: 10 of 20 samples are read    dispatch_batches=False: 12    a dataset that does not divide: 20
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/read.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Stream(IterableDataset):
    def __init__(self, divides):
        self.first, self.step = (RANK, WORLD_SIZE) if divides else (0, 1)

    def __iter__(self):
        return iter(torch.arange(20.0)[self.first :: self.step])


def samples_read(divides, dispatch):
    accelerator.dataloader_config.dispatch_batches = dispatch
    loader = accelerator.prepare(DataLoader(Stream(divides), batch_size=2))
    own = [int(value) for batch in loader for value in batch]
    of_all = [None] * WORLD_SIZE
    dist.all_gather_object(of_all, own)
    return len(set(sum(of_all, [])))


accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration())
found = [samples_read(True, None), samples_read(True, False), samples_read(False, None)]
if RANK == 0:
    print("as it comes, dispatch_batches=False, a dataset that does not divide:", *found)
sys.exit(found != [10, 12, 20])
PY
"$folder/venv/bin/torchrun" --standalone --nproc_per_node=2 "$folder/read.py"
