"""Reading: layouts as found in the wild, nothing lost, bad samples, limits and digests."""

from __future__ import annotations

import hashlib
import json

import pytest

from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import count_samples, read, scan
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SourceError
from splatshard.schemas.shard import ShardRef
from tests.make import (
    datacomp_tar,
    image_folder,
    image_parquet,
    imagenet_tar,
    jpeg,
    shared_data,
    write_tar,
)
from tests.unit.reading import (
    IMAGE,
    cut,
    end_of_second_sample,
    read_all,
    read_members,
    ref_of,
    statuses,
)

# Layouts


def test_datacomp(tmp_path):
    samples = read_all(datacomp_tar(tmp_path / "a.tar", count=3, start=7))
    assert [s.key for s in samples] == ["000000000007", "000000000008", "000000000009"]
    assert samples[0].uid == f"{7:032x}"
    assert samples[0].caption == "photograph number 7"
    assert samples[0].image == jpeg(seed=7)
    assert samples[0].image_name == "000000000007.jpg"
    assert json.loads(samples[0].metadata)["original_width"] == 64
    assert samples[0].members == ()
    assert statuses(samples) == [None] * 3


def test_resharded_datacomp(tmp_path):
    fields = b'{"uid": "ab", "text": "a boat", "blurred": true}'
    (sample,) = read_members(tmp_path, ("ab-0.webp", IMAGE), ("ab-0.meta.json", fields))
    assert (sample.key, sample.uid, sample.caption) == ("ab-0", "ab", "a boat")
    assert sample.metadata == fields.decode()
    assert sample.members == (("meta.json", fields),)  # its column would not give back the name


def test_imagenet(tmp_path):
    samples = read_all(imagenet_tar(tmp_path / "a.tar", count=12))
    assert [s.label for s in samples] == [*range(10), 0, 1]
    assert all(s.members == () and s.metadata is None for s in samples)


def test_timm_label_in_json(tmp_path):
    (sample,) = read_members(tmp_path, ("1.jpg", IMAGE), ("1.json", b'{"label": 3, "uid": 5}'))
    assert (sample.label, sample.uid) == (3, "5")


def test_clip_benchmark_keeps_npy(tmp_path):
    (sample,) = read_members(tmp_path, ("s0.npy", b"\x93NUMPY"), ("s0.png", IMAGE))
    assert sample.members == (("npy", b"\x93NUMPY"),)
    assert sample.label is None


def test_direct_members_win_over_json(tmp_path):
    fields = b'{"caption": "json", "label": 1}'
    members = [("a.json", fields), ("a.txt", b"txt"), ("a.cls", b"2"), ("a.jpg", IMAGE)]
    (sample,) = read_members(tmp_path, *members)
    assert (sample.caption, sample.label) == ("txt", 2)


def test_json_values_that_do_not_fit_stay_in_metadata(tmp_path):
    fields = rb'{"caption": {"en": "a"}, "label": "cat", "uid": null, "text": "\ud800 b"}'
    (sample,) = read_members(tmp_path, ("1.jpg", IMAGE), ("1.json", fields))
    assert (sample.label, sample.uid) == (None, None)
    assert sample.caption == r"\ud800 b"
    sample.caption.encode()  # Arrow must be able to store it
    assert sample.metadata == fields.decode()


# Nothing lost


def test_inexact_columns_keep_their_bytes(tmp_path):
    members = [("a.jpg", IMAGE), ("a.txt", b"caf\xe9"), ("a.cls", b"07\n")]
    (sample,) = read_members(tmp_path, *members)
    assert (sample.caption, sample.label) == ("caf\ufffd", 7)
    assert sample.members == (("txt", b"caf\xe9"), ("cls", b"07\n"))


