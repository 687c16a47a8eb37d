"""Committed shards, read back: rows of both formats, and the check of a shard against its marker.

Front to back, one row at a time; for `verify`, `report` and the commit itself. Left out: order,
batches, prefetching and columns by choice, which are the training reader's. Nothing is unpickled,
and whatever is wrong with a file raises CorruptShardError (or is listed by `verify_shard`).

A tar that was cut between two members reads like a shorter one: trust the marker's count.
"""

from __future__ import annotations

import hashlib
import json
import math
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from splatshard.pipeline.storage import fs as storage
from splatshard.schemas.config import fingerprint
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    SourceError,
    StorageError,
)
from splatshard.schemas.shard import OK, PSNR_STEP, STATUSES, ShardManifest, is_text
from splatshard.schemas.splats import (
    CODECS,
    EXTENSIONS,
    FORMAT_VERSION,
    MAX_PSNR,
    MAX_TEACHER_DIM,
    METADATA_KEY,
    METADATA_MEMBER,
    PLANAR,
    TEACHER,
    columns,
    payload_bytes,
    payload_columns,
    psnr_columns,
    scalars,
    splat_columns,
    splat_suffix,
)

Row = dict[str, Any]

BATCH_ROWS = 64
BATCH_BYTES = 64 << 20
LARGE = ("metadata", "members", "splats", TEACHER)
"""What the names of columns with large values begin with."""
MAX_PROBLEMS = 10
MAX_FLOAT = (2 - 2**-23) * 2.0**127
"""The largest finite single."""


def read_rows(url: str, format: str | None = None) -> Iterator[Row]:
    """The rows of the shard at `url` (path or URL), one dict each with the names of its columns.

    Payloads are bytes, or a dict of planes (see `schemas.splats.PLANAR`). `format` is that of the
    file's extension if None. Raises CorruptShardError for a missing, damaged or foreign file and
    FormatVersionError for a newer one.
    """
    with _reading(url) as stream:
        rows = _parquet_rows if _format_of(url, format) == "parquet" else _tar_rows
        yield from rows(stream, url)


def shard_metadata_of(url: str, format: str | None = None) -> dict[str, Any]:
    """The constants of the shard at `url`, see `schemas.splats.shard_metadata`; raises as
    `read_rows`."""
    with _reading(url) as stream:
        if _format_of(url, format) == "parquet":
            return parquet_metadata(pq.ParquetFile(stream), url)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            return _tar_metadata(_tar_members(tar), url)


def is_shard(url: str) -> bool:
    """Whether splatshard wrote the file at `url`, by the constants in it. Raises
    UnavailableError."""
    try:
        return bool(shard_metadata_of(url))
    except (CorruptShardError, FormatVersionError):
        return False


def _format_of(url: str, format: str | None) -> str:
    by_extension = {extension: name for name, extension in EXTENSIONS.items()}
    format = format or by_extension.get(url.rpartition(".")[2], "")
    if format not in EXTENSIONS:
        raise CorruptShardError(f"{url} is neither a .parquet nor a .tar file")
    return format


@contextmanager
def _reading(url: str) -> Iterator[BinaryIO]:
    """A stream over `url`; whatever the libraries raise on bad bytes becomes CorruptShardError."""
    try:
        with storage.open_read(url) as stream:
            yield stream
    except SourceError as e:
        raise CorruptShardError(str(e)) from e
    except FormatVersionError:
        raise
    except CorruptShardError as e:
        raise e if url in str(e) else CorruptShardError(f"{url}: {e}") from e
    except (pa.ArrowException, tarfile.TarError, OSError, ValueError, RecursionError) as e:
        raise CorruptShardError(f"{url} cannot be read: {type(e).__name__}: {e}") from e


def _parquet_rows(stream: BinaryIO, url: str) -> Iterator[Row]:
    file = pq.ParquetFile(stream, page_checksum_verification=True)
    parquet_metadata(file, url)
    for group in range(file.num_row_groups):
        rows = _batch_rows(file, group)
        for batch in file.iter_batches(rows, [group], use_threads=False):
            for row in batch.to_pylist():
                yield row | {"members": row["members"] or []}


