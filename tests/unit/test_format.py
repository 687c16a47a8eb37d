"""FORMAT.md is enough to write a reader: this one follows its text, with numpy alone.

Also: its examples and tables are true, shards open in the usual Parquet readers, and the golden
shards of every released format version still read to the values recorded beside them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.kernels import reference
from pipeline.pack import pack, unpack
from pipeline.shards import read_rows, shard_metadata_of, survey
from schemas.shard import SKIP_STATUSES, FailedShard, ShardManifest
from schemas.splats import COLUMNS, NAMES, shard_metadata
from tests.rows import CODEC_NAMES, HEIGHT, WIDTH, make_rows, random_splats, values_of, write_shard

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
FORMAT_MD = (ROOT / "schemas" / "FORMAT.md").read_text()


def decode(payload: bytes, codec: str, width: int, height: int) -> np.ndarray:
    """FORMAT.md, "Payload": float32 [N, 8], x y l11 l21 l22 r g b. Uses nothing of the package."""
    header, row_bytes = {"fp16": (0, 16), "q11": (4, 11)}[codec]
    planes = np.frombuffer(payload, np.uint8, offset=min(header, len(payload)))
    rows = planes.reshape(row_bytes, -1).T.copy()  # [N, row_bytes]
    if codec == "fp16":
        out = rows.view("<f2").astype(float)
        out[:, 0] += width / 2
        out[:, 1] += height / 2
        return out.astype(np.float32)
    m = np.frombuffer(payload, "<f4", 1).astype(float) if payload else 0
    b = rows.astype(int)
    out = np.zeros((len(rows), 8))
    out[:, 0] = (2 * (b[:, 0] + 256 * b[:, 1]) / 65535 - 0.5) * width
    out[:, 1] = (2 * (b[:, 2] + 256 * b[:, 3]) / 65535 - 0.5) * height
    out[:, 2] = 2 ** ((4 * b[:, 4] + b[:, 7] % 4) / 64 - 5)
    out[:, 4] = 2 ** ((4 * b[:, 5] + b[:, 7] // 4 % 4) / 64 - 5)
    out[:, 3] = out[:, 4] * 2 * np.sinh((16 * b[:, 6] + b[:, 7] // 16 - 2048) / 384)
    signed = np.where(b[:, 8:] < 128, b[:, 8:], b[:, 8:] - 256) / 127
    out[:, 5:] = m * signed * np.abs(signed)
    return out.astype(np.float32)


def render(gaussians: np.ndarray, width: int, height: int, cutoff: float) -> np.ndarray:
    """FORMAT.md, "Geometry": [H, W, 3]."""
    image = np.zeros((height, width, 3))
    for x, y, l11, l21, l22, *color in gaussians.astype(float):
        for row in range(height):
            for column in range(width):
                u = (column + 0.5 - x) / l11
                v = (row + 0.5 - y - l21 * u) / l22
                if u * u + v * v <= cutoff**2:
                    image[row, column] += np.array(color) * math.exp(-(u * u + v * v) / 2)
    return image


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("n", [0, 1, 2, 117])
def test_the_documents_decoder_agrees(codec: str, n: int) -> None:
    (payload,) = pack(random_splats(1, n), HEIGHT, WIDTH, codec)
    wanted = values_of(unpack([payload], HEIGHT, WIDTH, codec))[0].numpy()
    np.testing.assert_array_equal(decode(payload, codec, WIDTH, HEIGHT), wanted)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_the_documents_decoder_agrees_on_any_bytes(codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4 + 11 * 16 * 50, np.uint8).tobytes()
    payload = bytes.fromhex("0000803f") + noise[4:] if codec == "q11" else noise[4:]
    wanted = values_of(unpack([payload], HEIGHT, WIDTH, codec))[0].numpy()
    with np.errstate(invalid="ignore"):  # some are NaN
        np.testing.assert_array_equal(decode(payload, codec, WIDTH, HEIGHT), wanted)


def test_the_documents_picture_agrees() -> None:
    splats = unpack(pack(random_splats(1, 6), 10, 12, "fp16"), 10, 12, "fp16")
    wanted = reference.render(splats, 10, 12, 3.0)[0].permute(1, 2, 0).numpy()
    found = render(values_of(splats)[0].numpy(), 12, 10, 3.0)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


EXAMPLES = re.findall(r"```example (\w+) (\d+) (\d+)\n(.*?)```", FORMAT_MD, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[0])
def test_the_documents_examples_are_true(example: tuple[str, str, str, str]) -> None:
    codec, width, height = example[0], int(example[1]), int(example[2])
    lines = example[3].splitlines()
    payload = bytes.fromhex("".join(line for line in lines if "." not in line))
    values = np.array([line.split() for line in lines if "." in line], float)
    np.testing.assert_allclose(decode(payload, codec, width, height), values, atol=5e-7)
    assert pack(unpack([payload], height, width, codec), height, width, codec) == [payload]


def test_every_codec_has_an_example() -> None:
    assert tuple(example[0] for example in EXAMPLES) == CODEC_NAMES


def table_after(heading: str) -> list[list[str]]:
    """The cells of the first table after `heading`, without its header."""
    text = FORMAT_MD.split(heading, 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names_in(cells: list[str]) -> list[str]:
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_the_documents_tables_name_every_field() -> None:
    columns = table_after("\n## Rows\n")
    assert names_in([row[0] for row in columns]) == list(NAMES)
    for names, kind, null, _ in columns:
        for name in names_in([names]):
            column = COLUMNS.field(name)
            assert column.nullable == (null != "never"), name
            if pa.types.is_primitive(column.type) or pa.types.is_binary(column.type):
                assert {"float": "float32"}.get(str(column.type), str(column.type)) == kind
    statuses = table_after("Statuses of skipped samples:")
    assert names_in([row[0] for row in statuses]) == list(SKIP_STATUSES)
    marker = names_in([row[0] for row in table_after("\n### Marker\n")])
    assert sorted(marker) == sorted(ShardManifest.__dataclass_fields__)
    failed = re.search(r"A failed marker has (.*?)\.", FORMAT_MD, re.DOTALL)[1]
    assert sorted(re.findall(r"`(\w+)`", failed)) == sorted(FailedShard.__dataclass_fields__)
    metadata = re.search(r"### Shard metadata\n(.*?)\n###", FORMAT_MD, re.DOTALL)[1]
    assert all(f"`{name}`" in metadata for name in shard_metadata("fp16", 3.0, {}))


# Other readers, offline


@pytest.fixture
def shard(tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    """A Parquet shard and its rows."""
    rows = make_rows(8)
    path = write_shard(tmp_path / "shard.parquet", rows)
    return str(path), list(read_rows(str(path)))


def test_opens_in_pyarrow(shard: tuple[str, list[dict[str, Any]]]) -> None:
    path, rows = shard
    assert pq.read_table(path).to_pylist() == rows
    ok = pq.read_table(path, columns=["key", "psnr"], filters=[("psnr", ">", 26)])
    assert ok.column("key").to_pylist() == [r["key"] for r in rows if (r["psnr"] or 0) > 26]


def test_opens_in_duckdb(shard: tuple[str, list[dict[str, Any]]]) -> None:
    path, rows = shard
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT * FROM '{path}'")
        names = [column[0] for column in found.description]
        table = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        sums = "status, count(*), sum(octet_length(splats))"
        counts = connection.execute(f"SELECT {sums} FROM '{path}' GROUP BY 1 ORDER BY 1").fetchall()
    assert table == rows
    assert counts == [("corrupt_image", 2, None), ("ok", 6, 6 * 20 * 16)]


def test_opens_in_polars(shard: tuple[str, list[dict[str, Any]]]) -> None:
    path, rows = shard
    assert polars.read_parquet(path).to_dicts() == rows
    ok = polars.scan_parquet(path).filter(polars.col("status") == "ok").select("splats").collect()
    assert ok["splats"].to_list() == [r["splats"] for r in rows if r["status"] == "ok"]


def test_opens_in_hugging_face_datasets(
    shard: tuple[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import datasets

    datasets.disable_progress_bars()
    path, rows = shard
    dataset = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    assert dataset.to_list() == rows
    assert dataset.features["splats"].dtype == "binary"


# Golden shards


@pytest.mark.parametrize("extension", ["parquet", "tar"])
@pytest.mark.parametrize("version", [1])
def test_golden_shards_read_to_their_recorded_values(version: int, extension: str) -> None:
    path = str(DATA / f"golden-v{version}.{extension}")
    golden = json.loads((DATA / f"golden-v{version}.json").read_text())[extension]
    metadata = shard_metadata_of(path)
    assert {name: metadata[name] for name in golden["metadata"]} == golden["metadata"]
    rows = list(read_rows(path))
    assert survey(path).problems == []
    assert len(rows) == len(golden["rows"])
    for row, wanted in zip(rows, golden["rows"], strict=True):
        values = wanted.pop("gaussians")
        members = [{"name": m["name"], "data": m["data"].decode()} for m in row["members"]]
        assert {**row, "splats": None, "members": members} == dict.fromkeys(NAMES) | wanted
        if values is None:
            assert row["splats"] is None
            continue
        found = unpack([row["splats"]], row["height"], row["width"], metadata["codec"])
        torch.testing.assert_close(values_of(found)[0], torch.tensor(values), rtol=1e-6, atol=0)
