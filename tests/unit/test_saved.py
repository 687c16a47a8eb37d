"""Saved models: the same outputs from the folder, in another process too; the hub; the card."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import splatshard
from splatshard.jobs.evaluate import main as evaluate
from splatshard.pipeline.evaluation.embedder import Embedder
from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.clip import load_tokenizer
from splatshard.pipeline.train.checkpoint import initial_weights, refuse_other_inputs
from splatshard.pipeline.train.log import read_log
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.trained import Trained, config_to_save
from splatshard.schemas.config import DecodeConfig, FitConfig, class_list
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import EncoderConfig, GViTConfig, ModelConfig, TextConfig
from tests.make import photo
from tests.training import make_shards, same_weights, toy_config, toy_patches
from tests.unit.toy_models import TOY, TOY_RGB, tokenizer_folder

PHOTO = photo(40, 31)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def model_of(config: ModelConfig, seed: int = 0, **fields: Any) -> Embedder:
    """One whose weights are all random, as if it was trained on splats of 20 Gaussians."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    decode, fit = DecodeConfig(image_size=32), FitConfig(num_gaussians=20, steps=8)
    values = {"cutoff": 3.0, "decode": decode, "fit": fit, "step": 7} | fields
    return Embedder(Trained(model, config, "", weights="", device=CPU, **values))


def classifier(**fields: Any) -> Embedder:
    return model_of(ModelConfig(encoder=TOY, num_classes=3), **fields)


def models(tokenizer: Path) -> dict[str, Embedder]:
    size = {"width": 24, "layers": 2, "heads": 2, "vocab_size": 10, "context_length": 8}
    text = TextConfig(**size, tokenizer=str(tokenizer))
    images: Any = {"cutoff": None, "decode": None, "fit": None}
    predictor = EncoderConfig(**{**vars(toy_patches()), "layers": 1})
    gvit = GViTConfig(gaussians=9, predictor=predictor)
    plain = replace(TOY, resampler=None)
    return {
        "clip": model_of(ModelConfig(encoder=TOY, text=text, embed_dim=16)),
        "vision": model_of(ModelConfig(encoder=plain, embed_dim=16)),
        "classifier": classifier(),
        "rgb": model_of(ModelConfig(encoder=TOY_RGB, text=text, embed_dim=16), **images),
        "gvit": model_of(ModelConfig(encoder=plain, num_classes=3, gvit=gvit), **images),
    }


def outputs(embed: Embedder, picture: Any = PHOTO) -> dict[str, Tensor]:
    found = {"images": embed([picture, picture[:20, :20].copy()])}
    if embed.trained.config.text is not None:
        found["texts"] = embed.encode_text(["w0 w1", "w3"])
    if embed.trained.config.num_classes is not None:
        found["logits"] = embed.logits(picture)
    return found


FRESH = """
import sys
import numpy as np
from safetensors.torch import save_file
import splatshard
import torch
from tests.unit.test_saved import outputs
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    embed = splatshard.encoder(folder, device="cpu")
    save_file(outputs(embed, np.load(sys.argv[1])), f"{folder}/outputs.safetensors")
"""


