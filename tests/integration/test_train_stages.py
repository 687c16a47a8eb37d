"""Stage 1, then stage 2, against stage 2 alone, on captions of pictures that were held out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.recipes.toys import COLORS, SHAPES
from pipeline.data import SplatDataset
from pipeline.models import SplatCLIP, build_model
from pipeline.models.clip import load_tokenizer, tokenize
from pipeline.train.checkpoint import read_checkpoint
from pipeline.train.loop import train
from tests.training import make_shards, toy_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """To train on, and held out."""
    folders = [tmp_path_factory.mktemp(name) for name in ("train", "val")]
    train, val = (
        make_shards(f, n, 100, seed=s) for f, n, s in zip(folders, (400, 150), (0, 9), strict=True)
    )
    return train, val


@torch.no_grad()
def held_out_accuracy(url: str, val: Path) -> float:
    """Share of pictures whose own kind's caption is the nearest of all 24."""
    found = read_checkpoint(url)
    config = found.train_config().model
    model = build_model(config).eval()
    model.load_state_dict(found.weights())
    assert isinstance(model, SplatCLIP)
    assert config.text is not None
    names = [f"a {color} {shape}" for shape in SHAPES for color in COLORS]
    ids, _ = tokenize(load_tokenizer(config.text), names, config.text.context_length)
    texts = torch.nn.functional.normalize(model.encode_text(ids), dim=1)
    right = []
    for batch in SplatDataset(f"{val}/splats", batch_size=50, shuffle=False):
        nearest = (model.encode_image(batch) @ texts.mT).argmax(1)
        right += (nearest == batch.labels).tolist()
    return sum(right) / len(right)


def test_stage_one_then_two_beats_stage_two_alone(
    shards: tuple[Path, Path], tmp_path: Path
) -> None:
    """Both arms see the same contrastive steps. The teacher is made up: an embedding for each kind
    of picture, as a good model of pictures has it; so this shows that the stages work together, and
    nothing about real teachers."""
    train_shards, val = shards
    options = {"steps": 60, "data__batch_size": 64, "optim__lr": 3e-3, "checkpoint__every": 1000}
    one = {**options, "steps": 150}
    distilled = train(toy_config(train_shards, tmp_path / "1", "distill", **one))
    both = train(
        toy_config(train_shards, tmp_path / "1+2", "contrast", init=distilled.checkpoint, **options)
    )
    alone = train(toy_config(train_shards, tmp_path / "2", "contrast", **options))
    scores = [held_out_accuracy(result.checkpoint, val) for result in (both, alone)]
    print("held-out top-1 of 24 captions: stages 1 + 2 %.3f, stage 2 alone %.3f" % tuple(scores))
    assert scores[0] > scores[1] + 0.1
    assert scores[0] > 4 / 24
