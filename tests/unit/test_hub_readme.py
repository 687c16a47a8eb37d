"""README.md of DST: Hugging Face's datasets reads the folder by it, and a changed one stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Value, load_dataset
from datasets.utils.logging import disable_progress_bar

from splatshard.jobs.destination.card import CARD_FILE
from splatshard.jobs.destination.hub_readme import README_FILE, classes_of, head, size_category
from splatshard.jobs.destination.manifest import Catalog
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.commit import mark_failed
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.source.listing import list_source
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig, PackConfig
from splatshard.schemas.shard import ShardManifest
from tests.make import image_folder, image_parquet
from tests.rows import make_ref

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
disable_progress_bar()


def converted(
    tmp_path: Path, src: Path | None = None, **pack: Any
) -> tuple[Path, list[ShardManifest]]:
    """`src`, else cat/ and dog/, three images each, in shards of four, as a job leaves them."""
    dst = tmp_path / 'the "splats"'
    dst.mkdir(parents=True)
    found = list_source(str(src or image_folder(tmp_path / "in")), samples_per_shard=4)
    config = ConvertConfig(
        decode=DecodeConfig(image_size=16),
        fit=FitConfig(num_gaussians=4, steps=1),
        pack=PackConfig(**pack),
    )
    backend = select_backend("cpu")
    manifests = [convert_shard(ref, config, str(dst), backend) for ref in found.refs]
    (dst / "classnames.txt").write_text("".join(f"{name}\n" for name in found.classes))
    mark_failed(str(dst), make_ref("z"), config, OSError("no disk"))
    (dst / "_progress.json").write_text("{}")
    Catalog(str(dst), manifests).write()
    return dst, manifests


@pytest.mark.parametrize("codec", ["balanced", "fp16"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_folder_loads(tmp_path: Path, codec: str, streaming: bool) -> None:
    dst, manifests = converted(tmp_path, codec=codec)
    rows = load_dataset(
        str(dst), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    expected = [row for m in manifests for row in read_rows(f"{dst}/{m.data_file}")]
    assert rows.features is not None
    assert rows.features["label"] == ClassLabel(names=["cat", "dog"])
    assert rows.features["psnr"] == Value("float32")
    found = list(rows)
    assert [row["key"] for row in found] == [row["key"] for row in expected]
    for row, own in zip(found, expected, strict=True):
        assert row["splats"] == own["splats"]
        assert rows.features["label"].int2str(row["label"]) == row["key"].partition("/")[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_load(tmp_path: Path, streaming: bool) -> None:
    """Though the first sample has no image, and each other one of the first five another member."""
    src = image_folder(tmp_path / "in")
    (src / "cat" / "!.png").write_bytes(b"nothing")
    (src / "cat" / "1.txt").write_text("a cat")
    (src / "dog" / "0.json").write_text('{"source": {"page": 7}}')
    dst, manifests = converted(tmp_path, src, format="webdataset")
    rows = load_dataset(
        str(dst), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    assert rows.features is not None
    assert rows.features["cls"] == ClassLabel(names=["cat", "dog"])
    assert rows.features["splat.json"]["psnr"] == Value("float32")
    found = [row for row in rows if "/" in row["__key__"]]
    expected = [row for m in manifests for row in read_rows(f"{dst}/{m.data_file}", "webdataset")]
    assert len(found) == 7
    for row, own in zip(found, expected, strict=True):
        assert row["splat.json"]["status"] == own["status"]
        assert (row["txt"], row["cls"]) == (own["caption"], own["label"])
        assert (row["splat"] is None) == (own["status"] != "ok")
        assert (row["json"] or {}) == json.loads(own["metadata"] or "{}")


def test_labels_of_another_list_are_numbers(tmp_path: Path) -> None:
    """classnames.txt may be the source's own, of other numbers."""
    dst, manifests = converted(tmp_path)
    assert '"dog"' in head(str(dst), manifests)
    (dst / "classnames.txt").write_text("dog\ncat\n")
    assert "class_label" not in head(str(dst), manifests)
    (dst / "classnames.txt").unlink()
    assert "class_label" not in head(str(dst), manifests)


def test_the_classes_of_a_class_label(tmp_path: Path) -> None:
    names = ("cat", "dog", "ant")
    dst, manifests = converted(tmp_path, image_parquet(tmp_path / "a.parquet", classes=names))
    assert classes_of(str(dst), manifests) == names
    twice = converted(tmp_path / "b", image_parquet(tmp_path / "b.parquet", classes="aba"))
    assert classes_of(str(twice[0]), twice[1]) == ()


def test_what_somebody_changed_stays(tmp_path: Path) -> None:
    dst, manifests = converted(tmp_path)
    readme = dst / README_FILE
    written = readme.read_text()
    assert (dst / CARD_FILE).read_text() in written
    (dst / CARD_FILE).unlink()  # so that the next job writes anew
    Catalog(str(dst), manifests[:1]).write()
    assert readme.read_text() != written
    changed = written.replace("# license: that of", "license: cc0-1.0  # that of")
    readme.write_text(changed)
    (dst / CARD_FILE).unlink()
    Catalog(str(dst), manifests).write()
    assert readme.read_text() == changed
    assert (dst / CARD_FILE).exists()
    rows = load_dataset(str(dst), split="train", streaming=True)
    assert len(list(rows)) == 6


def test_sizes_have_the_hub_s_names() -> None:
    found = [size_category(n) for n in (0, 999, 1000, 9_999, 12_800_000, 10**12)]
    assert found == ["n<1K", "n<1K", "1K<n<10K", "1K<n<10K", "10M<n<100M", "n>1T"]
