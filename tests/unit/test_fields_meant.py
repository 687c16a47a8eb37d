"""Columns, and values of a JSON, that are no field but may be one by their names: told where the
field is missing, nothing where it is there. The columns are those of well-known datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from splatshard.pipeline.source.read import RawSample
from splatshard.pipeline.source.sample import (
    MEANT,
    MEANT_IN_JSON,
    NEITHER,
    NO_FIELD,
    OTHER_CAPTION,
    may_be,
    unused_lines,
)
from tests.make import write_parquet
from tests.unit.reading import IMAGE, read_all, read_members

FIELD_OF = {why: field for whys in (MEANT, MEANT_IN_JSON) for field, why in whys.items()}
JPG, IN_STRUCT = {"jpg": IMAGE}, {"image": {"bytes": IMAGE, "path": "a.jpg"}}


def sample_of(tmp_path: Path, row: Mapping[str, Any], features: Any = None) -> RawSample:
    table = pa.Table.from_pylist([dict(row)])
    (sample,) = read_all(write_parquet(tmp_path / "p.parquet", table, features))
    return sample


def meant(sample: RawSample) -> dict[str, str]:
    """By name of what is not used, the field that it may be, or why else."""
    return {name: FIELD_OF.get(why, why) for name, why in sample.unused}


SCHEMAS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "img2dataset": (
        JPG
        | {"key": "0", "caption": "a", "url": "http://a/b.jpg", "status": "success"}
        | {"error_message": "", "width": 8, "height": 8, "exif": "{}", "sha256": "ab"},
        {},
    ),
    "img2dataset without captions": (
        JPG | {"key": "0", "url": "http://a/b.jpg", "error_message": "", "sha256": "ab"},
        dict.fromkeys(("url", "error_message", "sha256"), NEITHER),
    ),
    "FER2013": (JPG | {"emotion": 3, "usage": "Training"}, {
        "emotion": NEITHER, "usage": NEITHER,
    }),
    "CelebA": (IN_STRUCT | {"celeb_id": 7, "Male": True, "__index_level_0__": 0}, {
        "celeb_id": NEITHER, "Male": NEITHER,
    }),
    "skin lesions": (IN_STRUCT | {"image_id": "i", "dx": "nv", "scan": b"a"}, {
        "image_id": "key", "dx": NEITHER, "scan": NO_FIELD,
    }),
    "formulas": (IN_STRUCT | {"latex_formula": "x^2"}, {"latex_formula": NEITHER}),
    "many": (JPG | {f"attribute {i:02d}": 1 for i in range(40)}, {
        f"attribute {i:02d}": NEITHER for i in range(10)
    }),
    "empty captions": (JPG | {"caption": "", "alt": "a", "label": 1}, {"alt": "caption"}),
    "captions of blanks": (JPG | {"caption": " \n", "alt": "a", "label": 1}, {"alt": "caption"}),
    "captions of blanks beside a JSON": (
        JPG | {"caption": " ", "json": '{"caption": "a", "text": " "}', "__key__": "0", "label": 1},
        {"json.caption": OTHER_CAPTION},
    ),
    "nothing but empty captions": (JPG | {"caption": "", "emotion": 3}, {"emotion": NEITHER}),
    "DataComp": (
        JPG | {"uid": "ab", "url": "u", "text": "a", "re_caption": "b", "sha256": "ab"},
        {},
    ),
    "LAION": (
        JPG | {"SAMPLE_ID": 7, "URL": "u", "TEXT": "a", "LICENSE": "", "similarity": 0.3},
        {"SAMPLE_ID": "key"},
    ),
    "MNIST": (IN_STRUCT | {"label": 7}, {}),
    "digits": (IN_STRUCT | {"digit": 7}, {"digit": "label"}),
    "beans": (IN_STRUCT | {"image_file_path": "a.jpg", "labels": 1}, {
        "image_file_path": "key", "labels": "label",
    }),
    "CIFAR-100, undeclared": (IN_STRUCT | {"fine_label": 1, "coarse_label": 2}, {
        "fine_label": "label", "coarse_label": "label",
    }),
    "WikiArt, undeclared": (IN_STRUCT | {"artist": 3, "genre": 1, "style": 2}, {"genre": "label"}),
    "iNaturalist": (
        IN_STRUCT | {"photo_id": 7, "species_id": 3, "species": "Ursus", "latitude": 1.5},
        {"photo_id": "key", "species_id": "label", "species": "label"},
    ),
    "classes by name": (JPG | {"category": "dog", "filename": "a.jpg"}, {
        "category": "label", "filename": "key",
    }),
    "scores": (JPG | {"caption": "a", "label_0": 0.5, "score": 0.5}, {"label_0": "label"}),
    "a class as an object": (
        JPG | {"caption": "a", "category": {"id": 3, "name": "cat"}, "target": {"width": 8}},
        {"category": "label"},
    ),
    "classes as objects, within a JSON": (
        JPG | {"caption": "a", "meta": '{"categories": [{"name": "cat"}]}', "y": [{"_id": 3}]},
        {"meta.categories": "label", "y": "label"},
    ),
    "x and y": (JPG | {"y": 3, "pos_y": 3, "__index_level_0__": 0}, {"y": "label"}),
    "COCO": (
        IN_STRUCT
        | {"cocoid": 7, "imgid": 0, "file_name": "a.jpg", "sentences_raw": ["a", "b"]},
        {"imgid": "key", "file_name": "key", "sentences_raw": "caption"},
    ),
    "LLaVA": (
        IN_STRUCT | {"id": "7", "conversations": [{"from": "human", "value": "what is it?"}]},
        {"id": "key", "conversations": "caption"},
    ),
    "VQA": (IN_STRUCT | {"question_id": 7, "question": "a?", "answers": ["b"]}, {
        "question": "caption", "answers": "caption",
    }),
    "text to image": (
        JPG | {"prompt": "a", "image_name": "b", "seed": 7, "width": 512, "timestamp": "x"},
        {"prompt": "caption", "image_name": "key"},
    ),
    "captions of several": (
        JPG | {"caption_llava": "a", "alt_text": "b", "alt": "c", "md5": "ab", "hash": 7},
        {"caption_llava": "caption", "alt_text": "caption", "alt": "caption"}
        | {"md5": "key", "hash": "key"},
    ),
    "of WebDataset": (
        JPG | {"json": {"uid": "ab", "caption": "a", "alt": "b"}, "__key__": "0", "__url__": "x"},
        {},
    ),
    "JSON as text": (
        JPG | {"json": '{"prompt": "a", "sha256": "ab", "class": 3}', "__key__": "0", "alt": "b"},
        {"json.prompt": "caption", "json.class": "label", "alt": "caption"},
    ),
    "JSON as struct": (
        JPG | {"json": {"id": 3, "meta": {"recaption": "a"}}, "file": "a"},
        {"json.meta.recaption": "caption", "file": "key"},
    ),
    "an uid within the JSON": (JPG | {"json": '{"uid": "ab"}', "id": "0"}, {}),
    "only a url": (JPG | {"caption": "a", "url": "http://a/b.jpg"}, {}),
    "JSON in a column of metadata": (
        JPG | {"metadata": '{"caption": "a", "x": {"label": 3}, "id": 7}', "info": "some text"},
        {"metadata.caption": "caption", "metadata.x.label": "label"},
    ),
    "bytes": (JPG | {"image_id": b"ab", "caption": "a"}, {"image_id": "key"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_columns_of_datasets(tmp_path: Path, name: str) -> None:
    row, expected = SCHEMAS[name]
    sample = sample_of(tmp_path, row)
    assert meant(sample) == expected
    for field in MEANT:
        full = row | {"key": "k", "caption": "a", "label": 1}
        assert field not in meant(sample_of(tmp_path, full)).values()


def test_classes_that_are_declared_are_taken(tmp_path: Path) -> None:
    classes = {"_type": "ClassLabel", "names": ["a", "b", "c", "d"]}
    features = {"artist": classes, "genre": classes}
    sample = sample_of(tmp_path, IN_STRUCT | {"artist": 3, "genre": 1}, features)
    why = "the label is taken from artist; call the one that is meant label"
    assert (sample.label, dict(sample.unused)) == (3, {"genre": why})


def test_one_line_for_each_reason() -> None:
    assert unused_lines({"alt": "x", "id": "y", "prompt": "x"}) == [
        ("alt, prompt", "alt, prompt are not used: x"),
        ("id", "id is not used: y"),
    ]


def test_columns_within_others(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "labels": [3, 4], "edit_prompt": "a", "target": 2, "target_size": 224, "title": 7,
        "data": {"caption": "a", "id": 3, "objects": [{"category": 1}], "uid": "ab"},
    }  # fmt: skip
    sample = sample_of(tmp_path, JPG | columns)
    assert (sample.caption, sample.label) == (None, None)
    assert meant(sample) == {
        **dict.fromkeys(("labels", "target", "data.objects.category"), "label"),
        **dict.fromkeys(("edit_prompt", "data.caption"), "caption"),
    }
    assert meant(sample_of(tmp_path, JPG | columns | {"label": 1, "caption": "a"})) == {}


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.list_(pa.string(), 1), pa.list_view(pa.string())]
)
def test_lists(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"jpg": [IMAGE], "prompts": pa.array([["a"]], kind)})
    (sample,) = read_all(write_parquet(tmp_path / "p.parquet", table))
    assert meant(sample) == {"prompts": "caption"}


def test_a_key_that_repeats_leaves_others_to_be_meant(tmp_path: Path) -> None:
    rows = [JPG | {"key": "a", "image_id": str(i)} for i in range(2)]
    path = write_parquet(tmp_path / "p.parquet", pa.Table.from_pylist(rows))
    for sample in read_all(path):
        assert meant(sample) == {
            "key": "its values repeat, so rows are numbered",
            "image_id": "key",
        }


def test_a_second_key_is_told(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, JPG | {"key": "b", "__key__": "a"})
    assert (sample.key, meant(sample)) == ("a", {"key": "the key is taken from __key__"})


def test_a_json_that_is_cut_is_told(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, JPG | {"json": '{"caption": "a', "__key__": "0"})
    assert sample.caption is None
    assert list(meant(sample)) == ["json"]
    assert meant(sample)["json"].startswith("it cannot be parsed: Unterminated string")
    assert meant(sample_of(tmp_path, JPG | {"json": "", "__key__": "0"})) == {}


def test_values_of_the_json(tmp_path: Path) -> None:
    def told(document: object, *members: tuple[str, bytes]) -> dict[str, str]:
        text = json.dumps(document).encode()
        (sample,) = read_members(tmp_path, ("a.jpg", IMAGE), ("a.json", text), *members)
        return meant(sample)

    assert told([{"caption": "a"}]) == {"caption": "caption"}
    assert told({"data": {"captions": ["a"], "label": 1}}) == {
        "data.captions": "caption",
        "data.label": "label",
    }
    document = {"class": 4, "prompt_en": "a", "labels": [3, 1], "text": None, "target": "x"}
    document |= {"uid": 1, "genre": "", "species": float("nan"), "alt": "", "title": 3}
    document |= {"sha256": "ab", "file_name": "a"}
    expected = {"class": "label", "prompt_en": "caption", "labels": "label", "target": "label"}
    assert told(document) == expected
    assert told(document, ("a.txt", b"a"), ("a.cls", b"1")) == {}
    assert told({"a": {"b": {"c": {"d": {"caption": "deep"}}}}}) == {"a": NEITHER}
    assert told({"dx": "nv", "age": 50, "uid": "ab"}) == {"dx": NEITHER, "age": NEITHER}
    assert told({"dx": "nv", "caption": None}) == {}
    assert told({"dx": "nv"}, ("a.cls", b"1")) == told({"dx": "nv"}, ("a.txt", b"a")) == {}
    for beside in ({}, {"caption": ""}, {"caption": None}):
        assert told({"prompt": "a"} | beside, ("a.txt", b"")) == {"prompt": "caption"}
    assert told({"alt": " \n", "category": " "}) == dict.fromkeys(("alt", "category"), NEITHER)
    a_class = {"id": 3, "name": "cat"}
    for document in ({"category": a_class}, {"category": [a_class]}, {"class": {"id": 3}}):
        assert told(document, ("a.txt", b"a")) == dict.fromkeys(document, "label")
        assert told(document, ("a.txt", b"a"), ("a.cls", b"1")) == {}
    for empty in ({"category": {"id": None}}, {"class": {"name": " "}}, {"target": {"width": 8}}):
        assert told(empty, ("a.txt", b"a")) == {}
    said = [{"from": "human", "value": "what is it?"}]
    assert told({"conversations": said, "category": "dog"}) == {
        "conversations": "caption",
        "category": "label",
    }


@pytest.mark.parametrize("blank", ["", " ", "\n", "\t \u3000"])
def test_captions_of_blanks_are_as_empty_ones(tmp_path: Path, blank: str) -> None:
    def read_json(document: object, *members: tuple[str, bytes]) -> RawSample:
        text = json.dumps(document).encode()
        (sample,) = read_members(tmp_path, ("a.jpg", IMAGE), ("a.json", text), *members)
        assert sample.metadata == text.decode()
        return sample

    for members in ((), (("a.txt", blank.encode()),)):
        sample = read_json({"caption": blank, "text": "a dog"}, *members)
        assert (sample.caption, meant(sample)) == ("a dog", {})
        sample = read_json({"caption": blank, "title": "a dog"}, *members)
        assert (sample.caption, meant(sample)) == (blank, {"title": "caption"})
        sample = read_json({"captions": [blank], "text": blank}, *members)
        assert ((sample.caption or "").strip(), meant(sample)) == ("", {})
    document = {"caption": blank, "text": "a dog"}
    for value in (document, json.dumps(document)):
        sample = sample_of(tmp_path, JPG | {"json": value, "__key__": "0"})
        assert (sample.caption, meant(sample)) == ("a dog", {})


def test_columns_that_begin_with_blanks_are_captions(tmp_path: Path) -> None:
    """The statistics of both columns say that the last of their texts is of blanks."""
    for first, told in (("\ta dog", {}), ("\n", {"alt": "caption"})):
        table = pa.table({"jpg": [IMAGE] * 3, "caption": [first, " ", None], "alt": ["a"] * 3})
        samples = read_all(write_parquet(tmp_path / "p.parquet", table))
        assert [sample.caption for sample in samples] == [first, " ", None]
        assert [meant(sample) for sample in samples] == [told] * 3


@pytest.mark.parametrize("name", ["", "_", "0", "name", "idx", "width", "error_message", "split"])
def test_names_that_mean_nothing(name: str) -> None:
    assert not any(may_be(field, name) for field in ("caption", "label", "key"))


@pytest.mark.parametrize(
    "name", ["user_id", "url", "__url__", "category_id", "profile", "video_id"]
)
def test_names_of_other_things_are_no_keys(name: str) -> None:
    assert not may_be("key", name)


def test_columns_in_which_all_is_null_are_none(tmp_path: Path) -> None:
    columns = {"caption": pa.array([None], pa.string()), "label": pa.nulls(1), "alt": ["a"]}
    table = pa.table({"jpg": [IMAGE], **columns, "class_id": [3]})
    (sample,) = read_all(write_parquet(tmp_path / "p.parquet", table))
    assert meant(sample) == {"alt": "caption", "class_id": "label"}
    some = pa.table({"jpg": [IMAGE] * 2, "caption": [None, "a"], "alt": ["b", "c"]})
    for sample in read_all(write_parquet(tmp_path / "p.parquet", some)):
        assert meant(sample) == {}


def test_an_empty_key_or_uid_is_none(tmp_path: Path) -> None:
    rows = [JPG | {"key": key, "uid": uid} for key, uid in (("a", "x"), ("", ""), ("b", None))]
    path = write_parquet(tmp_path / "p.parquet", pa.Table.from_pylist(rows))
    samples = read_all(path)
    assert [(s.key, s.uid) for s in samples] == [("a", "x"), ("p-00000001", None), ("b", None)]
    assert [dict(s.unused) for s in samples] == [
        {},
        {"key": "'' is not a whole number or a non-empty text"}
        | {"uid": "'' is not a text or a number"},
        {},
    ]
