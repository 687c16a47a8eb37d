"""Members beside an image, in tars and folders: what they are by name and value, and what is told
of those that are nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from splatshard.pipeline.source.listing import list_source
from splatshard.pipeline.source.read import RawSample, read, scan
from tests.make import write_tar
from tests.unit.reading import IMAGE, read_all, read_members, statuses

NO_FIELD = "no field takes such a member, so it is kept as bytes"


def one(tmp_path: Path, *members: tuple[str, bytes]) -> RawSample:
    """The sample of `a.jpg` and these members, the same in a tar and in a folder."""
    files = [("a.jpg", IMAGE), *members]
    (sample,) = read_members(tmp_path, *files)
    shutil.rmtree(tmp_path / "folder", ignore_errors=True)
    (tmp_path / "folder").mkdir()
    for name, data in files:
        (tmp_path / "folder" / name).write_bytes(data)
    found = list_source(str(tmp_path / "folder"))
    assert found.left_out == {}
    (again,) = read(found.refs[0], hashlib.sha256())
    (scanned,) = scan(found.refs[0])
    for other in (again, scanned):
        for field in ("caption", "label", "uid", "metadata", "unused"):
            assert getattr(other, field) == getattr(sample, field)
    assert dict(again.members) == dict(sample.members)
    return sample


@pytest.mark.parametrize("name", ["txt", "caption", "text", "cap", "captions", "Cap", "jpg.txt"])
def test_captions(tmp_path: Path, name: str) -> None:
    sample = one(tmp_path, (f"a.{name}", b"a boat"))
    assert (sample.caption, sample.unused, sample.error) == ("a boat", (), None)
    assert sample.members == (() if name == "txt" else ((name, b"a boat"),))


@pytest.mark.parametrize("name", ["cls", "label", "class", "jpg.cls"])
def test_labels(tmp_path: Path, name: str) -> None:
    sample = one(tmp_path, (f"a.{name}", b"7"))
    assert (sample.label, sample.unused, sample.error) == (7, (), None)
    assert sample.members == (() if name == "cls" else ((name, b"7"),))


@pytest.mark.parametrize("data", [b"\x93NUMPY\1\0v\0", "a boat".encode("utf-16-le")])
def test_bytes_that_are_no_text_are_no_caption(tmp_path: Path, data: bytes) -> None:
    sample = one(tmp_path, ("a.captions", data))
    assert (sample.caption, sample.error, dict(sample.members)) == (None, None, {"captions": data})
    assert sample.unused == ((".captions", "it has zero bytes, so it is no text in UTF-8"),)


YOLO = [
    b"0 0.5 0.5 0.1 0.2\n3 0.1 .2 1 1e-05\n",
    b"15 0.1 0.1 0.9 0.1 0.9 0.9\r\n",
    b"7 0.512500 0.498611 0.975000 0.997222 0.93",
    b"Car 0.00 0 -1.57 599.41 156.40 629.75 189.25 2.85 2.63 12.34 0.47 1.49 69.44 -1.56\n",
    b"10.0 20.0 30.0 20.0 30.0 40.0 10.0 40.0 plane 0\n1.0 2.0 3.0 2.0 3.0 4.0 1.0 4.0 ship 1\n",
    b"377,117,463,117,465,130,378,130,Genaxis Theatre\r\n374,155,409,155,409,170,374,170,###\n",
    b"0\t0.5\t0.5\t0.1\t0.2\n\n",
    b"car 0.5 0.5 0.2 0.1\n",
]


@pytest.mark.parametrize("data", YOLO)
def test_boxes_are_no_caption(tmp_path: Path, data: bytes) -> None:
    sample = one(tmp_path, ("a.txt", data))
    assert (sample.caption, sample.error, sample.members) == (None, None, (("txt", data),))
    why = "it lists boxes of objects, and is no caption"
    assert sample.unused == ((".txt", why),)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"3", b"1 2 3 4", b"0 1 2 3 4 go", b"1 2 3 4 5\na boat", b"v1.5 1 2 3"),
        *(b"1, 2, 3, 4, 5, once I caught a fish alive", b"in 1914, 1915, 1916 and 1917"),
    ],
)
def test_captions_with_numbers(tmp_path: Path, data: bytes) -> None:
    sample = one(tmp_path, ("a.txt", data))
    assert (sample.caption, sample.unused) == (data.decode(), ())


def test_captions_of_the_json_beside_others(tmp_path: Path) -> None:
    """An empty text goes behind the JSON; where both say something, the JSON's is told."""
    for text in (b"", b" \n"):
        sample = one(tmp_path, ("a.txt", text), ("a.json", b'{"caption": "real"}'))
        assert (sample.caption, sample.unused) == ("real", ())
    why = "another caption is taken, see docs/sources.md for the order"
    sample = one(tmp_path, ("a.txt", b"one\n"), ("a.json", b'{"caption": "two", "text": "one"}'))
    assert (sample.caption, sample.unused) == ("one\n", (("caption", why),))
    sample = one(tmp_path, ("a.json", b'{"caption": "a", "text": "b", "captions": ["a"]}'))
    assert (sample.caption, sample.unused) == ("a", (("text", why),))
    sample = one(tmp_path, ("a.txt", b"a"), ("a.json", b'{"caption": null, "text": ""}'))
    assert (sample.caption, sample.unused) == ("a", ())


