"""Checkpoints: all of a run at a step, or nothing.

    {dst}/checkpoints/{step:08d}/
        model.safetensors    weights, fp32
        ema.safetensors      their average, where there is one
        state.pt             optimiser, gradient scaler, reader; torch.load(weights_only=True)
        config.json          comes last: readers trust only a folder that has it

Each file is written aside, synced and moved (or uploaded) to its place; config.json has the others'
sizes and SHA-256, so a torn file is seen when it is loaded, and the step, so that one that was
copied over another is. A run that was killed while it wrote
leaves a folder without config.json, which the next checkpoint deletes. The newest one that is
whole is where a run goes on.

config.json: {"version", "step", "config", "shards", "files": {name: {"size_bytes", "sha256"}}}.
`config` is the TrainConfig, `shards` what the data were (their fingerprint and constants). Learning
rate and random numbers are functions of the step (schedule.py), and so are not saved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splatshard.pipeline.storage import atomic, fs
from splatshard.pipeline.storage.errors import storage_errors
from splatshard.pipeline.storage.fs import is_local, local_path
from splatshard.pipeline.storage.options import redact_src
from splatshard.pipeline.storage.staging import STAGING, scratch, staged, sweep
from splatshard.pipeline.train.saved import read_config, read_model
from splatshard.schemas.errors import CorruptShardError, SourceError, UsageError
from splatshard.schemas.plain import flat, from_dict, to_dict
from splatshard.schemas.train import MAY_CHANGE, TrainConfig

log = logging.getLogger(__name__)

VERSION = 1
MODEL, AVERAGE, STATE, CONFIG = "model.safetensors", "ema.safetensors", "state.pt", "config.json"

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and what config.json says."""

    url: str
    step: int
    config: dict[str, Any]
    shards: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def train_config(self) -> TrainConfig:
        """Raises UsageError for a configuration of another version."""
        return from_dict(TrainConfig, self.config)

    def weights(self, name: str = MODEL) -> Weights:
        """The weights in one of its files. Raises CorruptShardError for a damaged one."""
        return self._read(name, load_file)

    def state(self) -> dict[str, Any]:
        """What state.pt holds, in main memory. Raises CorruptShardError for a damaged one."""
        return self._read(STATE, lambda path: torch.load(path, "cpu", weights_only=True))

    def _read(self, name: str, load: Callable[[str], Any]) -> Any:
        """Where its SHA-256 is as it should be; the bytes are read twice, or fetched once."""
        url = f"{self.url}/{name}"
        digest = hashlib.sha256()
        try:
            with fs.local_copy(url, digest) as path:
                if digest.hexdigest() == self.files.get(name, {}).get("sha256"):
                    return _loaded(url, load, path, self._remedy)
        except SourceError as e:
            raise CorruptShardError(f"{url} is missing: {self._remedy}") from e
        raise CorruptShardError(
            f"{url} is damaged: its SHA-256 is not the saved one; {self._remedy}"
        )

    @property
    def _remedy(self) -> str:
        return f"delete the folder {self.url}, and the one before is taken"


def _loaded(url: str, load: Callable[[str], Any], path: str, remedy: str) -> Any:
    """What `load` makes of `path`, a copy of `url`. Raises CorruptShardError for other contents."""
    try:
        return load(path)
    except (UnpicklingError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError) as e:
        raise CorruptShardError(
            f"{url} holds more or something else than the tensors, numbers and texts of a run, and "
            f"nothing else is loaded, since that could run code: {remedy}"
        ) from e


