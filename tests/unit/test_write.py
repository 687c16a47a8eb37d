"""Both shard writers: rows survive, bytes repeat, memory is bounded, a full disk is said."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from splatshard.pipeline.shards import write
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.pipeline.shards.write import open_writer
from splatshard.schemas.errors import StorageError, UsageError
from splatshard.schemas.splats import PLANES, columns, scalars
from tests.rows import FORMATS, config_of, make_rows, metadata_of, write_shard

KINDS = [
    ("fp16", ()),
    ("balanced", ()),
    ("compact", ()),
    ("balanced", (8, 13, 20)),
    ("fp16", (8, 20)),
]
"""Codecs, and nested budgets."""


def expected(row: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The row as a reader gives it: every column, PSNR as float32."""
    names = columns(metadata).names
    return dict.fromkeys(names) | {"members": []} | write.checked(row, names)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("codec", "budgets"), KINDS)
def test_rows_come_back(tmp_path: Path, format: str, codec: str, budgets: tuple[int, ...]) -> None:
    rows = make_rows(9, codec=codec, budgets=budgets)
    rows[1] |= {"members": [{"name": name, "data": b"m"} for name in ("splat_13", "splat", "x")]}
    path = write_shard(tmp_path / "x", rows, format, codec, budgets)
    wanted = json.loads(json.dumps(metadata_of(config_of(format, codec, budgets))))
    assert shard_metadata_of(str(path), format) == wanted
    assert list(read_rows(str(path), format)) == [expected(row, wanted) for row in rows]


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_without_rows_is_a_shard(tmp_path: Path, format: str) -> None:
    path = write_shard(tmp_path / "x", [], format)
    assert list(read_rows(str(path), format)) == []
    assert shard_metadata_of(str(path), format)["format_version"] == 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("codec", ["fp16", "balanced"])
