#!/usr/bin/env bash
# Lightning 2.6.6 makes the first iterator of a fit before on_train_epoch_start, where guides tell to call
# dataset.set_epoch: in the first epoch of every process the call comes too late for an IterableDataset, from the second
# on in time. After a checkpoint from within an epoch the hook is not called for that epoch at all, so what is left of it
# is read as whatever epoch the dataset was made with.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU build), Python 3.11, 3 batches, 2 epochs, a dataset that begins with epoch -1:
#   a new fit: iterator of epoch -1, hook 0, hook 1, iterator of epoch 1
#   resumed from a checkpoint of the 4th batch, the first of epoch 1: iterator of epoch -1, and no hook
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lightning==2.6.6 torch==2.13.0 numpy==2.4.6
cat > "$folder/epochs.py" <<'PY'
import logging
import sys
import warnings
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
CHECKPOINT = Path(sys.argv[1]) / "within.ckpt"
events = []


class Stream(IterableDataset):
    epoch = -1

    def __iter__(self):
        events.append(f"iterator of epoch {self.epoch}")
        yield from torch.arange(6.0)


class SetEpoch(lightning.Callback):
    def on_train_epoch_start(self, trainer, module):
        events.append(f"hook {trainer.current_epoch}")
        stream.epoch = trainer.current_epoch


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, _):
        return (self.weight - batch.mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(steps, ckpt_path=None):
    global stream
    events.clear()
    stream = Stream()
    trainer = lightning.Trainer(
        max_epochs=2, max_steps=steps, accelerator="cpu", callbacks=[SetEpoch()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )
    trainer.fit(Model(), DataLoader(stream, batch_size=2), ckpt_path=ckpt_path)
    print(*events, sep=", ")
    return trainer, list(events)


_, new = fit(-1)
stopped, _ = fit(4)
stopped.save_checkpoint(CHECKPOINT)
_, resumed = fit(-1, CHECKPOINT)
late = ["iterator of epoch -1", "hook 0", "hook 1", "iterator of epoch 1"]
sys.exit((new, resumed) != (late, ["iterator of epoch -1"]))
PY
"$folder/venv/bin/python" "$folder/epochs.py" "$folder"
