"""Blocks of a WebDataset shard: the whole tar in memory, indexed in one pass over its headers.

The columns are in a small JSON member per sample, whose parsing takes most of the time (as in every
reader of tars); payloads stay where they are in the archive. Nearly all headers are plain and are
recognised by one regular expression; tarfile reads the others.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from tarfile import BLOCKSIZE
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from splatshard.pipeline.codec import Plane, column, split_member
from splatshard.pipeline.data.block import Block, Part
from splatshard.pipeline.data.catalog import Shard, check_layout
from splatshard.pipeline.data.read_parquet import checked, teacher_of
from splatshard.pipeline.shards.rows import checked_metadata
from splatshard.pipeline.source.tar import forget_headers, match_file
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.shard import OK
from splatshard.schemas.splats import METADATA_MEMBER, TEACHER, splat_suffix

Member = tuple[str, int, int]
"""Name, and where its bytes begin and end."""

Row = dict[str, Any]
"""The columns of a sample, and where its payloads are: `{"splat": (begin, end)}` under MEMBERS; and
where its metadata or members are read, all of them in order under ALL."""

MEMBERS, ALL = "__members__", "__all__"


def tar_blocks(
    stream: BinaryIO, shard: Shard, kept: NDArray[np.int64] | None, begin: int, end: int
) -> list[Block]:
    """Samples `begin` to `end` of a shard as one block; arguments (`kept` int64 [K] or None) and
    errors as those of `parquet_blocks`, and tarfile's."""
    data = np.frombuffer(stream.read(), np.uint8)
    rows = tar_rows(data, shard)
    numbers = ok_rows(rows, shard) if kept is None else kept
    chosen = [rows[i] for i in numbers[begin:end]]
    return [_block(data, shard, chosen)] if chosen else []


def tar_rows(data: NDArray[np.uint8], shard: Shard) -> list[Row]:
    """All rows of the archive in `data` (its bytes, uint8 [S]), in order. Raises as
    `parquet_blocks`."""
    view = data.data
    members = _members(view)
    name, start, stop = next(members, ("", 0, 0))
    text = bytes(view[start:stop]) if name == METADATA_MEMBER else None
    metadata = checked_metadata(text, shard.url)
    check_layout(metadata, shard)
    layout = shard.layout
    payloads = {splat_suffix(name) for name, _, _ in layout.columns}
    payloads |= {TEACHER} & metadata.keys()
    whole = any(field.name in ("metadata", "members") for field in layout.further)
    rows: list[Row] = []
    for name, start, stop in members:
        suffix = name.rpartition("/")[2].partition(".")[2]
        if suffix == "splat.json":
            rows.append(_parsed(bytes(view[start:stop]), name))
        elif rows:
            if suffix in payloads:
                rows[-1][MEMBERS].setdefault(suffix, (start, stop))
            if whole:
                rows[-1].setdefault(ALL, []).append((suffix, start, stop))
    if len(rows) != shard.samples:
        raise CorruptShardError(
            f"{shard.url} has {len(rows)} rows, its marker says {shard.samples}: {shard.remedy}"
        )
    return rows


def ok_rows(rows: list[Row], shard: Shard) -> NDArray[np.int64]:
    """As the one of read_parquet, int64 [K]."""
    numbers = np.array([i for i, row in enumerate(rows) if row.get("status") == OK], np.int64)
    if len(numbers) != shard.ok:
        raise CorruptShardError(
            f"{shard.url} has {len(numbers)} ok rows, its marker says {shard.ok}: {shard.remedy}"
        )
    return numbers


def _parsed(text: bytes, name: str) -> Row:
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError(f"member {name} is no JSON object")
    row[MEMBERS] = {}
    return row


