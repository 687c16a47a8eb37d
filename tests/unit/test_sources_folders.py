"""SRC as a folder of images: cut by path, labels, sidecars, links."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from splatshard.pipeline.data import ImageDataset
from splatshard.pipeline.source.listing import list_shards, list_source
from splatshard.pipeline.source.read import read
from splatshard.schemas.errors import SourceError, UnavailableError, UsageError
from tests.make import (
    image_folder,
    imagenet_tar,
    jpeg,
)
from tests.unit.test_sources import keys, names


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
    assert ref.labels == ("cat", "dog", "empty")
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


def test_class_folders_given_one_by_one_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder(tmp_path / "train", ("n01", "n02", "n03"), per_class=1)
    other = image_folder(tmp_path / "val", ("n04", "n05"), per_class=1)
    (tmp_path / "list.txt").write_text("train/n01\ntrain/n03\n")
    two = f"{root}/n01::{root}/n03"
    for src in (two, f"{root}/{{n01,n03}}", f"{tmp_path}/list.txt"):
        (note,) = list_source(src).notes
        assert note.startswith(f"no labels by folder: n01, n03 of {root} are given one by one")
        assert f"if they are classes, give {root}, or" in note
    with pytest.raises(UsageError, match=f"SRC has none; .* give {root}, or"):
        list_source(two, classes=("n01", "n03"))
    assert len(list_source(f"{two}::{other}/n04::{other}/n05").notes) == 2
    beside = list_source(f"{two}::{other}")
    assert beside.notes[0] == "2 classes by folder: n04, n05"
    assert beside.notes[1:] == list_source(two).notes
    ImageDataset(two.split("::"), image_size=16, batch_size=1)
    assert note in caplog.text


def test_folders_given_one_by_one_that_are_no_classes(tmp_path: Path) -> None:
    """Splits, folders of two places, with classes below or labels beside the images."""
    image_folder(tmp_path, ("train", "val", "n01", "n02"), per_class=1)
    for split in "ab":
        image_folder(tmp_path / "deep" / split, ("cat", "dog"), per_class=1)
    image_folder(tmp_path / "more", ("n03",), per_class=1)
    for pair in ("train::{}/val", "n01::{}/more/n03", "deep/a::{}/deep/b", "n01"):
        notes = list_source(f"{tmp_path}/{pair}".format(tmp_path)).notes
        assert not [note for note in notes if "one by one" in note]
    for name in ("n01", "n02"):
        (tmp_path / name / "0000.cls").write_text("3")
    assert list_source(f"{tmp_path}/{{n01,n02}}").notes == []
