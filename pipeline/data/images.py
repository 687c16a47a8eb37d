"""ImageDataset: images to training batches, in the order in which SplatDataset gives their splats.

    SRC as convert understands it -> shards -> order -> windows (loaded ahead) -> blocks -> batch

The shards, their names and samples, the square of an image: all as convert has them, through the
same functions. So a model on patches sees what a model on the splats of the same images sees (where
these are of squares, too: --resize), and where the shards have the same numbers of samples (none
was skipped), the same keys, one by one, for a seed. So do labels: where folders are classes, they
have the numbers that convert gives them.

A block holds the files of a piece of a shard, undecoded; a batch is decoded when it is put
together, on several threads, since Pillow runs without Python's lock. An image that does not decode
is replaced by the next good one of its block, whatever batch that is in, so that the samples of a
step do not depend on the number of processes; `valid` is False for it.

Left out: a local cache of remote shards (each epoch reads them again), and to read less than a
whole shard for a part of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Unpack, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from splatshard.pipeline.data.base import OrderedDataset
from splatshard.pipeline.data.batch import ImageBatch, Position
from splatshard.pipeline.data.catalog import Location, Source, checked_columns
from splatshard.pipeline.data.epoch_order import Ordering, Piece
from splatshard.pipeline.data.filters import CAPTION_LENGTH, SCANNERS, Filter, fulfilled, keep
from splatshard.pipeline.data.windows import Choice
from splatshard.pipeline.runtime.prefetch import map_ahead
from splatshard.pipeline.shards.markers import DATA_FILE, DONE
from splatshard.pipeline.source.decode import DecodedImage, decode
from splatshard.pipeline.source.left_out import left_out_line
from splatshard.pipeline.source.listing import list_source
from splatshard.pipeline.source.read import count_samples, read, scan
from splatshard.pipeline.source.sample import RawSample, unused_lines
from splatshard.pipeline.storage import fs
from splatshard.schemas.config import DecodeConfig, class_list, source_of
from splatshard.schemas.errors import CorruptShardError, SampleError, SourceError, UsageError
from splatshard.schemas.shard import ShardRef, manifest_from_json
from splatshard.schemas.splats import canonical_json

log = logging.getLogger(__name__)

DECODERS = 8
"""Threads that decode, at most."""

FILTERED = ("label", CAPTION_LENGTH)
"""What a filter of images may ask for."""

READ = ("uid", "metadata", "members")
SIZES = ("original_width", "original_height")
COLUMNS = ("key", *READ, "caption", "label", *SIZES)
"""What `columns` may name, as the shards have it that convert makes of the images."""


@dataclass(frozen=True)
class ImageShard:
    """A source shard, and how many samples it has."""

    ref: ShardRef
    samples: int

    @property
    def url(self) -> str:
        return self.ref.root or self.ref.urls[0]

    @property
    def ok(self) -> int:
        return self.samples

    @property
    def content(self) -> str:
        return str(self.ref.size_bytes)  # its etag may be a time of this machine


@dataclass(frozen=True, eq=False)
class ImageBlock:
    """K samples of one shard. images are files as they are stored, names theirs for messages,
    errors what reading found wrong; labels int64 [K], -1 for none; unused is as RawSample has it;
    further those of READ that are asked for, K of each.
    """

    url: str
    images: list[bytes]
    names: list[str]
    keys: list[str]
    captions: list[str | None]
    labels: NDArray[np.int64]
    errors: list[SampleError | None]
    unused: dict[str, str]
    further: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.images)


class ImageDataset(OrderedDataset[ImageShard, ImageBatch]):
    """Batches of the images of `src`, which is what `splatshard convert` takes: tars, Hugging Face
    Parquet, folders. The arguments that are not named here, such as batch_size and seed, are those
    of OrderedDataset; a text `src` is one source, in which `::` joins what convert would join.

    image_size      side of the centred square crop, px
    classes         class folders in the order of their numbers, such as another split's `classes`;
                    by default all folders that are there, by name (see source/folder.py)
    filter          conditions on label and caption_length
    columns         further columns, as SplatDataset has them of the same images: key, uid,
                    metadata, members, caption, label, original_width, original_height
    as_dict         batches are dictionaries, those of `ImageBatch.as_dict`

    Raises UsageError for arguments that do not fit each other or the images, SourceError for shards
    that cannot be read, or of which no image decodes, and UnavailableError.
    """

    def __init__(
        self,
        src: Location | Sequence[Location] | Mapping[str, float],
        *,
        image_size: int,
        classes: Sequence[str] = (),
        columns: Sequence[str] = (),
        as_dict: bool = False,
        **ordering: Unpack[Ordering],
    ) -> None:
        self.decoding: DecodeConfig = DecodeConfig(image_size=image_size)
        self.as_dict = as_dict
        self.columns: tuple[str, ...] = checked_columns(columns)
        for name in self.columns:
            if name not in COLUMNS:
                raise UsageError(
                    f"columns names {name!r}, which images do not have: choose among "
                    f"{', '.join(COLUMNS)}"
                )
        self.replaced: int = 0
        self._wanted = tuple(classes)
        self._told = set[str]()
        super().__init__(src, **ordering)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class folders, or the names of a ClassLabel, whose positions are the labels; none
        where there are none, or several lists."""
        shards = (shard for source in self.sources for shard in source.shards)
        lists = {shard.ref.labels for shard in shards if shard.ref.labels}
        return lists.pop() if len(lists) == 1 else ()

    def open_source(self, urls: Sequence[str], conditions: Filter) -> Source[ImageShard]:
        for column, _, _ in conditions:
            if column not in FILTERED:
                raise UsageError(
                    f"filter names the column {column!r}, which images do not have: choose one of "
                    f"{', '.join(FILTERED)}"
                )
        return open_images(urls, conditions, self._wanted)

    def read(self, source: Source[ImageShard], piece: Piece) -> list[ImageBlock]:
        shard = source.shards[piece.shard]
        if piece.shard in source.kept:
            kept = np.flatnonzero(np.unpackbits(source.kept[piece.shard], count=shard.samples))
            rows = kept[piece.begin : piece.end]
        else:
            rows = np.arange(piece.begin, piece.end)
        block = read_block(shard, rows, self.columns)
        worker = get_worker_info()
        if worker is None or not worker.id:
            new = {name: why for name, why in block.unused.items() if name not in self._told}
            self._told.update(new)
            for _, line in unused_lines(new):
                log.warning("%s: %s", block.url, line)
        return [block]

    def assemble(
        self, chosen: Sequence[Choice[ImageBlock]], valid: Tensor, position: Position
    ) -> ImageBatch:
        """The B chosen images, decoded, as uint8 [B, 3, S, S]. In place of one that does not decode
        stands the next good one of its shard, or of the batch; it is not `valid` (bool [B]). Raises
        SourceError where none of the batch decodes."""
        asked = [(block, place) for block, places in chosen for place in places.tolist()]
        decode_one = partial(first_good, config=self.decoding)
        decoded = list(map_ahead(decode_one, asked, decoders()))
        for (block, place), taken in zip(asked, decoded, strict=True):
            if taken is None or taken.place != place:
                self._replace(block, place)
        found = [taken for taken in decoded if taken is not None]
        if not found:
            why = problem_of(*asked[0], self.decoding)
            raise SourceError(f"{asked[0][0].url}: no sample of a batch decodes, the first: {why}")
        if len(found) < len(decoded):  # blocks without any: the next good one of the batch
            found = [next(filter(None, decoded[i:] + decoded[:i])) for i in range(len(decoded))]
        own = [a == (f.block, f.place) for a, f in zip(asked, found, strict=True)]
        side = torch.full((len(found),), self.decoding.image_size, dtype=torch.int32)
        batch = ImageBatch(
            pixels=torch.from_numpy(np.stack([taken.image.pixels for taken in found]))
            .permute(0, 3, 1, 2)
            .contiguous(),
            heights=side,
            widths=side.clone(),
            keys=cast("list[str]", column_of(found, "key")),
            captions=cast("list[str | None]", column_of(found, "caption")),
            labels=cast(Tensor, column_of(found, "label")),
            teacher=None,
            valid=valid & torch.tensor(own),
            position=position,
            columns={name: column_of(found, name) for name in self.columns},
        )
        return cast(ImageBatch, batch.as_dict()) if self.as_dict else batch

    def keys_of(self, shard: ImageShard) -> Iterator[str]:
        return (sample.key for sample in scan(shard.ref))

    def _replace(self, block: ImageBlock, place: int) -> None:
        """Count a sample that was replaced, and say so the first, the tenth, ... time."""
        self.replaced += 1
        if str(self.replaced).strip("0") == "1":
            log.warning(
                "%s: sample %s does not decode and is replaced by the next good one of its shard "
                "(%d times so far in this process)", block.url, block.keys[place], self.replaced,
            )  # fmt: skip


