"""convert, status, verify and report on small inputs, with a real Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from splatshard.jobs import convert, demo, export, repair, report, status, verify
from splatshard.pipeline.codec.pack import unpack_row
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.pipeline.shards.verify import survey
from splatshard.schemas.splats import EXTENSIONS
from tests.integration.running import (
    SMALL,
    Converted,
    assert_verified,
    convert_json,
    convert_once,
    files,
    finished,
    run_json,
    tars,
)
from tests.make import image_folder, image_parquet, imagenet_tar

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("shared_ray")]

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, shared_ray: None) -> Converted:
    return convert_once(tmp_path_factory.mktemp("converted"), 2)


@pytest.fixture
def made(converted: Converted) -> tuple[str, Path, dict[str, bytes]]:
    """SRC, DST and the files of DST."""
    return converted.put_back()


def no_ray(*arguments: object) -> None:
    raise AssertionError("Ray must not be started")


@pytest.mark.parametrize("format", sorted(EXTENSIONS))
def test_end_to_end(format: str, tmp_path: Path, capsys: Capsys, monkeypatch) -> None:
    src, dst = tars(tmp_path / "in", shards=3), tmp_path / "out"
    code, summary, err = convert_json(capsys, src, dst, f"--format={format}", "--workers=2")
    assert code == 0, err
    assert (summary["samples"], summary["ok"], summary["skipped"]) == (9, 9, {})
    assert (summary["shards_done"], summary["shards_skipped_done"]) == (3, 0)
    assert summary["shards_failed"] == 0
    assert 5 < summary["psnr_mean"] < 60
    assert summary["num_gaussians_mean"] == 16
    assert (summary["workers"], summary["backend"]) == (2, "cpu")
    assert 0 < summary["time_to_first_shard_s"] <= summary["wall_s"]
    assert summary["images_per_s"] == pytest.approx(9 / summary["wall_s"])
    assert json.loads((dst / "_run.json").read_text()) == summary
    assert "splatshard verify" in err
    assert "splatshard report" in err

    state = assert_verified(capsys, dst)
    assert (state["shards_done"], state["shards_missing"], state["ok"]) == (3, 0, 9)
    data = sorted(dst.glob(f"*.{EXTENSIONS[format]}"))
    stored = sum(survey(str(path), format).statistics["payload_bytes"] for path in data)
    assert summary["bytes_per_image"] == stored / 9
    assert format != "webdataset" or stored < 9 * 16 * 16  # fp16 would be as large
    rows = [row for path in data for row in read_rows(str(path), format)]
    assert all(row["psnr_loss"] <= 0.201 for row in rows)
    assert [row["caption"] for row in rows] == [f"photograph number {i}" for i in range(9)]
    assert [row["uid"] for row in rows] == [f"{i:032x}" for i in range(9)]

    before = files(dst), finished(dst)
    monkeypatch.setattr("splatshard.jobs.driver.session.ray_session", no_ray)
    for path in (tmp_path / "in").iterdir():
        os.utime(path, (1, 1))  # another modification time, the same bytes
    code, summary, err = convert_json(capsys, src, dst, f"--format={format}")
    assert code == 0
    assert "everything is already done" in err
    assert (summary["samples"], summary["shards_skipped_done"]) == (9, 3)
    assert before[1] == finished(dst)
    assert_verified(capsys, dst)


@pytest.mark.parametrize(("format", "codec"), [("parquet", "compact"), ("webdataset", "fp16")])
def test_nested_budgets_end_to_end(format: str, codec: str, tmp_path: Path, capsys: Capsys) -> None:
    src, dst = tars(tmp_path / "in"), tmp_path / "out"
    flags = ("--nested=6,10,16", f"--format={format}", f"--codec={codec}", "--image-size=32")
    code, summary, err = run_json(capsys, convert, src, dst, *flags, "--steps=5", "--workers=1")
    assert (code, summary["ok"], summary["num_gaussians_mean"]) == (0, 6, 16), err
    assert_verified(capsys, dst)
    paths = [str(path) for path in sorted(dst.glob(f"*.{EXTENSIONS[format]}"))]
    for path in paths:
        metadata = shard_metadata_of(path)
        assert metadata["budgets"] == [6, 10, 16]
        for row in read_rows(path):
            assert row["psnr_6"] < row["psnr"]
            for budget in (6, 10, 16):
                assert unpack_row(row, metadata, budget).num_gaussians.tolist() == [budget]
    key, png = f"{4:012d}", tmp_path / "x.png"
    assert run_json(capsys, export, dst, key, f"--output={png}")[1]["num_gaussians"] == 16
    assert report.main([str(dst), "--samples", "2"]) == 0
    assert (dst / "report.html").read_text().count("<ellipse ") == 2 * 16
    before = files(dst)
    Path(paths[1]).unlink()
    code, found, err = run_json(capsys, repair, dst)
    assert (code, found["redone"]) == (0, ["00000001"]), err
    assert files(dst) == before


def test_report_of_a_conversion(
    made: tuple[str, Path, dict[str, bytes]], tmp_path: Path, capsys: Capsys
) -> None:
    _, dst, _ = made
    capsys.readouterr()
    assert report.main([str(dst), "--samples", "4"]) == 0
    assert capsys.readouterr().out.strip() == f"{dst}/report.html"
    html = (dst / "report.html").read_text()
    assert html.count("<article") == 4
    assert html.count("<ellipse ") == 4 * 16
    assert "photograph number" in html
    assert "JPEG q75" in html
    assert_verified(capsys, dst)

    for path in (dst.parent / "in").iterdir():
        path.unlink()
    assert report.main([str(dst), "--output", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert html.count("<article") == 6
    assert "6 originals could not be read" in html


def test_more_shards_with_the_same_recipe_are_added(tmp_path: Path, capsys: Capsys) -> None:
    src, dst = tars(tmp_path / "in"), tmp_path / "out"
    first = f"{tmp_path}/in/00000000.tar"
    assert convert_json(capsys, first, dst)[0] == 0
    before = finished(dst)
    code, summary, _ = convert_json(capsys, src, dst)
    assert (code, summary["shards_done"], summary["shards_skipped_done"]) == (0, 1, 1)
    assert before.items() <= finished(dst).items()
    assert assert_verified(capsys, dst)["shards_done"] == 2


def test_stale_shards_are_refused_and_redone_on_request(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    src, dst, before = made
    code, _, err = convert_json(capsys, src, dst, "--steps=4")
    assert code == 1
    assert "2 shards of another configuration" in err
    assert err.count("recipe.fit.steps: 3 -> 4") == 1
    assert "--overwrite-stale" in err
    assert files(dst) == before
    code, summary, err = convert_json(capsys, src, dst, "--steps=4", "--overwrite-stale")
    assert (code, summary["shards_done"]) == (0, 2), err
    assert assert_verified(capsys, dst)["shards_done"] == 2


def test_missing_and_damaged_shards_are_named(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    src, dst, _ = made
    damaged = next(dst.glob("00000001-*.parquet"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    (dst / "00000000.json").unlink()
    left = next(dst.glob("00000000-*.parquet")).read_bytes()  # by a killed worker
    (dst / "00000000-0123abcd.parquet").write_bytes(left)
    code, found, err = run_json(capsys, verify, dst)
    assert code == 1
    assert any("00000000 is planned but missing" in problem for problem in found["problems"])
    assert any(damaged.name in problem for problem in found["problems"])
    assert any("00000000-0123abcd.parquet" in note for note in found["notes"])
    assert "wrong:" in err
    state = run_json(capsys, status, dst)[1]
    assert (state["missing"], state["shards_done"]) == (["00000000"], 1)

    (dst / "00000001.json").unlink()
    assert convert_json(capsys, src, dst)[0] == 0
    assert_verified(capsys, dst)


def test_limit_takes_the_first_samples(tmp_path: Path, capsys: Capsys) -> None:
    src, dst = tars(tmp_path / "in", shards=3), tmp_path / "out"
    code, summary, _ = convert_json(capsys, src, dst, "--limit=4")
    assert (code, summary["samples"], summary["shards_done"]) == (0, 4, 2)


def test_imagenet_huggingface_and_folders(tmp_path: Path, capsys: Capsys) -> None:
    imagenet_tar(tmp_path / "in" / "train-000.tar", 4)
    image_parquet(tmp_path / "in" / "cats.parquet", 4)
    folder = image_folder(tmp_path / "folder", per_class=3)
    src = f"{tmp_path}/in/train-000.tar::{tmp_path}/in/cats.parquet::{folder}"
    dst = tmp_path / "out"
    code, summary, err = convert_json(capsys, src, dst, "--samples-per-shard=4")
    assert (code, summary["samples"], summary["ok"]) == (0, 14, 14), err
    assert_verified(capsys, dst)


def test_dry_run_estimates_and_writes_nothing(tmp_path: Path, capsys: Capsys) -> None:
    src, dst = tars(tmp_path / "in", shards=4, samples=5), tmp_path / "out"
    arguments = [src, str(dst), *SMALL, "--dry-run"]
    code, estimate, err = run_json(capsys, convert, *arguments)
    assert code == 0
    assert estimate["samples"] == pytest.approx(20, abs=3)
    assert estimate["psnr_mean"] > 5
    assert estimate["stored_bytes"] > 20 * 256
    assert "nothing was written" in err
    assert not dst.exists()


def test_the_demo(tmp_path: Path, capsys: Capsys) -> None:
    pytest.importorskip("skimage")
    folder = tmp_path / "demo"
    arguments = [str(folder), "--num-gaussians=16", "--steps=2", "--image-size=32"]
    assert demo.main(arguments) == 0
    assert f"{folder}/splats/report.html" in capsys.readouterr().out
    tars_before = {p: p.stat().st_mtime_ns for p in (folder / "input").iterdir()}
    assert demo.main(arguments) == 0
    assert "everything is already done" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (folder / "input").iterdir()} == tars_before
    state = assert_verified(capsys, folder / "splats")
    assert (state["shards_done"], state["ok"], state["skipped"]) == (4, 64, {"corrupt_image": 1})
