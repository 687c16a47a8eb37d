#!/usr/bin/env bash
# Lightning 2.6.6 ends an epoch after len(loader) batches, and torch's DataLoader reckons that length of an
# IterableDataset as if one process read it. With more workers, each of which ends with a batch of its own that is
# not full, there are more batches than that, and Lightning leaves the last ones out: the same samples in each
# epoch, without a word. A plain for loop has them all. A dataset whose __len__ is an estimate that is too low
# loses its end too. Without __len__ nothing is lost.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU build), Python 3.11, samples 0 to 9 split among workers, batches of 2, 2 epochs:
#   3 workers, len(loader) 5: for loop 6 batches, 10 samples; Lightning 5 batches, 9 samples, without 8 in both epochs
#   no worker, __len__ of 6: for loop 10 samples, Lightning 6    3 workers, no __len__: Lightning 10 samples
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lightning==2.6.6 torch==2.13.0 numpy==2.4.6
cat > "$folder/epochs.py" <<'PY'
import logging
import warnings

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Stream(IterableDataset):
    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return iter(torch.arange(10.0)[first::step, None])


class Counted(Stream):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.epochs = torch.nn.Linear(1, 1), []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch, _):
        self.epochs[-1] += batch.flatten().int().tolist()
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def epochs(dataset, workers):
    loader, module = DataLoader(dataset, batch_size=2, num_workers=workers), Module()
    assert sorted(torch.cat(list(loader)).flatten().tolist()) == list(range(10))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(module, loader)
    lost = [sorted(set(range(10)) - set(epoch)) for epoch in module.epochs]
    print(f"{type(dataset).__name__}, {workers} workers: for loop {len(list(loader))} batches, Lightning without {lost}")
    return lost


assert epochs(Counted(10), 0) == [[], []]
assert len(DataLoader(Counted(10), batch_size=2, num_workers=3)) == 5
assert epochs(Counted(10), 3) == [[8], [8]]
assert epochs(Counted(6), 0) == [[6, 7, 8, 9]] * 2
assert epochs(Stream(), 3) == [[], []]
PY
cd "$folder" && venv/bin/python epochs.py
