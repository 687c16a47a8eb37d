"""The commit after a kill or an error at any step: whole or not there."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from splatshard.pipeline.shards.commit import (
    clean_staging,
    mark_failed,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.schemas.errors import (
    SourceError,
    StorageError,
)
from splatshard.schemas.shard import ShardManifest
from tests.rows import config_of, make_ref, make_rows
from tests.unit.committing import (
    MORE_ROWS,
    assert_nothing_committed,
    commit_shard,
    die_at,
    snapshot,
)


def killed_commit(
    dst: Path,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    replaces: ShardManifest | None,
    rows: list[dict[str, Any]] | None,
) -> bool:
    """Commit in a child that SIGKILLs itself at `step`; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            die_at(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            commit_shard(dst, rows=rows, replaces=replaces)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("before", ["nothing", "another shard", "fewer rows"])
def test_a_kill_at_any_step_is_repaired_by_running_again(
    tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(dst: Path) -> ShardManifest | None:
        if before == "nothing":
            return None
        mark_failed(str(dst), make_ref(), config_of(), SourceError("cut"))
        if before == "fewer rows":
            return commit_shard(dst)
        old = commit_shard(dst, config_of("webdataset"))
        mark_failed(str(dst), make_ref(), config_of(), SourceError("cut"))
        return old

    old = prepare(tmp_path / "undisturbed")
    rows = make_rows(MORE_ROWS) if before == "fewer rows" else None
    new = commit_shard(tmp_path / "undisturbed", rows=rows, replaces=old)
    wanted = snapshot(tmp_path / "undisturbed")
    done = 0
    for step in itertools.count():
        old = prepare(dst := tmp_path / str(step))
        if not killed_commit(dst, step, monkeypatch, old, rows):
            break
        marker = read_markers(str(dst)).get("00000000")
        if isinstance(marker, ShardManifest):
            assert verify_shard(str(dst), marker) == []
        clean_staging(str(dst))
        if marker == new:
            done += 1
        else:
            commit_shard(dst, rows=rows, replaces=old)
        assert snapshot(dst) == wanted, step
    assert step >= 12
    assert done >= 1  # some kills came after the marker


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_step_leaves_no_half_commit(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    done, messages = 0, []
    for step in itertools.count():
        dst = tmp_path / str(step)
        failed = len(messages)
        try:
            with monkeypatch.context() as patch:
                die_at(patch, step, fail)
                commit_shard(dst)
        except StorageError as e:
            messages.append(str(e))
        if len(messages) == failed and done:  # it came to its end
            break
        marker = read_markers(str(dst)).get("00000000")
        if marker is not None:
            assert isinstance(marker, ShardManifest)
            assert verify_shard(str(dst), marker) == []
            done += 1
        clean_staging(str(dst))
        assert not (dst / "_staging").exists()
    assert len(messages) >= 10
    for message in messages:
        assert re.match(rf"cannot \w+ {tmp_path}/\d+.*run the same command", message)


def test_a_full_disk_leaves_no_marker_and_no_staging(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        big = make_rows(8, n=2000)
        with pytest.raises(StorageError, match="no space left: free some"):
            commit_shard(tmp_path, rows=big)
        assert_nothing_committed(tmp_path)
        commit_shard(tmp_path, rows=make_rows(8))  # there is room for this one
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