def test_every_byte_can_be_given_back(tmp_path):
    members = {
        "jpg": IMAGE,
        "seg.png": b"mask",
        "txt": "ein Bär\n".encode(),
        "cls": b"-3",
        "json": b' {"a": 1} ',
        "npy": b"\0\1",
        "TXT": b"other",
    }
    (sample,) = read_members(tmp_path, *[(f"k.{e}", data) for e, data in members.items()])
    back = dict(sample.members)
    back |= {"txt": sample.caption.encode(), "cls": str(sample.label).encode()}
    back |= {"json": sample.metadata.encode(), "jpg": sample.image}
    assert back == members
    assert {"TXT", "npy", "seg.png"} == dict(sample.members).keys()


@pytest.mark.parametrize("order", [1, -1])
def test_members_that_differ_in_case_alone(tmp_path, order):
    """The lower case is in the fields, whichever comes first, and the other one a member."""
    lower = {"cls": b"1", "json": b'{"a": 1}', "txt": b"a boat"}
    upper = {"CLS": b"2", "JSON": b'{"a": 2}', "TXT": b"a ship"}
    members = [(f"a.{e}", data) for e, data in (lower | upper).items()][::order]
    (sample,) = read_members(tmp_path, ("a.jpg", IMAGE), *members)
    assert (sample.label, sample.metadata, sample.caption) == (1, '{"a": 1}', "a boat")
    assert dict(sample.members) == upper


def test_second_image_becomes_a_member(tmp_path):
    (sample,) = read_members(tmp_path, ("a.PNG", b"png"), ("a.jpg", IMAGE), ("a.webp", b"webp"))
    assert sample.image == IMAGE
    assert sample.members == (("PNG", b"png"), ("webp", b"webp"))


# Bad samples


def test_duplicate_keys_near_and_far(tmp_path):
    members = [("a.jpg", IMAGE), ("a.txt", b"1"), ("a.jpg", IMAGE), ("b.jpg", IMAGE)]
    samples = read_members(tmp_path, *members, ("a.txt", b"3"), ("a.jpg", IMAGE))
    assert [s.key for s in samples] == ["a", "a", "b", "a"]
    assert statuses(samples) == [None, "duplicate_key", None, "duplicate_key"]
    assert samples[3].caption == "3"


@pytest.mark.parametrize("room", [1 << 28, len(IMAGE) + 1])
def test_dots_in_names_of_a_tar(tmp_path, room, monkeypatch):
    monkeypatch.setattr("splatshard.pipeline.source.tar.MAX_SAMPLE_BYTES", room)
    (sample,) = read_members(tmp_path, *((f"IMG.{i:04d}.jpg", IMAGE) for i in range(12)))
    assert sample.error.status == "no_image"
    assert "0009.jpg, ...; a key ends at the first dot" in str(sample.error)


def test_key_without_image(tmp_path):
    samples = read_members(tmp_path, ("a.txt", b"alone"), ("b.jpg", IMAGE), ("README", b"hello"))
    assert statuses(samples) == ["no_image", None, "no_image"]
    assert samples[0].caption == "alone"
    assert "only: txt" in str(samples[0].error)
    assert samples[2].members == (("", b"hello"),)
    assert "only: a file without extension" in str(samples[2].error)


def test_archives_in_an_archive(tmp_path):
    """They may be gigabytes, and do not travel along."""
    samples = read_members(tmp_path, ("n01440764.tar", b"tar"), ("b.jpg", IMAGE), ("c.tgz", b""))
    assert statuses(samples) == ["no_image", None, "no_image"]
    assert "only: tar; an archive in an archive is not read: unpack it" in str(samples[0].error)
    assert samples[0].members == samples[2].members == ()


def test_json_that_is_no_object(tmp_path):
    (sample,) = read_members(tmp_path, ("a.jpg", IMAGE), ("a.json", b"[1]"))
    assert (sample.metadata, sample.error) == ("[1]", None)


def test_oversized_folder_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("splatshard.pipeline.source.read.MAX_SAMPLE_BYTES", 5000)
    (tmp_path / "a.jpg").write_bytes(bytes(6000))
    (tmp_path / "b.jpg").write_bytes(IMAGE)
    (ref,) = list_shards(str(tmp_path))
    assert statuses(list(read(ref, hashlib.sha256()))) == ["too_large", None]


