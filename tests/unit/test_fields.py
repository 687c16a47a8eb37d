"""Captions, labels, uids and keys: recognised by value, whatever type or peer's name they have."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest

from splatshard.pipeline.source.read import RawSample, scan
from splatshard.pipeline.source.values import caption_of, key_of, label_of, uid_of
from tests.make import write_parquet
from tests.unit.reading import IMAGE, read_all, read_members, ref_of, statuses

words, numbers = pa.array(["a", "b", "c"]), pa.array([1, 2, 3])


def samples_of(tmp_path: Path, **columns: Any) -> list[RawSample]:
    """Rows of these columns beside an image; the same as in a scan without images."""
    length = len(next(iter(columns.values())))
    path = write_parquet(tmp_path / "p.parquet", pa.table({"jpg": [IMAGE] * length} | columns))
    samples = read_all(path)
    found = [(s.key, s.caption, s.label) for s in samples]
    assert found == [(s.key, s.caption, s.label) for s in scan(ref_of(path))]
    return samples


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("a boat", "a boat"),
        ("", ""),
        ("\ufeffa boat", "a boat"),
        (b"b\xc3\xa4r", "bär"),
        (b"caf\xe9", "caf\ufffd"),
        (b"a\0b", None),
        (["a", None, b"b"], "a\nb"),
        (["two\nlines", "b"], "two lines\nb"),
        ("\ud800", r"\ud800"),
        ([], None),
        ([["a"], ["b"]], "a\nb"),
        ([("en", "a"), ("de", "b")], None),  # of a map
        (b"a boat\0\0", "a boat"),
        (["a", 1], None),
        (1, None),
        ({"en": "a"}, None),
        (None, None),
    ],
)
def test_captions(value: Any, caption: str | None) -> None:
    assert caption_of(value) == caption


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((7, 7), (-1, -1), (7.0, 7), (True, 1), (False, 0), (Decimal("7.00"), 7), ("7", 7)),
        *(
            (" +07\n", 7),
            ("7.0", 7),
            (b"7", 7),
            (b"7" + bytes(7), None),
            ([7], 7),
            ((1 << 63) - 1, (1 << 63) - 1),
        ),
        *((1 << 63, None), (-(1 << 63), None), (7.5, None), (float("nan"), None), (1e300, None)),
        *((float("inf"), None), (Decimal("1e99999999"), None), (Decimal("nan"), None)),
        *(("cat", None), ("", None), ("9" * 19, None), ([1, 2], None), ([], None), (None, None)),
    ],
)
def test_labels(value: Any, label: int | None) -> None:
    found = label_of(value)
    assert found == label
    assert type(found) is type(label)


@pytest.mark.parametrize(
    ("value", "uid", "key"),
    [
        *(("a", "a", "a"), (7, "7", "7"), (b"a", "a", "a"), (7.0, "7", "7"), (7.5, "7.5", None)),
        *((b"\xff\0", "ff00", None), (UUID(int=1), *[str(UUID(int=1))] * 2), (True, None, None)),
        *((None, None, None), (["a"], None, None), ("\ud800", r"\ud800", r"\ud800")),
        *((b"a\0\0", "a", "a"), (b"\1\2", "0102", None), (1 << 70, *[str(1 << 70)] * 2)),
        *((Decimal("7.00"), "7", "7"), (Decimal("7.5"), "7.5", None), (float("nan"), None, None)),
    ],
)
def test_uids_and_keys(value: Any, uid: str | None, key: str | None) -> None:
    assert (uid_of(value), key_of(value)) == (uid, key)


# Types of columns


def test_dictionaries_are_texts(tmp_path: Path) -> None:
    coded = words.dictionary_encode()
    samples = samples_of(tmp_path, caption=coded, uid=coded, key=coded, label=numbers)
    assert [(s.key, s.uid, s.caption, s.label) for s in samples] == [
        (word, word, word, i) for i, word in enumerate("abc", 1)
    ]
    assert all(s.metadata is None and s.members == () and s.unused == () for s in samples)


@pytest.mark.parametrize(
    ("label", "expected", "metadata"),
    [
        (pa.array([1.0, 2.0, None]), [1, 2, None], [None, None, None]),
        (pa.array([1.0, 2.5, float("nan")]), [1, None, None], [None, 2.5, "nan"]),
        (pa.array([True, False, None]), [1, 0, None], [None, None, None]),
        (pa.array(["1", "02", "cat"]), [1, 2, None], [None, "02", "cat"]),
        (pa.array(["1", "2", "3"]).dictionary_encode(), [1, 2, 3], [None, None, None]),
        (pa.array([Decimal(1), Decimal(2), None]), [1, 2, None], [None, None, None]),
        (pa.array([[1], [2, 3], None]), [1, None, None], [[1], [2, 3], None]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_labels_of_any_type(
    tmp_path: Path, label: pa.Array, expected: list[int | None], metadata: list[Any]
) -> None:
    samples = samples_of(tmp_path, label=label)
    assert [s.label for s in samples] == expected
    assert [s.metadata and json.loads(s.metadata)["label"] for s in samples] == metadata


def test_captions_of_any_type(tmp_path: Path) -> None:
    (one, two) = samples_of(tmp_path, caption=pa.array([b"b\xc3\xa4r", b"caf\xe9"]))
    assert (one.caption, one.members, one.metadata) == ("bär", (), None)
    assert (two.caption, two.members, two.metadata) == (
        "caf\ufffd",
        (("caption", b"caf\xe9"),),
        None,
    )
    (one, two) = samples_of(tmp_path, caption=pa.array([["a", "b"], []]))
    assert (one.caption, json.loads(one.metadata)) == ("a\nb", {"caption": ["a", "b"]})
    assert (two.caption, json.loads(two.metadata)) == (None, {"caption": []})
    (one,) = samples_of(tmp_path, caption=["\ufeffa"])
    assert (one.caption, json.loads(one.metadata)) == ("a", {"caption": "\ufeffa"})


def test_captions_as_the_text_of_a_list(tmp_path: Path) -> None:
    """As pandas keeps several; the text itself stays in the metadata."""
    text = '["two\\nlines", "b"]'
    (sample,) = samples_of(tmp_path, captions=[text], key=["k"])
    assert (sample.caption, sample.unused) == ("two lines\nb", ())
    assert json.loads(sample.metadata or "") == {"captions": text}
    for document in (["a", "b"], json.dumps(["a", "b"])):  # the column `json`, as a whole
        (sample,) = samples_of(tmp_path, json=[json.dumps(document)], key=["k"])
        assert (sample.caption, sample.unused) == ("a\nb", ())
    (sample,) = samples_of(tmp_path, json=["[1]"], key=["k"])
    told = (("the JSON", "it is [1], without names for caption or label"),)
    assert (sample.caption, sample.unused) == (None, told)


def test_columns_of_the_usual_type_go_first(tmp_path: Path) -> None:
    """So files that were read before are read alike."""
    columns = {"caption": pa.array([["x"]]), "text": ["a"], "label": [0.5], "cls": [7]}
    (sample,) = samples_of(tmp_path, **columns)
    assert (sample.caption, sample.label) == ("a", 7)
    assert json.loads(sample.metadata) == {"caption": ["x"], "label": 0.5}
    (sample,) = samples_of(tmp_path, caption=["a"], text=["b"], txt=["c"])
    assert (sample.caption, json.loads(sample.metadata)) == ("a", {"text": "b", "txt": "c"})


@pytest.mark.parametrize("as_text", [False, True])
def test_columns_of_webdataset(tmp_path: Path, as_text: bool) -> None:
    document = {"uid": "ab", "caption": "in json", "label": 3.0, "url": None}
    columns = {"__key__": ["k/0"], "json": [json.dumps(document) if as_text else document]}
    (sample,) = samples_of(tmp_path, **columns, __url__=["a.tar"])
    assert (sample.key, sample.uid, sample.caption, sample.label) == ("k/0", "ab", "in json", 3)
    assert json.loads(sample.metadata) == {"json": columns["json"][0], "__url__": "a.tar"}
    (sample,) = samples_of(tmp_path, **columns, txt=["a boat"], cls=[7])
    assert (sample.caption, sample.label, sample.uid) == ("a boat", 7, "ab")


def test_a_key_that_repeats_is_none(tmp_path: Path) -> None:
    for key in (["C", "D", "C"], [1, 1, 2], pa.array(["C", "C", None]).dictionary_encode()):
        samples = samples_of(tmp_path, key=key)
        assert [s.key for s in samples] == [f"p-{i:08d}" for i in range(3)]
        assert statuses(samples) == [None] * 3
        values = key if isinstance(key, list) else key.to_pylist()
        assert [json.loads(s.metadata)["key"] for s in samples] == values
        assert samples[0].unused == (("key", "its values repeat, so rows are numbered"),)
    samples = samples_of(tmp_path, key=["C", None, "D"])
    assert [s.key for s in samples] == ["C", "p-00000001", "D"]
    assert all(s.metadata is None for s in samples)
    assert statuses(samples_of(tmp_path, __key__=["C", "C"])) == [None, "duplicate_key"]


def test_keys_of_any_type(tmp_path: Path) -> None:
    ids = [UUID(int=i) for i in (5, 6)]
    for key, expected in (
        (pa.array([1.0, 2.0]), ["1", "2"]),
        (pa.array([Decimal(1), Decimal(2)]), ["1", "2"]),
        (pa.array([b"a\0\0", b"bcd"], pa.binary(3)), ["a", "bcd"]),
        (pa.array([i.bytes for i in ids], pa.uuid()), [str(i) for i in ids]),
    ):
        samples = samples_of(tmp_path, key=key)
        assert [s.key for s in samples] == expected
        assert all(s.unused == () for s in samples)
        numbered = [s.key for s in samples_of(tmp_path, key=pa.concat_arrays([key, key[:1]]))]
        assert numbered == [f"p-{i:08d}" for i in range(3)]


def test_a_key_of_another_type_stays(tmp_path: Path) -> None:
    (one, two) = samples_of(tmp_path, key=pa.array([[1], [1]]))
    assert (one.key, two.key) == ("p-00000000", "p-00000001")
    assert json.loads(one.metadata) == {"key": [1]}
    assert one.unused == (("key", "[1] is not a whole number or a non-empty text"),)
    (one, two) = samples_of(tmp_path, key=pa.array([b"a", b"\xff"]))
    assert (one.key, two.key) == ("a", "p-00000001")
    assert (one.members, two.members) == ((), (("key", b"\xff"),))


def test_dictionaries_are_of_the_usual_type(tmp_path: Path) -> None:
    """A category goes before a text that is less preferred, and a number is no caption."""
    (sample, *_) = samples_of(tmp_path, caption=words.dictionary_encode(), text=words)
    why = "the caption is taken from caption; call the one that is meant caption"
    assert (sample.caption, dict(sample.unused)) == ("a", {"text": why})
    (sample, *_) = samples_of(tmp_path, caption=numbers, text=words, label=words, cls=numbers)
    assert (sample.caption, sample.label) == ("a", 1)
    assert dict(sample.unused) == {
        "caption": "the caption is taken from text, by its type",
        "label": "the label is taken from cls, by its type",
    }
    (sample, *_) = samples_of(tmp_path, label=words, cls=numbers.dictionary_encode())
    assert (sample.label, json.loads(sample.metadata)) == (1, {"label": "a"})


def test_fields_in_json(tmp_path: Path) -> None:
    def read_json(document: str, *members: tuple[str, bytes]) -> RawSample:
        (sample,) = read_members(
            tmp_path, ("1.jpg", IMAGE), ("1.json", document.encode()), *members
        )
        return sample

    sample = read_json('{"label": 1.0, "caption": ["a", "b"], "uid": 5}')
    assert (sample.label, sample.caption, sample.uid) == (1, "a\nb", "5")
    sample = read_json('{"label": true, "caption": "\\ufeffa"}')
    assert (sample.label, sample.caption, sample.unused) == (1, "a", ())
    sample = read_json('{"label": "cat", "text": {"en": "a"}, "uid": null}')
    assert dict(sample.unused) == {
        "label": "'cat' is not the number of a class",
        "text": "{'en': 'a'} is not a text or a list of texts",
    }
    assert read_json('{"label": "cat"}', ("1.cls", b"7")).unused == ()


def test_names_in_any_case(tmp_path: Path) -> None:
    """LAION's Parquet has TEXT; an exact name and a usual type go before."""
    (one, *_) = samples_of(tmp_path, TEXT=words, Label=numbers, UID=words, KEY=words)
    assert (one.key, one.caption, one.label, one.uid, one.metadata) == ("a", "a", 1, "a", None)
    path = write_parquet(tmp_path / "i.parquet", {"Image": [IMAGE], "Text": ["a"]})
    assert [(s.image, s.caption) for s in read_all(path)] == [(IMAGE, "a")]
    (two,) = read_members(tmp_path, ("1.jpg", IMAGE), ("1.json", b'{"TEXT": "a", "Label": 3}'))
    assert (two.caption, two.label, two.unused) == ("a", 3, ())
    (several,) = read_members(tmp_path, ("1.jpg", IMAGE), ("1.json", b'{"captions": ["a", "b"]}'))
    assert several.caption == "a\nb"
    (three,) = read_members(tmp_path, ("1.jpg", IMAGE), ("1.json", b'{"Label": "cat"}'))
    assert dict(three.unused) == {"Label": "'cat' is not the number of a class"}


