"""SplatDataset over files and globs: committed shards that match, and what is said of others."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from splatshard.jobs.destination.class_texts import folders_of
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.data.catalog import folder_and_files
from splatshard.pipeline.train.check import constants_said
from splatshard.schemas.errors import CorruptShardError, UsageError
from tests.rows import FORMATS
from tests.splat_shards import commit, keys_of, make_dataset, rows_of, splat_config


def keys(src: str | list[str]) -> list[str]:
    return keys_of(SplatDataset(src, batch_size=3, drop_last=False, shuffle=False))


def data_files(dst: Path) -> list[Path]:
    return sorted(path for path in dst.iterdir() if path.suffix in (".parquet", ".tar"))


def of_shards(*numbers: int) -> list[str]:
    """Keys of the ok rows of shards of five rows each."""
    return [f"{1000 * n + i:09d}" for n in numbers for i in (0, 1, 2, 4)]


@pytest.fixture(params=FORMATS)
def dst(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Shards 00000 to 00011 of five rows each."""
    make_dataset(str(tmp_path / "out"), [5] * 12, request.param)
    return tmp_path / "out"


def test_files_and_globs_are_the_shards_that_match(dst: Path) -> None:
    files = data_files(dst)
    extension = files[0].suffix
    whole = SplatDataset(str(dst), batch_size=3)
    assert (
        keys(f"{dst}/*{extension}") == keys(f"{dst}/*") == keys(str(dst)) == of_shards(*range(12))
    )
    assert keys(str(files[3])) == keys(f"{dst}/00003{extension}") == of_shards(3)
    assert keys(f"{dst}/00003.json") == keys(f"{dst}/00003-*") == of_shards(3)
    assert keys(f"{dst}/0001*") == keys(f"file://{dst}/0001[0-9]*{extension}") == of_shards(10, 11)
    assert keys([str(files[7]), str(files[2])]) == of_shards(2, 7)
    assert keys(f"{files[7]}::{dst}/0000[01]*") == of_shards(0, 1, 7)
    glob = SplatDataset(f"{dst}/*{extension}", batch_size=3)
    glob.load_state_dict(whole.state_dict())  # the same data


