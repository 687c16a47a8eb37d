"""Sums over the markers of done shards: what a dataset holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from splatshard.schemas.shard import OK, ShardManifest, is_count
from splatshard.schemas.splats import MAX_LOSS_DB


def total_samples(manifests: Sequence[ShardManifest]) -> int:
    return sum(m.samples for m in manifests)


def total_ok(manifests: Sequence[ShardManifest]) -> int:
    return sum(m.counts.get(OK, 0) for m in manifests)


def psnr_sum(manifests: Sequence[ShardManifest]) -> float:
    """Sum of the ok samples' PSNR in dB, from the markers' means."""
    return weighted(manifests, "psnr_mean")


def weighted(manifests: Sequence[ShardManifest], statistic: str) -> float:
    """Sum over shards of a per-image mean times the number of ok images."""
    pairs = [(m.statistics.get(statistic), m.counts.get(OK, 0)) for m in manifests]
    return sum(mean * ok for mean, ok in pairs if mean is not None and ok)


def dataset_figures(manifests: Sequence[ShardManifest]) -> dict[str, Any]:
    """The figures of a set of done shards, from their markers; None where there is no ok image."""
    ok = total_ok(manifests)
    skipped: Counter[str] = Counter()
    for m in manifests:
        skipped.update({reason: n for reason, n in m.counts.items() if reason != OK and n})
    payload = sum(m.statistics.get("payload_bytes", 0) for m in manifests)
    return {
        "samples": total_samples(manifests),
        "ok": ok,
        "skipped": dict(sorted(skipped.items())),
        "psnr_mean": psnr_sum(manifests) / ok if ok else None,
        "num_gaussians_mean": weighted(manifests, "num_gaussians_mean") / ok if ok else None,
        "bytes_per_image": payload / ok if ok else None,
        "shard_bytes": sum(m.size_bytes for m in manifests),
    }


def codec_line(manifests: Sequence[ShardManifest]) -> str:
    """`fp16 took 1.5 dB of that, ...`, where it is more than other codecs take; else empty."""
    recipes = ((m, m.inputs["recipe"].get("pack", {})) for m in manifests)
    halves = [m for m, pack in recipes if pack.get("codec") == "fp16"]
    ok = total_ok(halves)
    loss = weighted(halves, "psnr_loss_mean") / ok if ok else 0.0
    if loss <= MAX_LOSS_DB["balanced"]:
        return ""
    return (
        f"fp16 took {loss:.2f} dB of that: halves are too coarse for the positions of Gaussians so "
        f"small; --codec balanced takes {MAX_LOSS_DB['balanced']} dB at most"
    )


def copies_line(manifests: Sequence[ShardManifest]) -> str:
    """`2 shards are made of the same bytes, ...: a and b`; empty where none are."""
    made: dict[tuple[str, Any], list[str]] = {}
    for m in manifests:
        if m.counts.get(OK):
            source = m.source_sha256, m.inputs["source"].get("limit")
            made.setdefault(source, []).append(m.name)
    copies = [sorted(names) for names in made.values() if len(names) > 1]
    if not copies:
        return ""
    some = "; ".join(" and ".join(names[:3]) for names in copies[:3])
    number = sum(map(len, copies))
    return f"{number:,} shards are made of the same bytes, so their samples are several: {some}"


# Files of SRC that are not converted


def left_out_of(run: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What the run that wrote `_run.json` left out of SRC, by reason and extension."""
    return run.get("left_out") or {}


def is_left_out(value: object) -> bool:
    """Whether `value` is what `left_out_of` gives."""
    return isinstance(value, dict) and all(
        isinstance(found, dict) and all(map(is_count, found.values())) for found in value.values()
    )
