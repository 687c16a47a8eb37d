"""Golden shards: those of every released format version still read to the values recorded beside
them, verify and export.

`tests/data/golden/*`, each a destination: the code of that version's release converted a tar of
three samples (PNGs `photo(24, 20, i)`, caption, label, uid and a further member; the second image
is the bytes "broken") by `convert_shard` on the CPU: 16 Gaussians or nested budgets of 4, 9 and 16,
10 steps, 20 px; `source_url` was shortened. `values.npy` is what that code read back, [2, 16, 8].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from splatshard.jobs.__main__ import main
from splatshard.pipeline.codec.pack import unpack_row
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.pipeline.shards.verify import survey, verify_shard
from splatshard.schemas.shard import ShardManifest
from splatshard.schemas.splats import CODECS, FORMAT_VERSION, columns
from tests.format_reader import assert_close, decode
from tests.rows import values_of

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.mark.parametrize("extension", ["parquet", "tar"])
def test_the_first_shards_read_to_their_recorded_values(extension: str) -> None:
    """Of format version 1, of a writer before any release, without markers."""
    path = str(DATA / f"golden-v1.{extension}")
    golden = json.loads((DATA / "golden-v1.json").read_text())[extension]
    metadata = shard_metadata_of(path)
    assert {name: metadata[name] for name in golden["metadata"]} == golden["metadata"]
    rows = list(read_rows(path))
    assert survey(path).problems == []
    assert len(rows) == len(golden["rows"])
    for row, wanted in zip(rows, golden["rows"], strict=True):
        values = wanted.pop("gaussians")
        members = [{"name": m["name"], "data": m["data"].decode()} for m in row["members"]]
        names = columns(metadata).names
        assert {**row, "splats": None, "members": members} == dict.fromkeys(names) | wanted
        if values is None:
            assert row["splats"] is None
            continue
        found = unpack_row(row, metadata)
        torch.testing.assert_close(values_of(found)[0], torch.tensor(values), rtol=1e-6, atol=0)


GOLDEN = sorted(path.name for path in (DATA / "golden").iterdir())


def golden(name: str) -> tuple[ShardManifest, dict[str, Any], list[dict[str, Any]]]:
    """Marker, metadata and rows."""
    (manifest,) = read_markers(str(DATA / "golden" / name)).values()
    assert isinstance(manifest, ShardManifest)
    path = str(DATA / "golden" / name / manifest.data_file)
    metadata = shard_metadata_of(path, manifest.format)
    return manifest, metadata, list(read_rows(path, manifest.format))


def test_there_are_golden_shards_of_every_version_codec_and_format() -> None:
    found = [golden(name)[:2] for name in GOLDEN]
    kinds = {(meta["format_version"], meta["codec"], marker.format) for marker, meta in found}
    assert {(1, "fp16"), (1, "q11")} == {kind[:2] for kind in kinds if kind[0] == 1}
    assert set(CODECS) == {kind[1] for kind in kinds if kind[0] == FORMAT_VERSION}
    for version in range(1, FORMAT_VERSION + 1):
        assert {kind[2] for kind in kinds if kind[0] == version} == {"parquet", "webdataset"}
    assert sum(bool(meta.get("budgets")) for _, meta in found) == 2


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_shards_read_to_their_recorded_values(name: str) -> None:
    manifest, metadata, rows = golden(name)
    values = np.load(DATA / "golden" / name / "values.npy")
    assert [row["status"] for row in rows] == ["ok", "not_an_image", "ok"]
    assert [row["key"] for row in rows] == [f"{i:012d}" for i in range(3)]
    assert [row["label"] for row in rows] == [0, 1, 2]
    assert rows[2]["caption"] == "a photo of number 2, café"
    assert rows[2]["uid"] == f"{2:032x}"
    assert rows[2]["members"] == [{"name": "seg.bin", "data": bytes([2]) * 5}]
    assert rows[1]["splats"] is None
    assert manifest.format_version == metadata["format_version"] == int(name[1])
    for row, wanted in zip((rows[0], rows[2]), values, strict=True):
        found = values_of(unpack_row(row, metadata))[0].numpy()
        assert_close(found, wanted, 20)
        parts = [row[column] for column in row if column.startswith("splats")]
        decoded = [decode(part, metadata["codec"], 20, 20) for part in parts]
        assert_close(np.concatenate(decoded), wanted, 20)
        for budget in metadata.get("budgets", []):
            prefix = values_of(unpack_row(row, metadata, budget))[0].numpy()
            np.testing.assert_array_equal(prefix, found[:budget])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_shards_verify_and_export(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = str(DATA / "golden" / name)
    assert verify_shard(dst, golden(name)[0]) == []
    path = tmp_path / "x.png"
    arguments = [dst, "000000000002", "--output", str(path), "--backend", "reference"]
    assert main(["export", *arguments]) == 0
    assert "16 Gaussians, 20x20 px" in capsys.readouterr().err
    with Image.open(path) as image:
        assert np.asarray(image).std() > 20  # a picture
