"""Export of one sample: the PLY's numbers, our rendering as PNG, and every way to ask wrongly."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import splatshard
from splatshard.jobs import export as export_module
from splatshard.jobs.__main__ import main
from splatshard.pipeline.codec.pack import unpack
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.ply import ply_bytes
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.splats import Splats
from splatshard.pipeline.storage.fs import use_options
from splatshard.pipeline.storage.options import options_of
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from tests.make import datacomp_sample, write_tar

KEY, BAD = "000000000001", "000000000002"


@pytest.fixture(scope="module")
def dst(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three samples; one sample does not decode."""
    folder = tmp_path_factory.mktemp("export")
    for shard in range(2):
        members = [m for i in range(3) for m in datacomp_sample(3 * shard + i)]
        members = [(n, b"broken" if n == f"{BAD}.jpg" else data) for n, data in members]
        write_tar(folder / "in" / f"{shard:08d}.tar", members)
    config = ConvertConfig(
        decode=DecodeConfig(image_size=24),
        fit=FitConfig(num_gaussians=9, steps=3),
    )
    (folder / "out").mkdir()
    for ref in list_shards(str(folder / "in")):
        convert_shard(ref, config, str(folder / "out"), select_backend("cpu"))
    return folder / "out"


def export(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `splatshard export`."""
    capsys.readouterr()
    code = main(["export", *map(str, arguments)])
    return code, *capsys.readouterr()


def row_of(dst: Path, key: str) -> dict[str, Any]:
    rows = [row for file in sorted(dst.glob("*.parquet")) for row in read_rows(str(file))]
    (row,) = [row for row in rows if row["key"] == key]
    return row


def read_ply(data: bytes) -> np.ndarray:
    """The vertices of a binary PLY of floats, as a structured array."""
    header, _, body = data.partition(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    names = [line.split()[2] for line in lines if line.startswith("property float ")]
    assert f"element vertex {len(body) // (4 * len(names))}" in lines
    return np.frombuffer(body, [(name, "<f4") for name in names])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_a_ply_holds_the_splats() -> None:
    pytest.importorskip("gsplat")
    splats = Splats(
        means=torch.tensor([[[10.0, 5.0], [0.0, 0.0], [20.0, 10.0]]]),
        cholesky=torch.tensor([[[2.0, 0.0, 1.0], [9.0, 9.0, 9.0], [1.0, 1.0, 1.0]]]),
        colors=torch.tensor([[[0.5, 0.25, -0.1], [1.0, 1.0, 1.0], [2.0, 1.0, 0.0]]]),
        mask=torch.tensor([[True, False, True]]),
    )
    ply = read_ply(ply_bytes(splats, height=10, width=20))
    unit = 2 / 20
    assert len(ply) == 2  # the masked one is left out
    np.testing.assert_allclose(ply["x"], [0, 1], atol=1e-6)
    np.testing.assert_allclose(ply["y"], [0, 0.5], atol=1e-6)
    assert not ply["z"].any()
    scales = np.exp(np.stack([ply[f"scale_{i}"] for i in range(3)], 1))
    np.testing.assert_allclose(scales[0], [2 * unit, unit, 1e-4], rtol=1e-5)
    turn = np.stack([ply[f"rot_{i}"] for i in range(4)], 1)
    np.testing.assert_allclose(turn[0], [1, 0, 0, 0], atol=1e-6)
    angle = 2 * math.atan2(turn[1, 3], turn[1, 0])
    c, s = math.cos(angle), math.sin(angle)
    rotation = np.array([[c, -s], [s, c]])
    covariance = rotation @ np.diag(scales[1, :2] ** 2) @ rotation.T / unit**2
    np.testing.assert_allclose(covariance, [[1, 1], [1, 2]], rtol=1e-4)
    opacity = sigmoid(ply["opacity"])
    np.testing.assert_allclose(opacity, [0.5, 0.99], rtol=1e-5)
    colors = np.stack([ply[f"f_dc_{i}"] for i in range(3)], 1) * 0.28209479 + 0.5
    np.testing.assert_allclose(colors * opacity[:, None], [[0.5, 0.25, -0.1], [2, 1, 0]], atol=1e-5)
    assert not np.stack([ply[f"f_rest_{i}"] for i in range(45)]).any()


def test_ply_by_key_with_a_word_on_viewers(
    dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gsplat")
    path = tmp_path / "sample.ply"
    code, out, err = export(capsys, dst, KEY, "--output", path)
    assert (code, out) == (0, f"{path}\n")
    assert "viewers composite by alpha, splatshard sums" in err
    assert len(read_ply(path.read_bytes())) == row_of(dst, KEY)["num_gaussians"]


@pytest.mark.parametrize("name", ["000000000004", f"{4:032x}"])
def test_png_by_key_or_uid_is_our_rendering(
    name: str, dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sample.PNG"
    code, out, err = export(capsys, dst, name, "--output", path, "--backend", "reference")
    assert (code, out) == (0, f"{path}\n")
    assert "000000000004 of shard 00000001: 9 Gaussians, 24x24 px" in err
    assert "alpha" not in err
    row = row_of(dst, "000000000004")
    splats = unpack([{"splats": row["splats"]}], 24, 24, "balanced")
    expected = select_backend("cpu").render(splats, 24, 24, 3.0)[0].clamp(0, 1) * 255
    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())), dtype=float)
    assert np.abs(pixels - expected.permute(1, 2, 0).numpy()).max() <= 0.51


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody", "--output", "x.ply"], "has the key or uid 'nobody' (6 samples in 2 finished"),
        ([BAD, "--output", "x.ply"], "shard 00000000 was skipped as not_an_image"),
        ([KEY, "--output", "x.jpg"], "--output x.jpg: end it in .png, .ply, .safetensors"),
        ([KEY, "--output", "/nowhere/x.png"], "x.png: create the folder /nowhere first"),
        ([KEY, "--output", "s3://b/x.png"], "--output s3://b/x.png: give a local file"),
        ([KEY], "--output"),
    ],
)
def test_wrong_questions_get_one_line(
    arguments: list[str], words: str, dst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = export(capsys, dst, *arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


def test_the_json_line_and_the_options_of_the_store(
    dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sample.png"
    options = '--storage-options={"anon": true}'
    try:
        code, out, _ = export(capsys, dst, KEY, "--output", path, options, "--json")
        assert code == 0
        assert options_of("s3")["anon"] is True
    finally:
        use_options({})
    first, last = out.splitlines()
    assert first == str(path)
    row = row_of(dst, KEY)
    assert json.loads(last) == {
        "output": str(path),
        "shard": "00000000",
        **{name: row[name] for name in ("key", "num_gaussians", "width", "height", "psnr")},
    }
    code, _, err = export(capsys, dst, KEY, "--output", path, "--storage-options=secrt")
    assert (code, "not JSON" in err, "secrt" in err) == (1, True, False)


def test_a_folder_without_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = export(capsys, tmp_path, KEY, "--output", "x.png")
    assert (code, "holds no finished shard" in err) == (1, True)
    code, _, err = export(capsys, tmp_path / "none", KEY, "--output", "x.png")
    assert (code, "no such folder" in err) == (1, True)


def test_without_gsplat_the_remedy_is_said(
    dst: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "gsplat"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gsplat", None)
    code, _, err = export(capsys, dst, KEY, "--output", "x.ply")
    assert code == 1
    assert "which cannot be imported" in err
    assert "pip install gsplat" in err


@pytest.mark.parametrize("damage", ["damaged", "gone", "another"])
def test_a_damaged_shard_names_the_remedy(
    damage: str, dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path(shutil.copytree(dst, tmp_path / "bad"))
    data = min(bad.glob("*.parquet"))
    if damage == "gone":
        data.unlink()
    elif damage == "another":  # a good file, but not this shard's
        shutil.copy(max(bad.glob("*.parquet")), data)
    else:
        data.write_bytes(data.read_bytes()[:-10])
    code, _, err = export(capsys, bad, KEY, "--output", tmp_path / "x.png")
    assert (code, f"{data.name}" in err, err.count("\n")) == (1, True, 1)
    assert err.endswith(f": run splatshard repair {bad}\n")
    assert main(["report", str(bad)]) == 1
    assert capsys.readouterr().err.endswith(f": run splatshard repair {bad}\n")


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    dst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["report", str(dst), "--output", str(dst)]) == 1
    err = capsys.readouterr().err
    assert err == f"splatshard: error: --output {dst}: is a folder; name a file in it\n"


def test_without_a_key_samples_are_listed(
    dst: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = export(capsys, dst)
    assert (code, len(out.splitlines())) == (0, 6)
    assert f"{BAD}  corrupt_image\n" in out or f"{BAD}  not_an_image\n" in out
    row = row_of(dst, KEY)
    assert f"{KEY}  24x24 px  9 Gaussians  {row['psnr']:.2f} dB\n" in out
    assert "6 samples; one of them: splatshard export" in err
    monkeypatch.setattr(export_module, "LISTED", 4)
    code, out, _ = export(capsys, dst, "--json")
    assert json.loads(out) == {"samples": 6, "keys": [f"{i:012d}" for i in range(4)]}


def test_a_sample_for_the_library(
    dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    assert export(capsys, dst, KEY, "--output", path)[0] == 0
    image = splatshard.load(path)
    png = tmp_path / "a.png"
    assert export(capsys, dst, KEY, "--output", png)[0] == 0
    assert np.array_equal(np.asarray(Image.open(png)), np.asarray(image.to_pil()))
    assert image.decode == DecodeConfig(image_size=24)
