"""splatshard embed: finished shards get what convert --teacher would have stored, and only that."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splatshard.jobs import embed, repair, status, verify
from splatshard.pipeline import embed as embed_module
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.embed import pairs
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.teacher import resolve_teacher
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import RawSample
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig, PackConfig
from splatshard.schemas.errors import SourceError
from splatshard.schemas.shard import ShardManifest
from tests.clips import clip_folder
from tests.integration.running import convert_json, run_json
from tests.make import datacomp_sample, write_tar
from tests.rows import FORMATS, make_ref

pytestmark = pytest.mark.integration

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(clip_folder(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def src(tmp_path: Path) -> str:
    """Two tars of four and three samples; the second sample does not decode, the fourth is there
    twice."""
    for shard, numbers in enumerate(([0, 1, 2, 2], [4, 5, 6])):
        members = [member for number in numbers for member in datacomp_sample(number)]
        members = [(n, b"broken" if n == "000000000001.jpg" else data) for n, data in members]
        write_tar(tmp_path / "in" / f"{shard:08d}.tar", members)
    return str(tmp_path / "in")


def converted(src: str, dst: Path, format: str = "parquet", teacher: str = "") -> str:
    config = ConvertConfig(
        decode=DecodeConfig(image_size=24),
        fit=FitConfig(num_gaussians=5, steps=1),
        pack=PackConfig(format=format),  # type: ignore[arg-type]
        teacher=resolve_teacher(teacher) if teacher else None,
    )
    dst.mkdir()
    for ref in list_shards(src):
        convert_shard(ref, config, str(dst), select_backend("cpu"))
    return str(dst)


def contents(dst: str) -> dict[str, tuple[str, str, list[dict[str, Any]]]]:
    """Of each shard: its fingerprint, its data file and its rows."""
    found = {}
    for name, marker in read_markers(dst).items():
        assert isinstance(marker, ShardManifest)
        rows = list(read_rows(f"{dst}/{marker.data_file}"))
        found[name] = marker.fingerprint, marker.data_file, rows
    return found


def rows_in(found: dict[str, tuple[str, str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return [row for *_, rows in found.values() for row in rows]


@pytest.mark.parametrize("format", FORMATS)
def test_as_if_converted_with_the_teacher(
    format: str, src: str, clip: str, tmp_path: Path, capsys: Capsys
) -> None:
    dst = converted(src, tmp_path / "out", format)
    plain = contents(dst)
    code, summary, err = run_json(capsys, embed, dst, src, "--teacher", clip)
    assert (code, summary) == (0, {"embedded": 2, "before": 0, "failed": {}}), err
    wanted, found = contents(converted(src, tmp_path / "want", format, clip)), contents(dst)
    for name, (fingerprint, data_file, rows) in wanted.items():
        assert found[name][:2] == (fingerprint, data_file)
        for row, got, before in zip(rows, found[name][2], plain[name][2], strict=True):
            theirs, ours = row.pop("teacher"), got.pop("teacher")
            assert (theirs is None) == (ours is None) == (row["status"] != "ok")
            if ours is not None:
                a, b = (np.frombuffer(x, "<f2").astype(float) for x in (theirs, ours))
                assert np.abs(a - b).max() < 1e-3
            assert row == got == before
    assert len(list(Path(dst).glob("0*"))) == 4  # two markers and their files; no leftovers

    assert run_json(capsys, verify, dst)[0] == 0
    state = run_json(capsys, status, dst)[1]
    assert (state["shards_done"], state["stale"], state["missing"]) == (2, {}, [])
    stamps = {path: path.stat().st_mtime_ns for path in Path(dst).glob("0*")}
    assert run_json(capsys, embed, dst, "--teacher", clip)[1]["before"] == 2
    assert stamps == {path: path.stat().st_mtime_ns for path in Path(dst).glob("0*")}


def test_another_teacher_takes_the_place_of_the_first(
    src: str, clip: str, tmp_path: Path, capsys: Capsys
) -> None:
    """Without SRC: the plan knows it."""
    dst = converted(src, tmp_path / "out", teacher=clip)
    other = str(clip_folder(tmp_path / "other", seed=1))
    assert run_json(capsys, embed, dst, src, "--teacher", clip)[1]["before"] == 2
    before = contents(dst)
    code, summary, err = run_json(capsys, embed, dst, "--teacher", other)
    assert (code, summary["embedded"]) == (0, 2), err
    assert run_json(capsys, verify, dst)[0] == 0
    after = contents(dst)
    for name in before:
        assert before[name][0] != after[name][0]
        for a, b in zip(before[name][2], after[name][2], strict=True):
            assert (a["teacher"] == b["teacher"]) == (a["status"] != "ok")
            assert a["splats"] == b["splats"]


def test_interrupted_and_continued(
    src: str, clip: str, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = converted(src, tmp_path / "out")
    publish = embed_module.publish

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if arguments[2].name == "00000001":
            raise KeyboardInterrupt
        return publish(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(embed_module, "publish", interrupted)
        assert run_json(capsys, embed, dst, src, "--teacher", clip)[0] == 130
    assert ["teacher" in rows[0] for _, _, rows in contents(dst).values()] == [True, False]
    assert list(run_json(capsys, status, dst)[1]["stale"]) == ["00000001"]
    code, summary, _ = run_json(capsys, embed, dst, "--teacher", clip)
    assert (code, summary["embedded"], summary["before"]) == (0, 1, 1)
    assert run_json(capsys, status, dst)[1]["stale"] == {}


def test_another_source(src: str, clip: str, tmp_path: Path, capsys: Capsys) -> None:
    """Of the same size: seen by its checksum, and the shard stays as it was. Of another size: seen
    before anything is done."""
    dst = converted(src, tmp_path / "out")
    before = contents(dst)
    path = Path(src, "00000001.tar")
    data = path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        place = tar.getmember("000000000004.txt").offset_data
    path.write_bytes(data[:place] + b"P" + data[place + 1 :])
    code, summary, err = run_json(capsys, embed, dst, src, "--teacher", clip)
    assert (code, summary["embedded"], list(summary["failed"])) == (3, 1, ["00000001"])
    assert "is not what shard 00000001 was made of (its checksum" in err
    assert contents(dst)["00000001"] == before["00000001"]
    path.write_bytes(data + b"\0" * 512)
    code, _, err = run_json(capsys, embed, dst, src, "--teacher", clip)
    assert code == 1
    assert "(size_bytes: " in err
    path.unlink()
    code, _, err = run_json(capsys, embed, dst, src, "--teacher", clip)
    assert (code, "shard 00000001 has no source" in err) == (1, True)


def test_samples_must_be_those_of_the_rows() -> None:
    def sample(key: str) -> RawSample:
        return RawSample(key=key, image=b"", image_name="jpg")

    rows = [{"key": "a"}, {"key": "b"}]
    assert len(list(pairs(rows, [sample("a"), sample("b")], make_ref()))) == 2
    for keys in ("ac", "a", "abc", "ba"):
        with pytest.raises(SourceError, match=r"sample [012] is"):
            list(pairs(rows, map(sample, keys), make_ref()))


@pytest.mark.usefixtures("shared_ray")
def test_convert_and_repair_with_a_teacher(
    src: str, clip: str, tmp_path: Path, capsys: Capsys
) -> None:
    """On workers; repair finds the teacher in the recipe."""
    dst = tmp_path / "out"
    code, _, err = convert_json(capsys, src, dst, "--teacher", clip)
    assert code == 0, err
    before = contents(str(dst))
    assert all((row["teacher"] is None) == (row["status"] != "ok") for row in rows_in(before))
    (dst / before["00000001"][1]).unlink()
    code, found, err = run_json(capsys, repair, dst, "--workers=1")
    assert (code, found["redone"]) == (0, ["00000001"]), err
    assert contents(str(dst)) == before
    assert run_json(capsys, embed, dst, "--teacher", clip)[1]["before"] == 2
    code, _, err = convert_json(capsys, src, dst)
    assert (code, "recipe.teacher" in err) == (1, True)


def test_an_empty_destination(clip: str, tmp_path: Path, capsys: Capsys) -> None:
    code, _, err = run_json(capsys, embed, tmp_path, "--teacher", clip)
    assert (code, "has no finished shards" in err) == (1, True)


def test_a_source_image_that_no_longer_decodes(
    src: str, clip: str, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that was fitted and is refused now, as by a newer decoder: no row is without its
    embedding."""
    dst = converted(src, tmp_path / "out")
    decode = embed_module.decode

    def stricter(data: bytes, name: str, config: DecodeConfig) -> Any:
        return decode(data, name, replace(config, max_image_pixels=10))

    monkeypatch.setattr(embed_module, "decode", stricter)
    code, summary, _ = run_json(capsys, embed, dst, src, "--teacher", clip)
    assert (code, summary["embedded"]) == (3, 0)
    assert "which was converted, has no image" in summary["failed"]["00000000"]
