"""Figures of evaluation against counting by hand: ranks, accuracy, retrieval, linear probe."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from splatshard.pipeline.evaluation.metrics import (
    classification,
    linear_probe,
    ranks,
    retrieval,
    retrieval_bounds,
    summary,
)
from splatshard.pipeline.evaluation.zeroshot import checked_templates, filled
from splatshard.schemas.errors import UsageError

few = st.integers(-2, 2)  # so that there are ties


# Figures


@given(
    st.integers(1, 6).flatmap(lambda c: st.lists(st.lists(few, min_size=c, max_size=c))), st.data()
)
def test_a_rank_is_a_place_in_a_stable_sort(scores: list[list[int]], data: st.DataObject) -> None:
    if not scores:
        return
    classes = len(scores[0])
    target = [data.draw(st.integers(0, classes - 1)) for _ in scores]
    found = ranks(torch.tensor(scores).float(), torch.tensor(target))
    for row, own, place in zip(scores, target, found.tolist(), strict=True):
        assert sorted(range(classes), key=lambda i: (-row[i], i)).index(own) == place


def test_classification_by_hand() -> None:
    logits = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5, 0],
            [9, 1, 2, 3, 4, 5, 0],
            [0, 9, 8, 7, 6, 5, 4],
            [0, 9, 8, 7, 6, 5, 4],
        ]
    )
    found = classification(logits, torch.tensor([0, 1, 6, 1]))
    assert found == {
        "top1": 0.5,  # the first and the last
        "top5": 0.5,  # class 1 is sixth in the second, 6 is sixth in the third
        "mean_per_class_recall": pytest.approx((1 + 0.5 + 0) / 3),
    }


def test_a_model_that_says_the_same_of_everything_gets_chance() -> None:
    labels = torch.arange(10).repeat(20)
    found = classification(torch.zeros(200, 10), labels)
    assert (found["top1"], found["top5"]) == (0.1, 0.5)
    same = F.normalize(torch.ones(20, 4), dim=1)
    found = retrieval(same, same, torch.arange(20))
    assert found["image_to_text_recall1"] == found["text_to_image_recall1"] == 0.05
    assert found["text_to_image_recall10"] == 0.5


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 9), st.integers(0, 99))
def test_retrieval_against_loops(images: int, more: int, seed: int) -> None:
    """Several texts per image; far more rows than are in memory at once would be the same."""
    g = torch.Generator().manual_seed(seed)
    image_of = torch.cat((torch.arange(images), torch.randint(images, (more,), generator=g)))
    x, y = (F.normalize(torch.randn(n, 5, generator=g), dim=1) for n in (images, len(image_of)))
    scores = (x @ y.T).tolist()
    found = retrieval(x, y, image_of)
    for k in (1, 5, 10):
        hits = 0
        for row in scores:
            best = sorted(range(len(row)), key=lambda j: -row[j])[:k]
            hits += any(int(image_of[j]) == scores.index(row) for j in best)
        assert found[f"image_to_text_recall{k}"] == pytest.approx(hits / images)
        hits = 0
        for j, own in enumerate(image_of.tolist()):
            best = sorted(range(images), key=lambda i: -scores[i][j])[:k]
            hits += own in best
        assert found[f"text_to_image_recall{k}"] == pytest.approx(hits / len(image_of))
    recalls = found["image_to_text_recall1"], found["text_to_image_recall1"]
    assert found["mean_recall1"] == pytest.approx(sum(recalls) / 2)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=12))
def test_bounds_of_retrieval(pairs: list[tuple[int, int]]) -> None:
    """`chance` against all orders of the texts, drawn; no model exceeds `ceiling`, and one that
    knows everything, but not texts that are alike apart, reaches it by text at 1."""
    places = {image: n for n, image in enumerate(sorted({image for image, _ in pairs}))}
    image_of = torch.tensor([places[image] for image, _ in pairs])
    texts = [str(text) for _, text in pairs]
    count = len(places)
    found = retrieval_bounds(texts, image_of)
    kinds = sorted(set(texts))
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        # whole numbers: what is alike has one score, to the last bit
        x = torch.randint(-9, 9, (count, 8), generator=g).float()
        by_text = torch.randint(-9, 9, (len(kinds), 8), generator=g).float()
        y = by_text[[kinds.index(text) for text in texts]]
        for name, value in retrieval(x, y, image_of).items():
            assert value <= found["ceiling"][name] + 1e-9, name
    knows = torch.zeros(len(kinds), count)
    for text, own in zip(texts, image_of.tolist(), strict=True):
        knows[kinds.index(text), own] += 1
    best = float(knows.max(1).values.sum()) / len(texts)
    assert found["ceiling"]["text_to_image_recall1"] == pytest.approx(best)
    for k in (1, 5):
        hits = 0.0
        for image in range(count):
            own = [j for j, i in enumerate(image_of.tolist()) if i == image]
            chosen = list(itertools.combinations(range(len(texts)), min(k, len(texts))))
            hits += sum(bool({*own} & {*some}) for some in chosen) / len(chosen)
        assert found["chance"][f"image_to_text_recall{k}"] == pytest.approx(hits / count)
        assert found["chance"][f"text_to_image_recall{k}"] == pytest.approx(min(1, k / count))


def test_bounds_of_captions_that_repeat() -> None:
    found = retrieval_bounds(["a", "a", "a", "b"], torch.arange(4))
    assert found["ceiling"]["mean_recall1"] == 0.5  # one of the three, and the fourth
    assert found["ceiling"]["image_to_text_recall5"] == 1
    assert found["chance"]["mean_recall1"] == 0.25
    alone = retrieval_bounds(["a", "b", "c", "c"], torch.tensor([0, 1, 2, 2]))
    assert set(alone["ceiling"].values()) == {1.0}


def blobs(samples: int, classes: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted by class, of very different scales, with a column that never varies."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) * classes // samples
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(7))
    x = centres[labels] + noise * torch.randn(samples, 6, generator=g)
    scale = torch.tensor([1e3, 1, 1, 1e-3, 1, 1])
    return torch.cat((x * scale, torch.full((samples, 1), 0.1)), 1), labels


def test_a_linear_probe_separates_what_can_be() -> None:
    x, y = blobs(90, 3, 0.3, 0)
    test, labels = blobs(60, 3, 0.3, 1)
    logits, _ = linear_probe(x, y, test, 3)
    assert classification(logits, labels)["top1"] >= 0.98


def test_a_linear_probe_is_at_the_minimum() -> None:
    """Of convex loss and penalty: the gradient there is nil."""
    x, y = blobs(120, 4, 2.0, 0)
    logits, weight = linear_probe(x, y, x, 4)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    z = z[:, :6].double()
    design = torch.cat((z, torch.ones(len(z), 1, dtype=torch.float64)), 1)
    coefficients = torch.linalg.lstsq(design, logits.double()).solution  # logits are linear in z
    residual = torch.softmax(logits.double(), 1) - F.one_hot(y, 4)
    gradient = z.T @ residual / len(z) + weight * coefficients[:6]
    assert gradient.abs().max() < 2e-3
    assert residual.sum(0).abs().max() / len(z) < 2e-3


def test_a_linear_probe_on_noise_is_held_back() -> None:
    """Labels that mean nothing want a strong penalty; few samples have no held-out part."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 40, generator=g), torch.randint(3, (60,), generator=g)
    logits, weight = linear_probe(x, y, torch.randn(9, 40, generator=g), 3)
    assert weight >= 0.1
    assert logits.isfinite().all()
    logits, _ = linear_probe(x[:4], torch.tensor([0, 1, 2, 0]), x[:2], 3)
    assert logits.isfinite().all()


def test_both_ratios_to_a_reference() -> None:
    found = summary({"a": 0.5, "b": 0.1, "c": 0.9}, {"a": 1.0, "b": 0.05, "other": 0.3})
    assert found["mean"] == pytest.approx(0.5)
    assert found["ratio_of_means"] == pytest.approx(0.6 / 1.05)
    assert found["mean_of_ratios"] == pytest.approx((0.5 + 2) / 2)
    assert (found["ratios"]["b"], found["not_in_reference"]) == (2, ["c"])
    assert "ratios" not in summary({"a": 0.5}, None)
    with pytest.raises(UsageError, match="none of a"):
        summary({"a": 1.0}, {"b": 1.0})
    with pytest.raises(UsageError, match="no ratio"):
        summary({"a": 1.0}, {"a": 0.0})


def test_prompts() -> None:
    assert filled("a {c}, {c}", "cat {x}") == "a cat {x}, cat {x}"
    assert filled("a {}.", r"\1") == r"a \1."
    with pytest.raises(UsageError, match="line 2"):
        checked_templates(["{c}", "a cat"], "t.txt")
