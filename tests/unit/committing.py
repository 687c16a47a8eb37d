"""What tests of the commit share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splatshard.pipeline.shards.commit import (
    marker_digest,
    publish,
    staged_file,
)
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.shard import ShardManifest
from tests.rows import config_of, make_ref, make_rows, write_shard

DIGEST = "cd" * 32


def commit_shard(
    dst: Path,
    config: ConvertConfig | None = None,
    name: str = "00000000",
    rows: list[dict[str, Any]] | None = None,
    samples: int | None = None,
    replaces: ShardManifest | None = None,
) -> ShardManifest:
    """Write and publish one shard as convert_shard does."""
    config = config or config_of()
    codec, budgets = config.pack.codec, config.fit.budgets
    rows = make_rows(8, codec=codec, budgets=budgets) if rows is None else rows
    digest = marker_digest(replaces) if replaces else ""
    with staged_file(str(dst), name) as path:
        write_shard(path, rows, config.pack.format, codec, budgets)
        return publish(str(dst), path, make_ref(name), config, DIGEST, samples, replaces=digest)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`; None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def assert_nothing_committed(folder: Path) -> None:
    assert snapshot(folder) == {}


MORE_ROWS = 12
STEPS = ("replace", "fsync", "unlink", "open")


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, die: Callable[[], None]) -> None:
    """Call `die` instead of the `step`th call of any of STEPS."""
    left = [step]

    def patch(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                die()
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, patch(getattr(os, name)))
