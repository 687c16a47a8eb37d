"""A shard's check: every row of its file, and the file against its marker."""

from __future__ import annotations

import hashlib
import math
import tarfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from splatshard.pipeline.shards.rows import (
    Row,
    format_of,
    read_rows,
    reading,
    shard_metadata_of,
    tar_members,
    tar_metadata,
)
from splatshard.pipeline.source.tar import forget_headers
from splatshard.pipeline.storage import fs
from splatshard.schemas.config import fingerprint
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    SourceError,
    StorageError,
)
from splatshard.schemas.shard import OK, PSNR_STEP, STATUSES, ShardManifest
from splatshard.schemas.splats import (
    MAX_PSNR,
    TEACHER,
    payload_bytes,
    payload_columns,
    psnr_columns,
    splat_columns,
    splat_suffix,
)

MAX_PROBLEMS = 10


@dataclass
class Survey:
    """What a shard file holds, from the file alone; see ShardManifest for the fields' meaning."""

    samples: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    statistics: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def survey(url: str, format: str | None = None) -> Survey:
    """Read every row and unpack every payload; raises as `read_rows`. `problems` says which rows
    are not what FORMAT.md promises, the first MAX_PROBLEMS of them."""
    metadata = shard_metadata_of(url, format)
    result = Survey()
    psnr, losses = array("d"), array("d")  # of a million rows
    num_gaussians = unpacked_bytes = wrong = 0
    for row in read_rows(url, format):
        result.samples += 1
        result.counts[row["status"]] += 1
        if problem := row_problem(row, metadata):
            wrong += 1
            if wrong <= MAX_PROBLEMS:
                result.problems.append(f"row {result.samples - 1} ({row['key']}): {problem}")
        elif row["status"] == OK:
            psnr.append(row["psnr"])
            losses.append(row.get("psnr_loss") or 0.0)
            num_gaussians += row["num_gaussians"]
            unpacked_bytes += payload_bytes(row)
    if wrong > MAX_PROBLEMS:
        result.problems.append(f"and {wrong - MAX_PROBLEMS} more rows")
    first_version = metadata["format_version"] == 1  # it counted bytes before compression
    stored = unpacked_bytes if first_version else stored_payload_bytes(url, format)
    result.statistics = {"payload_bytes": stored}
    if psnr:
        result.statistics |= {
            "psnr_mean": math.fsum(psnr) / len(psnr),
            "psnr_min": min(psnr),
            "psnr_max": max(psnr),
            "num_gaussians_mean": num_gaussians / len(psnr),
            **_histogram(psnr),
        }
        if not first_version:
            result.statistics["psnr_loss_mean"] = math.fsum(losses) / len(losses)
    return result


def stored_payload_bytes(url: str, format: str | None = None) -> int:
    """What the payloads take in the file: compressed columns, or tar members without headers."""
    with reading(url) as stream:
        if format_of(url, format) == "parquet":
            sizes = column_sizes(pq.ParquetFile(stream).metadata)
            return sum(stored for stored, _ in sizes.values())
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            metadata = tar_metadata(tar_members(tar), url)
            names = map(splat_suffix, splat_columns(metadata.get("budgets", [])))
            ends = tuple(f".{name}" for name in names)
            size = 0
            for member in tar:
                forget_headers(tar)
                last = member.name.rpartition("/")[2]
                size += member.size if last[last.find(".") :] in ends else 0
            return size


def column_sizes(footer: pq.FileMetaData) -> dict[str, tuple[int, int]]:
    """Bytes of each column of payloads in a Parquet file, and before compression, without the
    lengths of values."""
    found: dict[str, tuple[int, int]] = {}
    for group in (footer.row_group(i) for i in range(footer.num_row_groups)):
        for chunk in (group.column(i) for i in range(group.num_columns)):
            name = chunk.path_in_schema.partition(".")[0]
            if name.startswith("splats"):
                stored, whole = found.get(name, (0, 0))
                stored += chunk.total_compressed_size
                whole += chunk.total_uncompressed_size - 4 * chunk.num_values
                found[name] = stored, whole
    return found


def _histogram(psnr: Sequence[float]) -> dict[str, Any]:
    steps = Counter(math.floor(min(max(p, 0), MAX_PSNR) / PSNR_STEP) for p in psnr)
    first = min(steps)
    return {
        "psnr_histogram_from": first * PSNR_STEP,
        "psnr_histogram": " ".join(str(steps[i]) for i in range(first, max(steps) + 1)),
    }


