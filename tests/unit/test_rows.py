"""Files that are no shards of ours, or damaged: they are corrupt, and named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from splatshard.pipeline.shards.rows import read_rows, rows_from
from splatshard.pipeline.shards.write import open_writer
from splatshard.schemas.errors import CorruptShardError, FormatVersionError
from tests.rows import FORMATS, config_of, make_rows, metadata_of, write_shard


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_corrupt(tmp_path: Path, format: str) -> None:
    path = write_shard(tmp_path / "x", make_rows(20, n=100), format)
    data = path.read_bytes()
    for size in (0, 1, 100, len(data) // 2):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptShardError, match=str(path)):
            list(read_rows(str(path), format))
    path.unlink()
    with pytest.raises(CorruptShardError, match=str(path)):
        list(read_rows(str(path), format))


def test_any_byte_flipped_in_a_parquet_page_is_found(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.parquet", make_rows(20, n=100))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=str(path)):
        list(read_rows(str(path)))


def tar_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


META = ("__splatshard__", b'{"format_version":1,"codec":"fp16"}')
NEW = ("__splatshard__", b'{"format_version":2,"codec":"compact","budgets":[1,2]}')
ROW = ("a.splat.json", b'{"members":[],"key":"a","status":"ok","num_gaussians":1}')


@pytest.mark.parametrize(
    "members",
    [
        [("a.jpg", b"x")],
        [META, ("a.jpg", b"x")],
        [META, ("a.splat.json", b"{")],
        [META, ("a.splat.json", b"[]")],
        [META, ("a.splat.json", b"{}")],
        [META, ("a.splat.json", b'{"members":["x"]}')],
        [META, ("a.splat.json", b'{"members":[],"key":"a","status":"ok","num_gaussians":true}')],
        [META, ("a.splat.json", b'{"members":[],"key":"a","status":"ok","num_gaussians":1e3}')],
        [META, ("a.splat.json", b'{"members":[],"key":"a","num_gaussians":0}')],
        [META, ("a.splat.json", b"[" * 100_000)],
        [("__splatshard__", b"[1]")],
        [("__splatshard__", b'{"format_version":true,"codec":"fp16"}')],
        [("__splatshard__", b'{"format_version":1,"codec":7}')],
        [("__splatshard__", b'{"format_version":1,"codec":"balanced"}')],
        [("__splatshard__", b'{"format_version":2,"codec":"q11"}')],
        [("__splatshard__", b'{"format_version":2,"codec":"fp16","budgets":[2,1]}')],
        [("__splatshard__", b'{"format_version":2,"codec":"fp16","budgets":[0]}')],
        [("__splatshard__", b'{"format_version":2,"codec":"fp16","budgets":["a"]}')],
        [("__splatshard__", b'{"format_version":2,"codec":"fp16","budgets":7}')],
        [NEW, ("a.splat.json", b'{"members":[],"key":"a","num_gaussians":0,"psnr_2":1}')],
    ],
)
def test_foreign_tars_are_corrupt(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(*members))
    with pytest.raises(CorruptShardError, match=str(path)):
        list(read_rows(str(path)))


@pytest.mark.parametrize("payload", [b"1", b"\1\0\0\0\xff\xff\xff\xff", bytes(8)])
@pytest.mark.parametrize("name", ["splat", "splat_2"])
def test_members_that_are_no_payloads_are_corrupt(
    tmp_path: Path, name: str, payload: bytes
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(NEW, ROW, (f"a.{name}", payload)))
    with pytest.raises(CorruptShardError, match="a payload cannot be taken apart"):
        list(read_rows(str(path)))


def test_foreign_parquet_and_foreign_names_are_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(CorruptShardError, match="no splatshard metadata"):
        list(read_rows(str(path)))
    marked = pa.table({"a": [1]}).replace_schema_metadata({"splatshard": META[1]})
    pq.write_table(marked, path)
    with pytest.raises(CorruptShardError, match=r"has the columns \['a'\]") as raised:
        list(read_rows(str(path)))
    assert raised.value.__cause__ is None  # who looks for causes of causes gets to an end
    path = path.rename(tmp_path / "x.zip")
    with pytest.raises(CorruptShardError, match=r"neither a \.parquet nor a \.tar"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("format", FORMATS)
def test_newer_files_are_refused_by_version(tmp_path: Path, format: str) -> None:
    metadata = metadata_of(config_of(format)) | {"format_version": 3}
    with open_writer(tmp_path / "x", format, metadata) as writer:
        writer.write(make_rows(1))
    with pytest.raises(FormatVersionError, match="format version 3"):
        list(read_rows(str(tmp_path / "x"), format))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_from_some_row_on(tmp_path: Path, format: str) -> None:
    """Also within a later row group; of Parquet nothing of the groups before it is read."""
    path = write_shard(tmp_path / "x", make_rows(20, n=100), format)
    if format == "parquet":
        pq.write_table(pq.read_table(path), path, row_group_size=6)
    rows = list(read_rows(str(path), format))
    for start in (0, 1, 5, 6, 13, 19, 20, 30):
        with path.open("rb") as stream:
            assert list(rows_from(stream, str(path), format, start)) == rows[start:]
    if format == "parquet":
        begin = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
        data = bytearray(path.read_bytes())
        data[8 : (begin or 0) - 8] = bytes((begin or 0) - 16)
        path.write_bytes(data)
        with path.open("rb") as stream:
            assert list(rows_from(stream, str(path), format, 13)) == rows[13:]
