"""Shards and markers of every kind, for tests of the planner."""

from __future__ import annotations

import dataclasses

from splatshard.jobs.destination.plan import Marker
from splatshard.schemas.config import ConvertConfig, FitConfig, fingerprint, inputs
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.shard import FailedShard, ShardManifest, ShardRef

CONFIG = ConvertConfig()
OTHER = ConvertConfig(fit=FitConfig(steps=300))


def make_ref(name: str, etag: str = "1", size_bytes: int = 100, limit: int | None = None):
    return ShardRef(
        name=name,
        kind="tar",
        urls=(f"in/{name}.tar",),
        size_bytes=size_bytes,
        etag=etag,
        limit=limit,
    )


def make_manifest(ref: ShardRef, config: ConvertConfig = CONFIG) -> ShardManifest:
    shard_inputs = inputs(config, ref)
    return ShardManifest(
        name=ref.name,
        data_file=f"{ref.name}.parquet",
        size_bytes=10,
        sha256="0" * 64,
        format="parquet",
        samples=3,
        counts={"ok": 2, "no_image": 1},
        statistics={"psnr_mean": 30.0, "payload_bytes": 12.0},
        fingerprint=fingerprint(shard_inputs),
        inputs=shard_inputs,
        source_url=ref.urls[0],
        source_sha256=f"content of {ref.name}",
    )


def make_failed(ref: ShardRef) -> FailedShard:
    return FailedShard(
        name=ref.name,
        source_url=ref.urls[0],
        error="SourceError",
        message="cut off",
        fingerprint=fingerprint(inputs(CONFIG, ref)),
    )


def same_content(ref: ShardRef) -> str:
    return f"content of {ref.name}"


def never(ref: ShardRef) -> str:
    raise AssertionError("no checksum is needed here")


MARKERS = {
    "none": lambda ref: None,
    "done": make_manifest,
    "failed": make_failed,
    "stale": lambda ref: make_manifest(ref, OTHER),
    "resized": lambda ref: make_manifest(dataclasses.replace(ref, size_bytes=99)),
    "touched": lambda ref: make_manifest(dataclasses.replace(ref, etag="0")),
    "corrupt": lambda ref: CorruptShardError("not JSON"),
}


def markers_for(kinds: list[str]) -> tuple[list[ShardRef], dict[str, Marker]]:
    refs = [make_ref(f"{i:08d}") for i in range(len(kinds))]
    found = {ref.name: MARKERS[kind](ref) for ref, kind in zip(refs, kinds, strict=True)}
    return refs, {name: marker for name, marker in found.items() if marker is not None}
