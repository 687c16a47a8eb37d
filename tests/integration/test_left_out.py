"""Folders as users have them: classes, files that are left out, and nothing that is good."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from splatshard.jobs import status
from splatshard.pipeline.shards.rows import read_rows
from tests.integration.running import assert_verified, convert_json, run_json
from tests.make import image_folder, jpeg, write_parquet, write_tar

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("shared_ray")]

Capsys = pytest.CaptureFixture[str]


def test_a_folder_with_classes_and_other_files(tmp_path: Path, capsys: Capsys) -> None:
    src = image_folder(tmp_path / "val", ("ant", "dog"), per_class=1)
    (src / "bee").mkdir()
    (src / "dog" / "0000.JPG").write_bytes(jpeg(seed=7))
    (src / "notes.md").write_text("x")
    dst = tmp_path / "out"
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["ok"], "the same bytes" in err) == (0, 3, False), err
    assert "3 classes by folder: ant, bee, dog\n" in err
    assert f"no image in 1 of the class folders of {src}: bee\n" in err
    assert "left out of SRC: 1 file: 1 of no known kind (1 md)\n" in err
    assert summary["left_out"] == {"other": {"md": 1}}
    assert (dst / "classnames.txt").read_text() == "ant\nbee\ndog\n"
    (data,) = dst.glob("*.parquet")
    assert {row["key"]: row["label"] for row in read_rows(str(data))} == {
        "ant/0000": 0,
        "dog/0000.JPG": 2,
        "dog/0000.jpg": 2,
    }
    assert assert_verified(capsys, dst)["left_out"] == summary["left_out"]

    (src / "notes.md").unlink()  # a run without work corrects it, and keeps the last one's figures
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["left_out"], summary["images_converted"]) == (0, {}, 0)
    assert run_json(capsys, status, dst)[1]["left_out"] == {}
    assert json.loads((dst / "_run.json").read_text())["images_converted"] == 3

    other = image_folder(tmp_path / "test", ("dog",), per_class=1)
    code, _, err = convert_json(capsys, other, tmp_path / "test-out", f"--classes={dst}")
    assert code == 0, err
    (data,) = (tmp_path / "test-out").glob("*.parquet")
    assert [row["label"] for row in read_rows(str(data))] == [2]


def test_no_good_sample_is_no_success(tmp_path: Path, capsys: Capsys) -> None:
    write_tar(tmp_path / "in" / "a.tar", [("a.jpg", b"<html>"), ("b.txt", b"a cat")])
    write_tar(tmp_path / "in" / "b.tar", [])
    dst = tmp_path / "größe"  # which Ray's metrics do not take
    code, summary, err = convert_json(capsys, tmp_path / "in", dst)
    assert (code, summary["ok"], summary["shards_done"]) == (3, 0, 2)
    assert "2 shards: a, b, 1 of them from a file that holds no sample at all\n" in err
    assert "no sample of SRC has splats" in err
    assert json.loads((dst / "_progress.json").read_text())["state"] == "failed"
    assert convert_json(capsys, tmp_path / "in", dst)[0] == 3
    write_tar(tmp_path / "in" / "c.tar", [("c.jpg", jpeg())])
    code, _, err = convert_json(capsys, tmp_path / "in", dst)
    assert (code, "without any ok sample" in err) == (0, False), err
    assert json.loads((dst / "_progress.json").read_text())["state"] == "done"


def test_columns_as_users_have_them(tmp_path: Path, capsys: Capsys) -> None:
    """Nothing of a table is lost for the name or type of a column, and what is not used is told."""
    captions = pa.array([b"a boat", b"caf\xe9", b"a cat"], pa.binary()).view(pa.string())
    columns = {"jpg": [jpeg()] * 3, "key": ["C", "D", "C"], "label": ["cat"] * 3}
    for name in "ab":
        write_parquet(tmp_path / "in" / f"{name}.parquet", pa.table(columns | {"text": captions}))
    dst = tmp_path / "out"
    code, summary, err = convert_json(capsys, tmp_path / "in", dst)
    assert (code, summary["ok"], summary["skipped"]) == (0, 6, {}), err
    assert err.count("label is not used: 'cat' is not the number of a class (3 samples, ") == 1
    assert err.count("key is not used: its values repeat, so rows are numbered (3 samples, ") == 1
    assert summary["unused"] == {"key": 6, "label": 6, "what is not UTF-8 in text": 2}
    assert "2 shards are made of the same bytes, so their samples are several: a and b\n" in err
    rows = list(read_rows(str(next(dst.glob("a-*.parquet")))))
    assert [row["key"] for row in rows] == [f"a-{i:08d}" for i in range(3)]
    assert [row["caption"] for row in rows] == ["a boat", "caf\ufffd", "a cat"]
    assert rows[1]["members"] == [{"name": "text", "data": b"caf\xe9"}]
    assert json.loads(rows[2]["metadata"]) == {"key": "C", "label": "cat"}
