"""Originals in a report are those that were converted: a source that is another one is left out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from splatshard.jobs import report
from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import write_plan
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.source.listing import is_source_of, list_shards
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.shard import ShardManifest, ShardRef
from tests.make import encode, photo, write_tar

CONFIG = ConvertConfig(
    decode=DecodeConfig(image_size=32), fit=FitConfig(num_gaussians=8, steps=1), backend="cpu"
)
DAY = 86_400


def bmp(seed: int) -> bytes:
    """All have one size."""
    return encode(photo(32, 32, seed), "BMP")


def put(src: Path, first: int, count: int = 4) -> None:
    """A tar or a folder of pictures, the first of them number `first`."""
    images = [(f"{i}.bmp", bmp(first + i)) for i in range(count)]
    if src.suffix == ".tar":
        write_tar(src, images)
    else:
        src.mkdir(exist_ok=True)
        for name, data in images:
            (src / name).write_bytes(data)


@pytest.fixture(params=["a.tar", "images"])
def made(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path, ShardRef]:
    """A source and its shard."""
    src, dst = tmp_path / request.param, tmp_path / "splats"
    put(src, 0)
    dst.mkdir()
    (ref,) = list_shards(str(src))
    convert_shard(ref, CONFIG, str(dst), select_backend("cpu"))
    plan = make_plan([ref], read_markers(str(dst)), CONFIG, str)
    write_plan(str(dst), planned([ref], plan, CONFIG))
    return src, dst, ref


def touch(src: Path) -> None:
    for path in [src, *src.rglob("*")]:
        os.utime(path, (DAY, DAY))


def others_of_the_same_size(src: Path) -> None:
    put(src, 10)
    touch(src)


def another_size(src: Path) -> None:
    if src.suffix == ".tar":
        put(src, 0, 3)
    else:
        (src / "1.bmp").write_bytes(encode(photo(40, 40, 1), "BMP"))


def shown(src: Path, dst: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, list[str]]:
    """The page, standard error, and the shards that are told."""
    assert report.main([str(dst), f"--src={src}", "--json", "--backend=cpu"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out.partition("\n")[2])
    return (dst / "report.html").read_text(), captured.err, answer["changed_sources"]


@pytest.mark.parametrize("change", [None, touch])
def test_a_source_that_is_the_same_is_shown(
    made: tuple[Path, Path, ShardRef],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None] | None,
) -> None:
    """Also where its modification time alone is another one."""
    src, dst, _ = made
    if change:
        change(src)
    html, err, changed = shown(src, dst, capsys)
    assert html.count('alt="original of') == 4
    assert "JPEG is measured on 4 fitted crops" in html
    assert f"next: splatshard view {dst}    splatshard train" in err
    assert changed == []
    assert "changed" not in err + html


@pytest.mark.parametrize("change", [others_of_the_same_size, another_size])
def test_a_source_that_is_another_one_is_left_out_and_told(
    made: tuple[Path, Path, ShardRef],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
) -> None:
    src, dst, ref = made
    change(src)
    html, err, changed = shown(src, dst, capsys)
    assert 'alt="original of' not in html
    assert html.count('alt="reconstruction of') == 4
    assert html.count("source changed") == 4
    assert "4 originals left out: the source has changed since" in html
    assert "have changed since, so JPEG sizes cannot be measured" in html
    assert changed == [ref.name]
    assert f"the source of {ref.name} has changed since it was converted ({ref.urls[0]})" in err


def test_a_source_that_is_gone_is_not_said_to_have_changed(
    made: tuple[Path, Path, ShardRef], capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst, ref = made
    src.rename(src.with_name("elsewhere"))
    html, err, changed = shown(src, dst, capsys)
    assert html.count("source gone") == 4
    assert changed == []
    assert f"originals of {ref.name} cannot be read" in err


def test_identity_of_a_part_and_of_a_store_without_etags(
    made: tuple[Path, Path, ShardRef], tmp_path: Path
) -> None:
    """Of a limited read the part that was taken counts; without an etag the checksum does."""
    src, _, ref = made
    part = tmp_path / "part"
    part.mkdir()
    limited = replace(ref, limit=2)
    convert_shard(limited, CONFIG, str(part), select_backend("cpu"))
    (marker,) = read_markers(str(part)).values()
    assert isinstance(marker, ShardManifest)
    assert is_source_of(limited, marker)
    touch(src)
    assert is_source_of(limited, marker)
    unknown = replace(
        marker, inputs=marker.inputs | {"source": marker.inputs["source"] | {"etag": ""}}
    )
    assert is_source_of(limited, unknown)
    others_of_the_same_size(src)
    assert not is_source_of(limited, unknown)
    assert not is_source_of(limited, replace(marker, source_sha256=""))


def test_an_address_that_was_signed_is_not_asked(
    made: tuple[Path, Path, ShardRef], capsys: pytest.CaptureFixture[str]
) -> None:
    """The server would refuse, and the credentials would be blamed."""
    _, dst, ref = made
    signed = replace(ref, kind="tar", urls=("http://127.0.0.1:1/a.tar?***",), root="")
    plan = make_plan([signed], {}, CONFIG, str)
    write_plan(str(dst), planned([signed], plan, CONFIG))
    assert report.main([str(dst), "--src", "http://127.0.0.1:1"]) == 0
    err = capsys.readouterr().err
    assert f"without originals of 1 shard ({ref.name}): the signature or password" in err
    assert "cannot be read" not in err
