"""`_manifest.json`, kept up to date by the driver while it runs, and what it is made of.

    catalog = Catalog(dst, done)        the done shards that are there before this run
    catalog.add(manifest)               one more, or one that replaces another
    catalog.write_if_due()              once a minute at most, and at most 3 % of the time
    catalog.write()                     at the end

The dataset card is written before it, each time, so that the card is never older.

All of it but `provenance` is a pure function of the markers. The file may lag behind them, so
nothing is lost when it is not written; see `pipeline.shards.markers` for how it is believed.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from splatshard.jobs.cli.text import say
from splatshard.jobs.destination.card import CARD_FILE, card
from splatshard.jobs.destination.figures import dataset_figures
from splatshard.jobs.destination.hub_readme import README_FILE, write_readme
from splatshard.jobs.destination.plan_file import put_file, write_lines, write_text
from splatshard.pipeline.storage.fs import exists, open_read
from splatshard.pipeline.storage.options import redact, redact_src
from splatshard.schemas.config import ConvertConfig, output_config, recipe_digest
from splatshard.schemas.errors import UnavailableError
from splatshard.schemas.manifest import (
    MANIFEST_FILE,
    Entry,
    dataset_content,
    dataset_fingerprint,
    manifest_lines,
    read_head,
)
from splatshard.schemas.shard import PSNR_STEP, ShardManifest, to_json
from splatshard.schemas.splats import FORMAT_VERSION, MAX_PSNR, columns, metadata_of

EVERY_S = 60.0
SHARE = 0.03
"""Of the driver's time, at most, that goes into writing the manifest again and again."""

PACKAGES = (
    *("torch", "triton", "numba", "numpy", "pillow", "pyarrow"),
    *("ray", "fsspec", "s3fs", "webdataset"),
)

OPTIONS = ("--storage-options", "--storage_options")

QUANTILES = (5, 25, 50, 75, 95)


class Catalog:
    """The done shards of a destination, and the file that lists them."""

    def __init__(self, dst: str, done: Iterable[ShardManifest]) -> None:
        self._dst = dst
        self._manifests = {manifest.name: manifest for manifest in done}
        self._recipes: dict[str, dict[str, Any]] = {}
        self._marker_bytes: dict[str, int] = {}
        self._due = time.monotonic() + EVERY_S
        self._changed = False

    @property
    def manifests(self) -> list[ShardManifest]:
        """All of them, sorted by name."""
        return [self._manifests[name] for name in sorted(self._manifests)]

    def add(self, manifest: ShardManifest) -> None:
        """A shard is done. Its recipe is that of the others from now on: each worker sends a copy,
        and 100,000 would fill the driver."""
        recipe = manifest.inputs["recipe"]
        manifest.inputs["recipe"] = self._recipes.setdefault(recipe_digest(recipe), recipe)
        self._manifests[manifest.name] = manifest
        self._marker_bytes.pop(manifest.name, None)
        self._changed = True

    def forget(self, names: Iterable[str]) -> None:
        """These shards are no more."""
        for name in names:
            self._manifests.pop(name, None)
            self._marker_bytes.pop(name, None)
            self._changed = True

    def write_if_due(self) -> None:
        """Write what is new, unless that was done a short while ago. A store that does not answer
        is asked again later."""
        begin = time.monotonic()
        if not self._changed or begin < self._due:
            return
        try:
            self._write(head(self.manifests))
        except UnavailableError as e:
            say(f"{MANIFEST_FILE} was not written, this is tried again: {e}")
        now = time.monotonic()
        self._due = now + max(EVERY_S, (now - begin) / SHARE)

    def write(self) -> None:
        """Write the file and the dataset card, unless they say all this already.

        Raises StorageError, UnavailableError and SourceError.
        """
        if self._changed or not self._is_written():
            self._write(head(self.manifests))

    def _is_written(self) -> bool:
        url = f"{self._dst}/{MANIFEST_FILE}"
        if not all(exists(f"{self._dst}/{x}") for x in (MANIFEST_FILE, CARD_FILE, README_FILE)):
            return False
        with open_read(url) as stream:
            before = read_head(stream.read(1 << 20).partition(b"\n")[0])
        return before.get("content") == dataset_content(self._manifests.values())

    def _write(self, now: dict[str, Any]) -> None:
        from splatshard.pipeline.shards.commit import staged_file

        for name in self._manifests.keys() - self._marker_bytes.keys():
            self._marker_bytes[name] = len(to_json(self._manifests[name]).encode())
        entries = {
            name: Entry(manifest, self._marker_bytes[name])
            for name, manifest in self._manifests.items()
        }
        text = card(self._dst, now, self.manifests)
        write_text(self._dst, CARD_FILE, text)
        write_readme(self._dst, text, self.manifests)
        with staged_file(self._dst, "manifest") as path:
            write_lines(path, manifest_lines(now, entries))
            put_file(path, f"{self._dst}/{MANIFEST_FILE}")
        self._changed = False