@pytest.mark.usefixtures("one_thread")
def test_a_fresh_process_gives_the_same(tokenizer: Path, tmp_path: Path) -> None:
    """Buffers that are no weights are made anew there; in this process memory might still hold
    them."""
    import numpy as np

    expected: dict[str, dict[str, Tensor]] = {}
    for name, embed in models(tokenizer).items():
        embed.save_pretrained(tmp_path / name)
        expected[name] = outputs(embed)
    np.save(tmp_path / "photo.npy", PHOTO)
    folders = [str(tmp_path / name) for name in expected]
    command = [sys.executable, "-c", FRESH, str(tmp_path / "photo.npy"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model of type" not in done.stderr  # of transformers, about config.json
    for name, wanted in expected.items():
        found = load_file(tmp_path / name / "outputs.safetensors")
        assert found.keys() == wanted.keys()
        for kind, values in wanted.items():
            assert values.isfinite().all()
            assert torch.equal(found[kind], values), (name, kind)


def test_what_a_folder_holds(tokenizer: Path, tmp_path: Path) -> None:
    embed = models(tokenizer)["clip"]
    embed.save_pretrained(tmp_path / "a")
    own = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == own  # no run, and so no card
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["model_type"] == "splatshard"
    assert config["architectures"] == ["SplatCLIP"]
    assert (config["version"], config["step"], config["fit"]["num_gaussians"]) == (1, 7, 20)
    for path in (tmp_path / "a").iterdir():
        assert str(tokenizer).encode() not in path.read_bytes(), path
    loaded = Embedder.from_pretrained(tmp_path / "a")
    assert loaded.trained.step == 7
    by_url = text_config(loaded, f"file://{tmp_path}/a")
    assert len(load_tokenizer(by_url)) == len(load_tokenizer(text_config(embed)))
    loaded.save_pretrained(tmp_path / "a")  # over itself
    assert torch.equal(loaded(PHOTO), embed(PHOTO))


def text_config(embed: Embedder, tokenizer: str = "") -> TextConfig:
    config = embed.trained.config.text
    assert config is not None
    return replace(config, tokenizer=tokenizer or config.tokenizer)


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_weights_are_of_one_kind(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="one kind of weights, and ema are asked for: leave it"):
        splatshard.encoder(tmp_path / "a", weights="ema")
    with pytest.raises(UsageError, match=r"'main': .* is a folder"):
        splatshard.encoder(tmp_path / "a", revision="main")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "best"}, "weights is 'best': choose one of auto, model, ema"),
        ({"device": "gpu"}, "device is 'gpu': choose one of auto, cpu, cuda"),
        ({"path": ""}, "the path is empty: give a folder"),
        ({"path": __file__}, r"test_saved\.py is a file: give a folder"),
    ],
)
def test_what_no_encoder_is_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        splatshard.encoder(**{"path": "a"} | options)
    if "path" in options:
        with pytest.raises(UsageError, match=message):
            classifier().save_pretrained(options["path"])


def test_folders_are_local_or_on_s3() -> None:
    with pytest.raises(UsageError, match="memory://"):
        classifier().save_pretrained("memory://box/model")


def test_what_is_no_batch() -> None:
    embed = classifier()
    assert repr(embed) == "Embedder(SplatClassifier, )"
    with pytest.raises(UsageError, match=r"a dict is no picture .*without as_dict"):
        embed({"means": 1})  # pyright: ignore


def test_a_model_takes_what_it_was_made_for(tokenizer: Path) -> None:
    both = models(tokenizer)
    with pytest.raises(UsageError, match="has no text tower: it takes no texts"):
        both["classifier"].encode_text("w0")
    with pytest.raises(UsageError, match="is no classifier: compare its embeddings"):
        both["clip"].logits(PHOTO)
    for nothing in ([], [3]):
        with pytest.raises(UsageError, match="are no texts: give a text, or a list of them"):
            both["clip"].encode_text(nothing)  # pyright: ignore
    assert both["clip"].encode_text("w0").norm(dim=1).item() == pytest.approx(1)


def test_shards_that_are_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        classifier(decode=None, fit=None).save_pretrained(tmp_path / "a")
    assert "takes splats and batches, and no pictures" in caplog.text
    loaded = splatshard.encoder(tmp_path / "a")
    assert loaded(splatshard.fit(PHOTO, 20, steps=2)).shape == (1, 32)
    with pytest.raises(UsageError, match="was saved when the shards of its training were gone"):
        loaded(PHOTO)


def test_names_of_classes(tmp_path: Path) -> None:
    """Those beside the shards, where they are what numbers the labels."""
    names = ("cat", "dog", "newt")
    (tmp_path / "classnames.txt").write_text("cat\ndog\nnewt\n")
    for digest, expected in ((class_list(names), names), ("other", ())):
        embed = classifier(src=str(tmp_path), class_list=digest)
        assert config_to_save(embed.trained).classes == expected
    (tmp_path / "classnames.txt").unlink()
    embed = classifier(src=str(tmp_path), class_list=class_list(names))
    assert config_to_save(embed.trained).classes == ()


# The hub


