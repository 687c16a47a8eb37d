"""The shards of a destination, as its markers name them, and which of their columns to read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from splatshard.pipeline.data.epoch_order import PERIOD
from splatshard.pipeline.shards.markers import DONE, read_markers
from splatshard.pipeline.shards.rows import shard_metadata_of
from splatshard.pipeline.shards.verify import is_refused
from splatshard.pipeline.source.patterns import is_glob, kind_of
from splatshard.pipeline.storage import fs
from splatshard.schemas.config import MAX_FITTED_GAUSSIANS
from splatshard.schemas.errors import CorruptShardError, StorageError, UsageError
from splatshard.schemas.manifest import dataset_content
from splatshard.schemas.shard import OK, FailedShard, ShardManifest
from splatshard.schemas.splats import (
    MAX_PAYLOAD_GAUSSIANS,
    MEMBER_COLUMNS,
    canonical_json,
    columns,
    scalars,
    splat_columns,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How payloads are stored. `columns` are the names of the columns to read with the Gaussians
    they hold, `begin` to `end` of each sample; `largest` is the most that a sample has of all;
    `further` are the columns that are read since somebody asked for them."""

    codec: str
    columns: tuple[tuple[str, int, int], ...]
    largest: int
    further: tuple[pa.Field, ...] = ()


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
    def content(self) -> str:
        return self.sha256

    @property
    def remedy(self) -> str:
        return f"run splatshard repair {self.url.rpartition('/')[0]}"


class AnyShard(Protocol):
    """A file, or a part of a folder: where it is, and how many samples it has."""

    @property
    def url(self) -> str: ...

    @property
    def ok(self) -> int: ...

    @property
    def content(self) -> str:
        """What tells it from others, alike wherever it is copied."""
        ...


S = TypeVar("S", bound=AnyShard)


@dataclass
class Source(Generic[S]):
    """Shards that are read as one pool. `counts` int64 [S] are the samples that are read of each;
    `kept` has those rows of a shard as packed bits, where a filter leaves some out. `content` has
    a digest of all that the shards of each URL hold, `class_lists` one of each list of classes by
    which labels are numbered, with a shard of which that is so."""

    urls: tuple[str, ...]
    shards: list[S]
    content: str
    class_lists: dict[str, str] = field(default_factory=dict)
    counts: NDArray[np.int64] = field(init=False)
    kept: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = np.array([shard.ok for shard in self.shards], np.int64)


Location = str | os.PathLike[str]
"""A folder, file or URL."""


def pools(
    src: Location | Sequence[Location] | Mapping[str, float],
) -> tuple[list[list[str]], tuple[float, ...] | None]:
    """The URLs of each source, and the weights of a mixture. Raises UsageError."""
    many = isinstance(src, Iterable) and not isinstance(src, str)
    given: list[Any] = list(cast(Any, src)) if many else [src]
    if not all(isinstance(each, str | os.PathLike) for each in given):
        raise UsageError(f"src is {src!r}: give a folder or URL, or a list of them")
    if isinstance(src, Mapping):
        weights = tuple(map(float, src.values()))
        small = sum(weights) / (2 * PERIOD)
        bad = [url for url, w in zip(src, weights, strict=True) if not small < w < float("inf")]
        if bad or not weights:
            names = ", ".join(map(str, bad)) or "no source"
            raise UsageError(
                f"src gives {names} a weight that is not positive, or "
                f"less than 1 / {2 * PERIOD} of all"
            )
        return [os.fspath(url).split("::") for url in src], weights
    urls = [url for each in given for url in os.fspath(each).split("::")]
    if not urls:
        raise UsageError("src names no source: give the folder that convert wrote to")
    return [urls], None


def open_source(
    urls: Sequence[str], num_gaussians: int | None, further: Sequence[str] = ()
) -> Source[Shard]:
    """All done shards of the destinations `urls`, or those of them that files and globs name, by
    folder and name: the order of `urls` does not matter.

    Raises UsageError where there are none or they do not have `num_gaussians` or the columns
    `further`, CorruptShardError for a damaged marker or a shard that cannot be opened,
    FormatVersionError, SourceError, StorageError and UnavailableError. Shards that only failed are
    left out, which the log says.
    """
    manifests: list[tuple[str, ShardManifest]] = []
    contents = []
    parts = [part for url in urls for part in _named(url)]
    for folder, done in sorted(parts, key=lambda part: (part[0], part[1][0].name)):
        contents.append(dataset_content(done))
        manifests += [(folder, manifest) for manifest in done]
    layouts: dict[tuple[str, str], Layout] = {}
    class_lists: dict[str, str] = {}
    texts: dict[int, str] = {}  # markers share their recipes, and there may be 100,000 of them
    shards = []
    for folder, manifest in manifests:
        data = f"{folder}/{manifest.data_file}"
        if classes := manifest.inputs["source"].get("labels"):
            class_lists.setdefault(classes, data)
        recipe = manifest.inputs["recipe"]
        text = texts.get(id(recipe)) or texts.setdefault(id(recipe), canonical_json(recipe))
        kind = (manifest.format, text)
        if kind not in layouts:
            metadata = _metadata_of(folder, manifest)
            layouts[kind] = layout_of(metadata, num_gaussians, data, further)
        shards.append(shard_of(data, manifest, layouts[kind]))
    check_once(shards)
    return Source(tuple(urls), shards, "+".join(contents), class_lists)