# Which shards there are


def open_images(
    urls: Sequence[str], conditions: Filter, classes: tuple[str, ...] = ()
) -> Source[ImageShard]:
    """The shards of `urls`, each a SRC, in the order in which their splats would be read; their
    class folders are numbered by `classes`, if these are given. What convert would say of them is
    logged.

    Raises UsageError for a place that has splat shards, and what listing and scanning raise.
    """
    for url in urls:
        refuse_splats(url)
    found = list_source("::".join(urls), classes=classes)
    for note in found.notes:
        log.log(logging.INFO if found.classes and note is found.notes[0] else logging.WARNING, note)
    if left_out := left_out_line(found.left_out):
        log.warning("%s", left_out)
    refs = sorted(found.refs, key=lambda ref: ref.name)
    content = hashlib.sha256(canonical_json([source_of(ref) for ref in refs]).encode())
    with ThreadPoolExecutor(SCANNERS, thread_name_prefix="count") as pool:
        counts = list(pool.map(lambda ref: count_samples(ref, ref.limit or sys.maxsize), refs))
    shards = [ImageShard(ref, count) for ref, count in zip(refs, counts, strict=True)]
    for shard in shards:
        if not shard.samples:
            log.warning("%s has no sample that can be read: it is left out", shard.url)
    lists = {class_list(shard.ref.labels): shard.url for shard in shards if shard.ref.labels}
    source = Source(tuple(urls), shards, content.hexdigest(), lists)
    if conditions:
        keep(source, lambda shard: rows_left(shard, conditions))
    return source


