"""The evaluation job on images: patch models, and an RGB CLIP as a reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from splatshard.pipeline.data import ImageDataset
from splatshard.pipeline.evaluation.metrics import retrieval
from splatshard.pipeline.models.patches import normalised
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.train.checkpoint import read_checkpoint
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.trained import load_trained
from splatshard.schemas.config import DecodeConfig
from tests import clips
from tests.clips import clip_folder
from tests.make import datacomp_sample, write_tar
from tests.training import images_config, toy_config
from tests.unit.evaluating import Capsys, run_job


def test_evaluation_of_a_patch_model(shards: Path, tmp_path: Path, capsys: Capsys) -> None:
    train(images_config(shards, tmp_path / "run", steps=20, optim__lr=1e-2))
    images, run = shards / "images", tmp_path / "run"
    code, found, err = run_job(capsys, run, f"toy={images}", "--batch-size", 32)
    assert code == 0, err
    model = read_checkpoint(f"{run}/checkpoints/00000020")
    trained = load_trained(model.url, "auto", torch.device("cpu"))
    (batch,) = ImageDataset(str(images), batch_size=90, image_size=32, shuffle=False)
    with torch.no_grad():
        hits = trained.model(batch).argmax(1) == batch.labels
    assert found["datasets"]["toy"] == pytest.approx(float(hits.double().mean()))
    assert found["datasets"]["toy"] > 0.08  # 24 classes
    probe = (run, f"toy={images}", "--task", "probe", "--train", images)
    code, found, err = run_job(capsys, *probe, "--output", tmp_path / "probe")
    assert code == 0, err
    assert found["datasets"]["toy"] > 0.3
    code, _, err = run_job(capsys, run, shards / "splats")
    assert (code, "has splat shards, and images are wanted" in err) == (1, True)
    code, _, err = run_job(capsys, run, images, "--num-gaussians", 8)
    assert (code, "a model that reads images" in err) == (1, True)


def test_evaluation_of_texts(shards: Path, tmp_path: Path, capsys: Capsys) -> None:
    train(images_config(shards, tmp_path / "run", "contrast", steps=4))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"a {i}" for i in range(24)))
    run, data = tmp_path / "run", f"toy={shards}/images"
    for task in ("retrieval", "zeroshot"):
        code, found, err = run_job(capsys, run, data, "--task", task, "--classnames", names)
        assert code == 0, err
        assert 0 <= found["datasets"]["toy"] <= 1


def test_images_for_a_splat_model(shards: Path, tmp_path: Path, capsys: Capsys) -> None:
    train(toy_config(shards, tmp_path, steps=1))
    code, _, err = run_job(capsys, tmp_path, shards / "images")
    assert (code, "images are converted first, with splatshard convert" in err) == (1, True)


def test_a_reference_on_the_images(tmp_path: Path, capsys: Capsys) -> None:
    """An RGB CLIP on the tars that convert reads; what does not decode is left out."""
    clip = clip_folder(tmp_path / "clip")
    members = [m for i in range(6) for m in datacomp_sample(i)]
    members = [(n, b"broken" if n == "000000000002.jpg" else data) for n, data in members]
    words = {f"{i:012d}.txt": f"photo of {'abcdef'[i]}".encode() for i in range(6)}
    members = [(n, words.get(n, data)) for n, data in members]
    src = write_tar(tmp_path / "in" / "test" / "0.tar", members)
    arguments = (clip, src.parent, "--images", "--batch-size", 2, "--output", tmp_path / "out")
    code, _, err = run_job(capsys, *arguments)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "in-test.json").read_text())
    assert (result["task"], result["samples"], result["texts"]) == ("retrieval", 5, 5)
    model = CLIPModel.from_pretrained(clip).eval()
    files = dict(members)
    kept = [i for i in range(6) if i != 2]
    config = DecodeConfig(image_size=clips.SIDE)
    crops = [decode(files[f"{i:012d}.jpg"], "jpg", config).pixels for i in kept]
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.padding_side = "right"
    texts = [files[f"{i:012d}.txt"].decode() for i in kept]
    ids = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        pixels = normalised(
            torch.stack([torch.from_numpy(c) for c in crops]).permute(0, 3, 1, 2) / 255
        )
        found = model(pixel_values=pixels, input_ids=ids)
    wanted = retrieval(found.image_embeds, found.text_embeds, torch.arange(5))
    assert result["metrics"] == pytest.approx(wanted)
    code, _, err = run_job(capsys, clip, src.parent, "--images")
    assert (code, "give --output" in err) == (1, True)
    (tmp_path / "in" / "classnames.txt").write_text("red\ngreen\n")
    code, _, err = run_job(capsys, *arguments)
    assert (code, "have no label" in err) == (1, True)  # zero-shot now; these have captions only