def test_a_bom_is_dropped_and_its_bytes_are_kept(tmp_path: Path) -> None:
    bom = "\ufeff".encode()
    members = [("1.jpg", IMAGE), ("1.txt", bom + b"a boat"), ("1.json", bom + b'{"uid": "x"}')]
    (sample,) = read_members(tmp_path, *members)
    assert (sample.caption, sample.metadata, sample.uid) == ("a boat", '{"uid": "x"}', "x")
    assert sample.members == (("txt", bom + b"a boat"), ("json", bom + b'{"uid": "x"}'))


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_texts_as_editors_on_windows_save_them(tmp_path: Path, coding: str) -> None:
    mark = "\ufeff" if coding == "utf-16-be" else ""  # the others write theirs
    texts = {"txt": "a boät\r\n", "cls": "7\r\n", "json": '{"uid": "x"}'}
    files = {name: (mark + text).encode(coding) for name, text in texts.items()}
    (sample,) = read_members(tmp_path, ("1.jpg", IMAGE), *((f"1.{n}", d) for n, d in files.items()))
    assert statuses([sample]) == [None]
    assert (sample.caption, sample.label, sample.uid) == ("a boät\r\n", 7, "x")
    assert dict(sample.members) == files


# Texts that are not UTF-8


def broken(*texts: bytes) -> pa.Array:
    """A column of texts that nobody checked."""
    return pa.array(texts, pa.binary()).view(pa.string())


