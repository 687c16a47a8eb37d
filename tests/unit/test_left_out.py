"""What is listed and not converted is counted, by reason and extension; nothing vanishes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import fsspec
import pytest

from splatshard.jobs import status
from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import write_plan
from splatshard.pipeline.data import ImageDataset
from splatshard.pipeline.source import left_out
from splatshard.pipeline.source.folder import image_keys
from splatshard.pipeline.source.left_out import LEFT_OUT, left_out_line
from splatshard.pipeline.source.listing import list_shards, list_source
from splatshard.pipeline.source.read import count_samples, read, scan
from splatshard.schemas.errors import UsageError
from tests.make import encode, image_parquet, imagenet_tar, jpeg, photo, write_parquet
from tests.rows import config_of
from tests.splat_shards import commit, rows_of, splat_config
from tests.unit.test_sources import keys, names


def put(folder: Path, *files: str) -> Path:
    """Files in `folder`; images are images."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg() if name.lower().endswith("jpg") else b"{}")
    return folder


def test_every_reason_is_known_and_documented() -> None:
    _, documented = str(left_out.__doc__).split("\n\n")
    reasons = [line.split()[0] for line in documented.splitlines()]
    assert reasons == list(LEFT_OUT)


def test_a_stray_tar_among_images(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.jpg" for i in range(5)), "deep/6.JPG", "notes.md")
    imagenet_tar(tmp_path / "originals.tar", count=1)
    found = list_source(str(tmp_path))
    assert names(found.refs) == ["originals"]
    assert found.left_out == {"beside_shards": {"jpg": 6}, "other": {"md": 1}}
    (note,) = found.notes
    assert (
        f"6 images are left out, since tars or Parquet files lie beside them, such as {tmp_path}"
        in note
    )
    assert list_source(f"{tmp_path}/*").left_out["beside_shards"] == {"jpg": 5}
    assert list_source(f"{tmp_path}/*.tar").left_out == {}


@pytest.mark.parametrize("name", ["metadata.jsonl", "train/metadata.csv"])
def test_captions_of_an_imagefolder_are_told_to_be_missing(tmp_path: Path, name: str) -> None:
    found = list_source(str(put(tmp_path, "train/a.jpg", "train/b.jpg", "train/a.caption", name)))
    assert any(f"{name} of {tmp_path} is not read" in note for note in found.notes)
    assert found.left_out == {"other": {name.rpartition(".")[2]: 1}}
    assert [len(ref.urls) for ref in found.refs] == [3]


def test_archives_with_capital_extensions(tmp_path: Path) -> None:
    imagenet_tar(tmp_path / "A.TAR", count=2)
    image_parquet(tmp_path / "B.Parquet", 3)
    refs = list_source(str(tmp_path)).refs
    assert [(ref.name, ref.kind) for ref in refs] == [("A", "tar"), ("B", "parquet")]
    assert len(keys(refs)) == 5
    assert names(list_shards(f"{tmp_path}/A.TAR")) == ["A"]


def test_what_the_names_of_folders_say_is_told(tmp_path: Path) -> None:
    """As Spark and Polars write a partitioned table."""
    for label in (0, 1):
        (tmp_path / f"label={label}").mkdir()
        image_parquet(tmp_path / f"label={label}" / f"part-{label}.parquet", 1)
    for src in (tmp_path, f"{tmp_path}/*/*.parquet"):
        _, note = list_source(str(src)).notes
        assert "label stands in the names of folders alone (label=0)" in note


def test_splats_are_no_images(tmp_path: Path) -> None:
    for format, extension in (("parquet", "parquet"), ("webdataset", "tar")):
        dst = tmp_path / format
        commit(str(dst), "a", rows_of(0, 2), splat_config(format=format))
        (data,) = dst.glob(f"*.{extension}")
        if format == "parquet":
            for src in (dst, data):
                with pytest.raises(UsageError, match="holds splats, not images: give the images"):
                    list_source(str(src))
        else:
            (ref,) = list_source(str(data)).refs
            first = next(iter(scan(ref)))
            assert "holds splats, not images: give the images" in str(first.error)


def test_a_stray_parquet_among_images(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    write_parquet(tmp_path / "urls.parquet", {"url": ["x"]})
    found = list_source(str(tmp_path))
    assert keys(found.refs) == ["a", "b"]
    assert (found.left_out, found.notes) == ({"no_image_column": {"parquet": 1}}, [])
    image_parquet(tmp_path / "images.parquet")
    found = list_source(str(tmp_path))
    assert names(found.refs) == ["images"]
    assert found.left_out == {"no_image_column": {"parquet": 1}, "beside_shards": {"jpg": 2}}
    assert "2 images are left out" in found.notes[1]


def test_what_lies_beside_tars(tmp_path: Path) -> None:
    put(tmp_path, "0.json", "more.tar.gz", "readme", ".hidden.jpg", ".hidden.txt", "._0.tar")
    for i in range(2):
        imagenet_tar(tmp_path / f"{i}.tar", count=1)
    write_parquet(tmp_path / "0.parquet", {"url": ["x"]})
    image_parquet(tmp_path / "1.parquet")
    found = list_source(str(tmp_path))
    assert names(found.refs) == ["0", "1"]
    assert found.left_out == {
        "same_name": {"parquet": 2},
        "compressed": {"gz": 1},
        "hidden": {"jpg": 1, "tar": 1},
        "other": {"json": 1, "": 1},
    }


def test_what_lies_beside_images(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "a.txt", "b.txt", "c.json", "d.csv", "old.zip", ".e.jpg", ".d/f.jpg")
    found = list_source(str(tmp_path))
    assert keys(found.refs) == ["a"]
    assert found.left_out == {
        "no_image": {"txt": 1, "json": 1},
        "compressed": {"zip": 1},
        "hidden": {"jpg": 1},
        "other": {"csv": 1},
    }


def test_hidden_folders_with_images_are_told(tmp_path: Path) -> None:
    """.NET may be a class."""
    put(tmp_path, "java/a.jpg", ".NET/b.jpg", ".git/config", ".x.jpg")
    found = list_source(str(tmp_path))
    assert keys(found.refs) == ["java/a"]
    (told,) = (note for note in found.notes if "begin with a dot" in note)
    assert told.endswith(": .NET")


def test_hidden_files_where_a_store_lists_them(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/p/a.jpg": jpeg(), "/p/.b.jpg": jpeg(), "/p/x/.c.png": jpeg()})
    try:
        found = list_source("memory://p")
        assert (keys(found.refs), found.left_out) == (["a"], {"hidden": {"jpg": 1, "png": 1}})
    finally:
        fs.rm("/", recursive=True)


# One stem


def test_hidden_files_that_a_glob_matches(tmp_path: Path) -> None:
    """As in a folder, and as a shell leaves them out: those of macOS are no tars."""
    for name in ("a.tar", "._a.tar"):
        imagenet_tar(tmp_path / name)
    found = list_source(f"{tmp_path}/*.tar")
    assert (names(found.refs), found.left_out) == (["a"], {"hidden": {"tar": 1}})
    assert len(list_source(f"{tmp_path}/.*.tar").refs) == 1


def test_a_file_of_two_places_is_refused(tmp_path: Path) -> None:
    """Its samples would be there twice, here once with a label and once without."""
    put(tmp_path, "in/cat/a.jpg", "in/dog/b.jpg")
    with pytest.raises(UsageError, match=rf"SRC has {tmp_path}/in/cat/a.jpg twice"):
        list_source(f"{tmp_path}/in::{tmp_path}/in/cat")


def test_image_datasets_tell_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "in/a.jpg", "in/b.jpg", "in/c.jpg_large")
    (tmp_path / "in" / "a.json").write_text('{"label": "cat"}')
    (tmp_path / "in" / "b.json").write_text('{"label": "dog"}')
    for batch in ImageDataset(f"{tmp_path}/in", image_size=8, batch_size=1):
        assert batch.labels.tolist() == [-1]
    assert "left out of SRC: 1 file: 1 of no known kind (1 jpg_large)" in caplog.text
    assert caplog.text.count("label is not used: 'cat' is not a whole number") <= 1
    assert caplog.text.count("is not used") == 1


def test_images_of_one_stem_are_samples(tmp_path: Path) -> None:
    put(tmp_path, "cat.jpg", "cat.JPG", "dog.jpg")
    (tmp_path / "cat.png").write_bytes(encode(photo(seed=1), "PNG"))
    (tmp_path / "cat.txt").write_text("a cat")
    (ref,) = list_shards(str(tmp_path))
    samples = list(read(ref, hashlib.sha256()))
    assert [s.key for s in samples] == ["cat.JPG", "cat.jpg", "cat.png", "dog"]
    assert [s.image_name for s in samples] == ["cat.JPG", "cat.jpg", "cat.png", "dog.jpg"]
    assert [s.caption for s in samples] == ["a cat"] * 3 + [None]
    assert samples[2].image == (tmp_path / "cat.png").read_bytes()
    assert all(s.error is None and s.members == () for s in samples)
    assert [s.key for s in scan(ref)] == [s.key for s in samples]
    assert count_samples(ref, 9) == 4


def test_images_of_one_stem_stay_in_one_shard(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg", "b.JPG", "b.jpeg.jpg", "c.jpg", "d.jpg")
    refs = list_shards(str(tmp_path), samples_per_shard=2)
    assert [keys([ref]) for ref in refs] == [["a"], ["b.JPG", "b.jpg"], ["b.jpeg", "c"], ["d"]]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["x/a.jpg", "y/a.jpg"], ["x/a", "y/a"]),
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.png", "a.jpg.png"]),
        (["a.jpg", "a.jpg.png"], ["a", "a.jpg"]),
        (
            ["a.jpg", "a.png", "a.jpg.png", "a.jpg.png.gif"],
            ["a.jpg", "a.png", "a.jpg.png", "a.jpg.png.gif"],
        ),
    ],
)
def test_no_two_images_have_one_key(paths: list[str], expected: list[str]) -> None:
    assert list(image_keys(paths).values()) == expected


