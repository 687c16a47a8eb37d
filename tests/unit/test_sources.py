"""What SRC means: every form of it, names, labels, limits, and what cannot be meant."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.schemas.errors import SourceError, UnavailableError, UsageError
from splatshard.schemas.shard import ShardRef
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


def names(refs: list[ShardRef]) -> list[str]:
    return [ref.name for ref in refs]


def keys(refs: list[ShardRef]) -> list[str]:
    return [sample.key for ref in refs for sample in read(ref, hashlib.sha256())]


@pytest.fixture
def shards(tmp_path) -> Path:
    """Four DataComp shards of 4, 4, 3 and 4 samples, with img2dataset's files beside them."""
    folder = tmp_path / "data" / "shards"
    for i, count in enumerate((4, 4, 3, 4)):
        datacomp_tar(folder / f"{i:08d}.tar", count, start=10 * i)
        write_parquet(folder / f"{i:08d}.parquet", {"url": ["x"], "key": ["1"]})
        (folder / f"{i:08d}_stats.json").write_text("{}")
    return folder


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system in memory, standing for any remote one."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_one_tar(shards):
    path = shards / "00000001.tar"
    (ref,) = list_shards(str(path))
    assert ref == ShardRef(
        name="00000001",
        kind="tar",
        urls=(str(path),),
        size_bytes=path.stat().st_size,
        etag=ref.etag,
    )
    assert ref.etag
    os.utime(path, (1, 1))
    assert list_shards(str(path))[0].etag != ref.etag


@pytest.mark.parametrize(
    ("src", "numbers"),
    [
        ("{00000000..00000003}.tar", [0, 1, 2, 3]),
        ("{00000002,00000000}.tar", [2, 0]),
        ("*.tar", [0, 1, 2, 3]),
        ("*", [0, 1, 2, 3]),
        ("0000000[12].tar", [1, 2]),
        ("0000000{0,3}.t*", [0, 3]),
        ("", [0, 1, 2, 3]),
        ("../", [0, 1, 2, 3]),
        ("../..", [0, 1, 2, 3]),
        ("00000003.tar::{shards}/00000000.tar", [3, 0]),
    ],
)
def test_forms_of_src(shards, src, numbers):
    refs = list_shards(f"{shards}/{src.replace('{shards}', str(shards))}")
    assert names(refs) == [f"{n:08d}" for n in numbers]
    assert [ref.urls for ref in refs] == [(str(shards / f"{n:08d}.tar"),) for n in numbers]


def test_many_neighbours_are_found_by_one_listing(tmp_path):
    for i in range(12):
        write_tar(tmp_path / f"{i:02d}.tar", [])
    refs = list_shards(f"{tmp_path}/{{00..11}}.tar")
    assert [r.urls[0] for r in refs] == [f"{tmp_path}/{i:02d}.tar" for i in range(12)]
    assert refs[3] == list_shards(f"{tmp_path}/03.tar")[0]
    with pytest.raises(UsageError, match=r"3 of 15 places: \S+12.tar, \S+13.tar, \S+14.tar;"):
        list_shards(f"{tmp_path}/{{00..14}}.tar")


def test_relative_paths_become_absolute(shards, monkeypatch):
    monkeypatch.chdir(shards.parent)
    assert list_shards("shards/00000000.tar")[0].urls == (str(shards / "00000000.tar"),)
    assert names(list_shards(".")) == [f"{n:08d}" for n in range(4)]


def test_list_file(shards):
    text = "# comment\n\nshards/0000000{0,1}.tar  # two\n" + f"{shards}/00000003.tar\n"
    (shards.parent / "list.txt").write_text(text)
    assert names(list_shards(f"{shards.parent}/list.txt")) == ["00000000", "00000001", "00000003"]


def test_list_file_that_says_nothing_useful(tmp_path):
    path = tmp_path / "list.txt"
    with pytest.raises(UsageError, match="no such list file"):
        list_shards(str(path))
    path.write_text("# nothing\n")
    with pytest.raises(UsageError, match="names no source"):
        list_shards(str(path))
    path.write_text("list.txt\n")
    with pytest.raises(UsageError, match="cannot name another list"):
        list_shards(str(path))
    path.write_text("absent.tar\n")
    with pytest.raises(UsageError, match=f"{tmp_path}/absent.tar"):
        list_shards(str(path))