JSON_CAPTIONS = [
    (["a cat", "kitty"], "a cat\nkitty"),
    ("a cat", "a cat"),
    ("[sic] a cat", "[sic] a cat"),
    (json.dumps({"caption": "a cat"}), "a cat"),
    (json.dumps(["a", "b"]), "a\nb"),
    ({"captions": json.dumps(["a", "b"])}, "a\nb"),
    ({"caption": '["a", 1]'}, '["a", 1]'),
    ({"caption": '["a"], he said'}, '["a"], he said'),
]


@pytest.mark.parametrize(("document", "caption"), JSON_CAPTIONS)
def test_json_by_its_value(tmp_path: Path, document: object, caption: str) -> None:
    """A list of texts and a bare one are captions, in whatever way they are written."""
    text = json.dumps(document)
    sample = one(tmp_path, ("a.json", text.encode()))
    assert (sample.caption, sample.metadata, sample.unused) == (caption, text, ())


@pytest.mark.parametrize("document", [7, True, [1, 2], ["a", 1], "[3]", [[]]])
def test_json_without_names_is_told(tmp_path: Path, document: object) -> None:
    sample = one(tmp_path, ("a.json", json.dumps(document).encode()))
    ((name, why),) = sample.unused
    assert (sample.caption, sample.label, name) == (None, None, "the JSON")
    assert why.endswith(", without names for caption or label")
    assert one(tmp_path, ("a.json", b"5"), ("a.cls", b"1")).unused == ()
    for nothing in (b"null", b"[]", b'""', b"{}"):
        assert one(tmp_path, ("a.json", nothing)).unused == ()


def test_captions_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    sample = one(tmp_path, ("a.txt", b"caf\xe9"))
    assert (sample.caption, sample.members) == ("caf\ufffd", (("txt", b"caf\xe9"),))
    why = "the caption has U+FFFD there: write texts in UTF-8"
    assert sample.unused == (("what is not UTF-8 in .txt", why),)
    assert one(tmp_path, ("a.txt", "caf\xe9".encode("utf-16"))).unused == ()
    assert one(tmp_path, ("a.txt", "caf\ufffd".encode())).unused == ()  # it says so


THUMB = ("b/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", IMAGE)


