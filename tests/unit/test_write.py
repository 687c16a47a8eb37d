"""Both shard writers: rows survive, bytes repeat, memory is bounded, a full disk is said."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import subprocess
import tarfile
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatshard.pipeline.shards import write
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.pipeline.shards.write import member_base, open_writer
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    StorageError,
    UsageError,
)
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

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import webdataset


def expected(row: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The row as a reader gives it: every column, PSNR as float32."""
    names = columns(metadata).names
    return dict.fromkeys(names) | {"members": []} | write.checked(row, names)


def samples_of(path: Path) -> list[dict[str, Any]]:
    """What plain webdataset makes of a tar. It leaves closing the file to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


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


# WebDataset


def test_webdataset_groups_each_sample(tmp_path: Path) -> None:
    rows = make_rows(8)
    path = write_shard(tmp_path / "x.tar", rows, "webdataset")
    samples = samples_of(path)
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        assert sample.get("splat") == row.get("splats")
        assert sample["txt"].decode() == row["caption"]
        assert sample["cls"] == str(row["label"]).encode()
        assert sample["json"].decode() == row["metadata"]
        assert sample["seg.png"] == row["members"][0]["data"]
        scalars = json.loads(sample["splat.json"])
        assert scalars["status"] == row["status"]
        assert scalars["num_gaussians"] == row["num_gaussians"]


def test_tar_headers_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", make_rows(2), "webdataset")
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert members[0].name == "__splatshard__"
    found = {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in members}
    assert found == {(0, 0, "", "", 0, 0o644)}


UNSAFE_KEYS = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "",
    ".",
    "..",
    "a//b",
    "a/",
    "a.b.c",
    "x.jpg",
    "n01440764/n01440764_18.JPEG",
    "./a",
    "v1.5/a",
    "__MACOSX__/a",
    "__a__",
    "100%",
    "%2E",
    "a\\b",
    "new\nline",
    "nul\0",
    "ключ/キー",
    "k" * 300,
    f"{'folder/' * 40}k",
]


@pytest.mark.parametrize("key", UNSAFE_KEYS, ids=range(len(UNSAFE_KEYS)))
def test_any_key_gives_a_safe_name_that_webdataset_groups(tmp_path: Path, key: str) -> None:
    row = make_rows(1)[0] | {"key": key}
    path = write_shard(tmp_path / "x.tar", [row], "webdataset")
    (sample,) = samples_of(path)
    assert json.loads(sample["splat.json"])["key"] == key
    assert sample["splat"] == row["splats"]
    assert next(read_rows(str(path)))["key"] == key
    with tarfile.open(path) as tar:
        for member in tar:
            assert tarfile.data_filter(member, str(tmp_path)).name == member.name


@given(st.lists(st.text(st.sampled_from("a.%/_\\\n2EF~"), max_size=6), unique=True, max_size=30))
def test_different_keys_give_different_names(keys: list[str]) -> None:
    bases = [member_base(key) for key in keys]
    assert len(set(bases)) == len(keys)
    for base in bases:
        assert "." not in base.rpartition("/")[2]
        assert not base.startswith("/")
        assert not {"", ".", ".."} & set(base.split("/"))
        assert "~" not in base or "~" in "".join(keys)


def test_samples_of_one_key_stay_apart(tmp_path: Path) -> None:
    first, second = make_rows(2)
    second = {"key": first["key"], "status": "duplicate_key", "num_gaussians": 0, "caption": "b"}
    path = write_shard(tmp_path / "x.tar", [first, second], "webdataset")
    assert [s["txt"] for s in samples_of(path)] == [first["caption"].encode(), b"b"]
    assert [row["key"] for row in read_rows(str(path))] == [first["key"]] * 2


def test_members_with_awkward_names(tmp_path: Path) -> None:
    names = ["txt", "PNG", "png", "splat", "splat.json", "__key__", "a/../b", "", "json", "é%"]
    members = [{"name": name, "data": name.encode()} for name in names]
    row = make_rows(1)[0] | {"members": members}
    path = write_shard(tmp_path / "x.tar", [row], "webdataset")
    assert next(read_rows(str(path)))["members"] == members
    assert next(read_rows(str(path)))["caption"] == row["caption"]
    (sample,) = samples_of(path)
    assert sample["txt"] == b"txt"  # the member as it came, not the caption
    assert sample["png"] == b"PNG"
    assert sample["splat"] == row["splats"]
    assert sample["json"].decode() == row["metadata"]


# Files that are not what they should be


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
    with pytest.raises(CorruptShardError, match=r"has the columns \['a'\]"):
        list(read_rows(str(path)))
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
