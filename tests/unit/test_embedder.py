"""`splatshard.encoder`: pictures, splats and batches of a dataset are one thing to a trained
model. And docs/library.md, whose code runs as it stands."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import splatshard
from splatshard.pipeline.evaluation import model_card
from splatshard.pipeline.train.loop import train
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import ModelConfig
from splatshard.schemas.saved import SavedConfig
from tests.make import photo
from tests.training import WIDTH, images_config, make_shards, toy_config
from tests.unit.toy_models import TOY


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 20 pictures; runs on them and on their images."""
    folder = make_shards(tmp_path_factory.mktemp("toys"), 20)
    train(toy_config(folder, folder / "classify", steps=4))
    train(toy_config(folder, folder / "clip", "contrast", steps=4))
    train(images_config(folder, folder / "images-run", steps=4))
    return folder


def pictures(toys: Path, count: int = 5) -> list[Image.Image]:
    """Of the first tar, in order."""
    with tarfile.open(sorted((toys / "images").glob("*.tar"))[0]) as tar:
        files = [tar.extractfile(m) for m in tar if m.name.endswith((".png", ".jpg"))]
        return [Image.open(io.BytesIO(f.read())) for f in files[:count] if f]


def first_batch(toys: Path, count: int = 5) -> splatshard.SplatDataset:
    return splatshard.open(f"{toys}/splats", batch_size=count, shuffle=False)


@pytest.mark.parametrize("run", ["classify", "clip"])
def test_pictures_have_the_embeddings_of_their_shards(toys: Path, run: str) -> None:
    embed = splatshard.encoder(str(toys / run))
    found = embed(pictures(toys))
    assert found.shape == (5, WIDTH)
    expected = embed(next(iter(first_batch(toys))))
    assert F.cosine_similarity(found, expected).min() > 0.98  # those are packed
    if run == "clip":
        assert torch.allclose(found.norm(dim=1), torch.ones(5))
    together = found @ expected.T / found.norm(dim=1)[:, None] / expected.norm(dim=1)
    assert together.argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_splats_may_be_fitted_before(toys: Path) -> None:
    """Of any number, in one batch or alone."""
    embed = splatshard.encoder(str(toys / "classify"))
    one, two, three = pictures(toys, 3)
    fits = [splatshard.fit(one, 8, steps=8), splatshard.fit(two, 5, steps=8)]
    found = embed([*fits, three])
    for i, each in enumerate([*fits, three]):
        assert torch.allclose(embed(each)[0], found[i], atol=1e-6)
    other = splatshard.SplatImage(fits[0].splats, 32, 32, cutoff=2.0)
    with pytest.raises(UsageError, match=r"a cutoff of 2\.0 .* was trained on 3\.0"):
        embed(other)


def test_models_of_images_take_pictures(toys: Path) -> None:
    embed = splatshard.encoder(str(toys / "images-run"))
    images = splatshard.ImageDataset(
        f"{toys}/images/*.tar", image_size=32, batch_size=5, shuffle=False
    )
    assert torch.allclose(embed(pictures(toys)), embed(next(iter(images))), atol=1e-6)
    with pytest.raises(UsageError, match="reads images: give pictures, not their splats"):
        embed(splatshard.fit(pictures(toys)[0], 8, steps=1))
    with pytest.raises(UsageError, match="reads a ImageBatch, this is a TrainBatch"):
        embed(next(iter(first_batch(toys))))


def test_what_is_no_run_or_no_picture(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no checkpoint: give the dst of a splatshard train"):
        splatshard.encoder(str(tmp_path))
    embed = splatshard.encoder(str(toys / "classify"))
    with pytest.raises(UsageError, match="no picture: give at least one"):
        embed([])
    with pytest.raises(UsageError, match="int is no picture"):
        embed(3)  # pyright: ignore


def test_names_in_a_card_are_text() -> None:
    """Of classes and data, which somebody else may have named."""
    model = ModelConfig(encoder=TOY, num_classes=2)
    config = SavedConfig(architectures=("SplatClassifier",), model=model, classes=("<b>", "a`\n|"))
    assert "to 2 classes (`<b>`, `a' |`), and" in model_card.what(config)
    assert "embed.trained.classes[i]" in model_card.use(config)
    assert model_card.table(("", ""), [("data", "a|b\n<c>")]).endswith("| data | a\\|b &lt;c> |")


PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"


def test_the_page_runs(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(photo(96, 64)).save(tmp_path / "photo.jpg")
    Image.fromarray(photo(40, 64, seed=1)).save(tmp_path / "other.png")
    shutil.copytree(toys / "classify", tmp_path / "runs" / "1")
    (tmp_path / "splats").symlink_to(toys / "splats")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block, found)
    assert found["by_size"].num_gaussians == round(20_000 * 96 * 64 / 1e6)
    assert 50 <= found["by_quality"].num_gaussians <= 1600
    assert found["pixels"].shape == (3, 224, 224)
    assert found["large"].size == (1024, 1024)
    assert torch.equal(found["same"].means, splatshard.load("photo.safetensors").means)
    assert found["crop"].render().shape == (3, 96, 96)
    assert torch.equal(found["vectors"], found["embed"](["photo.jpg", "other.png"]))
    assert (tmp_path / "plot.png").stat().st_size > 1000
