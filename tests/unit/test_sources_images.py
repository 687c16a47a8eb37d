"""Images that SRC names one by one, or by a pattern."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fsspec
import pytest

from splatshard.pipeline.source.listing import list_source
from splatshard.pipeline.source.read import RawSample, read
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardRef
from tests.make import datacomp_tar, jpeg
from tests.web import served


def put(folder: Path, *files: str) -> Path:
    """Files in `folder`: images, and texts that say their own names."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg() if name.endswith(("jpg", "png")) else path.name.encode())
    return folder


def samples(*refs: ShardRef) -> dict[str, RawSample]:
    return {s.key: s for ref in refs for s in read(ref, hashlib.sha256())}


def test_one_image_names_its_shard(tmp_path: Path) -> None:
    put(tmp_path, "a.b.jpg", "a.b.txt", "c.jpg", "c.txt")
    found = list_source(f"{tmp_path}/a.b.jpg")
    (ref,) = found.refs
    assert (ref.name, found.notes, found.left_out) == ("a.b-00000", [], {})
    ((key, sample),) = samples(ref).items()
    assert (key, sample.caption, sample.image) == ("a.b", "a.b.txt", jpeg())


def test_a_pattern_takes_images_and_what_lies_beside_them(tmp_path: Path) -> None:
    put(tmp_path, "in/a.jpg", "in/a.txt", "in/b.png", "in/b.txt", "in/c.cls", "in/.d.jpg")
    found = list_source(f"{tmp_path}/in/*.jpg")
    assert [ref.name for ref in found.refs] == ["a-00000"]
    assert {k: s.caption for k, s in samples(*found.refs).items()} == {"a": "a.txt"}
    found = list_source(f"{tmp_path}/in/*")
    assert [ref.name for ref in found.refs] == ["in-00000"]
    assert {k: s.caption for k, s in samples(*found.refs).items()} == {"a": "a.txt", "b": "b.txt"}
    assert found.left_out == {"no_image": {"cls": 1}, "hidden": {"jpg": 1}}


def test_images_of_one_stem_that_are_not_named_stay_out(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "a.png", "a.txt")
    (ref,) = list_source(f"{tmp_path}/*.png").refs
    assert sorted(url.rpartition("/")[2] for url in ref.urls) == ["a.png", "a.txt"]


def test_folders_of_a_pattern_are_in_the_keys_and_no_classes(tmp_path: Path) -> None:
    put(tmp_path, "in/cat/a.jpg", "in/dog/a.jpg", "in/dog/b.png")
    found = list_source(f"{tmp_path}/in/*/*.jpg::{tmp_path}/in/dog/*.png")
    assert [ref.name for ref in found.refs] == ["in-00000"]
    assert {k: s.label for k, s in samples(*found.refs).items()} == dict.fromkeys(
        ("cat/a", "dog/a", "dog/b")
    )
    (note,) = found.notes
    assert note.startswith(f"no labels: the images of {tmp_path}/in are given one by one")


def test_a_list_of_images_is_cut_into_shards(tmp_path: Path) -> None:
    put(tmp_path, *(f"in/{i}/x.jpg" for i in range(5)))
    (tmp_path / "list.txt").write_text("".join(f"in/{i}/x.jpg\n" for i in range(5)))
    found = list_source(f"{tmp_path}/list.txt", samples_per_shard=2)
    assert [ref.name for ref in found.refs] == [f"in-{i:05d}" for i in range(3)]
    assert list(samples(*found.refs)) == [f"{i}/x" for i in range(5)]
    assert len(list_source(f"{tmp_path}/list.txt", limit=3, samples_per_shard=2).refs) == 2
    (tmp_path / "list.txt").write_text("in/0/x.jpg\nin/0/y.jpg\n")
    with pytest.raises(UsageError, match=r"matches nothing at 1 of 2 places: .*in/0/y\.jpg;"):
        list_source(f"{tmp_path}/list.txt")


@pytest.mark.parametrize("line", ["./in/a.jpg", "in//a.jpg", "in/./a.jpg", "in/../in/a.jpg"])
def test_a_path_in_another_spelling_is_the_same(tmp_path: Path, line: str) -> None:
    """As `find .` writes it."""
    put(tmp_path, "in/a.jpg", "in/b.jpg", "in/c/d.jpg")
    (tmp_path / "list.txt").write_text(f"{line}\n./in/b.jpg\n./in/c/d.jpg\n")
    found = list_source(f"{tmp_path}/list.txt")
    assert list(samples(*found.refs)) == ["a", "b", "c/d"]
    assert found.notes[0].startswith("no labels: ")
    (tmp_path / "list.txt").write_text(f"{line}\nin/a.jpg\nin/b.jpg\nin/*.jpg\n")
    found = list_source(f"{tmp_path}/list.txt")
    assert list(samples(*found.refs)) == ["a", "b"]
    assert found.notes == ["images are taken once that SRC names several times: 3 of them"]


def test_keys_of_a_store_may_hold_two_slashes() -> None:
    for name in ("a//x.jpg", "a/x.jpg", "a//b/x.jpg"):
        fsspec.filesystem("memory").pipe(f"/slashes/{name}", jpeg())
    src = "::".join(f"memory://slashes/{name}" for name in ("a//x.jpg", "a//b/x.jpg"))
    assert sorted(samples(*list_source(src).refs)) == ["b/x", "x"]


def test_images_beside_tars_in_src(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    datacomp_tar(tmp_path / "b.tar", 2)
    found = list_source(f"{tmp_path}/a.jpg::{tmp_path}/b.tar")
    assert sorted(ref.name for ref in found.refs) == ["a-00000", "b"]
    (ref,) = list_source(f"{tmp_path}/*").refs  # a pattern takes shards where there are any
    assert ref.kind == "tar"


def test_images_of_several_stores(tmp_path: Path) -> None:
    put(tmp_path, "a/x.jpg", "b/x.jpg")
    for name in ("one/x.jpg", "one/x.txt", "two/x.jpg"):
        fsspec.filesystem("memory").pipe(f"/stores/{name}", jpeg() if "jpg" in name else b"hello")
    with served(tmp_path) as web:
        src = f"{tmp_path}/a/x.jpg::memory://stores/one/x.jpg::memory://stores/two/x.jpg"
        found = list_source(f"{src}::{web}/b/x.jpg")
        keys = [sorted(samples(ref)) for ref in found.refs]
    assert sorted(keys) == [["one/x", "two/x"], ["x"], ["x"]]


@pytest.mark.parametrize("query", ["?key=secret", "?a.png"])
def test_an_image_on_the_web_is_its_path(tmp_path: Path, query: str) -> None:
    """A key, and so a shard, would hold what may be a secret."""
    put(tmp_path, "x.jpg")
    with served(tmp_path) as web, pytest.raises(UsageError, match="else download it"):
        list_source(f"{web}/x.jpg{query}")
