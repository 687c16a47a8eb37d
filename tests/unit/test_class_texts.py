"""Class names and prompts that lie with the images go with the shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from splatshard.pipeline.evaluation import class_texts
from splatshard.pipeline.evaluation.class_texts import (
    CLASSNAMES,
    TEMPLATES,
    beside,
    copy_texts,
    find,
)
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.errors import StorageError, UnavailableError
from tests.make import datacomp_tar


@pytest.fixture
def src(tmp_path: Path) -> str:
    """Tars in `data/test`, names of classes beside them and prompts one folder up."""
    folder = tmp_path / "data/test"
    folder.mkdir(parents=True)
    for number in range(2):
        datacomp_tar(folder / f"{number:05d}.tar", 1, start=number)
    (folder / CLASSNAMES).write_text("a cat\na dög\n")
    (tmp_path / "data" / TEMPLATES).write_text("a photo of {c}.\n")
    (tmp_path / "out").mkdir()
    return f"{folder}/*.tar"


def test_both_are_copied_as_they_are(src: str, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    copied = copy_texts(list_shards(src), str(dst))
    assert copied == [f"{tmp_path}/data/test/{CLASSNAMES}", f"{tmp_path}/data/{TEMPLATES}"]
    assert sorted(path.name for path in dst.iterdir()) == [CLASSNAMES, TEMPLATES]
    assert (dst / CLASSNAMES).read_bytes() == "a cat\na dög\n".encode()
    assert find(TEMPLATES, beside(str(dst))) == f"{dst}/{TEMPLATES}"


def test_what_is_there_stays(src: str, tmp_path: Path) -> None:
    """It may have been edited; and a second run has nothing to do."""
    (tmp_path / "out" / CLASSNAMES).write_text("edited\n")
    copied = copy_texts(list_shards(src), f"{tmp_path}/out/")
    assert copied == [f"{tmp_path}/data/{TEMPLATES}"]
    assert (tmp_path / "out" / CLASSNAMES).read_text() == "edited\n"
    assert copy_texts(list_shards(src), f"{tmp_path}/out") == []


def test_a_folder_of_images(src: str, tmp_path: Path) -> None:
    """Its own folder counts, not those below it that are the classes."""
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "images" / CLASSNAMES).write_text("cat\ndog\n")
    refs = list_shards(f"{tmp_path}/images")
    assert copy_texts(refs, f"{tmp_path}/out") == [f"{tmp_path}/images/{CLASSNAMES}"]


def test_several_folders_are_no_dataset(src: str, tmp_path: Path) -> None:
    (tmp_path / "data/train").mkdir()
    datacomp_tar(tmp_path / "data/train/00009.tar", 1, start=9)
    refs = list_shards(f"{src}::{tmp_path}/data/train/*.tar")
    assert copy_texts(refs, f"{tmp_path}/out") == []


def test_texts_that_cannot_be_read_are_passed_over(
    src: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no reason not to convert; a destination that cannot be written is one."""

    def unavailable(*arguments: object) -> None:
        raise UnavailableError("the store does not answer")

    def full(*arguments: object) -> None:
        raise StorageError("no space left")

    refs = list_shards(src)
    with monkeypatch.context() as patched:
        patched.setattr(class_texts.fs, "open_read", unavailable)
        assert copy_texts(refs, f"{tmp_path}/out") == []
    monkeypatch.setattr(class_texts.fs, "write_bytes", full)
    with pytest.raises(StorageError):
        copy_texts(refs, f"{tmp_path}/out")
