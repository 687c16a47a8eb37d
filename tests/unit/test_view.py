"""What `splatshard view` answers: figures, lists, samples, pictures, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from splatshard.jobs.pages import view_data
from splatshard.jobs.pages.view_data import PAGE, Query, View
from splatshard.pipeline.codec.pack import unpack_row
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.rows import read_rows
from splatshard.schemas.errors import UsageError
from splatshard.schemas.splats import metadata_of
from tests.splat_shards import commit, make_dataset, rows_of, splat_config
from tests.viewing import (
    BROKEN,
    BUDGETS,
    HOSTILE,
    ROWS,
    SHARDS,
    ask,
    convert,
    make_source,
    pixels_of,
    refusal,
)

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its shards."""
    folder = tmp_path_factory.mktemp("view")
    make_source(folder / "in")
    convert(folder / "in", folder / "out")
    return folder / "in", folder / "out"


@pytest.fixture(scope="module")
def view(made: tuple[Path, Path]) -> View:
    src, dst = made
    return View(str(dst), str(src), "cpu")


# Figures and lists


def test_overview_and_shard(view: View) -> None:
    found = ask(view, "/api/overview")
    assert found["shards"] == {"done": 2, "failed": 0, "missing": 0, "stale": 0, "corrupt": 0}
    assert (found["samples"], found["skipped"]) == (2 * ROWS, {"not_an_image": 2})
    assert sum(found["histogram"]["counts"]) == found["ok"] == 2 * (ROWS - 1)
    one = ask(view, "/api/shard?shard=a")
    assert (one["samples"], one["budgets"], one["codec"]) == (ROWS, list(BUDGETS), "balanced")
    names = [shard["name"] for shard in ask(view, "/api/shards")["items"]]
    assert names == list(SHARDS)
    assert [shard["name"] for shard in ask(view, "/api/shards?text=B")["items"]] == ["b"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> View:
    """Three shards; every fourth row is skipped, and the PSNR rises from row to row."""
    dst = str(tmp_path_factory.mktemp("many"))
    make_dataset(dst, [2 * PAGE + 20, 7, 30])
    return View(dst, "", "cpu")


def rows_in(view: View, name: str) -> list[dict[str, Any]]:
    return list(read_rows(f"{view.dst}/{view.shards[name].data_file}"))


def test_pages_of_a_shard_have_every_row_once(many: View) -> None:
    pages = [ask(many, f"/api/samples?shard=00000&start={i * PAGE}") for i in range(4)]
    assert [len(page["items"]) for page in pages] == [PAGE, PAGE, 20, 0]
    rows = [item["row"] for page in pages for item in page["items"]]
    assert rows == list(range(2 * PAGE + 20))
    assert {page["total"] for page in pages} == {len(rows)}
    there = ask(many, f"/api/samples?shard=00000&around={PAGE + 3}")
    assert (there["start"], there["items"][3]["row"]) == (PAGE, PAGE + 3)


@pytest.mark.parametrize("order", ["worst", "best"])
def test_orders_by_psnr_end_with_those_that_have_none(many: View, order: str) -> None:
    items = ask(many, f"/api/samples?shard=00002&order={order}")["items"]
    psnrs = [item["psnr"] for item in items]
    ok = [psnr for psnr in psnrs if psnr is not None]
    assert ok == sorted(ok, reverse=order == "best")
    assert psnrs[len(ok) :] == [None] * 7


def all_of(view: View, query: str) -> tuple[list[tuple[str, int]], int]:
    """Shard and row of all that a scan finds, and the number of its pieces."""
    found: list[tuple[str, int]] = []
    place, pieces = ["", 0], 0
    while place:
        piece = ask(view, f"/api/scan?{query}&shard={place[0]}&row={place[1]}")
        assert len(piece["items"]) <= PAGE
        found += [(item["shard"], item["row"]) for item in piece["items"]]
        place, pieces = piece["next"], pieces + 1
    assert piece["done"] == piece["shards"] == len(view.shards)
    return found, pieces


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("status=ok", lambda row: row["status"] == "ok"),
        ("status=skipped", lambda row: row["status"] != "ok"),
        ("status=corrupt_image", lambda row: row["status"] == "corrupt_image"),
        ("status=too_large", lambda row: False),
        ("low=40&high=60.5", lambda row: row["psnr"] is not None and 40 <= row["psnr"] < 60.5),
        ("text=WORD%20word", lambda row: (row["caption"] or "").startswith("word word")),
        ("text=000002", lambda row: "000002" in row["key"]),
        ("text=.*", lambda row: False),
    ],
)
def test_a_scan_finds_what_is_wanted_once_and_in_order(many: View, query: str, wanted: Any) -> None:
    expected = [
        (name, i)
        for name in many.shards
        for i, row in enumerate(rows_in(many, name))
        if wanted(row)
    ]
    found, pieces = all_of(many, query)
    assert found == expected
    assert pieces > len(expected) // PAGE


