"""The dataset card: true figures, and code that runs."""

from __future__ import annotations

import gc
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs.destination.card import CARD_FILE, card
from splatshard.jobs.destination.manifest import Catalog, head
from splatshard.pipeline.shards.commit import publish, staged_file
from splatshard.schemas.shard import ShardManifest
from tests.rows import FORMATS, config_of, make_ref, make_rows, write_shard


def commit(dst: Path, name: str, format: str) -> ShardManifest:
    config = config_of(format)
    with staged_file(str(dst), name) as path:
        write_shard(path, make_rows(8), format)
        return publish(str(dst), path, make_ref(name), config, "")


def test_the_card_tells_figures_source_and_recipe(tmp_path: Path) -> None:
    manifests = [commit(tmp_path, name, "parquet") for name in "ab"]
    Catalog(str(tmp_path), manifests).write()
    text = (tmp_path / CARD_FILE).read_text()
    stored = sum(manifest.statistics["payload_bytes"] for manifest in manifests)
    assert text.startswith(f"# {tmp_path.name}\n")
    for line in (
        "| shards | 2 |",
        "| samples | 16 |",
        "| with splats | 12 |",
        "| skipped, as rows with a reason | 4 corrupt_image |",
        "| payload | fp16 in parquet |",
        "| Gaussians per image, mean | 20.0 |",
        f"| bytes per image, mean | {stored / 12:,.0f} |",
        "| mean | 28.10 |",
        "- `/in` (2)",
        '    "num_gaussians": 400,',
    ):
        assert line in text.splitlines(), line
    assert re.search(r"\| 50 % below \| 2[78]\.\d\d \|", text)
    assert "JPEG files of the same pictures" in text
    assert text.count("```json") == 1


def test_the_card_is_there_when_the_manifest_takes_in_the_last_shard_early(tmp_path: Path) -> None:
    """As in each conversion of more than a minute whose last shard comes as the minute ends."""
    catalog = Catalog(str(tmp_path), [])
    catalog.add(commit(tmp_path, "a", "parquet"))
    catalog._due = 0.0
    catalog.write_if_due()
    catalog.write()
    assert "| shards | 1 |" in (tmp_path / CARD_FILE).read_text()


@pytest.mark.parametrize("old", [None, "an older card\n"])
def test_a_job_that_finds_all_done_leaves_a_card_of_it(tmp_path: Path, old: str | None) -> None:
    """A killed job's manifest has its card already; without any the next job writes one."""
    manifests = [commit(tmp_path, name, "parquet") for name in "ab"]
    if old:
        (tmp_path / CARD_FILE).write_text(old)
    catalog = Catalog(str(tmp_path), manifests[:1])
    catalog.add(manifests[1])
    catalog._due = 0.0
    catalog.write_if_due()  # then it is killed
    assert "| shards | 2 |" in (tmp_path / CARD_FILE).read_text()
    (tmp_path / CARD_FILE).unlink()
    Catalog(str(tmp_path), manifests).write()
    assert "| shards | 2 |" in (tmp_path / CARD_FILE).read_text()


@pytest.mark.parametrize("format", FORMATS)
def test_the_code_on_the_card_reads_the_dataset(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = [commit(tmp_path, "a", format), commit(tmp_path, "b", format)]
    Catalog(str(tmp_path), manifests).write()
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / CARD_FILE).read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of webdataset, which leaves its files open
        exec(code, names)
        rows = names["rows"]
        keys = rows["key"].to_pylist() if format == "parquet" else [r["__key__"] for r in rows]
        gc.collect()
    assert keys == [f"{i:012d}" for i in range(8)] * 2


def test_a_dataset_without_images_has_one_too() -> None:
    empty = card("s3://bucket/a", head([]), [])
    assert empty.startswith("# a\n")
    assert "Quality" not in empty
    assert "None yet." in empty