def test_names_with_pattern_characters_are_taken_literally(tmp_path):
    write_tar(tmp_path / "[a] {1..2}" / "b.tar", [])
    assert names(list_shards(f"{tmp_path}/[a] {{1..2}}/b.tar")) == ["b"]
    assert names(list_shards(f"{tmp_path}/[a] {{1..2}}")) == ["b"]


# Nothing to be found


@pytest.mark.parametrize(
    "src", ["nothing", "nothing.tar", "nothing.parquet", "no*.tar", "no/thing/*.tar", "{0..2}.tar"]
)
def test_src_that_matches_nothing_is_named(tmp_path, src):
    with pytest.raises(UsageError, match="matches nothing") as caught:
        list_shards(f"{tmp_path}/{src}")
    assert f"{tmp_path}/{src}" in str(caught.value)


@pytest.mark.parametrize("src", ["", " ", "a.tar::"])
def test_empty_src(src):
    with pytest.raises(UsageError, match="SRC is empty"):
        list_shards(src)


def test_missing_files_of_a_brace_pattern(shards):
    with pytest.raises(UsageError, match=r"at 6 of 10 places: \S+04.tar, \S+05.tar, \S+06.tar, "):
        list_shards(f"{shards}/{{00000000..00000009}}.tar")


def test_unbalanced_braces(tmp_path):
    with pytest.raises(UsageError, match="unbalanced braces"):
        list_shards(f"{tmp_path}/{{0..3.tar")


@pytest.mark.parametrize("end", [".tar.gz", ".tgz", ".tar.zst", ".zip"])
def test_compressed_archives_are_refused(tmp_path, end):
    (tmp_path / f"a{end}").write_bytes(b"x")
    for src in (f"a{end}", "", "a*"):
        with pytest.raises(UsageError, match=rf"a{end}: compressed.*unpack"):
            list_shards(f"{tmp_path}/{src}")


def test_folder_and_glob_without_anything_usable(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UsageError, match="no images in it"):
        list_shards(str(tmp_path))
    with pytest.raises(UsageError, match="matches 1 files, but no"):
        list_shards(f"{tmp_path}/*.md")
    with pytest.raises(UsageError, match="give one of these"):
        list_shards(f"{tmp_path}/notes.md")


def test_two_shards_of_one_name(tmp_path):
    for part in ("train", "val"):
        write_tar(tmp_path / part / "0.tar", [])
    message = "train/0.tar and .*val/0.tar would both become shard 0: rename"
    with pytest.raises(UsageError, match=message):
        list_shards(str(tmp_path))
    with pytest.raises(UsageError, match=message):
        list_shards(f"{tmp_path}/train/0.tar::{tmp_path}/val/0.tar")


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -5}, {"samples_per_shard": 0}])
def test_absurd_numbers(shards, options):
    with pytest.raises(UsageError, match="must be 1 or more"):
        list_shards(str(shards), **options)


# Parquet


def test_parquet_shards(tmp_path):
    for i in range(3):
        image_parquet(tmp_path / "data" / f"train-0000{i}-of-00003.parquet", count=5)
    refs = list_shards(str(tmp_path), limit=7)
    assert [(r.name, r.kind, r.limit) for r in refs] == [
        ("train-00000-of-00003", "parquet", None),
        ("train-00001-of-00003", "parquet", 2),
    ]


def test_parquet_without_images(shards, tmp_path):
    path = shards / "00000000.parquet"
    with pytest.raises(UsageError, match=r"00000000.parquet has no image column.*img2dataset"):
        list_shards(str(path))
    with pytest.raises(UsageError, match="matches 4 files, but no"):
        list_shards(f"{shards}/*.parquet")
    (shards / "00000003.tar").unlink()  # its metadata stays behind
    assert names(list_shards(str(shards))) == ["00000000", "00000001", "00000002"]


def test_tar_is_meant_where_an_image_parquet_has_its_stem(shards):
    image_parquet(shards / "00000002.parquet")
    for src in (shards, f"{shards}/*"):
        assert [ref.kind for ref in list_shards(str(src))] == ["tar"] * 4