def test_relative_files_are_read(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = data_files(dst)[4].name
    monkeypatch.chdir(dst)
    assert keys(file) == keys(f"./{file}") == keys("00004-*") == of_shards(4)


def test_globs_of_folders(tmp_path: Path) -> None:
    """Folders with JSON and without shards are passed over; those without a marker, too."""
    for number, name in enumerate(("train-a", "train-b", "val")):
        make_dataset(f"{tmp_path}/{name}", [5], first=number)
    (tmp_path / "train-log").mkdir()
    (tmp_path / "train-log" / "run.json").write_text("{}")
    assert keys(f"{tmp_path}/train-*/*.parquet") == keys(f"{tmp_path}/train-*/") == of_shards(0, 1)
    assert keys(f"{tmp_path}/**/*.parquet") == of_shards(0, 1, 2)
    with pytest.raises(UsageError, match="give the folder"):
        keys(f"{tmp_path}/test-*/*.parquet")


def test_only_what_is_committed_is_read(dst: Path) -> None:
    """A file that no marker names is none of the data, as when the folder is read."""
    file = data_files(dst)[1]
    left = file.with_name(f"00099-{file.name.partition('-')[2]}")
    shutil.copy(file, left)
    assert keys(f"{dst}/*{file.suffix}") == of_shards(*range(12))
    with pytest.raises(UsageError, match=f"{left} is not read: no marker in its folder names it"):
        keys(str(left))
    with pytest.raises(UsageError, match=f"{left} is not read: no marker"):
        keys(f"{dst}/0009*")


@pytest.mark.parametrize("folder", ["copied", "images"])
def test_what_has_no_marker_is_refused_with_the_remedy(
    dst: Path, tmp_path: Path, folder: str
) -> None:
    file = data_files(dst)[0]
    copy = tmp_path / folder / file.name
    copy.parent.mkdir()
    if folder == "copied":
        shutil.copy(file, copy)
    else:
        copy.write_bytes(b"\0" * 1024)
    for src in (str(copy), f"{tmp_path}/{folder}/*", f"{tmp_path}/{folder}/*{copy.suffix}"):
        with pytest.raises(UsageError, match=f"{copy} is not read: .*beside their .*markers") as e:
            keys(src)
        assert "permissions" not in str(e.value)


@pytest.mark.parametrize("name", ["99999.parquet", "99999.tar", "x-*", "x-*.parquet", "[z]"])
def test_what_matches_nothing_is_said(dst: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no file of that name and no shard of it") as e:
        keys(f"{dst}/{name}")
    assert f"{dst}/{name}" in str(e.value)
    assert "permissions" not in str(e.value)


def test_folders_and_files_are_told_apart(tmp_path: Path) -> None:
    for name in ("splats.parquet", "a[1]", "b*"):
        make_dataset(f"{tmp_path}/{name}", [5])
        assert folder_and_files(f"{tmp_path}/{name}/") == (f"{tmp_path}/{name}", "")
        assert keys(f"{tmp_path}/{name}") == of_shards(0)
    assert keys(f"{tmp_path}/a[1]/*.parquet") == of_shards(0)
    assert folder_and_files("/x.tar") == ("/", "x.tar")


def test_damage_is_told_and_failures_are_logged(
    dst: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = data_files(dst)[0]
    failed = {"name": "00020", "source_url": "x.tar", "error": "E", "message": "m"}
    failed |= {"fingerprint": "0" * 64, "format_version": 1}
    (dst / "00020.failed.json").write_text(json.dumps(failed))
    with caplog.at_level(logging.WARNING):
        assert keys(f"{dst}/*{file.suffix}") == of_shards(*range(12))
    assert "1 shards failed and are not read, first of them 00020" in caplog.text
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptShardError, match=f"{file}.*repair {dst}$"):
        keys(str(file))
    file.unlink()
    with pytest.raises(CorruptShardError, match=f"{file}.*No such file.*repair {dst}$"):
        keys(f"{dst}/00000*")


def test_recipes_that_do_not_fit_are_refused_as_in_folders(tmp_path: Path) -> None:
    for number, n in enumerate((6, 9)):
        rows = rows_of(number, 5, n)
        commit(f"{tmp_path}/out-{n}", f"{number:05d}", rows, splat_config(n=n))
    for src in (f"{tmp_path}/out-*/*.parquet", f"{tmp_path}/out-6::{tmp_path}/out-9"):
        with pytest.raises(UsageError, match=r"num_gaussians is 6, which .*out-9/"):
            SplatDataset(src, batch_size=2, num_gaussians=6)


def test_others_find_the_folder(dst: Path) -> None:
    """Class names lie beside the shards, and a tar's constants are in its marker."""
    glob = f"{dst}/*{data_files(dst)[0].suffix}"
    assert folders_of(glob) == folders_of(str(dst))
    source = SplatDataset(glob, batch_size=2).sources[0]
    said = constants_said({shard.url.rpartition("/")[0] for shard in source.shards})
    assert said.keys() == {shard.url for shard in source.shards}


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system in memory, standing for any remote one."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_remote_files_and_globs(
    dst: Path, memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLATSHARD_CACHE", str(tmp_path / "cache"))
    for path in dst.iterdir():
        if path.is_file():
            memory.pipe(f"/bucket/out/{path.name}", path.read_bytes())
    extension = data_files(dst)[0].suffix
    assert keys("memory://bucket/out/0000[12]*") == of_shards(1, 2)
    assert keys(f"memory://bucket/*/00011-*{extension}") == of_shards(11)
    assert keys(f"memory://bucket/out/{data_files(dst)[5].name}") == of_shards(5)
    with pytest.raises(UsageError, match="no file of that name"):
        keys(f"memory://bucket/out/x{extension}")


def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, dst: Path) -> None:
    (tmp_path / "link").symlink_to(dst)
    first = data_files(dst)[0]
    for src in (
        [str(dst)] * 2,
        f"{dst}::{first}",
        [str(dst), f"{dst}/"],
        f"{tmp_path}/link::{dst}",
    ):
        with pytest.raises(UsageError, match=rf"{first.name} is there twice .* weigh sources"):
            keys(src)
    SplatDataset({str(dst): 1.0, str(first): 1.0}, batch_size=3)  # which is how to want that


def test_copies_are_told(tmp_path: Path, dst: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(dst, tmp_path / "copy")
    make_dataset(str(tmp_path / "empty"), [0, 0])
    keys([str(dst), str(tmp_path / "empty")])
    assert caplog.text == ""
    assert len(keys([str(dst), str(tmp_path / "copy")])) == 2 * len(keys(str(dst)))
    assert "12 shards are copies of others, and an epoch has their samples as often" in caplog.text


def test_labels_of_several_lists_of_classes_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, classes in (("a", ("ant", "cat")), ("b", ("ant", "cat")), ("c", ("cat",)), ("d", ())):
        commit(str(tmp_path / name), name, rows_of(ord(name), 5), classes=classes)
    SplatDataset([f"{tmp_path}/{name}" for name in "abd"], batch_size=2)
    assert caplog.text == ""
    SplatDataset([f"{tmp_path}/{name}" for name in "abcd"], batch_size=2)
    assert f"the labels of {tmp_path}/a/a-" in caplog.text
    assert f" and {tmp_path}/c/c-" in caplog.text
    assert "are numbered by different lists of classes" in caplog.text
