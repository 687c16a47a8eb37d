"""A teacher's embeddings for a shard that was finished without them, or with another's.

    rows of the shard + samples of the source -> decode -> teacher -> one column more -> commit

The samples come from the source again, in the order they had; key by key and by the checksum of the
whole they must be those that the shard was made of. The other columns are written as they were
read, payloads byte for byte, and the marker is replaced by the rules of commit.py: the result is
what `convert --teacher` makes, under the fingerprint it would have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import islice, zip_longest
from typing import Any

import torch

from splatshard.pipeline.convert import MAX_DECODERS, overlaps
from splatshard.pipeline.models.teacher import Teacher, load_teacher
from splatshard.pipeline.runtime.batching import TEACHER_TOGETHER, BatchLimit
from splatshard.pipeline.runtime.prefetch import map_ahead
from splatshard.pipeline.shards.commit import publish, staged_file
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.write import open_writer
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.read import RawSample, read
from splatshard.schemas.config import ConvertConfig, output_config
from splatshard.schemas.errors import SampleError, SourceError
from splatshard.schemas.shard import OK, ShardManifest, ShardRef, marker_digest
from splatshard.schemas.splats import TEACHER, shard_metadata

Row = dict[str, Any]

CPU_TOGETHER = 16


def embed_shard(
    dst: str, manifest: ShardManifest, ref: ShardRef, config: ConvertConfig, device: torch.device
) -> ShardManifest:
    """Replace the done shard `manifest` of `dst` by one with the embeddings of `config.teacher`.

    `config` is otherwise that of the shard's recipe, `ref` its source. Raises SourceError when the
    source cannot be read or is not the one the shard was made of, CorruptShardError for a damaged
    shard, UsageError for a teacher that cannot be loaded, StorageError, UnavailableError and
    BackendError; the shard is then as it was.
    """
    assert config.teacher is not None, "the configuration names a teacher"
    teacher = load_teacher(config.teacher, device)
    metadata = shard_metadata(config.pack.codec, config.fit.cutoff, output_config(config))
    digest = hashlib.sha256()
    rows = read_rows(f"{dst}/{manifest.data_file}", manifest.format)
    with staged_file(dst, ref.name) as path:
        samples = read(ref, digest)
        with open_writer(path, config.pack.format, metadata) as writer, closing(samples):
            for batch in embedded(pairs(rows, samples, ref), config, teacher):
                writer.write(batch)
        sha256 = digest.hexdigest()
        if sha256 != manifest.source_sha256:
            raise _other_source(ref, "its checksum is another one")
        return publish(
            dst, path, ref, config, sha256, manifest.samples, replaces=marker_digest(manifest)
        )


def pairs(
    rows: Iterable[Row], samples: Iterable[RawSample], ref: ShardRef
) -> Generator[tuple[Row, RawSample]]:
    """Each row of the shard with its sample. Raises SourceError where they do not belong
    together."""
    for number, (row, sample) in enumerate(zip_longest(rows, samples)):
        ours = row and row["key"]
        theirs = sample and sample.key
        if ours != theirs:
            raise _other_source(ref, f"sample {number} is {theirs} there and {ours} in the shard")
        yield row, sample


def embedded(
    samples: Iterable[tuple[Row, RawSample]], config: ConvertConfig, teacher: Teacher
) -> Generator[list[Row]]:
    """The rows, batch by batch, those of ok samples with their embeddings."""

    def decoded(pair: tuple[Row, RawSample]) -> tuple[Row, torch.Tensor | None]:
        row, sample = pair
        row.pop(TEACHER, None)
        if row["status"] != OK:
            return row, None
        try:
            image = decode(sample.image, sample.image_name, config.decode)
        except SampleError as e:
            raise SourceError(f"sample {row['key']}, which was converted, has no image: {e}") from e
        return row, torch.from_numpy(image.pixels)

    on_device = overlaps(teacher.device)
    limit = BatchLimit(TEACHER_TOGETHER if on_device else CPU_TOGETHER)
    threads = min(MAX_DECODERS, len(os.sched_getaffinity(0))) if on_device else 0
    with closing(map_ahead(decoded, samples, threads)) as images:
        while batch := list(islice(images, limit.images)):
            taught = [(row, image) for row, image in batch if image is not None]
            for size in dict.fromkeys(image.shape for _, image in taught):
                same = [(row, image) for row, image in taught if image.shape == size]
                pixels = torch.stack([image for _, image in same])
                parts = limit.in_parts(len(pixels), lambda part, p=pixels: teacher(p[part]))
                found = (embedding for part in parts for embedding in part)
                for (row, _), embedding in zip(same, found, strict=True):
                    row[TEACHER] = embedding
            yield [row for row, _ in batch]


def _other_source(ref: ShardRef, why: str) -> SourceError:
    return SourceError(
        f"{ref.root or ref.urls[0]} is not what shard {ref.name} was made of ({why}): give that "
        "source, or redo the shard with splatshard convert --teacher"
    )