def test_damaged_parquet_is_left_to_fail_in_its_turn(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"garbage")
    image_parquet(tmp_path / "b.parquet")
    assert names(list_shards(str(tmp_path))) == ["a", "b"]
    assert names(list_shards(str(tmp_path), limit=1)) == ["a", "b"]


# Limit


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [1]),
        (4, [None]),
        (5, [None, 1]),
        (8, [None, None]),
        (10, [None, None, 2]),
        (15, [None] * 4),
        (99, [None] * 4),
    ],
)
def test_limit_takes_the_first_samples(shards, limit, expected):
    refs = list_shards(str(shards), limit=limit)
    assert [ref.limit for ref in refs] == expected
    assert keys(refs) == keys(list_shards(str(shards)))[:limit]


def test_limit_ends_before_damage_that_it_does_not_need(shards):
    path = shards / "00000001.tar"
    path.write_bytes(path.read_bytes()[:8000])
    assert [ref.limit for ref in list_shards(str(shards), limit=5)] == [None, 1]


# Folders of images


def test_folder_is_cut_by_sorted_path(tmp_path):
    root = image_folder(tmp_path / "photos", ("b", "a"), per_class=3)
    refs = list_shards(str(root), samples_per_shard=4)
    assert names(refs) == ["photos-00000", "photos-00001"]
    assert [len(ref.urls) for ref in refs] == [4, 2]
    assert keys(refs) == [f"{c}/000{i}" for c in "ab" for i in range(3)]
    assert {ref.root for ref in refs} == {str(root)}
    assert refs[0].size_bytes == sum(Path(u).stat().st_size for u in refs[0].urls)


def test_folder_labels_only_when_all_images_are_in_folders(tmp_path):
    root = image_folder(tmp_path / "photos", ("dog", "cat"))
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "deep" / "a.jpg").write_bytes(jpeg())
    (root / "empty").mkdir()
    (ref,) = list_shards(str(root))
    assert ref.labels == ("cat", "dog")
    assert [s.label for s in read(ref, hashlib.sha256())] == [0, 0, 0, 0, 1, 1, 1]
    (root / "top.jpg").write_bytes(jpeg())
    assert list_shards(str(root))[0].labels == ()