# Told


def test_the_line() -> None:
    assert left_out_line({}) == ""
    found = {"beside_shards": {"png": 1, "jpg": 5}, "other": {"": 1}}
    assert left_out_line(found) == (
        "left out of SRC: 7 files: 6 images beside tars or Parquet files (5 jpg, 1 png), "
        "1 of no known kind (1 without extension)"
    )


def test_status_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, dst = put(tmp_path / "in", "a.jpg", "b.md"), tmp_path / "out"
    found = list_source(str(src))
    dst.mkdir()
    plan = make_plan(found.refs, {}, config_of(), str)
    write_plan(str(dst), planned(found.refs, plan, config_of()))
    for text in ("", "[]", '{"left_out": 1}'):
        (dst / "_run.json").write_text(text)
        assert status.main([str(dst), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["left_out"] == {}
    (dst / "_run.json").write_text(json.dumps({"left_out": found.left_out}))
    assert status.main([str(dst), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["left_out"] == {"other": {"md": 1}}
    assert "left out of SRC: 1 file: 1 of no known kind (1 md)" in err


def test_folders_that_a_glob_matches_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "val/x.jpg", "more/x.jpg", ".x/x.jpg", "elsewhere/x.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    tar = imagenet_tar(tmp_path / "train-0.tar", count=1)
    found = list_source(f"{tmp_path}/*", dst=f"{tmp_path}/elsewhere")
    assert found.left_out == {"folder": {"folder": 2}}
    found = list_source(f"{tmp_path}/*")
    assert found.left_out == {"folder": {"folder": 4}}
    assert f"{tmp_path}/* matches folders, too" in found.notes[0]
    assert ": elsewhere, link, more, val; give each as a SRC" in found.notes[0]
    assert found.notes[0].endswith(f", or {tmp_path}")
    assert left_out_line(found.left_out).startswith(
        "left out of SRC: 4 files and folders: 4 folders that a pattern matches (give each"
    )
    for other in ("*.tar", "**"):
        assert not list_source(f"{tmp_path}/{other}").left_out.get("folder")
    for name in ("a.tar", "b/b.tar"):
        fsspec.filesystem("memory").pipe(f"/globbed/{name}", tar.read_bytes())
    found = list_source("memory://globbed/*")
    assert found.left_out == {"folder": {"folder": 1}}
    assert found.notes[0].endswith(": b; give each as a SRC of its own, or memory://globbed")


@pytest.mark.parametrize("src", ["n0*", "*/", "n*"])
def test_a_glob_over_folders_alone_names_them(tmp_path: Path, src: str) -> None:
    put(tmp_path, "n01/x.jpg", "n02/x.jpg")
    what = rf"matches nothing but folders \(n01, n02\), .*; give {tmp_path}, or each"
    with pytest.raises(UsageError, match=what):
        list_source(f"{tmp_path}/{src}")
