"""Shards that are damaged, foreign or missing: the reader names them."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from splatshard.pipeline.data import SplatDataset
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    SourceError,
    UnavailableError,
)
from tests.rows import FORMATS
from tests.splat_shards import N, commit, forge, make_dataset, rows_of, splat_config


def data_file(dst: Path) -> Path:
    (found,) = (path for path in dst.iterdir() if path.suffix in (".parquet", ".tar"))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "other"])
def test_a_damaged_shard_is_named(tmp_path: Path, format: str, damage: str) -> None:
    make_dataset(str(tmp_path), [9], format)
    dataset = SplatDataset(str(tmp_path), batch_size=2)
    path = data_file(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        other = tmp_path / "other"
        make_dataset(str(other), [9], format, first=1)
        path.write_bytes(data_file(other).read_bytes())
    with pytest.raises(CorruptShardError, match=f"{path}.*repair"):
        list(dataset)
    if damage in ("missing", "truncated"):
        with pytest.raises(CorruptShardError, match=str(path)):
            SplatDataset(str(tmp_path), batch_size=2, filter=[("psnr", ">", 1)])


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_that_is_missing_when_filtered_is_named(tmp_path: Path, format: str) -> None:
    """The first shard is there, and tells the layout."""
    make_dataset(str(tmp_path), [5, 5], format)
    path = max(path for path in tmp_path.iterdir() if path.suffix in (".parquet", ".tar"))
    path.unlink()
    with pytest.raises(CorruptShardError, match=f"{path}.*repair"):
        SplatDataset(str(tmp_path), batch_size=2, filter=[("psnr", ">", 1)])


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EMFILE, SourceError),
        (errno.EACCES, SourceError),
        (errno.EIO, SourceError),
        (errno.ESTALE, UnavailableError),
    ],
)
def test_what_the_system_refuses_is_no_damage(
    dst: str, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    """Nor is `splatshard repair` a remedy for it."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    dataset = SplatDataset(dst, batch_size=2)
    monkeypatch.setattr(hashlib, "file_digest", refuse)
    with pytest.raises(error, match=f"cannot read {dst}/.*: {os.strerror(number)}") as raised:
        list(dataset)
    assert "repair" not in str(raised.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_foreign_file_is_named_without_checksum_too(tmp_path: Path, format: str) -> None:
    """Here the marker was altered with the file, so that only its content tells."""
    make_dataset(str(tmp_path), [9], format)
    dataset = SplatDataset(str(tmp_path), batch_size=2, checksum=False)
    path = data_file(tmp_path)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptShardError, match=f"{path}"):
        list(dataset)


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_files_end_in_an_error_that_names_them(tmp_path: Path, format: str) -> None:
    """200 single-byte changes, checksums off: samples or CorruptShardError, nothing else."""
    make_dataset(str(tmp_path), [6], format)
    dataset = SplatDataset(str(tmp_path), batch_size=2, checksum=False, prefetch_windows=0)
    path = data_file(tmp_path)
    data = path.read_bytes()
    messages = []
    for step in range(200):
        changed = bytearray(data)
        changed[step * len(data) // 200] ^= 1 << step % 8 | 64
        path.write_bytes(changed)
        dataset.set_epoch(step + 1)
        try:
            list(dataset)
        except (CorruptShardError, FormatVersionError) as e:
            messages.append(str(e))
    assert len(messages) > 10
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splats": None}, "splat"),
        ({"splats": bytes(16 * (N - 1))}, "bytes"),
        ({"splats": bytes(16 * N - 1)}, "bytes"),
        ({"num_gaussians": 2**31 - 1}, "num_gaussians"),
        ({"num_gaussians": -1}, "num_gaussians"),
        ({"num_gaussians": 0}, "num_gaussians"),
        ({"width": None}, "width"),
        ({"height": -3}, "height"),
        ({"height": 2**31 - 1, "num_gaussians": N + 1}, "num_gaussians"),
        ({"status": "corrupt_image"}, "2 ok rows, its marker says 3"),
    ],
)
def test_rows_that_no_writer_writes_are_damage(
    tmp_path: Path, format: str, change: dict[str, Any], message: str
) -> None:
    rows = rows_of(0, 4)
    manifest = commit(str(tmp_path), "a", rows, splat_config(format))
    forge(str(tmp_path), manifest, [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(CorruptShardError, match=f"(?s){tmp_path}.*{message}.*repair"):
        list(SplatDataset(str(tmp_path), batch_size=3))


def test_a_shard_of_another_length_than_its_marker_says(tmp_path: Path) -> None:
    rows = rows_of(0, 8)
    manifest = commit(str(tmp_path), "a", rows)
    forge(str(tmp_path), manifest, rows[:4])
    for conditions in ((), [("psnr", ">", 1)]):
        with pytest.raises(CorruptShardError, match=f"{tmp_path}.*4 rows, its marker says 8"):
            list(SplatDataset(str(tmp_path), batch_size=3, filter=conditions))