def test_sidecars_join_and_everything_else_is_left(tmp_path):
    for name in ("b.JPG", "a.png", "a.txt", "a.json", "c.txt", "notes.md", "a-b.jpg", ".x.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "z.jpg").write_bytes(b"x")
    refs = list_shards(str(tmp_path), samples_per_shard=2)
    found = [[Path(u).name for u in ref.urls] for ref in refs]
    assert found == [["a.json", "a.png", "a.txt", "a-b.jpg"], ["b.JPG"]]
    assert keys(refs) == ["a", "a-b", "b"]


def test_folder_limit(tmp_path):
    root = image_folder(tmp_path / "photos", per_class=4)
    refs = list_shards(str(root), limit=6, samples_per_shard=4)
    assert [ref.limit for ref in refs] == [None, 2]
    assert len(keys(refs)) == 6


def test_folder_identity_follows_its_files(tmp_path):
    root = image_folder(tmp_path / "photos")
    first = list_shards(str(root))
    assert list_shards(str(root)) == first
    os.utime(root / "cat" / "0000.jpg", (1, 1))
    second = list_shards(str(root))
    assert first[0].etag != second[0].etag
    (root / "cat" / "0000.jpg").rename(root / "cat" / "0009.jpg")
    assert list_shards(str(root))[0].etag not in (first[0].etag, second[0].etag)


def test_links_are_followed(tmp_path):
    blob = imagenet_tar(tmp_path / "blobs" / "abc")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "train.tar").symlink_to(blob)
    (ref,) = list_shards(str(folder))
    assert ref == list_shards(f"{folder}/train.tar")[0]
    assert ref.size_bytes == blob.stat().st_size


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    root = image_folder(tmp_path / "photos", ("cat", "dog"), per_class=2)
    image_folder(tmp_path / "elsewhere", ("owl",), per_class=2)
    (root / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    (root / "dog" / "again").symlink_to(root)
    (ref,) = list_shards(str(root))
    assert keys([ref]) == [f"{c}/000{i}" for c in ("cat", "dog", "owl") for i in range(2)]
    assert ref.labels == ("cat", "dog", "owl")
    for part in ("a", "b"):
        imagenet_tar(tmp_path / "tars" / part / f"{part}.tar")
    (tmp_path / "tars" / "c").symlink_to(imagenet_tar(tmp_path / "far" / "c.tar").parent)
    for pattern in ("", "/*/*.tar", "/**/*.tar"):
        assert names(list_shards(f"{tmp_path}/tars{pattern}")) == ["a", "b", "c"]


@pytest.mark.parametrize("link", ["cat/0009.jpg", "owl", "loop"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path, link):
    root = image_folder(tmp_path / "photos")
    (root / ".hidden").symlink_to(tmp_path / "nothing")
    assert len(list_shards(str(root))) == 1
    (root / link).symlink_to(root / "loop")
    with pytest.raises(
        SourceError, match=rf"{root}/{link}: .*fetch .* missing, or delete the link"
    ):
        list_shards(str(root))


def test_a_pattern_meets_only_links_on_its_way(tmp_path):
    for part in ("a", "b"):
        imagenet_tar(tmp_path / part / f"{part}.tar")
    (tmp_path / "a" / "gone.tar").symlink_to(tmp_path / "nothing")
    assert names(list_shards(f"{tmp_path}/b*/*.tar")) == ["b"]
    for pattern in ("*/*.tar", "**/*.tar", "a/*"):
        with pytest.raises(SourceError, match=r"a/gone\.tar"):
            list_shards(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("pattern", ["", "/*/*.tar", "/**/*.tar"])
@pytest.mark.parametrize(
    ("number", "error"), [(errno.EIO, SourceError), (errno.ESTALE, UnavailableError)]
)
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, pattern, number, error):
    for part in ("a", "b", ".b"):
        imagenet_tar(tmp_path / part / f"{part.strip('.')}.tar")
    scandir = os.scandir

    def broken(path: str) -> Any:
        if Path(path).name in ("b", ".b"):
            raise OSError(number, os.strerror(number))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(error, match=rf"cannot read {tmp_path}/\.?b: {os.strerror(number)}"):
        list_shards(f"{tmp_path}{pattern}")
    assert names(list_shards(f"{tmp_path}/[a]/*.tar")) == ["a"]


def test_a_pattern_looks_no_deeper_than_it_goes(tmp_path, monkeypatch):
    for place in ("x/1.tar", "x/deep/2.tar", "y/3.tar", "y/deep/er/4.tar"):
        imagenet_tar(tmp_path / place)
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(str(path)) or scandir(path))

    def listed(pattern: str) -> tuple[list[str], list[str]]:
        looked.clear()
        found = names(list_shards(f"{tmp_path}/{pattern}"))
        return found, sorted(os.path.relpath(folder, tmp_path) for folder in looked)

    assert listed("x/*.tar") == (["1"], ["x"])
    assert listed("x/*") == (["1"], ["x"])
    assert listed("*/*.tar") == (["1", "3"], [".", "x", "y"])
    assert listed("x*/*/*.tar") == (["2"], [".", "x", "x/deep"])
    assert listed("y/**/*.tar") == (["3", "4"], ["y", "y/deep", "y/deep/er"])
    with pytest.raises(UsageError, match=r"\*\*"):
        list_shards(f"{tmp_path}/x**.tar")


# A destination that is apart


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ("in/a/0.tar", "in/a"),
        ("in/a/{0..1}.tar", "in/a"),
        ("in/a/*.tar", "in/a/"),
        ("in/*/*.tar", "in"),
        ("in", "."),
        ("link/*.tar", "in/a"),
        ("in/a/0.tar", "link"),
        ("photos", "photos"),
        ("photos", "photos/splats"),
        ("photos/cat", "photos/cat/../cat/splats"),
        ("photos", "photo-link/splats"),
        ("in", "in/b"),
        ("in/*/*.tar", "in/splats"),
        ("in/**/*.tar", "in/x/splats"),
        ("in/a/0.tar::photos", "photos/splats"),
    ],
)
def test_sources_and_destination_must_not_mix(tmp_path, monkeypatch, src, dst):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        imagenet_tar(tmp_path / "in" / "a" / f"{i}.tar", count=1)
    image_folder(tmp_path / "photos", ("cat",))
    Path("link").symlink_to("in/a")
    Path("photo-link").symlink_to("photos")
    for place in (dst, f"file://{tmp_path}/{dst}"):
        with pytest.raises(UsageError, match=r"lies in (DST|SRC) \S+ ?.*: choose "):
            list_shards(src, dst=place)


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ("in/a/*.tar", "in/a/splats"),
        ("in/a/0.tar", "in/aa"),
        ("in/*/*.tar", "splats"),
        ("in/a", "in/a-splats"),
        ("in/a", "s3://bucket/in/a"),
    ],
)
def test_a_destination_beside_the_sources(tmp_path, monkeypatch, src, dst):
    monkeypatch.chdir(tmp_path)
    imagenet_tar(tmp_path / "in" / "a" / "0.tar", count=1)
    assert list_shards(src, dst=dst) == list_shards(src)


