"""Committed shards of random splats, for tests of the training reader."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from pipeline.commit import publish, staged_file
from pipeline.write import open_writer
from schemas.config import ConvertConfig, FitConfig
from schemas.shard import ShardManifest
from tests.rows import config_of, make_ref, make_rows, metadata_of

N = 6
"""Gaussians per sample."""


def splat_config(format: str = "parquet", codec: str = "fp16", n: int = N) -> ConvertConfig:
    return replace(config_of(format, codec), fit=FitConfig(num_gaussians=n))


def rows_of(shard: int, count: int, n: int = N, codec: str = "fp16") -> list[dict[str, Any]]:
    """Rows whose keys and labels are unique over shards; every fourth is a skipped sample, some
    captions and labels are null."""
    rows = make_rows(count, n, codec)
    for i, row in enumerate(rows):
        number = 1000 * shard + i
        row |= {"key": f"{number:09d}", "label": number, "caption": "word " * (i % 5)}
        if i % 7 == 5:
            row |= {"label": None, "caption": None}
    return rows


def commit(
    dst: str,
    name: str,
    rows: list[dict[str, Any]],
    config: ConvertConfig | None = None,
    attempt: str = "",
) -> ShardManifest:
    """Write and publish a shard of `rows`."""
    config = config or splat_config()
    with staged_file(dst, name) as path:
        with open_writer(path, config.pack.format, metadata_of(config)) as writer:
            writer.write(rows)
        ref = make_ref(name)
        return publish(dst, path, ref, config, "ab" * 32, len(rows), attempt=attempt)


def make_dataset(
    dst: str,
    counts: list[int],
    format: str = "parquet",
    codec: str = "fp16",
    attempt: str = "",
    first: int = 0,
) -> dict[str, dict[str, Any]]:
    """Shards of so many rows each; their ok rows by key."""
    found = {}
    config = splat_config(format, codec)
    for i, count in enumerate(counts):
        rows = rows_of(first + i, count, codec=codec)
        commit(dst, f"{first + i:05d}", rows, config, attempt)
        found |= {row["key"]: row for row in rows if row["status"] == "ok"}
    return found


def keys_of(batches: Any) -> list[str]:
    """Keys of the samples that are valid, in order."""
    return [k for b in batches for k, v in zip(b.keys, b.valid.tolist(), strict=True) if v]


def shuffled(seed: int, items: list[Any]) -> list[Any]:
    return random.Random(seed).sample(items, len(items))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())