def test_a_text_that_is_not_utf8_costs_itself_alone(tmp_path: Path) -> None:
    captions = broken(b"a boat", b"caf\xe9", "bär".encode())
    samples = samples_of(tmp_path, caption=captions, name=captions, uid=captions, key=captions)
    assert statuses(samples) == [None] * 3
    assert [s.caption for s in samples] == ["a boat", "caf\ufffd", "bär"]
    told = [("what is not UTF-8 in caption", "the caption has U+FFFD there: write texts in UTF-8")]
    assert [[u for u in s.unused if "U+FFFD" in u[1]] for s in samples] == [[], told, []]
    assert [s.uid for s in samples] == ["a boat", b"caf\xe9".hex(), "bär"]
    assert [s.key for s in samples] == ["a boat", "p-00000001", "bär"]
    assert [json.loads(s.metadata)["name"] for s in samples] == ["a boat", r"caf\xe9", "bär"]
    assert samples[0].members == samples[2].members == ()
    assert dict(samples[1].members) == dict.fromkeys(("caption", "uid", "key"), b"caf\xe9")


CODED = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), CODED], ids=str)
def test_texts_of_other_types_that_are_not_utf8(tmp_path: Path, kind: pa.DataType) -> None:
    texts = broken(b"caf\xe9", b"a")
    column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    samples = samples_of(tmp_path, caption=column)
    assert [s.caption for s in samples] == ["caf\ufffd", "a"]


