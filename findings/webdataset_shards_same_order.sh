#!/usr/bin/env bash
# webdataset 1.0.2: WebDataset(tars, shardshuffle=100) has the shards in the same order in every epoch. It draws a seed
# once, and its shuffle starts from that seed anew each time; .shuffle(1000, seed=0) of samples does the same. Without
# seed=... samples come in another order each epoch and each run, whatever random.seed says. detshuffle=True for
# the shards, .compose(webdataset.detshuffle(1000)) for the samples: another order each epoch, the same ones again
# in the next run; but they count epochs in the process that reads, so in a DataLoader's workers, which are started
# anew for each epoch, it is always the first. There they need persistent_workers=True.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU build), Python 3.11, 20 shards of one sample each: different orders in 3 epochs
#   shardshuffle=100: 1    the same, seed=7: 1    shardshuffle=100, detshuffle=True: 3
#   .shuffle(1000): 3      .shuffle(1000, seed=0): 1    .compose(detshuffle(1000)): 3
#   in DataLoader(num_workers=1): detshuffle=True: 1, with persistent_workers=True: 3
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 torch==2.13.0 numpy==2.4.6
cat > "$folder/epochs.py" <<'PY'
import io
import random
import sys
import tarfile

from torch.utils.data import DataLoader
from webdataset import WebDataset, detshuffle

folder = sys.argv[1]
for i in range(20):
    with tarfile.open(f"{folder}/{i:02d}.tar", "w") as tar:
        member = tarfile.TarInfo(f"{i:02d}.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
tars = f"{folder}/{{00..19}}.tar"


def epochs(dataset):
    return [tuple(sample["__key__"] for sample in dataset) for _ in range(3)]


def in_turn():
    return WebDataset(tars, shardshuffle=False)


made = {
    "shardshuffle=100": (lambda: WebDataset(tars, shardshuffle=100), 1, True),
    "shardshuffle=100, seed=7": (lambda: WebDataset(tars, shardshuffle=100, seed=7), 1, True),
    "shardshuffle=100, detshuffle, seed=7": (
        lambda: WebDataset(tars, shardshuffle=100, detshuffle=True, seed=7), 3, True),
    ".shuffle(1000)": (lambda: in_turn().shuffle(1000), 3, False),
    ".shuffle(1000, seed=0)": (lambda: in_turn().shuffle(1000, seed=0), 1, True),
    ".compose(detshuffle(1000))": (lambda: in_turn().compose(detshuffle(1000)), 3, True),
}
for name, (make, orders, again) in made.items():
    random.seed(0)
    first = epochs(make())
    assert all(sorted(order) == [f"{i:02d}" for i in range(20)] for order in first)
    print(f"{name}: {len(set(first))} different orders in three epochs")
    assert len(set(first)) == orders
    assert all(order != tuple(sorted(order)) for order in first)
    random.seed(0)
    assert (epochs(make()) == first) == again
for persistent, orders in ((False, 1), (True, 3)):
    dataset = WebDataset(tars, shardshuffle=100, detshuffle=True)
    found = epochs(DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=persistent))
    print(f"detshuffle, a worker, persistent {persistent}: {len(set(found))} different orders")
    assert len(set(found)) == orders
PY
mkdir "$folder/tars"
"$folder/venv/bin/python" "$folder/epochs.py" "$folder/tars"
