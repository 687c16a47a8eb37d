"""Whether the files of DST are what its markers say: what `verify` and `repair` share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

from rich.console import Console
from rich.progress import track

from splatshard.jobs.destination.plan import Marker
from splatshard.schemas.errors import SplatshardError
from splatshard.schemas.shard import ShardManifest
from splatshard.schemas.splats import EXTENSIONS

DOWNLOADS = 8
"""Shards of a remote store that are verified at once."""


def verified(
    dst: str, manifests: Sequence[ShardManifest]
) -> Iterator[tuple[ShardManifest, list[str]]]:
    """Each shard, re-read, with what is wrong with it; in order."""
    from splatshard.pipeline.shards.verify import verify_shard
    from splatshard.pipeline.storage.fs import is_local

    console = Console(stderr=True)
    with nullcontext() if is_local(dst) else ThreadPoolExecutor(DOWNLOADS) as pool:
        problems = (pool.map if pool else map)(partial(verify_shard, dst), manifests)
        shards = zip(manifests, problems, strict=True)
        yield from track(
            shards,
            description="verifying",
            total=len(manifests),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )


def orphans(files: Iterable[str], markers: Mapping[str, Marker]) -> list[str]:
    """Data files that no marker names. Of a shard with a corrupt marker nobody can tell."""
    from splatshard.pipeline.shards.markers import shard_of

    named = {m.data_file for m in markers.values() if isinstance(m, ShardManifest)}
    unclear = {n for n, marker in markers.items() if isinstance(marker, SplatshardError)}
    data = [f for f in files if f.endswith(tuple(f".{e}" for e in EXTENSIONS.values()))]
    return [file for file in data if file not in named and shard_of(file) not in unclear]
