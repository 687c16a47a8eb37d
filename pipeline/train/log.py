"""What a run tells: {dst}/log.jsonl, one JSON object per line, and TensorBoard's files on request.

    {"event": "start", "step": 0, ...}       a start or resume: versions, processes, parameters
    {"event": "step", "step": 10, ...}       every `log.every` steps
    {"event": "checkpoint", "step": 1000, "url": ...}
    {"event": "end", "step": 5000, ...}
    {"event": "stop", "step": 1234, ...}     in its place where a signal ended the run

`step` counts the steps that are done. A run that goes on from a checkpoint first cuts off the lines
after that, so the file is always the history of the weights.

A local file grows line by line; a remote one, to which nothing can be added, is written anew at
every checkpoint.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from splatshard.pipeline.storage.atomic import sync, write
from splatshard.pipeline.storage.errors import storage_errors
from splatshard.pipeline.storage.fs import is_local, local_path, read_bytes
from splatshard.schemas.errors import UsageError

LOG_FILE = "log.jsonl"


class Log:
    """The log of one run, written by rank 0 alone. `step` is where it goes on."""

    def __init__(self, dst: str, step: int, tensorboard: bool) -> None:
        self._url = f"{dst}/{LOG_FILE}"
        kept = [line for line in _lines(self._url) if step and json.loads(line)["step"] <= step]
        write(self._url, "".join(kept).encode())
        self._lines = [] if is_local(self._url) else kept
        self._board = _board(dst, step) if tensorboard else None

    def write(self, event: str, step: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Add a record, and return it."""
        record = {"event": event, "step": step, "time": round(time.time(), 3), **fields}
        line = json.dumps({name: finite(value) for name, value in record.items()}) + "\n"
        if is_local(self._url):
            with storage_errors(self._url), local_path(self._url).open("a") as file:
                file.write(line)
        else:
            self._lines.append(line)
        if self._board and event == "step":
            for name, value in fields.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        return record

    def flush(self) -> None:
        """See to it that all records are in {dst}, and on the disk."""
        if is_local(self._url):
            sync(local_path(self._url))
        else:
            write(self._url, "".join(self._lines).encode())

    def close(self) -> None:
        """Call it at the end."""
        self.flush()
        if self._board:
            self._board.close()


def finite(value: Any) -> Any:
    """`value`, but None for an infinite number or NaN, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(dst: str) -> list[dict[str, Any]]:
    """The records of a run; none where there is no log. Raises StorageError and others."""
    return [json.loads(line) for line in _lines(f"{dst.rstrip('/')}/{LOG_FILE}")]


def _lines(url: str) -> list[str]:
    """Whole lines; a kill may have cut the last one."""
    with storage_errors(url, "read"):
        try:
            text = read_bytes(url).decode()
        except FileNotFoundError:
            return []
    return [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def _board(dst: str, step: int) -> Any:
    if not is_local(dst):
        raise UsageError(f"log.tensorboard is True, but dst {dst} is remote: choose a local folder")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UsageError(
            "log.tensorboard is True, but tensorboard is not installed: install it, or set this "
            "to False"
        ) from e
    return SummaryWriter(str(local_path(dst) / "tensorboard"), purge_step=step or None)


def memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
