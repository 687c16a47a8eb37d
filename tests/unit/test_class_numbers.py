"""Labels of one job that a list of classes numbers, and others that none does: told in listing."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from splatshard.pipeline.source.listing import list_source
from tests.make import image_folder, jpeg, write_parquet, write_tar

OWN = "has numbers of its own, so that one number may mean several classes"


def table(path: Path, names: list[str] | None = None, labels: tuple[object, ...] = (0, 17)) -> Path:
    """Images with a label each, which is a ClassLabel where there are names."""
    features = {"image": {"_type": "Image"}} | (
        {"label": {"_type": "ClassLabel", "names": names}} if names else {}
    )
    info = json.dumps({"info": {"features": features}})
    found = pa.table({"image": [jpeg()] * len(labels), "label": labels})
    return write_parquet(path, found.replace_schema_metadata({"huggingface": info}))


def tar(path: Path, label: bytes, name: str = "b.cls") -> Path:
    return write_tar(path, [("a.jpg", jpeg()), ("b.jpg", jpeg()), (name, label)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", ("cat", "dog"), per_class=1)


def told(*sources: Path) -> list[str]:
    notes = list_source("::".join(map(str, sources))).notes
    return [note for note in notes if OWN in note]


def test_numbers_beside_class_folders(photos: Path, tmp_path: Path) -> None:
    for other in (
        tar(tmp_path / "more.tar", b"17"),
        tar(tmp_path / "json.tar", b'{"label": 17}', "b.json"),
        table(tmp_path / "plain.parquet"),
    ):
        (note,) = told(photos, other)
        assert note.startswith(f"the labels of {photos} are numbered by its classes (cat, dog), ")
        assert f"and {other} {OWN}: convert them into several DST" in note
        assert told(other, photos) == [note]
        assert told(other) == told(photos) == []
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, data in (("x.jpg", jpeg()), ("x.cls", b"17")):
        (flat / name).write_bytes(data)
    (note,) = told(photos, flat)
    assert f"and {flat / 'x.cls'} {OWN}" in note or f"and {flat / 'x.jpg'} {OWN}" in note


def test_numbers_beside_a_class_label(tmp_path: Path) -> None:
    named = table(tmp_path / "named.parquet", ["cat", "dog"], (0, 1))
    plain = table(tmp_path / "plain.parquet")
    (note,) = told(named, plain)
    assert (
        f"the labels of {named} are numbered by its classes (cat, dog), and {plain} {OWN}" in note
    )
    assert told(named, table(tmp_path / "again.parquet", ["cat", "dog"], (0, 1))) == []


def test_what_has_no_labels_is_quiet(photos: Path, tmp_path: Path) -> None:
    for other in (
        tar(tmp_path / "texts.tar", b"a cat", "b.txt"),
        tar(tmp_path / "names.tar", b"cat"),
        table(tmp_path / "hidden.parquet", labels=(-1, -1)),
        table(tmp_path / "words.parquet", labels=("cat", "dog")),
        tmp_path / "cut.tar",
    ):
        if not other.exists():
            other.write_bytes(b"no tar")
        assert told(photos, other) == []


def test_all_of_many_shards_are_looked_into(photos: Path, tmp_path: Path) -> None:
    """A few of them, spread: labels may begin late."""
    tars = [tar(tmp_path / f"{i:02}.tar", b"7", "b.cls" if i >= 30 else "b.txt") for i in range(40)]
    assert len(told(photos, *tars)) == 1