# Elsewhere than on the disk


def test_remote_file_system(memory, tmp_path):
    for i in range(3):
        path = imagenet_tar(tmp_path / f"{i}.tar", count=2)
        memory.pipe(f"/bucket/{i}.tar", path.read_bytes())
    memory.pipe("/bucket/list.txt", b"0.tar\n2.tar\n")
    assert names(list_shards("memory://bucket")) == ["0", "1", "2"]
    assert names(list_shards("memory://bucket/*.tar")) == ["0", "1", "2"]
    assert names(list_shards("memory://bucket/{0..2}.tar")) == ["0", "1", "2"]
    assert names(list_shards("memory://bucket/list.txt")) == ["0", "2"]
    assert keys(list_shards("memory://bucket/1.tar", limit=1)) == ["n00000000"]
    with pytest.raises(UsageError, match="matches nothing"):
        list_shards("memory://bucket/3.tar")


def test_remote_folders_that_cannot_be_listed(memory, monkeypatch):
    for part in ("a", "b"):
        memory.pipe(f"/bucket/{part}/{part}.tar", b"")
    patterns = ("", "/*/*.tar", "/**/*.tar")
    for pattern in patterns:
        assert names(list_shards(f"memory://bucket{pattern}")) == ["a", "b"]
    assert names(list_shards("memory://bucket/b*/b.tar")) == ["b"]
    listing = type(memory).ls

    def broken(self: Any, path: str, **options: Any) -> Any:
        if path.endswith("/b"):
            raise PermissionError(errno.EACCES, "denied")
        return listing(self, path, **options)

    monkeypatch.setattr(type(memory), "ls", broken)
    for pattern in patterns:
        with pytest.raises(SourceError, match=r"cannot read memory:/+bucket/b: denied"):
            list_shards(f"memory://bucket{pattern}")
    assert names(list_shards("memory://bucket/a*/*.tar")) == ["a"]


def test_remote_parquet_and_folder(memory, tmp_path):
    path = image_parquet(tmp_path / "p.parquet", count=5)
    memory.pipe("/bucket/p.parquet", path.read_bytes())
    (ref,) = list_shards("memory://bucket")
    digest = hashlib.sha256()
    assert len(list(read(ref, digest))) == 5
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    memory.pipe("/photos/a/1.jpg", jpeg())
    memory.pipe("/photos/b/2.jpg", jpeg())
    refs = list_shards("memory://photos")
    assert (names(refs), refs[0].labels, keys(refs)) == (
        ["photos-00000"],
        ("a", "b"),
        ["a/1", "b/2"],
    )
    assert refs[0].etag == ""  # this store has none, so that only a checksum tells


def test_unknown_kind_of_address():
    with pytest.raises(Exception, match="install its fsspec driver"):
        list_shards("nosuch://bucket/a.tar")


def test_real_data(tmp_path):
    refs = list_shards(str(shared_data("datacomp-sample")), limit=250)
    assert [(r.name, r.limit) for r in refs] == [
        ("00000000", None),
        ("00000001", None),
        ("00000002", 50),
    ]
    assert len(list_shards(str(shared_data("tiny-imagenet-100")))) == 5
    shutil.copytree(shared_data("kodak"), tmp_path / "kodak")
    (ref,) = list_shards(str(tmp_path / "kodak"))
    assert (ref.name, ref.kind, len(ref.urls), ref.labels) == ("kodak-00000", "folder", 12, ())