def test_a_scan_that_takes_long_says_how_far_it_is(
    many: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_data, "SCAN_S", -1.0)
    found, pieces = all_of(many, "text=no%20such%20caption")
    assert (found, pieces) == ([], 3)


def test_shards_are_not_opened_whose_markers_say_enough(
    many: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(many, "table", lambda shard: opened.append(shard.url))
    for query in ("low=500", "high=1", "status=quarantined"):
        assert ask(many, f"/api/scan?{query}")["next"] is None
    assert opened == []


def test_lists_of_shards_are_paged_and_name_what_is_broken_first(tmp_path: Path) -> None:
    rows = rows_of(0, 1)
    for i in range(PAGE + 2):
        commit(str(tmp_path), f"{i:05d}", rows)
    (tmp_path / "00007.json").write_text('{"fingerprint": 1, "format_version": 2, "source_url": 3')
    view = View(str(tmp_path))
    first, second = (ask(view, f"/api/shards?start={start}") for start in (0, PAGE))
    assert (first["total"], len(first["items"]), len(second["items"])) == (PAGE + 2, PAGE, 2)
    assert [shard["state"] for shard in first["items"][:2]] == ["corrupt", "done"]
    names = [shard["name"] for shard in (*first["items"][1:], *second["items"])]
    assert names == [f"{i:05d}" for i in range(PAGE + 2) if i != 7]
    assert len(ask(view, "/api/shards?text=0001")["items"]) == 11


def test_lists_read_no_payloads_and_damage_names_the_remedy(tmp_path: Path) -> None:
    commit(str(tmp_path), "a", rows_of(0, 20, n=100), splat_config(n=100))
    (path,) = tmp_path.glob("*.parquet")
    footer = pq.ParquetFile(path).metadata.row_group(0)
    columns = [footer.column(i) for i in range(footer.num_columns)]
    (payload,) = (c for c in columns if c.path_in_schema == "splats")
    data = bytearray(path.read_bytes())
    data[payload.data_page_offset + payload.total_compressed_size // 2] ^= 255
    path.write_bytes(data)
    view = View(str(tmp_path))
    assert len(ask(view, "/api/samples?shard=a")["items"]) == 20
    assert len(ask(view, "/api/scan?text=word")["items"]) > 0
    status, error = refusal(view, "/image/rendering?shard=a&row=0")
    assert status == 500
    assert f"{path} cannot be read" in error
    assert f"run splatshard repair {tmp_path}" in error


def test_a_damaged_shard_does_not_end_a_scan(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [5, 5])
    (path,) = tmp_path.glob("00000-*.parquet")
    path.write_bytes(b"x" * path.stat().st_size)
    found = ask(View(str(tmp_path)), "/api/scan?status=ok")
    assert {item["shard"] for item in found["items"]} == {"00001"}
    (damaged,) = found["damaged"]
    assert f"{path} cannot be read" in damaged


# Samples


def test_facts_of_a_sample(view: View) -> None:
    found = ask(view, "/api/sample?shard=b&row=2")
    assert (found["key"], found["status"], found["rows"]) == ("b2", "ok", ROWS)
    assert found["caption"] == "a b photograph, number 2"
    row = rows_in(view, "b")[2]
    psnrs = [row["psnr_6"], row["psnr_12"], row["psnr"]]
    assert [budget["psnr"] for budget in found["budgets"]] == psnrs
    assert [budget["gaussians"] for budget in found["budgets"]] == list(BUDGETS)
    sizes = [sum(map(len, row[name].values())) for name in ("splats", "splats_12", "splats_24")]
    assert [budget["bytes"] for budget in found["budgets"]] == np.cumsum(sizes).tolist()
    skipped = ask(view, f"/api/sample?shard=a&row={BROKEN}")
    assert (skipped["status"], skipped["budgets"]) == ("not_an_image", [])
    assert skipped["error"]
    assert ask(view, "/api/sample?shard=a&row=0")["caption"] == HOSTILE


@pytest.mark.parametrize(
    ("format", "codec", "count", "n"),
    [
        ("parquet", "balanced", 3, 200),
        ("webdataset", "balanced", 4, 60),
        ("webdataset", "fp16", 4, 9),
    ],
)
def test_bytes_of_samples_add_up_to_what_is_stored(
    tmp_path: Path, format: str, codec: str, count: int, n: int
) -> None:
    """In Parquet up to what pages have besides."""
    rows = rows_of(0, count, n, codec)
    manifest = commit(str(tmp_path), "a", rows, splat_config(format, codec, n))
    view = View(str(tmp_path))
    items = ask(view, "/api/samples?shard=a&status=ok")["items"]
    facts = [ask(view, f"/api/sample?shard=a&row={item['row']}")["budgets"][0] for item in items]
    whole = manifest.statistics["payload_bytes"]
    besides = 0.08 * whole if format == "parquet" else 0
    assert sum(one["stored"] for one in facts) == pytest.approx(whole, abs=besides)
    assert sum(one["bytes"] for one in facts) >= whole + 2 * besides


@pytest.mark.parametrize("budget", BUDGETS)
def test_pictures_are_of_the_stored_bytes_and_the_budget(view: View, budget: int) -> None:
    row = rows_in(view, "a")[1]
    metadata = metadata_of(view.shards["a"].inputs["recipe"])
    splats = unpack_row(row, metadata, budget)
    height, width = row["height"], row["width"]
    image = select_backend("cpu").render(splats, height, width, metadata["cutoff"])[0]
    expected = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    place = f"shard=a&row=1&budget={budget}"
    rendering = pixels_of(ask(view, f"/image/rendering?{place}"))
    assert np.array_equal(rendering, expected)
    original = pixels_of(ask(view, "/image/original?shard=a&row=1")).astype(int)
    assert original.shape == (height, width, 3)
    residual = pixels_of(ask(view, f"/image/residual?{place}&gain=4"))
    assert np.array_equal(residual, np.minimum(255, 4 * abs(original - rendering)))
    found = ask(view, f"/api/ellipses?{place}")
    assert (found["gaussians"], found["width"], found["height"]) == (budget, width, height)
    assert len(found["ellipses"]) == budget
    thumbnail = pixels_of(ask(view, "/image/rendering?shard=a&row=1&side=16"))
    assert max(thumbnail.shape[:2]) == 16


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.iterdir() if p.is_dir()))
def test_shards_of_every_format_and_version_are_shown(name: str) -> None:
    """Tars, too, and rows in any order."""
    view = View(str(GOLDEN / name), "", "reference")
    (shard,) = view.shards
    rows = list(read_rows(f"{view.dst}/{view.shards[shard].data_file}"))
    items = ask(view, f"/api/samples?shard={shard}")["items"]
    assert [(i["key"], i["status"]) for i in items] == [(r["key"], r["status"]) for r in rows]
    for number in reversed(range(len(rows))):
        assert ask(view, f"/api/sample?shard={shard}&row={number}")["key"] == rows[number]["key"]
        if rows[number]["status"] == "ok":
            assert ask(view, f"/image/rendering?shard={shard}&row={number}")[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/api/sample?shard=no&row=0", "has no finished shard 'no'"),
        ("/api/sample?shard=a", "row is missing"),
        ("/api/sample?shard=a&row=-1", "row '-1': must be a whole number"),
        ("/api/sample?shard=a&row=²", "must be a whole number"),
        ("/api/sample?shard=a&row=99", "shard a has rows 0 to 4, not 99"),
        ("/api/sample?shard=../a&row=0", "has no finished shard"),
        ("/api/samples?shard=a&order=x", "order 'x': choose row, worst, best"),
        ("/api/samples?shard=a&status=x", "status 'x': choose"),
        ("/api/samples?shard=a&low=nan", "low 'nan': must be a number of dB"),
        ("/api/shards?order=x", "order 'x': choose name"),
        ("/image/rendering?shard=a&row=0&budget=7", "has no budget 7; its budgets: 6, 12, 24"),
        ("/image/rendering?shard=a&row=0&side=99999", "side '99999': must be"),
        ("/image/residual?shard=a&row=0&gain=65", "gain '65': must be"),
        (f"/image/rendering?shard=a&row={BROKEN}", "sample a3 was skipped as not_an_image"),
        (f"/image/original?shard=a&row={BROKEN}", "sample a3 was skipped as not_an_image"),
    ],
)
def test_what_cannot_be_answered_says_why(view: View, path: str, error: str) -> None:
    status, found = refusal(view, path)
    assert status == 400
    assert error in found


def test_shards_that_came_since_are_there_when_read_again(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [3])
    view = View(str(tmp_path))
    make_dataset(str(tmp_path), [3], first=1)
    assert ask(view, "/api/overview")["samples"] == 3
    assert ask(view, "/api/overview?again=again")["samples"] == 6


def test_a_status_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="choose ok, skipped"):
        Query(status="okay")