def head(manifests: Sequence[ShardManifest]) -> dict[str, Any]:
    """What the manifest says about the dataset as a whole."""
    recipes = [manifest.inputs["recipe"] for manifest in manifests]
    one = recipes[0] if recipes else output_config(ConvertConfig())
    metadata = metadata_of(one)
    return {
        "fingerprint": dataset_fingerprint(manifests),
        "content": dataset_content(manifests),
        "totals": {
            "shards": len(manifests),
            **dataset_figures(manifests),
            "psnr_quantiles": psnr_quantiles(manifests),
        },
        "schema": {
            "format_version": FORMAT_VERSION,
            "columns": {field.name: str(field.type) for field in columns(metadata)},
            "codecs": sorted({each["pack"]["codec"] for each in recipes}),
        },
        "provenance": provenance(),
    }


def provenance() -> dict[str, Any]:
    """The command of this process, without secrets, and the versions of what it runs on."""
    versions = {"splatshard": version("splatshard"), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"command": command(), "versions": versions}


def command() -> list[str]:
    """The command line of this process. Of the storage options nothing is shown: what is no secret
    there, nobody can tell."""
    shown: list[str] = []
    for argument in sys.argv:
        name, equals, _ = argument.partition("=")
        if shown and shown[-1] in OPTIONS:
            argument = "***"
        elif equals and name in OPTIONS:
            argument = f"{name}=***"
        shown.append(redact(redact_src(argument)))
    return shown


def psnr_quantiles(manifests: Iterable[ShardManifest]) -> dict[str, float] | None:
    """`{"p5": ..., ...}` in dB over all ok images, from the markers' histograms.

    Within a step of PSNR_STEP dB images are taken to be evenly spread, so that a quantile is off by
    less than a step. None where there is no image, or a marker without a histogram.
    """
    steps = [0] * (round(MAX_PSNR / PSNR_STEP) + 1)
    low, high = float("inf"), float("-inf")
    for manifest in manifests:
        statistics = manifest.statistics
        if "psnr_mean" not in statistics:
            continue
        if "psnr_histogram" not in statistics:
            return None
        first = round(statistics["psnr_histogram_from"] / PSNR_STEP)
        for step, images in enumerate(map(int, statistics["psnr_histogram"].split()), first):
            steps[min(max(step, 0), len(steps) - 1)] += images
        low, high = min(low, statistics["psnr_min"]), max(high, statistics["psnr_max"])
    total = sum(steps)
    if not total:
        return None
    found: dict[str, float] = {}
    for percent in QUANTILES:
        wanted, below = total * percent / 100, 0
        for step, images in enumerate(steps):
            if images and below + images >= wanted:
                value = (step + (wanted - below) / images) * PSNR_STEP
                found[f"p{percent}"] = min(max(value, low), high)
                break
            below += images
    return found
