"""docs/reading.md: its code runs as it stands, on shards as the commit leaves them, and gives what
the shards hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import read_peers
from splatshard.pipeline.codec.pack import pack_fp16, unpack, unpack_row
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.shards.commit import mark_failed
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from tests.rows import make_ref, random_splats, values_of
from tests.splat_shards import commit, rows_of, splat_config

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # few cores
    # torchdata 0.11 beside a newer torch
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # webdataset 1.0 leaves its last tar to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*_io.FileIO:pytest.PytestUnraisableExceptionWarning"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reading.md"
SECTIONS = {
    title: [code for block in blocks for code in block]
    for title, *blocks in (
        (part.partition("\n")[0], re.findall(r"^```python\n(.*?)^```$", part, re.M | re.S))
        for part in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
    )
}
SHARDS = 3
ROWS = 240
"""Of each shard; a quarter are skipped samples."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`splats` and `more` in Parquet, `tars` in WebDataset; and what is no shard beside them."""
    place = tmp_path_factory.mktemp("recipes")
    for number, (name, format) in enumerate(
        (("splats", "parquet"), ("more", "parquet"), ("tars", "webdataset"))
    ):
        dst = place / name
        dst.mkdir()
        for shard in range(SHARDS):
            rows = rows_of(10 * number + shard, ROWS)
            commit(str(dst), f"{shard:08d}", rows, splat_config(format, n=400))
        (dst / "_progress.json").write_text("{}")
        mark_failed(str(dst), make_ref("00000009"), splat_config(format), OSError("no disk"))
        (dst / f"00000009-abc.{'tar' if format == 'webdataset' else format}").write_bytes(b"cut")
    return place


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the code of a section beside the shards; returns the names it leaves."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))

    def run_section(title: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "recipe"}
        for code in SECTIONS[title]:
            exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)
        return names

    return run_section


def truth(folder: Path) -> dict[str, tuple[str | None, np.ndarray]]:
    """Caption and Gaussians [N, 8] of every sample by key, through the package's row reader."""
    found = {}
    for marker in folder.glob("0000000[0-2].json"):
        path = str(folder / json.loads(marker.read_text())["data_file"])
        metadata = shard_metadata_of(path)
        for row in read_rows(path):
            if row["status"] == "ok":
                gaussians = values_of(unpack_row(row, metadata))[0].numpy()
                found[row["key"]] = row["caption"], gaussians
    return found


def test_page_has_the_sections_that_are_run() -> None:
    assert [title for title, codes in SECTIONS.items() if codes] == [
        "SplatDataset",
        "Workers, ranks, and going on after a kill",
        "Training stacks",  # by tests/integration/test_stacks.py
        "SplatTable",
        "Mixtures, filters, budgets, S3",
        "webdataset, without this package",
        "Hugging Face datasets, without this package",
    ]


def test_dataset(run: Any) -> None:
    names = run("SplatDataset")
    assert names["batch"].splats.means.shape[:2] == (256, 400)
    assert names["batch"].valid.all()
    assert names["fields"]["means"].shape == (256, 6, 2)
    assert all(len(values) == 256 for values in names["fields"].values())


def test_going_on(run: Any) -> None:
    """The rest after two batches is the epoch without them, and the state is plain data."""
    names = run("Workers, ranks, and going on after a kill")
    batches = [batch.keys for batch in SplatDataset("splats/", batch_size=64, lanes=2)]
    assert names["rest"] == [key for keys in batches[2:] for key in keys]
    assert names["rest"]
    json.dumps(names["state"])


def test_table(run: Any, folder: Path) -> None:
    names = run("SplatTable")
    assert names["table"].keys() == sorted(truth(folder / "splats"))
    assert names["same"]["key"] == names["sample"]["key"] == names["batch"].keys[0]
    assert names["best"]["psnr"] == max(names["table"][:].columns["psnr"])
    loaded = next(iter(names["loader"]))
    assert loaded["means"].shape == (32, 400, 2)
    assert len(loaded["caption"]) == 32


def test_mixture_and_filter(run: Any, folder: Path) -> None:
    names = run("Mixtures, filters, budgets, S3")
    keys = [key for batch in names["mixture"] for key in batch.keys]
    first = truth(folder / "splats").keys()
    share = np.mean([key in first for key in keys])
    assert len(keys) == 10_000 // 256 * 256
    assert share == pytest.approx(0.75, abs=0.01)
    good = [caption for batch in names["good"] for caption in batch.captions]
    assert good
    assert all(len(caption) > 5 for caption in good)


@pytest.mark.parametrize(
    ("title", "source", "name"),
    [
        ("webdataset, without this package", "tars", "dataset"),
        ("Hugging Face datasets, without this package", "splats", "rows"),
    ],
)
def test_without_the_package(run: Any, folder: Path, title: str, source: str, name: str) -> None:
    assert "pipeline" not in "".join(SECTIONS[title])
    expected = truth(folder / source)
    samples = {sample["key"]: sample for sample in run(title)[name]}
    assert samples.keys() == expected.keys()
    for key, (caption, gaussians) in expected.items():
        assert samples[key]["caption"] == caption
        assert np.array_equal(np.array(samples[key]["splats"], np.float32), gaussians)


@pytest.mark.parametrize("title", [title for title in SECTIONS if "without" in title])
def test_recipes_are_short(title: str) -> None:
    """Ten lines from the markers on, imports not counted."""
    (code,) = SECTIONS[title]
    lines = [line for line in code.splitlines() if line and not re.match(r"(from|import) ", line)]
    assert len(lines) <= 11


def test_peers_are_timed_on_the_same_floats() -> None:
    """benchmarks.read's stand-in for our decoding, that litdata and streaming are timed with."""
    splats = random_splats(3, 20)
    payloads = pack_fp16(splats, read_peers.SIZE, read_peers.SIZE)
    samples = [{"key": "k", "caption": "c", "splats": payload} for payload in payloads]
    own = unpack([{"splats": p} for p in payloads], read_peers.SIZE, read_peers.SIZE, "fp16")
    found = read_peers.batch_of(samples, 20)
    assert found["splats"].equal(values_of(own))
    assert found["splats"].is_contiguous()
