"""What is told of columns that are not used though they have a field's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from splatshard.pipeline.source.read import RawSample
from splatshard.pipeline.source.sample import NO_FIELD
from tests.make import write_parquet
from tests.unit.reading import IMAGE, read_all


def samples_of(tmp_path: Path, **columns: Any) -> list[RawSample]:
    """Rows of these columns beside an image."""
    length = len(next(iter(columns.values())))
    table = pa.table({"jpg": [IMAGE] * length} | columns)
    return read_all(write_parquet(tmp_path / "p.parquet", table))


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    named = {"label": ["cat"], "caption": [{"en": "a"}], "uid": [[1]]}
    (sample,) = samples_of(tmp_path, **named)
    assert dict(sample.unused) == {
        "label": "'cat' is not the number of a class",
        "caption": "{'en': 'a'} is not a text or a list of texts",
        "uid": "[1] is not a text or a number",
    }
    (sample,) = samples_of(tmp_path, label=pa.array([None], pa.float64()), caption=["a"])
    assert sample.unused == ()


def test_several_that_would_do_are_named(tmp_path: Path) -> None:
    numbers = {"Label": [3], "cls": [4]}
    (sample,) = samples_of(tmp_path, caption=["a"], text=["b"], TEXT=["c"], **numbers)
    assert (sample.caption, sample.label) == ("a", 3)
    caption = "the caption is taken from caption; call the one that is meant caption"
    label = "the label is taken from Label; call the one that is meant label"
    assert dict(sample.unused) == {"text": caption, "TEXT": caption, "cls": label}


def test_several_images_are_named(tmp_path: Path) -> None:
    image, sound = pa.array([{"bytes": IMAGE}]), pa.array([{"bytes": b"RIFF"}])
    table = pa.table({"sound": sound, "mask": image, "photo": image})
    path = tmp_path / "p.parquet"
    (sample,) = read_all(write_parquet(path, table))
    why = "the image is taken from sound; call the one that is meant image"
    assert (sample.image, dict(sample.unused)) == (b"RIFF", {"mask": why, "photo": why})
    features = {"sound": {"_type": "Audio"}, "photo": {"_type": "Image"}}
    (sample,) = read_all(write_parquet(path, table, features))
    assert (sample.image, dict(sample.unused)) == (IMAGE, {"sound": NO_FIELD, "mask": NO_FIELD})
    assert dict(sample.members) == {"sound": b"RIFF", "mask": IMAGE}
    (sample,) = samples_of(tmp_path, mask=image)  # jpg is named
    assert sample.unused == (("mask", NO_FIELD),)


def test_columns_that_become_members_are_told(tmp_path: Path) -> None:
    (sample,) = samples_of(tmp_path, npy=[b"1"], png=[IMAGE], txt=[b"a"])
    assert dict(sample.unused) == {"npy": NO_FIELD, "png": "the image is taken from jpg"}
    (sample,) = samples_of(tmp_path, png=pa.array([None], pa.binary()), label=[3])
    assert sample.unused == ()