def save(
    dst: str,
    step: int,
    model: Weights,
    average: Weights | None,
    state: Mapping[str, Any],
    config: TrainConfig,
    shards: Mapping[str, Any],
    keep: int,
) -> str:
    """Write the checkpoint of `step` and delete all but the last `keep`; the URL of its folder.

    Raises StorageError and UnavailableError; then the last ones are still there.
    """
    url = _folder(dst, step)
    if is_local(url):
        with storage_errors(url):
            local_path(url).mkdir(parents=True, exist_ok=True)
            for folder in (dst, url):
                sweep(local_path(folder))  # what a killed process was writing
    atomic.delete(f"{url}/{CONFIG}")  # of a run that went on from an earlier one
    files = {
        MODEL: lambda path: _save_weights(_plain(model), path),
        STATE: lambda path: _save_state(dict(state), path),
    }
    if average is not None:
        files[AVERAGE] = lambda path: _save_weights(_plain(average), path)
    aside = local_path(dst) if is_local(dst) else scratch()
    entries = {name: _put(url, name, write, aside) for name, write in files.items()}
    values = to_dict(config)
    values["data"] |= {"src": redact_src(config.data.src)}  # which may change when a run goes on
    marker = {"version": VERSION, "step": step, "config": values, "shards": dict(shards)}
    text = json.dumps(marker | {"files": entries}, indent=1) + "\n"
    atomic.write(f"{url}/{CONFIG}", text.encode())
    prune(dst, keep)
    return url


def _plain(weights: Weights) -> Weights:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def _save_weights(weights: Weights, path: Path) -> None:
    """Raises OSErrors; safetensors says them in words."""
    try:
        save_file(weights, path)
    except SafetensorError as e:
        if found := re.search(r"os error (\d+)", str(e)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from e
        raise


def _save_state(state: dict[str, Any], path: Path) -> None:
    """Raises OSErrors; torch hides them behind its own."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as e:
        if isinstance(e.__context__, OSError):
            raise e.__context__ from None
        raise


def _put(url: str, name: str, write: Callable[[Path], None], aside: Path) -> dict[str, Any]:
    """Write one file to the folder `aside`, then put it in its place; its entry in config.json."""
    with staged(aside, name) as path:
        with storage_errors(path):
            write(path)
            atomic.sync(path)
            entry = {"size_bytes": path.stat().st_size, "sha256": fs.sha256(str(path))}
        atomic.upload(path, f"{url}/{name}")
    return entry


def _folder(dst: str, step: int) -> str:
    return f"{dst.rstrip('/')}/checkpoints/{step:08d}"


def saved_steps(dst: str) -> tuple[list[int], dict[int, list[str]]]:
    """Steps of the whole checkpoints in `dst`, in order; and the files of all, whole or not."""
    files: dict[int, list[str]] = {}
    for url in fs.find(f"{dst.rstrip('/')}/checkpoints"):
        place = re.search(r"/checkpoints/([0-9]{8,})/", url)
        if place:
            files.setdefault(int(place[1]), []).append(url)
    whole = [step for step in files if f"{step:08d}/{CONFIG}" in _ends(files[step])]
    return sorted(whole), files


def _ends(urls: list[str]) -> set[str]:
    return {"/".join(url.rsplit("/", 2)[1:]) for url in urls}


def prune(dst: str, keep: int) -> None:
    """Delete all checkpoints but the last `keep`, and what is left of broken ones."""
    whole, files = saved_steps(dst)
    for step in set(files) - set(whole[-keep:]):
        folder = _folder(dst, step)
        atomic.delete(f"{folder}/{CONFIG}")  # first: what is left is no checkpoint
        for url in files[step]:
            atomic.delete(url)
        if is_local(folder):
            for place in (local_path(folder) / STAGING, local_path(folder)):
                with suppress(OSError):
                    os.rmdir(place)


def latest(dst: str) -> Checkpoint | None:
    """The newest whole checkpoint of the run in `dst`; None where there is none. Raises
    CorruptShardError where it cannot be understood, or is that of another step."""
    whole, _ = saved_steps(dst)
    return read_checkpoint(_folder(dst, whole[-1])) if whole else None


def read_checkpoint(url: str) -> Checkpoint:
    """What config.json of the checkpoint at `url` says. Raises UsageError where there is none,
    CorruptShardError where it cannot be understood, or the folder is named after another step."""
    url = url.rstrip("/")
    with storage_errors(url, "read"):
        try:
            text = fs.read_bytes(f"{url}/{CONFIG}").decode()
        except FileNotFoundError as e:
            raise UsageError(
                f"{url} is no checkpoint, it has no {CONFIG}: give a folder of {{dst}}/checkpoints"
            ) from e
    try:
        found = json.loads(text)
        if found["version"] != VERSION:
            raise UsageError(
                f"{url} is a checkpoint of version {found['version']}, this build reads {VERSION}"
            )
        if type(found["step"]) is not int:
            raise TypeError(f"step is {found['step']!r}")
        checkpoint = Checkpoint(
            url, found["step"], found["config"], found["shards"], found["files"]
        )
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, UsageError):
            raise
        raise CorruptShardError(f"{url}/{CONFIG} is damaged ({e}): delete that folder") from e
    name = url.rpartition("/")[2]
    if re.fullmatch("[0-9]{8,}", name) and int(name) != checkpoint.step:
        raise CorruptShardError(
            f"{url} holds the checkpoint of step {checkpoint.step}, which was put there from "
            f"elsewhere: call the folder {checkpoint.step:08d}, or delete it, and the one before "
            "is taken"
        )
    return checkpoint


def refuse_changes(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Raises UsageError where `config` is not that of the checkpoint, in a field that matters."""
    before = dict(flat(checkpoint.config))
    now = dict(flat(json.loads(json.dumps(to_dict(config)))))
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name) and not _may_change(name)
    ]
    if changed:
        raise UsageError(
            f"{checkpoint.url} is a checkpoint of another configuration: {'; '.join(changed)}: "
            "set it as it was, or choose another dst (and init, to begin with these weights)"
        )


