"""Checkpoints that cannot be taken, or not be written: what is wrong, and what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from splatshard.pipeline.train import checkpoint
from splatshard.pipeline.train.checkpoint import initial_weights, latest, read_checkpoint, save
from splatshard.pipeline.train.trained import load_trained
from splatshard.schemas.errors import CorruptShardError, StorageError
from tests.training import toy_config

SHARDS = {"cutoff": 3.0}


def saved(dst: Path, step: int, numbers: int = 10) -> Path:
    """The folder of a small checkpoint of `step`."""
    weights = {"a": torch.full((numbers,), float(step))}
    state = {"optimizer": {"b": torch.zeros(numbers)}, "step": step}
    config = toy_config(dst, dst)
    return Path(save(str(dst), step, weights, None, state, config, SHARDS, keep=9))


# Of another step


def test_a_checkpoint_that_was_copied_over_another_is_not_taken(tmp_path: Path) -> None:
    before, url = saved(tmp_path, 99), saved(tmp_path, 100)
    shutil.rmtree(url)
    shutil.copytree(before, url)
    for take in (
        lambda: latest(str(tmp_path)),
        lambda: read_checkpoint(f"{url}/"),
        lambda: initial_weights(str(url)),
        lambda: initial_weights(str(tmp_path)),
        lambda: load_trained(str(tmp_path), "auto", torch.device("cpu")),
    ):
        with pytest.raises(CorruptShardError, match=f"{url} holds the .* step 99.* 00000099"):
            take()
    shutil.rmtree(url)
    found = latest(str(tmp_path))
    assert found is not None
    assert found.step == 99


def test_a_copy_under_another_name_is_one(tmp_path: Path) -> None:
    url = saved(tmp_path, 99)
    for name in ("best", "00000099", "99"):
        copy = shutil.copytree(url, tmp_path / "elsewhere" / name)
        assert read_checkpoint(str(copy)).step == 99


@pytest.mark.parametrize("step", ["99", None, 1.5, True])
def test_a_step_that_is_none_is_damage(tmp_path: Path, step: object) -> None:
    url = saved(tmp_path, 99)
    marker = json.loads((url / "config.json").read_text())
    (url / "config.json").write_text(json.dumps(marker | {"step": step}))
    with pytest.raises(CorruptShardError, match=r"config.json is damaged .*delete that folder"):
        read_checkpoint(str(url))


# Of other contents


def forge(url: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of a file, and let config.json vouch for it."""
    (url / name).write_bytes(data)
    marker = json.loads((url / "config.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    marker["files"][name] = {"size_bytes": len(data), "sha256": digest}
    (url / "config.json").write_text(json.dumps(marker))


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("false",)


def torch_bytes(value: Any, path: Path) -> bytes:
    torch.save(value, path)
    return path.read_bytes()


@pytest.mark.parametrize("contents", ["torch", "pickle", "garbage", "cut", "empty"])
def test_what_is_no_state_is_said_plainly(tmp_path: Path, contents: str) -> None:
    url = saved(tmp_path, 2)
    whole = (url / "state.pt").read_bytes()
    forge(
        url,
        "state.pt",
        {
            "torch": torch_bytes({"a": Evil()}, tmp_path / "other"),
            "pickle": pickle.dumps({"a": Evil()}, protocol=2),
            "garbage": b"garbage" * 100,
            "cut": whole[: len(whole) // 2],
            "empty": b"",
        }[contents],
    )
    with pytest.raises(CorruptShardError) as e:
        read_checkpoint(str(url)).state()
    text = str(e.value)
    assert text.startswith(f"{url}/state.pt holds ")
    assert text.endswith(f"delete the folder {url}, and the one before is taken")
    assert "weights_only" not in text
    assert "\n" not in text


@pytest.mark.parametrize("data", [b"", b"garbage" * 9, pickle.dumps({"a": 1})])
def test_what_is_no_safetensors_is_said_plainly(tmp_path: Path, data: bytes) -> None:
    url = saved(tmp_path, 2)
    forge(url, "model.safetensors", data)
    with pytest.raises(CorruptShardError, match=f"{url}/model.safetensors holds .*delete the"):
        read_checkpoint(str(url)).weights()
    file = tmp_path / "other.safetensors"
    file.write_bytes(data)
    with pytest.raises(CorruptShardError, match=f"{file} holds .*give a file of safetensors"):
        initial_weights(str(file))


# A full disk


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The system refuses to write more to a file, as where no space is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("weights", [10, 100_000])
def test_a_checkpoint_that_cannot_be_written_leaves_those_before(
    tmp_path: Path, weights: int
) -> None:
    """Whether its weights do not fit, or after them the state."""
    saved(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    config = toy_config(tmp_path, tmp_path)
    model, state = {"a": torch.zeros(weights)}, {"b": torch.zeros(200_000)}
    with files_of_at_most(50_000), pytest.raises(StorageError) as e:
        save(str(tmp_path), 2, model, None, state, config, SHARDS, keep=1)
    name = "model.safetensors" if weights > 10 else "state.pt"
    assert f"cannot write {tmp_path}/_staging/{name}" in str(e.value)
    assert "File too large" in str(e.value)
    found = latest(str(tmp_path))
    assert found is not None
    assert found.step == 1
    assert found.state()["step"] == 1
    left = set(tmp_path.rglob("*")) - set(before)
    assert {path.name for path in left} <= {"00000002", "model.safetensors"}
    assert saved(tmp_path, 3).name == "00000003"


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_no_space_is_said(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of each library."""

    def full(_: object, place: Any, *__: object) -> None:
        if name == "model.safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    if name == "model.safetensors":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=f"cannot write .*{name}.*: no space left: free some"):
        saved(tmp_path, 1)


def test_what_is_not_the_disks_fault_is_not_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        saved(tmp_path, 1)