def refuse_splats(url: str) -> None:
    """Raises UsageError where the folder `url` is a destination of convert."""
    if not fs.is_dir(url):
        return
    files = fs.list_folder(url)
    names = (match[1] for match in map(DATA_FILE.fullmatch, files) if match)
    marker = next((f"{name}{DONE}" for name in names if f"{name}{DONE}" in files), None)
    if marker is None:
        return
    marker = f"{url.rstrip('/')}/{marker}"
    try:
        source = manifest_from_json(fs.read_bytes(marker), marker).source_url
    except CorruptShardError:
        return  # something else, called alike
    raise UsageError(
        f"{url} has splat shards, and images are wanted: give the images that they were made of, "
        f"such as {source}"
    )


def rows_left(shard: ImageShard, conditions: Filter) -> NDArray[np.bool_]:
    """bool [samples]: which samples of a shard fulfil `conditions`. Raises SourceError."""
    samples = list(scan(shard.ref))
    table = pa.table(
        {
            "label": pa.array([sample.label for sample in samples], pa.int64()),
            "caption": pa.array([sample.caption for sample in samples], pa.string()),
        }
    )
    return fulfilled(_expected(table, len(samples), shard), conditions)


# Samples in memory


class Undigested:
    """In place of a digest where nobody asks for one."""

    def update(self, data: bytes) -> None:
        pass


