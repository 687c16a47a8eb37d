"""Committed shards of random splats, for tests of the training reader."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from splatshard.pipeline.shards.commit import publish, staged_file
from splatshard.pipeline.shards.rows import shard_metadata_of
from splatshard.pipeline.shards.verify import survey
from splatshard.pipeline.shards.write import open_writer
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.shard import ShardManifest, to_json
from tests.rows import config_of, make_ref, make_rows, metadata_of

Budgets = tuple[int, ...]

N = 6
"""Gaussians per sample."""


def splat_config(
    format: str = "parquet", codec: str = "fp16", n: int = N, budgets: Budgets = ()
) -> ConvertConfig:
    config = config_of(format, codec, budgets)
    return replace(config, fit=replace(config.fit, num_gaussians=n))


def rows_of(
    shard: int, count: int, n: int = N, codec: str = "fp16", budgets: Budgets = ()
) -> list[dict[str, Any]]:
    """Rows whose keys and labels are unique over shards; every fourth is a skipped sample, some
    captions and labels are null."""
    rows = make_rows(count, n, codec, budgets)
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
    classes: tuple[str, ...] = (),
) -> ShardManifest:
    """Write and publish a shard of `rows`, whose labels `classes` number, if any."""
    config = config or splat_config()
    with staged_file(dst, name) as path:
        with open_writer(path, config.pack.format, metadata_of(config)) as writer:
            writer.write(rows)
        ref = replace(make_ref(name), labels=classes)
        return publish(dst, path, ref, config, "ab" * 32, len(rows), attempt=attempt)


def forge(dst: str, manifest: ShardManifest, rows: list[dict[str, Any]]) -> None:
    """Replace a shard's rows and let its marker vouch for the file: what no writer does."""
    path = Path(dst, manifest.data_file)
    config = splat_config(manifest.format)
    with open_writer(path, manifest.format, metadata_of(config)) as writer:
        writer.write(rows)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    marker = replace(manifest, size_bytes=len(data), sha256=digest)
    Path(dst, f"{manifest.name}.json").write_text(to_json(marker))


def vouch(dst: str, data_file: str) -> None:
    """A marker for a file that came without one."""
    path = Path(dst, data_file)
    found, metadata = survey(str(path)), shard_metadata_of(str(path))
    inputs = {"recipe": metadata["recipe"], "source": {}}
    manifest = ShardManifest(
        name=path.stem,
        data_file=data_file,
        size_bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        format="parquet" if path.suffix == ".parquet" else "webdataset",
        samples=found.samples,
        counts=dict(found.counts),
        statistics=found.statistics,
        fingerprint="0" * 64,
        inputs=inputs,
        source_url="",
        source_sha256="",
    )
    Path(dst, f"{manifest.name}.json").write_text(to_json(manifest))


def make_dataset(
    dst: str,
    counts: list[int],
    format: str = "parquet",
    codec: str = "fp16",
    attempt: str = "",
    first: int = 0,
    budgets: Budgets = (),
) -> dict[str, dict[str, Any]]:
    """Shards of so many rows each; their ok rows by key."""
    found = {}
    n = budgets[-1] if budgets else N
    config = splat_config(format, codec, n, budgets)
    for i, count in enumerate(counts):
        rows = rows_of(first + i, count, n, codec, budgets)
        commit(dst, f"{first + i:05d}", rows, config, attempt)
        found |= {row["key"]: row for row in rows if row["status"] == "ok"}
    return found


def keys_of(batches: Any) -> list[str]:
    """Keys of the samples that are valid, in order."""
    return [k for b in batches for k, v in zip(b.keys, b.valid.tolist(), strict=True) if v]