def test_images_of_a_system_in_a_tar_are_told(tmp_path: Path) -> None:
    """Before, between and behind samples: each is counted once."""
    odd = [
        THUMB,
        ("lost+found/x.heic", IMAGE),
        ("#recycle/old.png", IMAGE),
        ("__MACOSX/c.jpg", b""),
    ]
    quiet = [("__MACOSX/._a.jpg", b""), ("@eaDir/a.txt", b""), ("b/._a.dng", b"")]
    members = [odd[0], *quiet, ("b/a.jpg", IMAGE), ("b/a.txt", b""), odd[1], ("c.txt", b"")]
    one, two = read_members(tmp_path, *members, *odd[2:], odd[0])
    assert (one.key, two.key, statuses([one, two])) == ("b/a", "c", [None, "no_image"])
    said = Counter(name for sample in (one, two) for name, _ in sample.unused)
    assert said == {
        "an image in @eaDir": 2,
        "an image in lost+found": 1,
        "an image in #recycle": 1,
        "an image in __MACOSX": 1,
    }
    assert "move what is wanted out of it" in one.unused[0][1]


def test_a_tar_of_a_systems_images_alone_is_a_row(tmp_path: Path) -> None:
    (sample,) = read_members(tmp_path, THUMB, ("#recycle/a.jpg", IMAGE))
    assert (sample.key, statuses([sample])) == ("b/@eaDir/a.jpg/SYNOPHOTO_THUMB_M", ["no_image"])
    assert "only an image in @eaDir, an image in #recycle: systems keep" in str(sample.error)
    assert [name for name, _ in sample.unused] == ["an image in @eaDir", "an image in #recycle"]


def test_what_is_long_is_no_label(tmp_path: Path) -> None:
    sample = one(tmp_path, ("a.label", b"7" + b" " * 300))
    assert (sample.label, [name for name, _ in sample.unused]) == (None, [".label"])


@pytest.mark.parametrize("name", ["cls", "label", "jpg.class"])
def test_a_label_that_is_no_number_costs_itself_alone(tmp_path: Path, name: str) -> None:
    """As in a column of Parquet."""
    sample = one(tmp_path, (f"a.{name}", b"cat"), ("a.txt", b"a boat"))
    assert (sample.image, sample.error, sample.label) == (IMAGE, None, None)
    assert (sample.caption, sample.members) == ("a boat", ((name, b"cat"),))
    assert sample.unused == ((f".{name}", "'cat' is not the number of a class"),)


def test_of_several_the_first_by_name_is_taken(tmp_path: Path) -> None:
    captions = [("a.cap", b"1"), ("a.jpg.txt", b"2"), ("a.text", b"3"), ("a.caption", b"4")]
    labels = [("a.class", b"1"), ("a.label", b"2")]
    sample = one(tmp_path, *captions, *labels)
    assert (sample.caption, sample.label) == ("2", 2)
    taken = "the caption is taken from .jpg.txt"
    assert dict(sample.unused) == {
        ".caption": taken,
        ".text": taken,
        ".cap": taken,
        ".class": "the label is taken from .label",
    }
    sample = one(tmp_path, *captions, *labels, ("a.txt", b"0"), ("a.cls", b"x"))
    assert (sample.caption, sample.label) == ("0", 2)  # .cls says nothing
    assert dict(sample.unused)[".cls"] == "'x' is not the number of a class"


def test_the_same_twice_is_not_told(tmp_path: Path) -> None:
    same = [("a.txt", b"a boat"), ("a.caption", b"a boat"), ("a.cls", b"7"), ("a.label", b"7\n")]
    assert one(tmp_path, *same).unused == ()


def test_known_companions_are_not_told(tmp_path: Path) -> None:
    """What img2dataset and webdataset write."""
    fields = b'{"caption": "a", "url": "x", "__url__": "a.tar", "status": "success", "uid": "u"}'
    sample = one(tmp_path, ("a.txt", b"a"), ("a.json", fields))
    assert (sample.caption, sample.uid, sample.unused) == ("a", "u", ())