def shard_of(url: str, manifest: ShardManifest, layout: Layout) -> Shard:
    """The data file at `url`, as its marker has it."""
    return Shard(
        url=url,
        format=manifest.format,
        size_bytes=manifest.size_bytes,
        sha256=manifest.sha256,
        samples=manifest.samples,
        ok=manifest.counts.get(OK, 0),
        layout=layout,
    )


def checked_columns(names: Sequence[str]) -> tuple[str, ...]:
    """`names` as names of columns. Raises UsageError for what is no list of them."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UsageError(f'columns is {names!r}: give names in a list, as in ["uid", "psnr"]')
    return tuple(names)


def check_sizes(
    sources: Sequence[Source[S]],
    weights: Sequence[float] | None,
    lanes: int,
    epoch_samples: int | None,
) -> None:
    """Raises UsageError for a source without samples, or too few for a mixture, and for a length of
    what is none."""
    for source in sources:
        samples = int(source.counts.sum())
        if not samples:
            raise UsageError(
                f"no sample of {'::'.join(source.urls)} passes: loosen filter, or look at "
                "splatshard status"
            )
        if weights is not None and samples < lanes:
            raise UsageError(
                f"lanes is {lanes}, but {'::'.join(source.urls)} has {samples} samples: a mixture "
                "needs one per lane"
            )
    if epoch_samples is not None and (weights is None or epoch_samples < 1):
        raise UsageError(
            f"epoch_samples is {epoch_samples}: it is the positive length of a mixture's epoch; "
            "another dataset's is its number of samples"
        )


def check_once(shards: Sequence[Shard]) -> None:
    """Raises UsageError for a file that is named twice, and logs which are copies of others: each
    of their samples is there several times in an epoch."""
    places = {folder: fs.place(folder) for folder in {s.url.rpartition("/")[0] for s in shards}}
    files: dict[tuple[str, str], Shard] = {}
    contents: dict[str, list[Shard]] = {}
    for shard in shards:
        folder, _, name = shard.url.rpartition("/")
        other = files.setdefault((places[folder], name), shard)
        if other is not shard:
            raise UsageError(
                f"{shard.url} is there twice (as {other.url}), so its samples would be, too: name "
                "it once, or weigh sources as a mixture, {src: weight, ...}"
            )
        if shard.ok:
            contents.setdefault(shard.sha256, []).append(shard)
    if copies := [alike for alike in contents.values() if len(alike) > 1]:
        first, second, *_ = copies[0]
        log.warning(
            "%d shards are copies of others, and an epoch has their samples as often: %s, %s, ...",
            sum(len(alike) - 1 for alike in copies), first.url, second.url,
        )  # fmt: skip


def numbered_otherwise(lists: Mapping[str, str]) -> str:
    """What to say of labels that are numbered by several lists of classes, the `class_lists`."""
    return (
        f"the labels of {' and '.join(lists.values())} are numbered by different lists of "
        "classes, so that one number means several classes: convert folders with the same "
        "--classes, or give ImageDataset classes=[...]; cast ClassLabels to one (cast_column of "
        "Hugging Face's datasets)"
    )


def folder_and_files(url: str) -> tuple[str, str]:
    """The destination of `url`, and which of its shards are meant: the name of a file or a glob of
    names, empty for all. The destination is a glob, too, where the folders of `url` have one."""
    url = url.replace(os.sep, "/") if fs.is_local(url) else url  # Windows
    is_file = fs.is_local(url) and fs.local_path(url).is_file()
    if not is_file and not is_glob(url) and (not kind_of(url) or fs.is_dir(url)):
        return url.rstrip("/"), ""
    folder, slash, files = url.rpartition("/")
    return folder or slash or ".", files


def _named(url: str) -> list[tuple[str, list[ShardManifest]]]:
    """The destinations of `url` with the done shards that it names, none of them empty."""
    place, files = folder_and_files(url)
    folders = [place]
    if is_glob(place):
        folders = sorted({marker.rpartition("/")[0] for marker in fs.glob(f"{place}/*{DONE}")})
    found = [(folder, [m for m in _done(folder) if _is_named(m, files)]) for folder in folders]
    if found := [(folder, done) for folder, done in found if done]:
        return found
    images = "images are converted first, with splatshard convert"
    if not files:
        raise UsageError(
            f"{url} has no splat shards: give the folder that convert wrote to (with its *.json "
            f"markers); {images}"
        )
    there = list(fs.glob(url)) if is_glob(url) else [url] * fs.exists(url)
    if there:
        raise UsageError(
            f"{there[0]} is not read: no marker in its folder names it. Give the folder that "
            f"convert wrote, or files in it, beside their *.json markers (also of a copy); {images}"
        )
    raise UsageError(
        f"{url}: no file of that name and no shard of it in {place}: give the folder that convert "
        "wrote to, or files in it"
    )


def _is_named(manifest: ShardManifest, files: str) -> bool:
    """Whether `files` are the shard's: its data file, that without the fingerprint, its marker."""
    extension = manifest.data_file.rpartition(".")[2]
    names = manifest.data_file, f"{manifest.name}.{extension}", manifest.name + DONE
    return not files or any(name == files or fnmatchcase(name, files) for name in names)


