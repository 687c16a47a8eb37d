"""Names that no shard can have are found while a conversion is planned."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from splatshard.jobs import convert
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards import names
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.names import MAX_BYTES, check_names, is_one_file
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardManifest
from tests.make import datacomp_tar, image_folder
from tests.rows import make_ref

BAD = {
    "long": (b"n" * 250, "its name has 250 bytes"),
    "long-in-bytes": ("\u732b".encode() * 60, "its name has 180 bytes"),
    "undecodable": (b"caf\xe9", "caf\\udce9.tar: that path is no UTF-8"),
    "folder": (b"caf\xe9/a", "caf\\udce9/a.tar: that path is no UTF-8"),
    "line": (b"a\nb", "would clash"),
    "backslash": (b"a\\b", "would clash"),
    "underscore": (b"_a", "would clash"),
    "failed": (b"a.failed", "would clash"),
}


@pytest.mark.parametrize(("name", "reason"), BAD.values(), ids=BAD)
def test_a_name_that_no_shard_can_have_is_told_before_any_work(
    tmp_path: Path, name: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    datacomp_tar(tmp_path / "in" / f"{os.fsdecode(name)}.tar", 1)
    datacomp_tar(tmp_path / "in" / "good.tar", 1)
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert reason in told
    assert "rename it" in told
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_of_images_of_such_a_name(tmp_path: Path) -> None:
    for name, reason in (b"x" * 200, "206 bytes"), (b"caf\xe9", "no UTF-8"):
        refs = list_shards(str(image_folder(tmp_path / os.fsdecode(name), per_class=1)))
        with pytest.raises(UsageError, match=reason):
            check_names(refs, (), str(tmp_path))


def test_the_longest_name_is_converted_and_read(tmp_path: Path) -> None:
    name = "\u00e9" * (MAX_BYTES // 2)
    refs = list_shards(str(datacomp_tar(tmp_path / f"{name}.tar", 1)))
    (tmp_path / "out").mkdir()
    check_names(refs, (), str(tmp_path / "out"))
    config = ConvertConfig(
        decode=DecodeConfig(image_size=24), fit=FitConfig(num_gaussians=9, steps=1)
    )
    convert_shard(refs[0], config, str(tmp_path / "out"), select_backend("cpu"))
    assert isinstance(read_markers(str(tmp_path / "out"))[name], ShardManifest)
    assert max(len(os.fsencode(file)) for file in os.listdir(tmp_path / "out")) < 255 - 36


PAIRS = [
    ("Train", "train"),
    ("STRASSE", "stra\u00dfe"),
    ("caf\u00e9", "cafe\u0301"),
    ("CAFE\u0301", "caf\u00e9"),
]


def fold(text: str) -> str:
    return unicodedata.normalize("NFD", text.casefold())


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_names_for_one_file(
    tmp_path: Path, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that does not tell them apart, and only there."""
    refs, dst = [make_ref(first), make_ref("b"), make_ref(second)], str(tmp_path)
    check_names(refs, (), dst)  # this one does
    check_names(refs, (), "s3://bucket/out")
    assert not is_one_file(dst, first, second)

    def exists(path: Path) -> bool:
        return fold(path.name) in map(fold, os.listdir(path.parent))

    monkeypatch.setattr(names.os.path, "exists", exists)
    assert is_one_file(dst, first, second)
    for these, others in (refs, ()), (refs[1:], (first,)):
        with pytest.raises(UsageError, match=f"shards {first} and {second} .* rename"):
            check_names(these, others, dst)
    check_names(refs[:2], (first, "c"), dst)


def test_shards_that_are_there_already_are_not_judged(tmp_path: Path) -> None:
    long = replace(make_ref("a"), name="n" * 200)
    check_names([long], [long.name], str(tmp_path))