def _members(view: memoryview) -> Iterator[Member]:
    """The regular files of an archive. Raises tarfile's errors and ValueError."""
    archive: Any = None  # its published type lacks what is set here
    offset = 0
    while True:
        match = match_file(view, offset)
        if match:
            name, size = match["name"].decode(), int(match["size"], 8)
            offset += BLOCKSIZE
        else:
            if archive is None:
                archive = tarfile.TarFile(fileobj=io.BytesIO(view), encoding="utf-8")
            archive.firstmember, archive.offset = None, offset
            info = archive.next()
            if info is None:
                return
            if not info.isreg() or info.issparse() or info.size < 0:
                raise ValueError(f"member {info.name} is not a regular file")
            forget_headers(archive)
            name, size, offset = info.name, info.size, info.offset_data
        if offset + size > len(view):
            raise tarfile.ReadError("unexpected end of data")
        yield name, offset, offset + size
        offset += -(-size // BLOCKSIZE) * BLOCKSIZE


def _block(data: NDArray[np.uint8], shard: Shard, rows: list[Row]) -> Block:
    def numbers(name: str, null: int, dtype: type) -> NDArray:
        values = [null if (v := row.get(name)) is None else v for row in rows]
        if np.array(values).dtype.kind != "i":
            raise ValueError(f"{name} is not a whole number everywhere")
        return np.array(values, dtype)

    def strings(name: str) -> pa.Array:
        return pa.array([row.get(name) for row in rows], pa.string())

    codec = shard.layout.codec
    taught = any(TEACHER in row[MEMBERS] for row in rows)
    block = Block(
        url=shard.url,
        codec=codec,
        parts=tuple(
            Part(begin, end, _planes(codec, data, [_place(row, name) for row in rows]))
            for name, begin, end in shard.layout.columns
        ),
        rows=np.arange(len(rows)),
        counts=numbers("num_gaussians", 0, np.int32),
        heights=numbers("height", 0, np.int32),
        widths=numbers("width", 0, np.int32),
        labels=numbers("label", -1, np.int64),
        keys=strings("key"),
        captions=strings("caption"),
        teacher=_embeddings(data, rows) if taught else None,
        further={
            field.name: pa.array([_value(data, row, field.name) for row in rows], field.type)
            for field in shard.layout.further
        },
    )
    return checked(block, shard)


def _value(data: NDArray[np.uint8], row: Row, name: str) -> Any:
    """A further column of a row; `data` uint8 [S] is the archive. Raises ValueError."""
    if name not in ("metadata", "members"):
        return row.get(name)
    every: list[Member] = row.get(ALL, [])
    names: list[str] = row["members"]
    own, further = every[: len(every) - len(names)], every[len(every) - len(names) :]
    if len(names) > len(every):
        raise ValueError(f"sample {row.get('key')!r} has fewer members than it names")
    if name == "metadata":
        found = (data[begin:end].tobytes() for suffix, begin, end in own if suffix == "json")
        return next((text.decode() for text in found), None)
    return [
        {"name": each, "data": data[begin:end].tobytes()}
        for each, (_, begin, end) in zip(names, further, strict=True)
    ]


def _embeddings(data: NDArray[np.uint8], rows: list[Row]) -> NDArray[np.float16]:
    places = [row[MEMBERS].get(TEACHER) for row in rows]
    found = [None if place is None else data[slice(*place)].tobytes() for place in places]
    return teacher_of(pa.array(found, pa.binary()))


def _place(row: Row, name: str) -> tuple[int, int]:
    place = row[MEMBERS].get(splat_suffix(name))
    if place is None:
        raise ValueError(f"sample {row.get('key')!r} has no member .{splat_suffix(name)}")
    return place


def _planes(codec: str, data: NDArray[np.uint8], places: list[tuple[int, int]]) -> dict[str, Plane]:
    """The payloads at `places` as the codec's planes, by copying them: a plane has its rows end to
    end, the archive has headers between them."""
    planes: dict[str, list[bytes]] = {}
    for begin, end in places:
        for name, part in split_member(codec, data[begin:end].tobytes()).items():
            planes.setdefault(name, []).append(part)
    return {name: column(parts) for name, parts in planes.items()}