def _done(url: str) -> list[ShardManifest]:
    """The done markers in `url`."""
    markers = read_markers(url)
    for marker in markers.values():
        if isinstance(marker, CorruptShardError):
            raise marker
    failed = [name for name, marker in markers.items() if isinstance(marker, FailedShard)]
    if failed:
        log.warning(
            "%s: %d shards failed and are not read, first of them %s: splatshard convert tries "
            "them again", url, len(failed), failed[0],
        )  # fmt: skip
    return [marker for marker in markers.values() if isinstance(marker, ShardManifest)]


def _metadata_of(folder: str, manifest: ShardManifest) -> dict[str, Any]:
    url = f"{folder}/{manifest.data_file}"
    try:
        return shard_metadata_of(url, manifest.format)
    except CorruptShardError as e:
        if is_refused(url, e):
            raise StorageError(str(e)) from e
        raise CorruptShardError(f"{e}: run splatshard repair {folder}") from e


def layout_of(
    metadata: dict[str, Any], num_gaussians: int | None, url: str, further: Sequence[str] = ()
) -> Layout:
    """The columns to read for samples of `num_gaussians`, all if None, and those named `further`.

    `metadata` is the shard's; raises UsageError when it has no such budget or column, naming those
    it has.
    """
    codec = metadata["codec"]
    budgets = _budgets(metadata, url)
    wanted = budgets[-1] if num_gaussians is None else num_gaussians
    if wanted not in budgets:
        if len(budgets) > 1:
            remedy = f"choose one of its budgets, {', '.join(map(str, budgets))}"
        else:
            again = "more" if wanted > budgets[0] else f"--nested {wanted} and others"
            remedy = (
                f"its samples have up to {budgets[0]} and no other budget: leave num_gaussians "
                f"out, or convert again with {again}"
            )
        raise UsageError(f"num_gaussians is {wanted}, which {url} does not have: {remedy}")
    taken = budgets[: budgets.index(wanted) + 1]
    payloads = tuple(zip(splat_columns(taken), (0, *taken[:-1]), taken, strict=True))
    return Layout(codec, payloads, budgets[-1], _fields(metadata, further, url))


def _fields(metadata: dict[str, Any], names: Sequence[str], url: str) -> tuple[pa.Field, ...]:
    there = [name for name in scalars(metadata) if name not in ("status", "error")]
    there += [field.name for field in MEMBER_COLUMNS]
    for name in names:
        if name not in there:
            raise UsageError(
                f"columns names {name!r}, which {url} does not have: choose among "
                f"{', '.join(there)}"
            )
    return tuple(columns(metadata).field(name) for name in dict.fromkeys(names))


def check_layout(metadata: dict[str, Any], shard: Shard) -> None:
    """Raises CorruptShardError unless a file with these metadata is laid out as `shard` is."""
    budget = shard.layout.columns[-1][2]
    further = [field.name for field in shard.layout.further]
    try:
        same = layout_of(metadata, budget, shard.url, further) == shard.layout
    except UsageError:
        same = False
    if not same:
        raise CorruptShardError(
            f"{shard.url} has another codec or other budgets than its marker says: {shard.remedy}"
        )


def most_gaussians(recipe: dict[str, Any]) -> Any:
    """That a sample may have; raises KeyError and TypeError for what is no recipe."""
    fit = recipe["fit"]
    if fit.get("max_gaussians") is not None:
        return fit["max_gaussians"]
    if fit.get("gaussians_per_megapixel") is not None:
        return MAX_FITTED_GAUSSIANS
    return fit["num_gaussians"]


def _budgets(metadata: dict[str, Any], url: str) -> list[int]:
    try:
        budgets = metadata.get("budgets") or [most_gaussians(metadata["recipe"])]
    except (KeyError, TypeError):
        budgets = None
    if (
        not isinstance(budgets, list)
        or not all(type(b) is int and 0 < b <= MAX_PAYLOAD_GAUSSIANS for b in budgets)
        or budgets != sorted(set(budgets))
    ):
        raise CorruptShardError(f"{url}: its metadata have no budgets that can be understood")
    return budgets