def test_the_same_rows_give_the_same_bytes(
    tmp_path: Path, format: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_shard(tmp_path / "a", make_rows(9, codec=codec), format, codec)
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr("os.getuid", lambda: 77)
    second = tmp_path / "b"
    with open_writer(second, format, metadata_of(config_of(format, codec))) as writer:
        for row in make_rows(9, codec=codec):  # however the rows are batched
            writer.write([row])
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("codec", ["fp16", "balanced"])
def test_rows_are_put_together_without_a_trace(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rows are Python's objects at a time is not in the bytes; row groups are."""
    rows = make_rows(40, codec=codec)
    monkeypatch.setattr(write, "ROW_GROUP_BYTES", 20 * write.row_bytes(rows[0]))
    first = write_shard(tmp_path / "a", rows, "parquet", codec)
    for together in (1, 7):
        monkeypatch.setattr(write, "ROWS_TOGETHER", together)
        assert write_shard(tmp_path / "b", rows, "parquet", codec).read_bytes() == (
            first.read_bytes()
        )
    assert pq.ParquetFile(first).num_row_groups > 1


def test_small_rows_do_not_wait_as_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group of them would take ten times its bytes."""
    monkeypatch.setattr(write, "ROWS_TOGETHER", 8)
    with open_writer(tmp_path / "a", "parquet", metadata_of(config_of())) as writer:
        for row in make_rows(20):
            writer.write([row])
            assert len(writer._rows) < 8  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "no columns for"),
        ({"key": None}, "'key'"),
        ({"status": "fine"}, "unknown status 'fine'"),
        ({"psnr": float("nan")}, "psnr is nan"),
        ({"psnr_loss": float("inf")}, "psnr_loss is inf"),
        ({"splats_20": b""}, "no columns for"),
        ({"psnr_8": 20.0}, "no columns for"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, format: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "x", [make_rows(1)[0] | change], format)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--format zip"):
        write_shard(tmp_path / "x", [], "zip")
    assert not (tmp_path / "x").exists()


# Parquet


def test_row_groups_follow_bytes_and_large_columns_have_no_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "ROW_GROUP_BYTES", 5000)
    path = write_shard(tmp_path / "x.parquet", make_rows(40, n=50))  # 850 to 900 bytes a row
    metadata = pq.read_metadata(path)
    assert metadata.num_rows == 40
    assert metadata.num_row_groups >= 5
    check_columns(path, scalars(metadata_of(config_of())))
    assert columns_of(path)["psnr"].statistics.min == pytest.approx(25.1)


@pytest.mark.parametrize("budgets", [(), (8, 20)])
def test_planes_are_columns_without_statistics(tmp_path: Path, budgets: tuple[int, ...]) -> None:
    rows = make_rows(8, codec="balanced", budgets=budgets)
    path = write_shard(tmp_path / "x.parquet", rows, codec="balanced", budgets=budgets)
    found = columns_of(path)
    check_columns(path, scalars(metadata_of(config_of("parquet", "balanced", budgets))))
    for payload in ["splats", "splats_20"][: len(budgets) or 1]:
        leaves = {f"{payload}.{plane}" for plane in PLANES}
        assert leaves == {name for name in found if name.startswith(f"{payload}.")}
        assert all("DELTA_LENGTH_BYTE_ARRAY" in found[leaf].encodings for leaf in leaves)


def test_a_row_takes_no_more_bytes_in_a_large_shard(tmp_path: Path) -> None:
    """zstd searches otherwise in pages above 256 KiB, and takes 2.5 % more here."""
    rng = np.random.default_rng(0)
    (row,) = make_rows(1, codec="balanced")

    def bytes_per_row(count: int) -> float:
        rows = []
        for i in range(count):
            symbols = rng.normal(64, 5, (len(PLANES), 1600)).astype(np.uint8)
            planes = dict(zip(PLANES, map(bytes, symbols), strict=True))
            rows.append(row | {"key": str(i), "splats": planes})
        return write_shard(tmp_path / "a", rows, "parquet", "balanced").stat().st_size / count

    assert bytes_per_row(400) < 1.005 * bytes_per_row(100)


def columns_of(path: Path) -> dict[str, Any]:
    """The column chunks of the first row group, by path."""
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    return {chunk.path_in_schema: chunk for chunk in chunks}


def check_columns(path: Path, small: tuple[str, ...]) -> None:
    """Only `small` columns have dictionaries and statistics; all but fp16 are compressed."""
    for name, column in columns_of(path).items():
        raw = name == "splats"  # fp16: hardly smaller, and slower to read
        assert column.compression == ("UNCOMPRESSED" if raw else "ZSTD"), name
        assert column.is_stats_set == (name in small), name
        assert any("DICT" in e for e in column.encodings) == (name in small), name


@pytest.mark.parametrize("format", FORMATS)
def test_memory_does_not_grow_with_the_shard(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "ROW_GROUP_BYTES", 200_000)
    (row,) = make_rows(1, n=3000)  # 48 kB
    peaks = []
    for rows in (20, 200):
        tracemalloc.start()
        with open_writer(tmp_path / "x", format, metadata_of(config_of(format))) as writer:
            for i in range(rows):
                writer.write([row | {"key": str(i), "splats": os.urandom(48_000)}])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 2_000_000


# Storage errors


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder  # type: ignore[misc]
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_bytes", [20_000, 32 << 20])
def test_a_full_disk_is_said(
    tiny_disk: Path, format: str, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "ROW_GROUP_BYTES", group_bytes)
    rows = [row | {"splats": os.urandom(9000)} for row in make_rows(20)]
    with pytest.raises(StorageError, match=rf"{tiny_disk}/x: no space left.*run the same command"):
        write_shard(tiny_disk / "x", rows, format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_write_error_is_said(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 20_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda *_: Full())
    rows = [row | {"splats": os.urandom(9000)} for row in make_rows(20)]
    with pytest.raises(StorageError, match="no space left"):
        write_shard(tmp_path / "x", rows, format)


def test_a_folder_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        write_shard(tmp_path / "none" / "x", [])


@pytest.mark.parametrize("format", FORMATS)
def test_errors_of_the_block_are_not_the_disks(tmp_path: Path, format: str) -> None:
    def broken_source() -> None:
        with open_writer(tmp_path / "x", format, metadata_of(config_of(format))) as writer:
            writer.write(make_rows(1))
            raise OSError("of a source")

    with pytest.raises(OSError, match="of a source") as caught:
        broken_source()
    assert type(caught.value) is OSError
