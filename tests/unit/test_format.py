"""FORMAT.md is enough to write a reader: that of format_reader.py agrees with ours.

Also: its examples and tables are true, and shards open in the usual Parquet readers.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from splatshard.pipeline.codec.pack import unpack
from splatshard.pipeline.codec.planes import encode, join
from splatshard.pipeline.codec.quantise import on_grid
from splatshard.pipeline.kernels import reference
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.verify import survey
from splatshard.pipeline.splats import Splats
from splatshard.schemas.shard import SKIP_STATUSES, FailedShard, ShardManifest
from splatshard.schemas.splats import CODECS, FORMAT_VERSION, PLANES, columns, shard_metadata
from tests.format_reader import assert_close, decode, picture
from tests.rows import HEIGHT, WIDTH, make_rows, packed, random_splats, values_of, write_shard

ROOT = Path(__file__).resolve().parents[2]
FORMAT_MD = (ROOT / "schemas" / "FORMAT.md").read_text()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [0, 1, 2, 117])
@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (9, 5)])
def test_the_documents_decoder_agrees(codec: str, n: int, height: int, width: int) -> None:
    (row,) = packed(random_splats(1, n), codec, height=height, width=width)
    wanted = values_of(unpack([row], height, width, codec))[0].numpy()
    found = decode(row["splats"], codec, width, height)
    if codec == "fp16":
        np.testing.assert_array_equal(found, wanted)
    else:
        assert_close(found, wanted, max(height, width))


@pytest.mark.parametrize("step", [1e-7, 0.03, 30.0])
def test_the_documents_decoder_agrees_on_extremes(step: float) -> None:
    """Tokens of all kinds, cells of all widths, Gaussians at the ends of every range."""
    splats = random_splats(1, 40)
    splats = replace(splats, cholesky=splats.cholesky * 10 ** torch.linspace(-5, 5, 40)[:, None])
    steps = torch.tensor([step], dtype=torch.float64)
    (planes,) = encode(on_grid(splats, splats, steps, torch.zeros(1, 3, HEIGHT, WIDTH)))
    wanted = values_of(unpack([{"splats": planes}], HEIGHT, WIDTH, "compact"))[0].numpy()
    assert_close(decode(planes, "compact", WIDTH, HEIGHT), wanted, WIDTH)


@pytest.mark.parametrize("codec", ["fp16", "q11"])
def test_the_documents_decoder_agrees_on_any_bytes(codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4 + 11 * 16 * 50, np.uint8).tobytes()
    payload = bytes.fromhex("0000803f") + noise[4:] if codec == "q11" else noise[4:]
    wanted = values_of(unpack([{"splats": payload}], HEIGHT, WIDTH, codec))[0].numpy()
    with np.errstate(invalid="ignore"):  # some are NaN
        np.testing.assert_array_equal(decode(payload, codec, WIDTH, HEIGHT), wanted)


def test_the_documents_picture_agrees() -> None:
    splats = unpack(packed(random_splats(1, 6), "fp16", height=10, width=12), 10, 12, "fp16")
    wanted = reference.render(splats, 10, 12, 3.0)[0].permute(1, 2, 0).numpy()
    found = picture(values_of(splats)[0].numpy(), 12, 10, 3.0)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


EXAMPLES = re.findall(r"```example (\w+) (\d+) (\d+)\n(.*?)```", FORMAT_MD, re.DOTALL)


def example_of(name: str) -> tuple[Any, np.ndarray, int, int]:
    """Payload, Gaussians, width and height."""
    (match,) = [example for example in EXAMPLES if example[0] == name]
    width, height, lines = int(match[1]), int(match[2]), match[3].splitlines()
    values = np.array([line.split() for line in lines if "." in line], float)
    coded = [line for line in lines if "." not in line]
    if name == "planes":
        named = [line.split(maxsplit=1) for line in coded]
        return {plane: bytes.fromhex(data) for plane, data in named}, values, width, height
    return bytes.fromhex("".join(coded)), values, width, height


@pytest.mark.parametrize(
    ("name", "codec"), [("fp16", "fp16"), ("planes", "balanced"), ("q11", "q11")]
)
def test_the_documents_examples_are_true(name: str, codec: str) -> None:
    payload, values, width, height = example_of(name)
    np.testing.assert_allclose(decode(payload, codec, width, height), values, atol=6e-7)
    found = unpack([{"splats": payload}], height, width, codec)
    np.testing.assert_allclose(values_of(found)[0], values, atol=2e-6)


def test_the_documents_examples_are_of_the_same_gaussians() -> None:
    payload, values, width, height = example_of("fp16")
    means, cholesky, colors = torch.tensor(values)[None].split((2, 3, 3), -1)
    splats = Splats(means, cholesky, colors, torch.ones(1, 2, dtype=torch.bool))
    assert packed(splats, "fp16", height=height, width=width) == [{"splats": payload}]
    planes, _, width, height = example_of("planes")
    step = torch.tensor([1 / 32], dtype=torch.float64)
    codes = on_grid(splats, splats, step, torch.zeros(1, 3, height, width))
    assert encode(codes) == [planes]


def test_every_kind_of_payload_has_an_example() -> None:
    assert [example[0] for example in EXAMPLES] == ["fp16", "planes", "q11"]


def test_the_documents_member_of_a_tar() -> None:
    """N, n, a Brotli stream of n bytes with seven planes, bits."""
    planes = example_of("planes")[0]
    member = join(planes)
    count, size = struct.unpack("<II", member[:8])
    assert count == 2
    assert member[8 + size :] == planes["bits"]
    symbols = pa.Codec("brotli").decompress(member[8 : 8 + size], 14, asbytes=True)
    assert symbols == b"".join(planes[name] for name in PLANES[:-1])


def table_after(heading: str) -> list[list[str]]:
    """The cells of the first table after `heading`, without its header."""
    text = FORMAT_MD.split(heading, 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names_in(cells: list[str]) -> list[str]:
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_the_documents_tables_name_every_field() -> None:
    rows = table_after("\n## Rows\n")
    schema = columns(shard_metadata("fp16", 3.0, {"fit": {"nested": "400,900"}, "teacher": {}}))
    assert names_in([row[0] for row in rows]) == schema.names
    for names, kind, null, _ in rows:
        for name in names_in([names]):
            column = schema.field(name)
            assert column.nullable == (null != "never"), name
            if pa.types.is_primitive(column.type):
                assert {"float": "float32"}.get(str(column.type), str(column.type)) == kind
    plain = columns(shard_metadata("balanced", 3.0, {}))
    some = ("nested shards only", "shards with a teacher only")
    only_some = [names_in([row[0]])[0] for row in rows if row[3].startswith(some)]
    assert [name for name in schema.names if name not in plain.names] == only_some
    payload = next(row for row in rows if row[0] == "`splats`")
    assert names_in([payload[3].split("else a struct of")[1]]) == list(PLANES)
    statuses = table_after("Statuses of skipped samples:")
    assert names_in([row[0] for row in statuses]) == list(SKIP_STATUSES)
    marker = names_in([row[0] for row in table_after("\n### Marker\n")])
    assert sorted(marker) == sorted(ShardManifest.__dataclass_fields__)
    failed = re.search(r"A failed marker has (.*?)\.", FORMAT_MD, re.DOTALL)[1]
    assert sorted(re.findall(r"`(\w+)`", failed)) == sorted(FailedShard.__dataclass_fields__)
    metadata = re.search(r"### Shard metadata\n(.*?)\n###", FORMAT_MD, re.DOTALL)[1]
    assert all(f"`{name}`" in metadata for name in (*shard_metadata("fp16", 3.0, {}), *CODECS))
    assert FORMAT_MD.startswith(f"# Splat shards, format version {FORMAT_VERSION}\n")
    versions = [row[2] for row in table_after("\n### Marker\n") if row[0] == "`format_version`"]
    assert versions == [str(FORMAT_VERSION)]


def test_the_documents_statistics_are_those_of_a_shard(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.parquet", make_rows(4))
    names = names_in([row[0] for row in table_after("\nStatistics; ")])
    assert set(names) == set(survey(str(path)).statistics)


# Other readers, offline


KINDS = [("fp16", ()), ("balanced", ()), ("compact", (8, 20))]


@pytest.fixture(params=KINDS, ids=["fp16", "balanced", "nested"])
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    """A Parquet shard and its rows."""
    codec, budgets = request.param
    rows = make_rows(8, codec=codec, budgets=budgets)
    path = write_shard(tmp_path / "shard.parquet", rows, codec=codec, budgets=budgets)
    return str(path), list(read_rows(str(path)))


def test_opens_in_pyarrow(shard: tuple[str, list[dict[str, Any]]]) -> None:
    path, rows = shard
    assert pq.read_table(path).to_pylist() == rows
    ok = pq.read_table(path, columns=["key", "psnr"], filters=[("psnr", ">", 26)])
    assert ok.column("key").to_pylist() == [r["key"] for r in rows if (r["psnr"] or 0) > 26]
    payloads = pq.read_table(path, columns=["splats"]).column("splats").to_pylist()
    assert payloads == [row["splats"] for row in rows]


def test_opens_in_duckdb(shard: tuple[str, list[dict[str, Any]]]) -> None:
    path, rows = shard
    plane = "splats" if isinstance(rows[0]["splats"], bytes) else "splats.gap"
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT * FROM '{path}'")
        names = [column[0] for column in found.description]
        table = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        sums = f"status, count(*), sum(octet_length({plane}))"
        counts = connection.execute(f"SELECT {sums} FROM '{path}' GROUP BY 1 ORDER BY 1").fetchall()
    assert table == rows
    n = 8 if "splats_20" in rows[0] else 20
    each = n * (16 if plane == "splats" else 1)
    assert counts == [("corrupt_image", 2, None), ("ok", 6, 6 * each)]


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
    feature = dataset.features["splats"]
    leaves = feature.values() if isinstance(feature, dict) else [feature]
    assert {leaf.dtype for leaf in leaves} == {"binary"}
