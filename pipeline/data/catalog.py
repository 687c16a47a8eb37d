"""The shards of a destination, as its markers name them, and which of their columns to read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from splatshard.pipeline.data.epoch_order import PERIOD
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.rows import shard_metadata_of
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.manifest import dataset_content
from splatshard.schemas.shard import OK, FailedShard, ShardManifest
from splatshard.schemas.splats import MAX_PAYLOAD_GAUSSIANS, canonical_json, splat_columns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How payloads are stored. `columns` are the names of the columns to read with the Gaussians
    they hold, `begin` to `end` of each sample; `largest` is the most that a sample has of all."""

    codec: str
    columns: tuple[tuple[str, int, int], ...]
    largest: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One committed data file, by its marker; `ok` of its `samples` rows are samples."""

    url: str
    format: str
    size_bytes: int
    sha256: str
    samples: int
    ok: int
    layout: Layout

    @property
    def remedy(self) -> str:
        return f"run splatshard repair {self.url.rpartition('/')[0]}"


class AnyShard(Protocol):
    """A file, or a part of a folder: where it is, and how many samples it has."""

    @property
    def url(self) -> str: ...

    @property
    def ok(self) -> int: ...


S = TypeVar("S", bound=AnyShard)


@dataclass
class Source(Generic[S]):
    """Shards that are read as one pool. `counts` int64 [S] are the samples that are read of each;
    `kept` has those rows of a shard as packed bits, where a filter leaves some out. `content` has
    a digest of all that the shards of each URL hold."""

    urls: tuple[str, ...]
    shards: list[S]
    content: str
    counts: NDArray[np.int64] = field(init=False)
    kept: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = np.array([shard.ok for shard in self.shards], np.int64)


def pools(
    src: str | Sequence[str] | Mapping[str, float],
) -> tuple[list[list[str]], tuple[float, ...] | None]:
    """The URLs of each source, and the weights of a mixture. Raises UsageError."""
    if isinstance(src, Mapping):
        weights = tuple(map(float, src.values()))
        small = sum(weights) / (2 * PERIOD)
        bad = [url for url, w in zip(src, weights, strict=True) if not small < w < float("inf")]
        if bad or not weights:
            raise UsageError(
                f"src gives {', '.join(bad) or 'no source'} a weight that is not positive, or "
                f"less than 1 / {2 * PERIOD} of all"
            )
        return [url.split("::") for url in src], weights
    urls = src.split("::") if isinstance(src, str) else [u for s in src for u in s.split("::")]
    if not urls:
        raise UsageError("src names no source: give the folder that convert wrote to")
    return [urls], None


def open_source(urls: Sequence[str], num_gaussians: int | None) -> Source[Shard]:
    """All done shards of the destinations `urls`.

    Raises UsageError where there are none or they do not have `num_gaussians`, CorruptShardError
    for a damaged marker or a shard that cannot be opened, FormatVersionError, StorageError and
    UnavailableError. Shards that only failed are left out, which the log says.
    """
    manifests: list[tuple[str, ShardManifest]] = []
    contents = []
    for url in urls:
        done = _done(url.rstrip("/"))
        contents.append(dataset_content(done))
        manifests += [(url, manifest) for manifest in done]
    layouts: dict[tuple[str, str], Layout] = {}
    texts: dict[int, str] = {}  # markers share their recipes, and there may be 100,000 of them
    shards = []
    for url, manifest in manifests:
        data = f"{url.rstrip('/')}/{manifest.data_file}"
        recipe = manifest.inputs["recipe"]
        text = texts.get(id(recipe)) or texts.setdefault(id(recipe), canonical_json(recipe))
        kind = (manifest.format, text)
        if kind not in layouts:
            metadata = shard_metadata_of(data, manifest.format)
            layouts[kind] = layout_of(metadata, num_gaussians, data)
        shards.append(
            Shard(
                url=data,
                format=manifest.format,
                size_bytes=manifest.size_bytes,
                sha256=manifest.sha256,
                samples=manifest.samples,
                ok=manifest.counts.get(OK, 0),
                layout=layouts[kind],
            )
        )
    return Source(tuple(urls), shards, "+".join(contents))


def _done(url: str) -> list[ShardManifest]:
    markers = read_markers(url)
    for marker in markers.values():
        if isinstance(marker, CorruptShardError):
            raise marker
    failed = [name for name, marker in markers.items() if isinstance(marker, FailedShard)]
    done = [marker for marker in markers.values() if isinstance(marker, ShardManifest)]
    if not done:
        raise UsageError(
            f"{url} has no splat shards: give the folder that convert wrote to (with its *.json "
            "markers); images are converted first, with splatshard convert"
        )
    if failed:
        log.warning(
            "%s: %d shards failed and are not read, first of them %s: splatshard convert tries "
            "them again", url, len(failed), failed[0],
        )  # fmt: skip
    return done


def layout_of(metadata: dict[str, Any], num_gaussians: int | None, url: str) -> Layout:
    """The columns to read for samples of `num_gaussians`, all if None.

    `metadata` is the shard's; raises UsageError when it has no such budget, naming those it has.
    """
    codec = metadata["codec"]
    budgets = _budgets(metadata, url)
    wanted = budgets[-1] if num_gaussians is None else num_gaussians
    if wanted not in budgets:
        if len(budgets) > 1:
            remedy = f"choose one of its budgets, {', '.join(map(str, budgets))}"
        elif wanted > budgets[0]:
            remedy = f"its samples have up to {budgets[0]}: choose that, or convert again with more"
        else:
            remedy = (
                f"its samples have up to {budgets[0]} and no smaller budget: choose that, or "
                f"convert again with --nested {wanted},{budgets[0]}"
            )
        raise UsageError(f"num_gaussians is {wanted}, which {url} does not have: {remedy}")
    taken = budgets[: budgets.index(wanted) + 1]
    columns = tuple(zip(splat_columns(taken), (0, *taken[:-1]), taken, strict=True))
    return Layout(codec, columns, budgets[-1])


def check_layout(metadata: dict[str, Any], shard: Shard) -> None:
    """Raises CorruptShardError unless a file with these metadata is laid out as `shard` is."""
    budget = shard.layout.columns[-1][2]
    try:
        same = layout_of(metadata, budget, shard.url) == shard.layout
    except UsageError:
        same = False
    if not same:
        raise CorruptShardError(
            f"{shard.url} has another codec or other budgets than its marker says: {shard.remedy}"
        )


def _budgets(metadata: dict[str, Any], url: str) -> list[int]:
    try:
        budgets = metadata.get("budgets") or [metadata["recipe"]["fit"]["num_gaussians"]]
    except (KeyError, TypeError):
        budgets = None
    if (
        not isinstance(budgets, list)
        or not all(type(b) is int and 0 < b <= MAX_PAYLOAD_GAUSSIANS for b in budgets)
        or budgets != sorted(set(budgets))
    ):
        raise CorruptShardError(f"{url}: its metadata have no budgets that can be understood")
    return budgets