def _batch_rows(file: pq.ParquetFile, group: int) -> int:
    """Rows of that group to read at once: fewer where they are large, and one where large values
    come from a dictionary, by which a small file can have any number of copies of them."""
    names = [name for name in file.schema_arrow.names if name.startswith(LARGE)]
    # pyarrow's column() ends the process where this raises: its C++ exception is not caught
    next(file.iter_batches(1, [group], names, use_threads=False), None)
    footer = file.metadata.row_group(group)
    large = [i for i in range(len(file.schema)) if file.schema.column(i).path.startswith(LARGE)]
    if any(footer.column(i).has_dictionary_page for i in large):
        return 1
    return max(1, min(BATCH_ROWS, BATCH_BYTES * footer.num_rows // max(1, footer.total_byte_size)))


def parquet_metadata(file: pq.ParquetFile, url: str) -> dict[str, Any]:
    """The constants of an open Parquet shard. Raises CorruptShardError and FormatVersionError."""
    schema = file.schema_arrow
    metadata = checked_metadata((schema.metadata or {}).get(METADATA_KEY), url)
    if not schema.equals(wanted := columns(metadata)):
        raise CorruptShardError(f"{url} has the columns {schema.names}, not {wanted.names}")
    return metadata


def checked_metadata(text: bytes | None, url: str) -> dict[str, Any]:
    """A shard's constants from their JSON. Raises as `parquet_metadata`, and ValueError."""
    if text is None:
        raise CorruptShardError(f"{url} is not a splat shard: it has no splatshard metadata")
    metadata = json.loads(text)
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{url} has format version {version}, this build reads up to {FORMAT_VERSION}: "
            "upgrade splatshard"
        )
    codecs = CODECS if version != 1 else ("fp16", "q11")
    budgets = metadata.get("budgets", []) if isinstance(metadata, dict) else None
    known = (
        type(version) is int
        and version >= 1
        and metadata.get("codec") in codecs
        and isinstance(budgets, list)
        and all(type(b) is int and a < b for a, b in zip([0, *budgets], budgets, strict=False))
        and (TEACHER not in metadata or _is_teacher(metadata[TEACHER]))
    )
    if not known:
        raise CorruptShardError(f"{url} is not a splat shard: its metadata are {str(text)[:200]}")
    return metadata


def _is_teacher(value: object) -> bool:
    dim = value.get("dim") if isinstance(value, dict) else None
    return type(dim) is int and 0 < dim <= MAX_TEACHER_DIM


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        if not member.isreg() or member.issparse() or member.size < 0:  # holes may be of any size
            raise ValueError(f"member {member.name} is not a regular file")
        yield member.name, cast("BinaryIO", tar.extractfile(member)).read()
        tar.members.clear()  # tarfile would keep every header until the end


def _tar_metadata(members: Iterator[tuple[str, bytes]], url: str) -> dict[str, Any]:
    name, data = next(members, ("", b""))
    return checked_metadata(data if name == METADATA_MEMBER else None, url)


def _tar_rows(stream: BinaryIO, url: str) -> Iterator[Row]:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        members = _tar_members(tar)
        metadata = _tar_metadata(members, url)
        base, group = "", list[tuple[str, bytes]]()
        for name, data in members:
            folder, slash, last = name.rpartition("/")
            stem, _, suffix = last.partition(".")
            if suffix == "splat.json":
                if group:
                    yield tar_row(base, group, metadata)
                base, group = folder + slash + stem, []
            if folder + slash + stem != base or (not group and suffix != "splat.json"):
                raise ValueError(f"member {name} belongs to no sample")
            group.append((suffix, data))
        if group:
            yield tar_row(base, group, metadata)


def tar_row(base: str, group: list[tuple[str, bytes]], metadata: dict[str, Any]) -> Row:
    """A row from the members (suffix, bytes) of one sample, in file order. Raises ValueError and
    CorruptShardError."""
    from splatshard.pipeline.codec.planes import split

    document = json.loads(group[0][1])
    names = document.pop("members", None) if isinstance(document, dict) else None
    if not isinstance(names, list) or not all(map(is_text, names)):
        raise ValueError(f"{base}.splat.json has no list of members")
    own, further = group[1 : len(group) - len(names)], group[len(group) - len(names) :]
    if len(names) > len(group) - 1 or document.keys() - set(scalars(metadata)):
        raise ValueError(f"{base}.splat.json does not fit its sample")
    found = dict(own)
    schema = columns(metadata)
    row: Row = dict.fromkeys(schema.names) | document
    for name in scalars(metadata):
        if not _is_of(row[name], schema.field(name)):
            raise ValueError(f"{base}.splat.json: {name} is {row[name]!r}")
    row["metadata"] = found["json"].decode() if "json" in found else None
    planar = metadata["codec"] in PLANAR
    for name in payload_columns(metadata):
        data = found.get(splat_suffix(name))
        row[name] = split(data) if planar and name != TEACHER and data is not None else data
    row["members"] = [
        {"name": name, "data": data} for name, (_, data) in zip(names, further, strict=True)
    ]
    return row


def _is_of(value: object, column: pa.Field) -> bool:
    if value is None:
        return column.nullable
    if pa.types.is_string(column.type):
        return is_text(value)
    if pa.types.is_floating(column.type):
        return type(value) in (int, float) and not MAX_FLOAT < abs(value) < math.inf
    limit = 1 << (column.type.bit_width - 1)
    return type(value) is int and -limit <= value < limit


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
    psnr: list[float] = []
    losses: list[float] = []
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
    with _reading(url) as stream:
        if _format_of(url, format) == "parquet":
            file = pq.ParquetFile(stream).metadata
            groups = [file.row_group(i) for i in range(file.num_row_groups)]
            chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
            splats = [chunk for chunk in chunks if chunk.path_in_schema.startswith("splats")]
            return sum(chunk.total_compressed_size for chunk in splats)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            metadata = _tar_metadata(_tar_members(tar), url)
            names = map(splat_suffix, splat_columns(metadata.get("budgets", [])))
            ends = tuple(f".{name}" for name in names)
            size = 0
            for member in tar:
                tar.members.clear()
                last = member.name.rpartition("/")[2]
                size += member.size if last[last.find(".") :] in ends else 0
            return size


def _histogram(psnr: list[float]) -> dict[str, Any]:
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
    """Whether a store refused access to the shard, which says nothing about the shard."""
    while not isinstance(error, SourceError) and error.__cause__:
        error = error.__cause__
    refused = isinstance(error, SourceError)
    return (
        refused and not storage.is_local(url) and not isinstance(error.__cause__, FileNotFoundError)
    )


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
    size = storage.stat(url).size_bytes
    if size != manifest.size_bytes:
        return [f"{size} bytes, its marker says {manifest.size_bytes}"]
    digest = hashlib.sha256()
    with storage.local_copy(url, digest) as path:
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
    if "psnr_histogram" not in manifest.statistics:  # the first markers had none
        for name in ("psnr_histogram", "psnr_histogram_from"):
            found.statistics.pop(name, None)
    for name in ("samples", "counts", "statistics"):
        if getattr(found, name) != getattr(manifest, name):
            problems.append(
                f"{name} are {getattr(found, name)}, its marker says {getattr(manifest, name)}"
            )
    return problems
