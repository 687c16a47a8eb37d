"""A look at every shard before the first step: does it have what the stage trains on?

    markers, footers -> one cutoff, one teacher -> the stage's column -> what is wrong, counted

batches.py looks at every batch, too, but a bad label in shard 900 would end the run after hours.
Here the one column that the stage needs (label, caption or teacher's embedding) is read of all
Parquet shards, and of those samples only that a filter leaves. 15 shards of 1,000 samples took
0.02 to 0.06 s for labels, 0.1 s for embeddings of 512 numbers, on two busy cores and a warm local
disk; ImageNet's 1,281 would take 2 to 5 s and 7 to 12 s. Over a network it is a few requests a
shard, 16 shards at a time.

A tar has no columns. Of tars it is known from their markers alone that the files are there, and
with which cutoff and teacher they were made; their samples are left to batches.py, and so are
payloads of both formats, and the images that an RGB model trains on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.data.catalog import Shard, Source
from splatshard.pipeline.data.files import look_for, shard_errors
from splatshard.pipeline.data.read_parquet import ok_rows, teacher_of
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.rows import parquet_metadata
from splatshard.pipeline.storage import fs
from splatshard.pipeline.train.batches import Dataset
from splatshard.pipeline.train.distributed import World, on_rank_zero
from splatshard.pipeline.train.faults import (
    Bools,
    Constants,
    caption_faults,
    label_faults,
    other_width,
    reasons,
    refuse_differences,
    teacher_faults,
)
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.shard import ShardManifest
from splatshard.schemas.splats import TEACHER, metadata_of
from splatshard.schemas.train import TrainConfig

log = logging.getLogger(__name__)

READERS = 16
REPORT_AFTER_S = 10.0
"""After so long the log tells how far it is, and again each time as much has passed."""
ROWS = 4096
"""Read at once by each reader."""


@dataclass(frozen=True)
class Bad:
    """`count` samples of a shard have the same fault; the first of them, and what it has."""

    count: int
    key: str
    value: Any


@dataclass(frozen=True)
class Seen:
    """What there is in one shard, which trains `samples`; `faults` by their names in `reasons`."""

    url: str
    samples: int
    constants: Constants
    faults: dict[str, Bad]


def check_data(dataset: Dataset, config: TrainConfig, world: World) -> None:
    """Rank 0 looks at all shards of `dataset`, the others wait for what it finds.

    On all of them raises UsageError where shards differ in cutoff or teacher, or samples lack
    what `config.stage` needs; CorruptShardError for shards that are missing, truncated or damaged;
    UnavailableError.
    """
    on_rank_zero(world, lambda: look_through(dataset, config))


def look_through(dataset: Dataset, config: TrainConfig) -> None:
    """`check_data` in one process."""
    if not isinstance(dataset, SplatDataset):
        return
    seen = list(_all_seen(dataset, config))
    names = ("cutoff", TEACHER) if config.stage == "distill" else ("cutoff",)
    for name in names:
        refuse_differences({shard.url: shard.constants for shard in seen}, name, "shards")
    if config.stage == "distill":
        refuse_width(seen, config)
    refuse_faults(seen, config)


def _all_seen(dataset: SplatDataset, config: TrainConfig) -> Iterator[Seen]:
    shards = [
        (source, i)
        for source in dataset.sources
        for i in range(len(source.shards))
        if source.counts[i]
    ]
    said: dict[str, Constants] = {}
    if any(source.shards[i].format == "webdataset" for source, i in shards):
        said = constants_said({source.shards[i].url.rpartition("/")[0] for source, i in shards})
    begin = reported = time.monotonic()
    with ThreadPoolExecutor(READERS, thread_name_prefix="check") as pool:
        found = pool.map(lambda place: see(place[0], place[1], config, said), shards)
        for number, each in enumerate(found, 1):
            yield each
            if time.monotonic() - reported > REPORT_AFTER_S:
                reported = time.monotonic()
                log.warning(
                    "before the first step: %d of %d shards looked at in %.0f s", number,
                    len(shards), reported - begin,
                )  # fmt: skip


def constants_said(folders: Iterable[str]) -> dict[str, Constants]:
    """By data file's URL, the constants that the markers in `folders` tell."""
    found: dict[str, Constants] = {}
    made: dict[int, Constants] = {}  # markers share their recipes
    for folder in folders:
        for marker in read_markers(folder).values():
            if isinstance(marker, ShardManifest):
                recipe = marker.inputs["recipe"]
                found[f"{folder}/{marker.data_file}"] = made.setdefault(
                    id(recipe), metadata_of(recipe)
                )
    return found


# One shard


