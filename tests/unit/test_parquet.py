"""Parquet as found in the wild: which column is what, bad rows, damaged files, flat memory."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import date, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest

from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read, scan
from splatshard.pipeline.source.sample import NO_FIELD
from splatshard.schemas.errors import SourceError, UsageError
from tests.make import encode, image_parquet, jpeg, photo, write_parquet
from tests.unit.reading import IMAGE, read_all, ref_of, statuses


def test_hugging_face_parquet(tmp_path):
    samples = read_all(image_parquet(tmp_path / "p.parquet", count=40, row_group_size=7))
    assert [s.key for s in samples[:2]] == ["p-00000000", "p-00000001"]
    assert [s.label for s in samples] == [i % 3 for i in range(40)]
    assert samples[39].image == jpeg(seed=39)
    assert samples[39].image_name == "39.jpg"
    assert samples[0].metadata == '{"image": {"path": "0.jpg"}}'
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


def metadata_of(tmp_path, **columns: Any) -> dict[str, Any]:
    """The metadata of a sample beside whose image are these values."""
    table = pa.table({"jpg": [IMAGE]} | columns)
    (sample,) = read_all(write_parquet(tmp_path / "p.parquet", table))
    assert sample.members == ()
    return json.loads(sample.metadata, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary(2), pa.binary_view()], ids=str
)
def test_bytes_of_any_type_are_members(tmp_path, kind):
    columns = {"jpg": [IMAGE], "mask": pa.array([b"\0\1"], kind)}
    columns["same"] = pa.array([b"\2\3"]).dictionary_encode()
    (sample,) = read_all(write_parquet(tmp_path / "p.parquet", columns))
    assert sample.members == (("mask", b"\0\1"), ("same", b"\2\3"))
    assert sample.metadata is None


def test_image_of_any_binary_type(tmp_path):
    columns = {"image": pa.array([IMAGE], pa.binary_view()), "caption": pa.array(["a"])}
    columns["caption"] = columns["caption"].cast(pa.string_view())
    (sample,) = read_all(write_parquet(tmp_path / "p.parquet", columns))
    assert (sample.image, sample.caption, sample.metadata) == (IMAGE, "a", None)


def test_image_structs_keep_their_other_fields(tmp_path):
    columns = {
        "image": [{"bytes": IMAGE, "path": "a.jpg"}, {"bytes": IMAGE, "path": None}],
        "mask": [{"bytes": b"m", "path": "m.png", "classes": [1]}] * 2,
    }
    first, second = read_all(write_parquet(tmp_path / "p.parquet", columns))
    mask = {"path": "m.png", "classes": [1]}
    assert json.loads(first.metadata) == {"image": {"path": "a.jpg"}, "mask": mask}
    assert json.loads(second.metadata) == {"mask": mask}
    assert first.members == second.members == (("mask", b"m"),)


def test_nested_columns_are_json(tmp_path):
    nan, inf = float("nan"), float("inf")
    box = {"bbox": [1.0, nan], "binary_label": 1}
    words = pa.array([[("a", b"one")]], pa.map_(pa.string(), pa.binary()))
    found = metadata_of(tmp_path, boxes=[[box]], scores=[[-inf, inf]], words=words)
    assert found["boxes"] == [{"bbox": [1.0, "nan"], "binary_label": 1}]
    assert found["scores"] == ["-inf", "inf"]
    assert found["words"] == [["a", base64.b64encode(b"one").decode()]]


def test_bytes_within_columns_are_members_and_told(tmp_path):
    """As of several images for a row: further ones, frames, masks of objects."""
    image = {"bytes": IMAGE, "path": "a.jpg"}
    columns = {
        "image": [image],
        "frames": [[image | {"bytes": b"one"}, None, {"bytes": b"two", "path": None}]],
        "pair": [{"left": {"bytes": b"l", "path": "l.png"}, "id": 3}],
        "masks": [[b"m", b""]],
        "objects": [[{"mask": b"o", "box": [1, 2]}]],
        "none": pa.array([[]], pa.list_(pa.binary())),
    }
    (sample,) = read_all(write_parquet(tmp_path / "p.parquet", columns))
    members = {"frames.0": b"one", "frames.2": b"two", "pair.left": b"l"}
    members |= {"masks.0": b"m", "masks.1": b"", "objects.0.mask": b"o"}
    assert dict(sample.members) == members
    assert json.loads(sample.metadata) == {
        "image": {"path": "a.jpg"},
        "frames": [{"path": "a.jpg"}, None, None],
        "pair": {"left": {"path": "l.png"}, "id": 3},
        "objects": [{"box": [1, 2]}],
        "none": [],
    }
    told = {name for name, why in sample.unused if why == NO_FIELD}
    assert told == {"frames", "pair", "masks", "objects", "none"}


def test_columns_that_json_has_no_form_for_are_text(tmp_path):
    uuid = UUID(int=1)
    found = metadata_of(
        tmp_path,
        day=[date(2020, 1, 2)],
        price=[[Decimal("1.50")]],
        lasts=[timedelta(days=1)],
        id=pa.array([uuid.bytes], pa.uuid()),
        words=pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int8())),
        kind=pa.array(["a"]).dictionary_encode(),
        half=pa.array([0.5], pa.float16()),
    )
    assert found == {
        "day": "2020-01-02",
        "price": ["1.50"],
        "lasts": "1 day, 0:00:00",
        "id": str(uuid),
        "words": [["a", 1], ["a", 2]],
        "kind": "a",
        "half": 0.5,
    }


def test_nanoseconds_are_kept_without_pandas(tmp_path):
    ns = pa.timestamp("ns")
    seen = 1_577_836_800_000_000_000
    texts = [f"2020-01-01 00:00:00.00000000{i}" for i in range(2)]
    found = metadata_of(
        tmp_path,
        seen=pa.array([seen], ns),
        there=pa.array([seen + 1], pa.timestamp("ns", "UTC")),
        took=pa.array([1001], pa.duration("ns")),
        at=pa.array([1001], pa.time64("ns")),
        log=pa.array([[seen, seen + 1]], pa.list_(ns)),
        pair=pa.array([[seen, seen + 1]], pa.list_(ns, 2)),
        long=pa.array([[seen, seen + 1]], pa.large_list(ns)),
        one=pa.array([{"at": seen, "by": "me"}], pa.struct([("at", ns), ("by", pa.string())])),
        by=pa.array([[("me", seen)]], pa.map_(pa.string(), ns)),
    )
    assert found == {
        "seen": texts[0],
        "there": texts[1] + "Z",
        "took": 1001,
        "at": "00:00:00.000001001",
        "log": texts,
        "pair": texts,
        "long": texts,
        "one": {"at": texts[0], "by": "me"},
        "by": [["me", texts[0]]],
    }


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (pa.timestamp("us"), 1 << 62),
        (pa.timestamp("us", "Mars/Phobos"), 1),
        (pa.duration("s"), 1 << 60),
        (pa.date32(), 10**8),
    ],
    ids=str,
)
def test_times_beyond_python_are_numbers(tmp_path, kind, number):
    stored = pa.int32() if kind == pa.date32() else pa.int64()
    column = pa.array([number, None, number], stored).cast(kind)
    day = [date(2020, 1, 2)] * 3
    table = pa.table({"jpg": [IMAGE] * 3, "taken": column, "day": day})
    samples = read_all(write_parquet(tmp_path / "p.parquet", table))
    assert statuses(samples) == [None] * 3
    found = [json.loads(sample.metadata) for sample in samples]
    assert [f["taken"] for f in found] == [number, None, number]
    assert found[0]["day"] == "2020-01-02"


def test_integers_of_128_bits_name_their_column(tmp_path):
    """As Polars 2.1 writes them: pyarrow cannot even open such a file."""
    schema = pa.schema([("jpg", pa.binary()), ("n", pa.int64())]).serialize().to_pybytes()
    wide = schema.replace((64).to_bytes(4, "little"), (128).to_bytes(4, "little"))
    assert wide != schema
    table = pa.table({"jpg": [IMAGE], "n": pa.array([bytes(16)], pa.binary(16))})
    table = table.replace_schema_metadata({"wide_schema!": base64.b64encode(wide)})
    path = write_parquet(tmp_path / "p.parquet", table)
    data = path.read_bytes().replace(b"ARROW:schema", b"narrow_schem")
    path.write_bytes(data.replace(b"wide_schema!", b"ARROW:schema"))
    with pytest.raises(
        SourceError, match=r"p\.parquet: column n cannot be read .*64 bits"
    ) as caught:
        read_all(path)
    assert ".cast(pl.Int64)" in str(caught.value)
    assert "download" not in str(caught.value)


def test_columns_of_one_name(tmp_path):
    table = pa.table([[IMAGE], [1], [2]], names=["jpg", "a", "a"])
    with pytest.raises(SourceError, match=r"p\.parquet has several columns named a; rename"):
        read_all(write_parquet(tmp_path / "p.parquet", table))


def test_labels_beyond_int64_stay_in_metadata(tmp_path):
    label = pa.array([7, 1 << 63, None], pa.uint64())
    path = write_parquet(tmp_path / "p.parquet", {"jpg": [IMAGE] * 3, "label": label})
    samples = read_all(path)
    assert [s.label for s in samples] == [s.label for s in scan(ref_of(path))] == [7, None, None]
    assert [s.metadata for s in samples] == [None, f'{{"label": {1 << 63}}}', None]


def test_parquet_rows_without_image_or_with_one_key(tmp_path):
    images = [None, {"bytes": None, "path": "far/a.jpg"}, {"bytes": IMAGE, "path": None}] * 2
    columns = {"image": images, "__key__": [1, 2, 3, 4, 5, 3]}
    samples = read_all(write_parquet(tmp_path / "p.parquet", columns))
    assert statuses(samples) == ["no_image", "no_image", None] + ["no_image"] * 2 + [
        "duplicate_key"
    ]
    assert "far/a.jpg" in str(samples[1].error)
    assert "no image bytes in image; if" in str(samples[0].error)
    assert "rename it to image: there are image (struct<bytes: " in str(samples[0].error)
    assert str(samples[0].error).endswith("__key__ (int64)")
    assert [s.key for s in samples[:2]] == ["1", "2"]


def test_parquet_without_image_column(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"url": ["x"], "image": ["path.jpg"]})
    with pytest.raises(
        SourceError, match=r"p\.parquet has no image column, only url .string., i"
    ) as e:
        read_all(path)
    assert "image (string); expected is one of type struct" in str(e.value)
    assert "rename the one that is meant to image" in str(e.value)
    (tmp_path / "notes.md").write_text("x")
    for src in (path, tmp_path):
        with pytest.raises(UsageError, match=r"p\.parquet has no image column, only url .string"):
            list_shards(str(src))


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
        with pytest.raises(SourceError, match=r"p\.parquet is not readable as Parquet.*again"):
            read_all(path)


def test_parquet_streams_row_batches(tmp_path):
    block = {"bytes": bytes(range(256)) * 1024, "path": None}
    path = write_parquet(tmp_path / "p.parquet", {"image": [block] * 128}, row_group_size=8)
    before, peak = pa.total_allocated_bytes(), 0
    for _ in read(ref_of(path), hashlib.sha256()):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 16e6  # of 32 MB, in batches of 16 rows


def test_images_of_several_formats_are_in_several_columns(tmp_path):
    """As Hugging Face's webdataset loader writes tars of .jpg and .png; a mask is no image."""
    png = encode(photo(), "PNG")
    table = {
        "jpg": [IMAGE, None, IMAGE, None],
        "png": [None, png, png, None],
        "mask.png": [png] * 4,
    }
    samples = read_all(write_parquet(tmp_path / "p.parquet", table))
    assert [s.image for s in samples] == [IMAGE, png, IMAGE, b""]
    assert statuses(samples) == [None, None, None, "no_image"]
    assert [sorted(dict(s.members)) for s in samples] == [
        ["mask.png"],
        ["mask.png"],
        ["mask.png", "png"],
        ["mask.png"],
    ]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer: fetch"),
        (b"<!DOCTYPE html><html>log in</html>", "a web page: download it again"),
        (b"\x1f\x8b\x08\0" + bytes(99), "a gzip file: unpack it"),
    ],
)
def test_what_is_something_else_is_named(tmp_path, data, text):
    path = tmp_path / "p.parquet"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"p\.parquet is no Parquet, but {text}"):
        read_all(path)
