"""Reading: layouts as found in the wild, nothing lost, each bad input, and flat memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.decode import decode
from pipeline.read import RawSample, count_samples, read
from pipeline.sources import list_shards
from pipeline.tar import split_name
from schemas.config import DecodeConfig
from schemas.errors import SourceError
from schemas.shard import SKIP_STATUSES, ShardRef
from tests.make import (
    datacomp_tar,
    image_folder,
    image_parquet,
    imagenet_tar,
    jpeg,
    shared_data,
    write_parquet,
    write_tar,
)

IMAGE = jpeg()


def ref_of(path: Path, limit: int | None = None) -> ShardRef:
    kind = path.suffix[1:]
    size = path.stat().st_size
    return ShardRef(
        name=path.stem, kind=kind, urls=(str(path),), size_bytes=size, etag="", limit=limit
    )


def read_all(path: Path, limit: int | None = None) -> list[RawSample]:
    return list(read(ref_of(path, limit), hashlib.sha256()))


def read_members(tmp_path: Path, *members: tuple[str, bytes]) -> list[RawSample]:
    return read_all(write_tar(tmp_path / "a.tar", members))


def statuses(samples: list[RawSample]) -> list[str | None]:
    found = [s.error.status if s.error else None for s in samples]
    assert all(status is None or status in SKIP_STATUSES for status in found)
    return found


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


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.e/a.b.jpg", ("d.e/a", "b.jpg")),
        ("./a.meta.json", ("./a", "meta.json")),
        ("/a.jpg", ("/a", "jpg")),
        ("README", ("README", "")),
    ],
)
def test_key_rule(path, expected):
    assert split_name(path) == expected


def test_json_values_that_do_not_fit_stay_in_metadata(tmp_path):
    fields = rb'{"caption": ["a"], "label": true, "uid": null, "text": "\ud800 b"}'
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
    assert back == members | {"txt": back["txt"]}
    assert {"TXT", "npy", "seg.png"} <= dict(sample.members).keys()


def test_second_image_becomes_a_member(tmp_path):
    (sample,) = read_members(tmp_path, ("a.PNG", b"png"), ("a.jpg", IMAGE), ("a.webp", b"webp"))
    assert sample.image == IMAGE
    assert sample.members == (("PNG", b"png"), ("webp", b"webp"))


def test_names_that_are_not_utf8_can_be_stored(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        info = tarfile.TarInfo("é.jpg")
        info.size = len(IMAGE)
        archive.addfile(info, io.BytesIO(IMAGE))
    (sample,) = read_all(path)
    assert sample.key.encode() == rb"\xe9"


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_folders_links_and_hidden_files_are_passed_over(tmp_path, style):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=style) as archive:
        for name, kind in [("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "d/a.jpg" if kind == tarfile.SYMTYPE else ""
            archive.addfile(info)
        name = "d/" + "a" * (90 if style == tarfile.USTAR_FORMAT else 250)
        for member in ("d/._a.jpg", "__MACOSX/b.jpg", ".DS_Store", f"{name}.jpg"):
            info = tarfile.TarInfo(member)
            info.size, info.mtime = len(IMAGE), 1.5 if style == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(IMAGE))
    (sample,) = read_all(path)
    assert (sample.key, sample.image) == (name, IMAGE)


# Bad samples


def test_duplicate_keys_near_and_far(tmp_path):
    members = [("a.jpg", IMAGE), ("a.txt", b"1"), ("a.jpg", IMAGE), ("b.jpg", IMAGE)]
    samples = read_members(tmp_path, *members, ("a.txt", b"3"), ("a.jpg", IMAGE))
    assert [s.key for s in samples] == ["a", "a", "b", "a"]
    assert statuses(samples) == [None, "duplicate_key", None, "duplicate_key"]
    assert samples[3].caption == "3"


def test_key_without_image(tmp_path):
    samples = read_members(tmp_path, ("a.txt", b"alone"), ("b.jpg", IMAGE), ("README", b"hello"))
    assert statuses(samples) == ["no_image", None, "no_image"]
    assert samples[0].caption == "alone"
    assert "only: txt" in str(samples[0].error)
    assert samples[2].members == (("", b"hello"),)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a/..\\..\\x"])
def test_unsafe_path_is_one_row(tmp_path, path):
    samples = read_members(tmp_path, (f"{path}.jpg", IMAGE), (f"{path}.txt", b""), ("y.jpg", IMAGE))
    assert statuses(samples) == ["unsafe_path", None]
    assert path in str(samples[0].error).replace("\\\\", "\\")
    assert ".." not in samples[0].key  # a tar written from it must be safe, too
    assert not samples[0].key.startswith("/")
    assert samples[0].image == b""


def test_dots_inside_names_are_safe(tmp_path):
    samples = read_members(tmp_path, ("a/b..c/x.jpg", IMAGE), ("a..d/y.jpg", IMAGE))
    assert statuses(samples) == [None, None]


@pytest.mark.parametrize(
    "member",
    [
        ("a.cls", b"cat"),
        ("a.cls", b""),
        ("a.cls", b"1" * 40),
        ("a.json", b'{"cut": '),
        ("a.json", b"\xff\xfe"),
        ("a.json", b"[" * 100_000),
    ],
    ids=lambda member: f"{member[0]}-{len(member[1])}",
)
def test_bad_metadata_keeps_its_bytes(tmp_path, member):
    samples = read_members(tmp_path, ("a.jpg", IMAGE), member, ("b.jpg", IMAGE))
    assert statuses(samples) == ["bad_metadata", None]
    assert samples[0].members == ((member[0][2:], member[1]),)


def test_json_that_is_no_object(tmp_path):
    (sample,) = read_members(tmp_path, ("a.jpg", IMAGE), ("a.json", b"[1]"))
    assert (sample.metadata, sample.error) == ("[1]", None)


def test_oversized_sample_is_skipped_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.tar.MAX_SAMPLE_BYTES", 5000)
    samples = read_members(tmp_path, ("a.jpg", bytes(6000)), ("b.jpg", IMAGE))
    assert statuses(samples) == ["too_large", None]
    assert samples[0].image == b""


def test_oversized_folder_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.read.MAX_SAMPLE_BYTES", 5000)
    (tmp_path / "a.jpg").write_bytes(bytes(6000))
    (tmp_path / "b.jpg").write_bytes(IMAGE)
    (ref,) = list_shards(str(tmp_path))
    assert statuses(list(read(ref, hashlib.sha256()))) == ["too_large", None]


# Bad archives


def cut(tmp_path: Path, size: int) -> Path:
    whole = datacomp_tar(tmp_path / "whole.tar").read_bytes()
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[:size])
    return path


def end_of_second_sample(tmp_path: Path) -> int:
    with tarfile.open(datacomp_tar(tmp_path / "whole.tar")) as archive:
        return archive.getmembers()[6].offset


def test_cut_inside_a_member(tmp_path):
    end = end_of_second_sample(tmp_path)
    with pytest.raises(SourceError, match=rf"cut.tar.*byte {end + 700}; download it again"):
        read_all(cut(tmp_path, end + 700))


def test_cut_inside_a_header(tmp_path):
    end = end_of_second_sample(tmp_path)
    with pytest.raises(SourceError, match=rf"cut.tar.*{end + 100}.*header; download it again"):
        read_all(cut(tmp_path, end + 100))


@pytest.mark.parametrize("zeros", [0, 512])
def test_cut_at_a_member_boundary(tmp_path, zeros):
    end = end_of_second_sample(tmp_path)
    path = cut(tmp_path, end)
    path.write_bytes(path.read_bytes() + bytes(zeros))
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 6  # tarfile finds nothing wrong
    with pytest.raises(SourceError, match=rf"byte {end + zeros} without the end-of-archive"):
        read_all(path)


def test_every_cut_is_noticed(tmp_path):
    whole = imagenet_tar(tmp_path / "whole.tar", count=2).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        archive.getmembers()
        end = archive.offset
    path = tmp_path / "cut.tar"
    for size in range(0, end + 1024, 101):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"cut\.tar"):
            read_all(path)
    path.write_bytes(whole[: end + 1024])
    assert len(read_all(path)) == 2


def test_damaged_header_inside(tmp_path):
    end = end_of_second_sample(tmp_path)
    path = tmp_path / "whole.tar"
    whole = bytearray(path.read_bytes())
    whole[end + 150] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(SourceError, match=f"damaged header or a second archive from byte {end}"):
        read_all(path)


def test_second_archive_behind_the_first(tmp_path):
    one = imagenet_tar(tmp_path / "one.tar").read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    with pytest.raises(SourceError, match="second archive"):
        read_all(tmp_path / "two.tar")


def test_empty_archive_has_no_samples(tmp_path):
    assert read_all(write_tar(tmp_path / "a.tar", [])) == []


def test_zero_byte_file(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(SourceError, match=r"a\.tar has zero bytes; download it again"):
        read_all(tmp_path / "a.tar")


def test_not_a_tar(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(SourceError, match="begins with b'<html>40'"):
        read_all(path)
    path.write_bytes(gzip.compress(imagenet_tar(tmp_path / "b.tar").read_bytes()))
    with pytest.raises(SourceError, match="must not be compressed"):
        read_all(path)


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


def test_memory_does_not_grow_with_the_shard(tmp_path):
    block = bytes(range(256)) * 1024
    big = write_tar(tmp_path / "big.tar", ((f"{i}.jpg", block) for i in range(128)))  # 32 MB
    many = write_tar(tmp_path / "many.tar", ((f"{i}.jpg", b"x") for i in range(4000)))
    for path in (big, many):
        tracemalloc.start()
        count = sum(1 for _ in read(ref_of(path), hashlib.sha256()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count in (128, 4000)
        assert peak < 2e6  # 3 MB if tarfile may keep its 4000 headers


# Parquet


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
