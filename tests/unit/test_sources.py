"""What SRC means: every form of it, names, labels, limits, and what cannot be meant."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardRef
from tests.make import (
    datacomp_tar,
    image_parquet,
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


def test_comments_in_a_list_stand_apart(tmp_path):
    datacomp_tar(tmp_path / "a#1.tar", 1)
    (tmp_path / "list.txt").write_text("# all\na#1.tar # the first\n  #b.tar\n")
    assert names(list_shards(f"{tmp_path}/list.txt")) == ["a#1"]


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
    datacomp_tar(tmp_path / ".cache" / "a.tar")
    with pytest.raises(UsageError, match=r"begins with a dot is left out: \.cache$"):
        list_shards(str(tmp_path))
    with pytest.raises(UsageError, match="matches 1 files, but no"):
        list_shards(f"{tmp_path}/*.md")
    with pytest.raises(UsageError, match="give one of these"):
        list_shards(f"{tmp_path}/notes.md")


def test_one_tar_twice(tmp_path):
    tar = datacomp_tar(tmp_path / "a.tar", 1)
    with pytest.raises(UsageError, match=r"SRC has \S+/a.tar twice: leave one out"):
        list_shards(f"{tar}::{tmp_path}/*.tar")


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
