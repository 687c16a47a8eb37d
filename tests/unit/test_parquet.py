"""Parquet as found in the wild: which column is what, bad rows, damaged files, flat memory."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pytest

from pipeline.read import read
from schemas.errors import SourceError
from tests.make import image_parquet, jpeg, write_parquet
from tests.unit.reading import IMAGE, read_all, ref_of, statuses


def test_hugging_face_parquet(tmp_path):
    samples = read_all(image_parquet(tmp_path / "p.parquet", count=40, row_group_size=7))
    assert [s.key for s in samples[:2]] == ["p-00000000", "p-00000001"]
    assert [s.label for s in samples] == [i % 3 for i in range(40)]
    assert samples[39].image == jpeg(seed=39)
    assert samples[39].image_name == "39.jpg"
    assert samples[0].metadata is None
    assert len(read_all(tmp_path / "p.parquet", limit=11)) == 11


def test_parquet_columns(tmp_path):
    columns = {
        "__key__": ["k0", "k1"],
        "jpg": [IMAGE, IMAGE],
        "caption": ["a boat", None],
        "uid": ["ab", "cd"],
        "fine": pa.array([4, None], pa.int16()),
        "width": [64, 65],
        "score": [0.5, float("nan")],
        "tags": [["a"], []],
        "mask": [b"\0\1", None],
    }
    features = {"fine": {"_type": "ClassLabel", "names": []}}
    samples = read_all(write_parquet(tmp_path / "p.parquet", columns, features=features))
    assert [(s.key, s.uid, s.caption, s.label) for s in samples] == [
        ("k0", "ab", "a boat", 4),
        ("k1", "cd", None, None),
    ]
    assert json.loads(samples[0].metadata) == {"width": 64, "score": 0.5, "tags": ["a"]}
    assert json.loads(samples[1].metadata) == {"width": 65, "score": "nan", "tags": []}
    assert samples[0].members == (("mask", b"\0\1"),)
    assert samples[1].members == ()


def test_parquet_rows_without_image_or_with_one_key(tmp_path):
    images = [None, {"bytes": None, "path": "far/a.jpg"}, {"bytes": IMAGE, "path": None}] * 2
    columns = {"image": images, "key": [1, 2, 3, 4, 5, 3]}
    samples = read_all(write_parquet(tmp_path / "p.parquet", columns))
    assert statuses(samples) == ["no_image", "no_image", None] + ["no_image"] * 2 + [
        "duplicate_key"
    ]
    assert "far/a.jpg" in str(samples[1].error)
    assert [s.key for s in samples[:2]] == ["1", "2"]


def test_parquet_without_image_column(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"url": ["x"], "image": ["path.jpg"]})
    with pytest.raises(SourceError, match=r"p\.parquet has no image column, only url, image"):
        read_all(path)


def test_damaged_parquet(tmp_path):
    path = image_parquet(tmp_path / "p.parquet", count=20)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        whole[:100] + bytes(5000) + whole[5100:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"p\.parquet is not readable as Parquet"):
            read_all(path)


def test_parquet_streams_row_batches(tmp_path):
    block = {"bytes": bytes(range(256)) * 1024, "path": None}
    path = write_parquet(tmp_path / "p.parquet", {"image": [block] * 128}, row_group_size=8)
    before, peak = pa.total_allocated_bytes(), 0
    for _ in read(ref_of(path), hashlib.sha256()):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 16e6  # of 32 MB, in batches of 16 rows