def row_problem(row: Row, metadata: dict[str, Any]) -> str:
    """What is wrong with a row of a shard with these metadata; empty when nothing is."""
    from splatshard.pipeline.codec.pack import (  # torch; a driver only reads markers
        finite_images,
        unpack_row,
    )

    budgets = metadata.get("budgets", [])
    payloads = [row[name] for name in splat_columns(budgets)]
    if row["status"] not in STATUSES:
        return f"unknown status {row['status']!r}"
    if row["status"] != OK:
        kept = any(row[name] is not None for name in payload_columns(metadata))
        kept = kept or row["num_gaussians"]
        return f"status {row['status']}, yet it has splats" if kept else ""
    sides = [row["width"] or 0, row["height"] or 0]
    if any(payload is None for payload in payloads) or min(sides) < 1:
        return "status ok, but no splats, width or height"
    losses = ("psnr_loss",) if metadata["format_version"] > 1 else ()
    for name in ("psnr", *psnr_columns(budgets), *losses):
        if row[name] is None or not math.isfinite(row[name]):
            return f"{'PSNR' if name == 'psnr' else name} is {row[name]}"
    try:
        splats = unpack_row(row, metadata)
    except CorruptShardError as e:
        return str(e)
    found = int(splats.num_gaussians[0])
    if found != row["num_gaussians"]:
        return f"{found} Gaussians in the payload, num_gaussians is {row['num_gaussians']}"
    if not finite_images(splats).all():
        return "Gaussians that are not finite"
    if TEACHER in metadata and (problem := teacher_problem(row[TEACHER], metadata[TEACHER]["dim"])):
        return problem
    return (
        "" if (splats.cholesky[..., ::2] > 0).all() else "Cholesky diagonals that are not positive"
    )


def teacher_problem(embedding: bytes | None, dim: int) -> str:
    """What is wrong with a stored embedding of `dim` numbers; empty when nothing is."""
    if embedding is None:
        return "status ok, but no teacher's embedding"
    if len(embedding) != 2 * dim:
        return f"a teacher's embedding of {len(embedding)} bytes, not {2 * dim}"
    norm = float(np.linalg.norm(np.frombuffer(embedding, "<f2").astype(np.float64)))
    # halves round each number by 2^-11 of itself at most
    return "" if abs(norm - 1) < 1e-2 else f"a teacher's embedding of length {norm:.3g}, not 1"


def is_refused(url: str, error: BaseException) -> bool:
    """Whether a store, or the disk, refused access to the shard, which says nothing about it."""
    while not isinstance(error, SourceError) and error.__cause__:
        error = error.__cause__
    cause = error.__cause__
    refused = isinstance(cause, PermissionError) if fs.is_local(url) else True
    return isinstance(error, SourceError) and refused and not isinstance(cause, FileNotFoundError)


def verify_shard(dst: str, manifest: ShardManifest) -> list[str]:
    """Everything about the shard in `dst` that is not as its marker says; empty when all is well.

    Checks size, SHA-256, format version, recipe, row count, statuses, every payload and the
    statistics. Each message names the file and what to do.
    """
    url = f"{dst.rstrip('/')}/{manifest.data_file}"
    marker = f"{dst.rstrip('/')}/{manifest.name}.json"
    try:
        problems = _problems(url, manifest)
    except FormatVersionError as e:
        return [str(e)]
    except (CorruptShardError, SourceError) as e:
        if is_refused(url, e):
            raise StorageError(str(e)) from e
        problems = [str(e)]
    if not problems and manifest.fingerprint != fingerprint(manifest.inputs):
        return [
            f"{marker}: its fingerprint is not that of its inputs: delete it and run convert again"
        ]
    return [
        f"{p if url in p else f'{url}: {p}'}: run splatshard repair, or delete {marker} and run "
        "convert again"
        for p in problems
    ]


def _problems(url: str, manifest: ShardManifest) -> list[str]:
    size = fs.stat(url).size_bytes
    if size != manifest.size_bytes:
        return [f"{size} bytes, its marker says {manifest.size_bytes}"]
    digest = hashlib.sha256()
    with fs.local_copy(url, digest) as path:
        if digest.hexdigest() != manifest.sha256:
            return ["SHA-256 is not the one in its marker (damaged or replaced)"]
        try:
            return _differences(path, manifest)
        except (CorruptShardError, FormatVersionError) as e:
            raise type(e)(str(e).replace(path, url)) from e


def _differences(path: str, manifest: ShardManifest) -> list[str]:
    """What the file at `path` holds and its marker does not say."""
    problems: list[str] = []
    recipe = shard_metadata_of(path, manifest.format).get("recipe")
    if recipe != manifest.inputs["recipe"]:
        problems.append("it was made by another recipe than its marker says")
    found = survey(path, manifest.format)
    problems += found.problems
    if "psnr_histogram" not in manifest.statistics:  # early markers have none
        for name in ("psnr_histogram", "psnr_histogram_from"):
            found.statistics.pop(name, None)
    for name in ("samples", "counts", "statistics"):
        if getattr(found, name) != getattr(manifest, name):
            problems.append(
                f"{name} are {getattr(found, name)}, its marker says {getattr(manifest, name)}"
            )
    return problems