@pytest.mark.parametrize(
    "damaged", [b'{"cut": ', b"\xff\xfe", b"[" * 100_000], ids=["cut", "utf16", "deep"]
)
def test_json_that_cannot_be_parsed_costs_itself_alone(tmp_path: Path, damaged: bytes) -> None:
    sample = one(tmp_path, ("a.json", damaged), ("a.txt", b"a boat"))
    assert (sample.image, sample.error, sample.metadata) == (IMAGE, None, None)
    assert (sample.caption, sample.members) == ("a boat", (("json", damaged),))
    ((name, why),) = sample.unused
    assert (name, why.startswith("it cannot be parsed: ")) == (".json", True)


def test_members_without_a_field_are_told(tmp_path: Path) -> None:
    members = [("a.npy", b"\x93NUMPY"), ("a.seg.png", b"mask"), ("a.png", b"other")]
    (sample,) = read_members(tmp_path, ("a.jpg", IMAGE), *members)
    assert dict(sample.unused) == {
        ".npy": NO_FIELD,
        ".seg.png": NO_FIELD,
        ".png": "the image is taken from .jpg",
    }
    assert [name for name, _ in sample.members] == ["npy", "seg.png", "png"]
    (sample,) = read_members(tmp_path, ("readme.md", b"hello"))
    assert (statuses([sample]), sample.unused) == (["no_image"], ())  # which says it


# Names after the image's whole name, in folders


def put(folder: Path, **files: bytes) -> list[RawSample]:
    for name, data in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (ref,) = list_source(str(folder)).refs
    return list(read(ref, hashlib.sha256()))


def test_files_named_after_the_whole_name(tmp_path: Path) -> None:
    files = {"a.jpg": IMAGE, "a.jpg.txt": b"of a", "a.jpg.json": b'{"uid": "u"}', "b.PNG": b"png",
             "b.PNG.caption": b"of b", "c.jpg": IMAGE, "c.txt": b"of c"}  # fmt: skip
    samples = put(tmp_path / "in", **files)
    assert [s.key for s in samples] == ["a", "b", "c"]
    assert [s.caption for s in samples] == ["of a", "of b", "of c"]
    assert samples[0].uid == "u"
    assert [s.image_name for s in samples] == ["a.jpg", "b.PNG", "c.jpg"]


def test_each_image_of_a_stem_has_its_own(tmp_path: Path) -> None:
    files = {"a.jpg": IMAGE, "a.png": b"png", "a.jpg.txt": b"jpg", "a.png.txt": b"png"}
    samples = put(tmp_path / "in", **files, **{"a.cls": b"3"})
    assert [(s.key, s.caption, s.label) for s in samples] == [
        ("a.jpg", "jpg", 3),
        ("a.png", "png", 3),
    ]
    assert all(s.unused == () for s in samples)


def test_an_image_of_that_stem_goes_before(tmp_path: Path) -> None:
    samples = put(tmp_path / "in", **{"a.jpg": IMAGE, "a.jpg.jpg": IMAGE, "a.jpg.txt": b"x"})
    assert [(s.key, s.caption) for s in samples] == [("a", None), ("a.jpg", "x")]


def test_one_without_its_image_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGE)
    (tmp_path / "b.jpg.txt").write_bytes(b"x")
    assert list_source(str(tmp_path)).left_out == {"no_image": {"txt": 1}}


def test_the_digest_covers_them(tmp_path: Path) -> None:
    digests = set()
    for name, text in (("a.txt", b"x"), ("a.jpg.txt", b"x"), ("a.jpg.txt", b"y")):
        folder = tmp_path / f"{name}{text!r}"
        folder.mkdir()
        (folder / "a.jpg").write_bytes(IMAGE)
        (folder / name).write_bytes(text)
        digest = hashlib.sha256()
        (ref,) = list_source(str(folder)).refs
        list(read(ref, digest))
        digests.add(digest.hexdigest())
    assert len(digests) == 3


def test_a_limit_tells_the_same(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", IMAGE), ("a.npy", b"1"), ("b.jpg", IMAGE)])
    assert read_all(path, limit=1)[0].unused == ((".npy", NO_FIELD),)