def test_missing_file(tmp_path):
    ref = ShardRef(name="a", kind="tar", urls=(str(tmp_path / "a.tar"),), size_bytes=0, etag="")
    with pytest.raises(SourceError, match="cannot open"):
        next(read(ref, hashlib.sha256()))


# Limit, digest, count, memory


def test_limit_stops_early_and_wants_no_end_marker(tmp_path):
    path = cut(tmp_path, end_of_second_sample(tmp_path) + 700)
    assert [s.key for s in read_all(path, limit=2)] == ["000000000000", "000000000001"]
    with pytest.raises(SourceError):
        read_all(path, limit=3)


def test_limit_beyond_the_end_reads_the_whole(tmp_path):
    path = cut(tmp_path, end_of_second_sample(tmp_path))
    with pytest.raises(SourceError):
        read_all(path, limit=3)
    assert len(read_all(datacomp_tar(tmp_path / "a.tar"), limit=100)) == 4


@pytest.mark.parametrize("make", [datacomp_tar, image_parquet])
def test_digest_is_that_of_the_file(tmp_path, make):
    path = make(tmp_path / ("a.tar" if make is datacomp_tar else "a.parquet"))
    digest = hashlib.sha256()
    list(read(ref_of(path), digest))
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("make", [datacomp_tar, image_parquet])
def test_limited_digest_is_reproducible(tmp_path, make):
    path = make(tmp_path / ("a.tar" if make is datacomp_tar else "a.parquet"), count=20)
    digests = []
    for limit in (5, 5, 19):
        digest = hashlib.sha256()
        list(read(ref_of(path, limit), digest))
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_count_agrees_with_read(tmp_path):
    members = [("a.jpg", IMAGE), ("a.jpg", IMAGE), ("../x.jpg", IMAGE), ("b.txt", b"")]
    odd = write_tar(tmp_path / "odd.tar", [*members, (".hidden", b"")])
    for path in (odd, datacomp_tar(tmp_path / "a.tar"), image_parquet(tmp_path / "a.parquet")):
        assert count_samples(ref_of(path), 1000) == len(read_all(path))
        assert count_samples(ref_of(path), 2) == 2
    cut_in_the_third = cut(tmp_path, end_of_second_sample(tmp_path) + 700)
    assert count_samples(ref_of(cut_in_the_third), 9) == 3


# Folder and real data


def test_folder_with_sidecars(tmp_path):
    root = image_folder(tmp_path / "photos")
    (root / "cat" / "0000.txt").write_text("a cat")
    (root / "cat" / "0001.cls").write_text("9")
    (root / "dog" / "2020.01.02.jpg").write_bytes(IMAGE)
    (ref,) = list_shards(str(root))
    samples = list(read(ref, hashlib.sha256()))
    assert [s.key for s in samples[:3]] == ["cat/0000", "cat/0001", "cat/0002"]
    assert samples[-1].key == "dog/2020.01.02"
    assert [s.label for s in samples] == [0, 9, 0, 1, 1, 1, 1]
    assert samples[0].caption == "a cat"
    assert statuses(samples) == [None] * 7


def test_folder_digest_covers_names_and_bytes(tmp_path):
    def digest() -> str:
        found = hashlib.sha256()
        (ref,) = list_shards(str(root))
        list(read(ref, found))
        return found.hexdigest()

    root = image_folder(tmp_path / "photos")
    first = digest()
    assert digest() == first
    (root / "cat" / "0000.jpg").rename(root / "cat" / "0000a.jpg")
    renamed = digest()
    (root / "cat" / "0001.jpg").write_bytes(IMAGE)
    assert len({first, renamed, digest()}) == 3


def test_real_datacomp_shard():
    path = shared_data("datacomp-sample", "shards", "00000000.tar")
    samples = read_all(path)
    assert len(samples) == 100
    assert all(len(s.uid) == 32 and s.caption.startswith("a photo of") for s in samples)
    assert statuses(samples) == [None] * 100
    for sample in samples:
        assert decode(sample.image, sample.image_name, DecodeConfig()).pixels.shape[0] == 224