def read_block(
    shard: ImageShard, rows: NDArray[np.int64], columns: Sequence[str] = ()
) -> ImageBlock:
    """The samples `rows` (int64 [K], ascending) of a shard, with what `columns` name. Raises
    SourceError."""
    ref, end = shard.ref, int(rows[-1]) + 1
    if (
        ref.kind == "parquet" or end < shard.samples
    ):  # else the file is read to its end, and checked
        ref = replace(ref, limit=end)
    wanted = np.zeros(end, np.bool_)
    wanted[rows] = True
    with closing(cast(Any, read(ref, cast(Any, Undigested())))) as samples:
        taken = [s for number, s in enumerate(samples) if number < end and wanted[number]]
    _expected(taken, len(taken) - len(rows) + shard.samples, shard)
    labels = [-1 if sample.label is None else sample.label for sample in taken]
    return ImageBlock(
        url=shard.url,
        images=[sample.image for sample in taken],
        names=[sample.image_name for sample in taken],
        keys=[sample.key for sample in taken],
        captions=[sample.caption for sample in taken],
        labels=np.array(labels, np.int64),
        errors=[sample.error for sample in taken],
        # the bytes that convert keeps are not there
        unused={name: why.partition(", so")[0] for s in taken for name, why in s.unused},
        further={name: [_further(s, name) for s in taken] for name in READ if name in columns},
    )


def _further(sample: RawSample, name: str) -> Any:
    if name == "members":
        return [{"name": extension, "data": data} for extension, data in sample.members]
    return getattr(sample, name)


def _expected(value: Any, count: int, shard: ImageShard) -> Any:
    """`value`, of a shard in which `count` samples were found. Raises SourceError."""
    if count != shard.samples:
        raise SourceError(
            f"{shard.url} had {shard.samples} samples when it was listed, and has {count}: it was "
            "replaced meanwhile; begin again"
        )
    return value


class Taken(NamedTuple):
    """A sample of a block, and its image, of S x S px."""

    block: ImageBlock
    place: int
    image: DecodedImage


def column_of(found: Sequence[Taken], name: str) -> Tensor | list[Any]:
    """One of COLUMNS, of B samples: a tensor [B] of numbers, or a list."""
    if name in SIZES:
        return torch.tensor([getattr(each.image, name) for each in found], dtype=torch.int32)
    if name == "label":
        return torch.tensor([int(each.block.labels[each.place]) for each in found])
    own = {"key": "keys", "caption": "captions"}
    if name in own:
        return [getattr(each.block, own[name])[each.place] for each in found]
    return [each.block.further[name][each.place] for each in found]


def first_good(asked: tuple[ImageBlock, int], config: DecodeConfig) -> Taken | None:
    """The first sample of a block, from a place on and beginning anew at its end, that decodes;
    None where none does."""
    block, place = asked
    for other in chain(range(place, len(block)), range(place)):
        with suppress(SampleError):
            return Taken(block, other, image_of(block, other, config))
    return None


def image_of(block: ImageBlock, place: int, config: DecodeConfig) -> DecodedImage:
    """The crop of one sample. Raises SampleError."""
    if error := block.errors[place]:
        raise error
    return decode(block.images[place], block.names[place], config)


def problem_of(block: ImageBlock, place: int, config: DecodeConfig) -> str:
    """Why a sample does not decode."""
    try:
        image_of(block, place, config)
    except SampleError as e:
        return str(e)
    return ""


def decoders() -> int:
    """Threads for this process, beside other ranks (torchrun and Ray say how many there are here)
    and a DataLoader's workers."""
    worker = get_worker_info()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (worker.num_workers if worker else 1)
    return max(1, min(DECODERS, (os.cpu_count() or 1) // processes))