class Hub:
    """In place of Hugging Face's: repositories that are folders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **repositories: Path) -> None:
        self.asked: list[tuple[str, Any, list[str]]] = []
        self.repositories = repositories
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, allow_patterns))
        if name.partition("/")[2] not in self.repositories:
            raise ConnectionError("no route\nmore of it")
        return str(self.repositories[name.partition("/")[2]])


def test_repositories_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    embed = classifier()
    embed.save_pretrained(tmp_path / "copy")
    hub = Hub(monkeypatch, ours=tmp_path / "copy")
    loaded = splatshard.encoder("me/ours", revision="v1")
    assert torch.equal(loaded(PHOTO), embed(PHOTO))
    (_, first, only), (name, second, files) = hub.asked
    assert (name, first, second, only) == ("me/ours", "v1", "v1", ["config.json"])
    assert not any(file.endswith((".bin", ".pt", ".py", "*")) for file in files)
    with pytest.raises(UsageError, match=r"me/none: there is no such folder, .*no route\): check"):
        splatshard.encoder("me/none")
    changed(tmp_path / "copy", model_type="clip")  # whose weights are not fetched
    with pytest.raises(UsageError, match="model of the type 'clip'"):
        splatshard.encoder("me/ours")
    assert [patterns for _, _, patterns in hub.asked[2:]] == [["config.json"]] * 2


def test_folders_are_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch)
    classifier().save_pretrained("runs/1")
    splatshard.encoder("runs/1")
    for name in ("./runs/2", "runs", str(tmp_path / "runs"), "a/b/c"):
        with pytest.raises(UsageError, match=r"has no checkpoint: give the dst of .* saved model"):
            splatshard.encoder(name)
    assert hub.asked == []


def test_the_hub_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"me/ours: .* needs huggingface_hub: install it"):
        splatshard.encoder("me/ours")


# Of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_shards(tmp_path_factory.mktemp("run"), 20)
    train(toy_config(folder, folder / "clip", "contrast", steps=2, optim__ema=0.5))
    return folder


def test_a_run_and_its_card(run: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    task = ["--task", "retrieval", "--device", "cpu"]
    assert evaluate([str(run / "clip"), f"shapes={run}/splats", *task]) == 0
    embed = splatshard.encoder(run / "clip")
    embed.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model/README.md").read_text()
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "splatshard",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["splatshard", "gaussian-splatting", "2d-gaussians"],
    }
    for row in (
        "| stage | contrast |",
        "| data | splats |",
        "| Gaussians | 8 an image, cutoff 3 standard deviations |",
        "| image size | 32 px (square) |",
        "| codec | balanced |",
        "| steps | 2, each of 16 samples |",
        "| weights | their average (decay 0.5) |",
    ):
        assert row in text
    loss = next(r["loss"] for r in read_log(str(run / "clip")) if r.get("step") == 2)
    assert f"| loss | {loss:.4g}, in training |" in text
    result = json.loads(next((run / "clip/evaluation").rglob("shapes.json")).read_text())
    value = result["main"]["value"]
    assert f"| shapes | retrieval, mean_recall1 {value:.4f} (20 samples) |" in text
    assert str(run) not in text + (tmp_path / "model/config.json").read_text()
    loaded = splatshard.encoder(tmp_path / "model")
    batch = next(iter(splatshard.open(f"{run}/splats", batch_size=4)))
    assert torch.equal(loaded(batch), embed(batch))
    assert torch.equal(loaded.encode_text("red"), embed.encode_text("red"))
    assert evaluate([str(tmp_path / "model"), f"shapes={run}/splats", *task]) == 0
    same = json.loads((tmp_path / "model-evaluation/shapes.json").read_text())
    assert same["metrics"] == result["metrics"]
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text() == text


def test_who_changes_a_card_owns_it(run: Path, tmp_path: Path) -> None:
    embed = splatshard.encoder(run / "clip")
    card = tmp_path / "model/README.md"
    embed.save_pretrained(tmp_path / "model")
    first = card.read_text()
    embed.save_pretrained(tmp_path / "model")
    assert card.read_text() == first
    card.write_text(first.replace("# license: yours", "license: mit  # yours"))
    mine = card.read_text()
    embed.save_pretrained(tmp_path / "model")
    assert card.read_text() == mine != first


def test_a_checkpoint_is_not_written_over(run: Path) -> None:
    embed = splatshard.encoder(run / "clip")
    before = (run / "clip/checkpoints/00000002/config.json").read_bytes()
    with pytest.raises(UsageError, match=r"not written by save_pretrained.*choose another folder"):
        embed.save_pretrained(embed.trained.url)
    assert (run / "clip/checkpoints/00000002/config.json").read_bytes() == before


def test_another_run_may_begin_with_it(run: Path, tmp_path: Path) -> None:
    splatshard.encoder(run / "clip").save_pretrained(tmp_path / "model")
    found, origin = initial_weights(str(tmp_path / "model"))
    expected, own = initial_weights(str(run / "clip"))
    assert same_weights(found, expected)
    assert origin is not None
    assert own is not None
    assert origin.step == own.step
    config = toy_config(run, "", "contrast")
    refuse_other_inputs(origin, config, 3.0)
    with pytest.raises(UsageError, match=r"the shards' cutoff was 3\.0 and is 2\.0"):
        refuse_other_inputs(origin, config, 2.0)