def see(
    source: Source[Shard], number: int, config: TrainConfig, said: dict[str, Constants]
) -> Seen:
    """Look at shard `number` of `source`. Raises CorruptShardError and UnavailableError."""
    shard, samples = source.shards[number], int(source.counts[number])
    look_for(shard)
    if shard.format == "webdataset":
        return Seen(shard.url, samples, said.get(shard.url, {}), {})
    with shard_errors(shard), fs.open_read(shard.url) as stream:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        metadata = parquet_metadata(file, shard.url)
        if file.metadata.num_rows != shard.samples:
            raise CorruptShardError(
                f"{shard.url} has {file.metadata.num_rows} rows, its marker says {shard.samples}: "
                f"{shard.remedy}"
            )
        constants = {name: metadata.get(name) for name in ("cutoff", TEACHER)}
        rows = rows_read(source, number, file)
        return Seen(shard.url, samples, constants, faults_of(file, rows, constants, config))


def rows_read(source: Source[Shard], number: int, file: pq.ParquetFile) -> NDArray[np.int64]:
    """Numbers of the rows of shard `number` that are trained on, int64 [K], ascending."""
    shard = source.shards[number]
    if number in source.kept:
        return np.flatnonzero(np.unpackbits(source.kept[number], count=shard.samples))
    return ok_rows(file, shard)


def faults_of(
    file: pq.ParquetFile, rows: NDArray[np.int64], constants: Constants, config: TrainConfig
) -> dict[str, Bad]:
    """What is wrong with `rows` (int64 [K], ascending), of which the stage's column is read part by
    part."""
    name, find = COLUMNS[config.stage]
    if name not in file.schema_arrow.names:  # of a teacher: refuse_differences says it
        return {}
    counts: Counter[str] = Counter()
    firsts: dict[str, tuple[int, Any]] = {}
    start = 0
    for batch in file.iter_batches(ROWS, columns=[name], use_threads=False):
        first, last = np.searchsorted(rows, (start, start + len(batch)))
        places = rows[first:last]
        column = batch.column(0).take(pa.array(places - start))
        for fault, bad in find(column, constants, config).items():
            if bad.any():
                i = int(bad.argmax())
                counts[fault] += int(bad.sum())
                firsts.setdefault(fault, (int(places[i]), column[i].as_py()))
        start += len(batch)
    keys = file.read(["key"], use_threads=False).column(0) if counts else ()
    return {
        fault: Bad(count, str(keys[firsts[fault][0]]), firsts[fault][1])
        for fault, count in counts.items()
    }


def labels_of(column: pa.Array, constants: Constants, config: TrainConfig) -> dict[str, Bools]:
    """Of labels int64 [K], null where there is none (as is -1)."""
    return label_faults(column.fill_null(-1).to_numpy(zero_copy_only=False), config)


def captions_of(column: pa.Array, constants: Constants, config: TrainConfig) -> dict[str, Bools]:
    """Of captions [K], null where there is none."""
    return caption_faults(column.to_pylist(), config)


def embeddings_of(column: pa.Array, constants: Constants, config: TrainConfig) -> dict[str, Bools]:
    """Of embeddings [K], each the bytes of as many halves as the shard's teacher makes."""
    lengths = pc.fill_null(pc.call_function("binary_length", [column]), -1).to_numpy(
        zero_copy_only=False
    )
    right = lengths == 2 * constants[TEACHER]["dim"]
    found = {"no embedding": ~right}
    if right.any():
        for fault, bad in teacher_faults(teacher_of(column.filter(pa.array(right)))).items():
            found[fault] = np.zeros(len(column), bool)
            found[fault][right] = bad
    return found


Find = Callable[[pa.Array, Constants, TrainConfig], dict[str, Bools]]
COLUMNS: dict[str, tuple[str, Find]] = {
    "classify": ("label", labels_of),
    "contrast": ("caption", captions_of),
    "distill": (TEACHER, embeddings_of),
}
"""By stage, the column that it trains on, and what finds the faults in it."""


# All shards


def refuse_width(seen: Sequence[Seen], config: TrainConfig) -> None:
    """Raises UsageError unless the encoder is as wide as the teacher's embeddings."""
    size, width = seen[0].constants[TEACHER]["dim"], config.model.encoder.width
    if size != width:
        raise UsageError(f"{seen[0].url} has teacher's embeddings of {other_width(size, width)}")


def refuse_faults(seen: Sequence[Seen], config: TrainConfig) -> None:
    """Raises UsageError for the first sample that the stage cannot train on, and says how many
    there are like it."""
    for each in seen:
        for fault, bad in each.faults.items():
            alike = [s.faults[fault].count for s in seen if fault in s.faults]
            count, samples = sum(alike), sum(s.samples for s in seen)
            shards = f"{len(alike):,} of {len(seen):,} shards"
            share = f"{count:,} of {samples:,} samples are so, in {shards}"
            what, remedy = reasons(fault, bad.value, samples - count, config)
            raise UsageError(f"{each.url}: sample {bad.key} {what} ({share}): {remedy}")