def test_texts_inside_others_that_are_not_utf8(tmp_path: Path) -> None:
    text = broken(b"caf\xe9")
    columns = {
        "list": pa.ListArray.from_arrays([0, 1], text),
        "struct": pa.StructArray.from_arrays([text, pa.array([b"\xe9"])], ["s", "bytes?"]),
        "map": pa.MapArray.from_arrays([0, 1], pa.array(["a"]), text),
    }
    (sample,) = samples_of(tmp_path, **columns)
    assert json.loads(sample.metadata) == {
        "list": [r"caf\xe9"],
        "struct": {"s": r"caf\xe9"},
        "map": [["a", r"caf\xe9"]],
    }
    assert sample.members == (("struct.bytes?", b"\xe9"),)


def test_an_image_path_that_is_not_utf8(tmp_path: Path) -> None:
    image = pa.StructArray.from_arrays(
        [pa.array([IMAGE]), broken(b"caf\xe9.jpg")], ["bytes", "path"]
    )
    (sample,) = samples_of(tmp_path, image=image)
    assert sample.image == IMAGE
    assert json.loads(sample.metadata)["image"] == {"path": r"caf\xe9.jpg"}
    assert sample.image_name == r"caf\xe9.jpg"


def test_an_empty_caption_gives_way(tmp_path: Path) -> None:
    for document, caption in (
        ({"caption": "", "text": "better"}, "better"),
        ({"caption": "", "text": None}, ""),
    ):
        text = json.dumps(document).encode()
        (sample,) = read_members(tmp_path, ("a.jpg", IMAGE), ("a.json", text))
        assert sample.caption == caption
