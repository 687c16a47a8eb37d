"""Quantiles of PSNR over all markers."""

from __future__ import annotations

import dataclasses

import pytest

from splatshard.jobs.destination.manifest import psnr_quantiles
from splatshard.schemas.shard import ShardManifest


def with_psnr(start: float, *counts: int) -> ShardManifest:
    ok = sum(counts)
    steps = [start + 0.5 * i for i, n in enumerate(counts) if n]
    statistics = {
        "psnr_mean": 30.0,
        "psnr_min": min(steps) + 0.1,
        "psnr_max": max(steps) + 0.4,
        "psnr_histogram_from": start,
        "psnr_histogram": " ".join(map(str, counts)),
    }
    return ShardManifest(
        name="a",
        data_file="a-00000000.tar",
        size_bytes=1,
        sha256="",
        format="webdataset",
        samples=ok,
        counts={"ok": ok},
        statistics=statistics,
        fingerprint="",
        inputs={},
        source_url="",
        source_sha256="",
    )


def test_quantiles_are_those_of_all_images_together() -> None:
    shards = [with_psnr(20.0, *[10] * 20), with_psnr(30.0, *[10] * 20)]  # even from 20 to 40 dB
    found = psnr_quantiles(shards)
    assert found == {
        "p5": pytest.approx(21.0),
        "p25": pytest.approx(25.0),
        "p50": pytest.approx(30.0),
        "p75": pytest.approx(35.0),
        "p95": pytest.approx(39.0),
    }


def test_quantiles_stay_within_what_was_seen() -> None:
    assert psnr_quantiles([with_psnr(25.0, 1)]) == {
        f"p{p}": pytest.approx(25.1 if p == 5 else min(25.0 + p / 200, 25.4), abs=0.03)
        for p in (5, 25, 50, 75, 95)
    }


def test_no_quantiles_without_images_or_histograms() -> None:
    assert psnr_quantiles([]) is None
    skipped = dataclasses.replace(
        with_psnr(25.0, 1), counts={"no_image": 1}, statistics={"payload_bytes": 0}
    )
    assert psnr_quantiles([skipped]) is None
    old = dataclasses.replace(with_psnr(25.0, 1), statistics={"psnr_mean": 25.0})
    assert psnr_quantiles([with_psnr(25.0, 1), old]) is None
    assert psnr_quantiles([with_psnr(25.0, 1), skipped]) is not None