def _may_change(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in MAY_CHANGE)


def initial_weights(url: str) -> tuple[Weights, Checkpoint | None]:
    """Weights from a run's dst (its newest checkpoint), a checkpoint, a saved model's folder or a
    .safetensors file, and the checkpoint that they are of. Of a checkpoint it is the average where
    there is one, which is also what evaluation takes; its model.safetensors can be named as a file.

    Raises UsageError where there are none, CorruptShardError for damaged ones.
    """
    url, name = url.rstrip("/"), ""
    if (saved := read_config(url)) is not None:
        model, _ = read_model(url, saved)
        told = {"model": to_dict(saved.model)}
        origin = Checkpoint(url, saved.step or 0, told, {"cutoff": saved.cutoff}, {})
        return model.state_dict(), origin
    if url.endswith(".safetensors"):
        url, _, name = url.rpartition("/")
        if not fs.exists(f"{url}/{CONFIG}"):
            with fs.local_copy(f"{url}/{name}", hashlib.sha256()) as path:
                other = "give a file of safetensors, or the dst of another run"
                return _loaded(f"{url}/{name}", load_file, path, other), None
    found = read_checkpoint(url) if fs.exists(f"{url}/{CONFIG}") else latest(url)
    if found is None:
        raise UsageError(f"init is {url}: no checkpoint is there; give the dst of another run")
    return found.weights(name or (AVERAGE if AVERAGE in found.files else MODEL)), found


def refuse_other_inputs(origin: Checkpoint, config: TrainConfig, cutoff: float | None) -> None:
    """Raises UsageError where the weights of `origin` were trained on numbers that mean something
    else: shards with another cutoff, or a stem with other constants."""
    if "patches" in (origin.config["model"]["encoder"]["input"], config.model.encoder.input):
        return  # no stem, no cutoff; and `take` refuses the encoder of the other kind
    before = dict(flat(origin.config["model"]["encoder"]["stem"]))
    now = dict(flat(json.loads(json.dumps(to_dict(config.model.encoder.stem)))))
    different = [
        f"model.encoder.stem.{name} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if origin.shards["cutoff"] != cutoff and None not in (origin.shards["cutoff"], cutoff):
        different.append(f"the shards' cutoff was {origin.shards['cutoff']} and is {cutoff}")
    if different:
        raise UsageError(
            f"init {origin.url} was trained on other inputs: {'; '.join(different)}: set it as it "
            "was, or convert again as those shards were"
        )