def test_real_tiny_imagenet_labels():
    path = shared_data("tiny-imagenet-100", "train-00000-of-00004.parquet")
    samples = read_all(path, limit=100)
    assert all(0 <= s.label < 100 for s in samples)
    assert len({s.label for s in samples}) > 20
    assert decode(samples[0].image, "", DecodeConfig()).original_width == 64


def test_hidden_images_are_rows(tmp_path):
    """Those of macOS are no images, other hidden files are passed over."""
    members = [
        ("a.jpg", IMAGE), ("d/.b.JPG", IMAGE), ("a.txt", b"a boat"), ("._a.jpg", b"mac"),
        (".c.txt", b"x"), ("__MACOSX/.d.jpg", b"mac"), ("e.jpg", IMAGE),
    ]  # fmt: skip
    for name in ("c.heic", "c.dng", "c.jp2"):  # nor do those of formats that are not read
        (sample,) = read_members(tmp_path, (f"d/.{name}", IMAGE))
        assert (sample.key, statuses([sample])) == ("d/.c", ["no_image"])
    hidden, one, two = read_members(tmp_path, *members)
    assert statuses([hidden, one, two]) == ["no_image", None, None]
    assert (hidden.key, str(hidden.error)) == (
        "d/.b", "d/.b.JPG is hidden, since its name begins with a dot: rename it"
    )  # fmt: skip
    assert (one.key, one.caption, two.key) == ("a", "a boat", "e")
    ref = ref_of(tmp_path / "a.tar")
    assert count_samples(ref, 9) == len(list(scan(ref))) == 3


def test_folders_in_a_tar_give_no_labels_and_that_is_told(tmp_path):
    def told(*members: tuple[str, bytes]) -> list[bool]:
        samples = read_members(tmp_path, *members)
        return ["folders in the tar" in dict(sample.unused) for sample in samples]

    assert told(("./cat/a.jpg", IMAGE), ("cat/b.jpg", IMAGE)) == [True, True]
    assert told(("a.jpg", IMAGE), ("./b.jpg", IMAGE)) == [False, False]
    for name, data in (("cls", b"3"), ("txt", b"a cat"), ("json", b"{}")):
        assert told(("cat/a.jpg", IMAGE), (f"cat/a.{name}", data)) == [False]
    assert told(("cat/a.txt", b"x")) == [False]  # which is a row of its own


@pytest.mark.parametrize(
    ("tar", "key", "may_be_a_class"),
    [
        ("n01440764", "n01440764_18", True),
        ("cat", "cat_0001", True),
        ("cat", "0001", False),  # the summary says that there are no labels
        ("cat", "cat/1", False),  # the folders are told
        *((tar, f"{tar}_1", False) for tar in ("train", "val2017", "00000", "images")),
    ],
)
def test_a_tar_for_each_class_is_told(tmp_path, tar, key, may_be_a_class):
    def told(*members: tuple[str, bytes]) -> bool:
        samples = read_all(write_tar(tmp_path / f"{tar}.tar", members))
        return all("the tar's name" in dict(sample.unused) for sample in samples)

    assert told((f"{key}.JPEG", IMAGE), (f"./{key}1.JPEG", IMAGE)) == may_be_a_class
    assert not told((f"{key}.JPEG", IMAGE), (f"{key}.cls", b"1"))


def test_labels_below_0_are_told(tmp_path):
    labels = (-1, 0, -7, 3)
    members = [(f"{i}.{e}", d) for i, label in enumerate(labels) for e, d in label_and_image(label)]
    found = read_all(write_tar(tmp_path / "a.tar", members))
    assert [s.label for s in found] == list(labels)
    told = [dict(s.unused).get("a label below 0", "") for s in found]
    assert [bool(why) for why in told] == [True, False, True, False]
    assert "classes count from 0" in told[0]


def label_and_image(label: int) -> tuple[tuple[str, bytes], ...]:
    return ("cls", str(label).encode()), ("jpg", jpeg())
