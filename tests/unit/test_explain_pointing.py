"""explain: its map, the pointing game on made scenes, and the picture."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.jobs.pages.explain_picture import outlines, shares
from splatshard.pipeline.evaluation.explain import (
    SCORES,
    Box,
    box_in_crop,
    covered,
    explain,
    pointing_hit,
    saliency_map,
)
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.splats import Splats, ellipses, scales_and_angles
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.model import (
    ModelConfig,
)
from tests.make import encode
from tests.unit.explaining import PLAIN, SIDE, model_of, padded_splats


def scenes(count: int, seed: int) -> tuple[Splats, Tensor, list[Box]]:
    """Clutter of 16 blue and green Gaussians; in those of class 1 the first one is red, and boxes
    are around the first one."""
    splats = padded_splats(16, seed=seed, batch=count)
    splats.cholesky[:] = torch.tensor([1.6, 0.0, 2.0])
    splats.colors[:] = splats.colors.abs().clamp(0.2, 0.8)
    splats.colors[..., 0] = 0
    labels = torch.arange(count) % 2
    splats.colors[labels == 1, 0] = torch.tensor([0.7, 0.0, 0.0])
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in splats.means[:, 0].tolist()]
    return splats, labels, boxes


@cache
def seeing_red() -> SplatClassifier:
    """A tiny model that learned to tell whether there is a red Gaussian."""
    torch.manual_seed(0)
    encoder = replace(PLAIN, layers=1)
    model = SplatClassifier(ModelConfig(encoder=encoder, num_classes=2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    sizes = torch.full((64,), SIDE)
    for step in range(120):
        splats, labels, _ = scenes(64, 100 + step)
        loss = F.cross_entropy(model.head(model.encoder(splats, sizes, sizes)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    return model.eval()


def pointing(
    model: SplatClassifier, count: int, label: int = 1, turn: int = 0
) -> tuple[dict[str, float], float]:
    """The pointing game on scenes of the class `label`: shares of hits by score, and of chance.
    With `turn` a scene has the box of another one."""
    splats, _, boxes = scenes(2 * count, 7)
    boxes = boxes[turn:] + boxes[:turn]
    hits: dict[str, float] = dict.fromkeys(SCORES, 0.0)
    chance = 0.0
    for i in range(label, 2 * count, 2):
        found = explain(model, splats[i : i + 1], SIDE, SIDE, 1)
        chance += covered([boxes[i]], SIDE, SIDE).float().mean().item() / count
        for name in SCORES:
            scores = getattr(found, name)
            saliency = saliency_map(found.splats, scores, SIDE, SIDE, 3.0, select_backend("cpu"))
            hits[name] += pointing_hit(saliency, [boxes[i]]) / count
    return hits, chance


def test_a_trained_model_points_at_the_object() -> None:
    hits, chance = pointing(seeing_red(), 12)
    assert chance < 0.08
    assert min(hits.values()) > 0.9


def test_a_model_that_knows_nothing_is_near_chance() -> None:
    """On clutter, as what is red stands out to random weights too, and with boxes that are not
    around Gaussians: maps are large where many are, and boxes around one hold its neighbours."""
    models = [model_of(replace(PLAIN, layers=1), seed) for seed in range(4)]
    games = [pointing(model, 8, 0, 2) for model in models]
    for name in SCORES:
        assert abs(np.mean([hits[name] - chance for hits, chance in games])) < 0.12


def test_the_map_is_largest_where_the_only_one_that_matters_is() -> None:
    splats = padded_splats(6)
    scores = torch.tensor([0.0, 0, 0, 2.5, 0, 0])
    found = saliency_map(splats, scores, SIDE, SIDE, 3.0, select_backend("cpu"))
    y, x = divmod(int(found.argmax()), SIDE)
    mean = splats.means[0, 3]
    assert (mean - torch.tensor([x + 0.5, y + 0.5])).abs().max() <= 0.71
    assert 0.8 * 2.5 < found.max() <= 2.5
    assert (found >= 0).all()
    assert found.shape == (SIDE, SIDE)


def test_pointing_by_hand() -> None:
    saliency = torch.zeros(4, 6)
    assert not pointing_hit(saliency, [(0, 0, 6, 4)])  # says nothing
    saliency[1, 4] = 1
    assert pointing_hit(saliency, [(4, 1, 5, 2)])
    assert pointing_hit(saliency, [(0, 0, 1, 1), (3, 0, 6, 2)])
    assert not pointing_hit(saliency, [(0, 0, 4, 4)])
    assert not pointing_hit(saliency, [(0, 2, 6, 4)])
    assert covered([(0, 0, 3, 4), (2, 0, 3, 4)], 4, 6).float().mean() == 0.5


@pytest.mark.parametrize(("width", "height"), [(90, 60), (48, 100), (64, 64)])
def test_a_box_goes_with_the_crop(width: int, height: int) -> None:
    """A white rectangle in a black image is in the crop where its box is."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[24:50, 20:40] = 255
    crop = decode(encode(pixels, "PNG"), "it", DecodeConfig(image_size=40)).pixels
    box = box_in_crop((20, 24, 40, 50), width, height, 40)
    assert box is not None
    inside = covered([box], 40, 40).numpy()
    assert (inside == (crop[..., 0] > 127)).mean() > 0.99
    assert box_in_crop((0, 0, 5, 5), 100, 60, 40) is None
    assert box_in_crop((10, 0, 60, 30), 100, 60, 60) == (0, 0, 40, 30)


# The picture


def test_outlines_are_one_standard_deviation() -> None:
    splats = padded_splats(3)
    offsets = ellipses(splats)[0] - splats.means[0][:, None]
    scales, angles = scales_and_angles(splats.cholesky[0])
    along = offsets @ torch.stack((angles.cos(), angles.sin()), -1)[..., None]
    torch.testing.assert_close(along.amax((1, 2)), scales[:, 0], rtol=0.02, atol=0)


def test_high_scores_are_bright_and_all_zero_is_drawn() -> None:
    splats, pixels = padded_splats(2), np.zeros((SIDE, SIDE, 3), np.float32)
    splats.means[0] = torch.tensor([[8.0, 16.0], [24.0, 16.0]])
    panel = np.asarray(outlines(pixels, splats, np.array([0.0, 3.0], np.float32), 4))
    assert panel[:, 64:, 1].max() > 150 > panel[:, :64].max()
    assert (shares(np.zeros(3, np.float32)) == 0).all()
    assert shares(np.array([-1.0, 1, 4], np.float32)).tolist() == [0, 0.5, 1]
