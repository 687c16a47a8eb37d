"""Figures of merit, as pure functions of tensors: classification, retrieval, linear probe, summary.

All ranks are counted, not taken from a sort: a rank is how many others score higher, and of those
that score the same, how many come first. So a model that says the same of everything gets what
chance gives it, and not, as with `>=` or `>` alone, nothing or everything.

The linear probe is multinomial logistic regression by L-BFGS on standardised features, its L2
weight chosen on a fifth of the training samples that the first fits do not see.

Left out: calibration, robustness scores and per-group accuracies of the 38 datasets' harness.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.schemas.errors import UsageError

Metrics = dict[str, float]

ROWS = 1024
"""Rows of scores that are in memory at once."""

L2_WEIGHTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 5
"""One in so many training samples chooses among them."""
MAX_ITERATIONS = 200


def ranks(scores: Tensor, target: Tensor) -> Tensor:
    """Place, 0 for the first, of column target[i] among scores[i]: [B, C], [B] -> int64 [B]."""
    own = scores.gather(1, target[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(1)


def share_below(places: Tensor, k: int) -> float:
    """Share of the ranks `places`, int64 [S], that are within the first k."""
    return float((places < k).double().mean())


def classification(logits: Tensor, labels: Tensor) -> Metrics:
    """top1, top5, and mean_per_class_recall over the classes that occur; logits [S, C], labels
    int64 [S]."""
    parts = zip(logits.split(ROWS), labels.split(ROWS), strict=True)
    place = torch.cat([ranks(*part) for part in parts])
    hit = (place == 0).double()
    classes, index = labels.unique(return_inverse=True)
    zeros = torch.zeros(len(classes), dtype=torch.float64)
    hits = zeros.index_add(0, index, hit)
    recall = hits / zeros.index_add(0, index, torch.ones_like(hit))
    return {
        "top1": share_below(place, 1),
        "top5": share_below(place, 5),
        "mean_per_class_recall": float(recall.mean()),
    }


def retrieval(images: Tensor, texts: Tensor, image_of: Tensor) -> Metrics:
    """Recall at 1, 5 and 10, both ways, of unit vectors images [I, E] and texts [T, E]; text j
    belongs to image image_of[j], and every image has one or more.

    image_to_text: whether any of an image's texts is among the first k. text_to_image: whether a
    text's image is.
    """
    parts = zip(texts.split(ROWS), image_of.split(ROWS), strict=True)
    to_image = torch.cat([ranks(part @ images.T, own) for part, own in parts])
    to_text = torch.cat(
        [
            ranks(scores, scores.masked_fill(image_of != own[:, None], -math.inf).argmax(1))
            for own in torch.arange(len(images)).split(ROWS)
            for scores in [images[own] @ texts.T]
        ]
    )
    found = {}
    for name, place in (("image_to_text", to_text), ("text_to_image", to_image)):
        found |= {f"{name}_recall{k}": share_below(place, k) for k in (1, 5, 10)}
    return found | {"mean_recall1": sum(v for n, v in found.items() if n.endswith("recall1")) / 2}


def retrieval_bounds(texts: Sequence[str], image_of: Tensor) -> dict[str, Metrics]:
    """Between what a model's `retrieval` lies, with the same names: `chance`, its expectation in a
    random order, and `ceiling`, what none exceeds, for texts that are alike have one score. Text j
    belongs to image image_of[j], int64 [T]."""
    images, owners = int(image_of.max()) + 1, image_of.tolist()
    seen, shared = Counter[str](), dict[str, Counter[int]]()
    first = [len(texts)] * images  # the best place that an image's texts can have
    for text, own in zip(texts, owners, strict=True):
        first[own] = min(first[own], seen[text])
        seen[text] += 1
        shared.setdefault(text, Counter())[own] += 1
    of_image = Counter(owners)

    def metrics(to_text: Callable[[int], float], to_image: Callable[[int], float]) -> Metrics:
        found = {f"image_to_text_recall{k}": to_text(k) for k in (1, 5, 10)}
        found |= {f"text_to_image_recall{k}": to_image(k) for k in (1, 5, 10)}
        at_one = (found["image_to_text_recall1"], found["text_to_image_recall1"])
        return found | {"mean_recall1": sum(at_one) / 2}

    def missed(own: int, k: int) -> float:
        return math.comb(len(texts) - own, k) / math.comb(len(texts), min(k, len(texts)))

    return {
        "chance": metrics(
            lambda k: sum(1 - missed(own, k) for own in of_image.values()) / images,
            lambda k: min(1.0, k / images),
        ),
        "ceiling": metrics(
            lambda k: sum(place < k for place in first) / images,
            lambda k: sum(n for c in shared.values() for _, n in c.most_common(k)) / len(texts),
        ),
    }


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> tuple[Tensor, float]:
    """Logits [S, classes] of features `test` [S, D] by a logistic regression on `train` [R, D] and
    its labels int64 [R]; and the L2 weight that it chose. No chance is involved."""
    mean, std = train.mean(0), train.std(0, correction=0)
    varies = std > 1e-6 * mean.abs()  # and is not the rounding of a constant
    scale = torch.where(varies, 1 / std, torch.zeros_like(std))
    train, test = (train - mean) * scale, (test - mean) * scale
    held = torch.arange(len(train)) % HELD_OUT == 0
    if bool(held.all()) or len(train) < 2 * HELD_OUT:
        chosen = L2_WEIGHTS[len(L2_WEIGHTS) // 2]
    else:
        # in an order of its own: datasets are often sorted by class, and held-out ones spread
        order = torch.argsort(labels, stable=True)
        x, y = train[order], labels[order]
        found = []
        for weight in L2_WEIGHTS:
            matrix, bias = _fitted(x[~held], y[~held], classes, weight)
            found.append(float(F.cross_entropy(x[held] @ matrix + bias, y[held])))
        chosen = L2_WEIGHTS[found.index(min(found))]
    matrix, bias = _fitted(train, labels, classes, chosen)
    return test @ matrix + bias, chosen


def _fitted(x: Tensor, y: Tensor, classes: int, weight: float) -> tuple[Tensor, Tensor]:
    """Matrix [D, C] and bias [C] that minimise cross-entropy + weight / 2 |matrix|^2."""
    matrix = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [matrix, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ matrix + bias, y) + weight / 2 * matrix.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return matrix.detach(), bias.detach()


def summary(values: Mapping[str, float], reference: Mapping[str, float] | None) -> dict[str, Any]:
    """The mean of a run's main figures by dataset, and against those of a reference run both
    ratios in use, over the datasets that both have: of the means, in which datasets with high
    figures weigh more, and the mean of each dataset's ratio, in which those near chance do.

    Raises UsageError where they share no dataset, or a figure of the reference is zero.
    """
    found: dict[str, Any] = {"datasets": dict(values), "mean": _mean(list(values.values()))}
    if reference is None:
        return found
    shared = [name for name in values if name in reference]
    if not shared:
        raise UsageError(
            f"the reference has {', '.join(reference) or 'no datasets'}, and none of "
            f"{', '.join(values)}: give the output folder of a run on the same datasets"
        )
    if zero := [name for name in shared if not reference[name] > 0]:
        raise UsageError(f"the reference has {reference[zero[0]]} for {zero[0]}: no ratio to that")
    ours, theirs = [values[n] for n in shared], [reference[n] for n in shared]
    ratios = {name: values[name] / reference[name] for name in shared}
    return found | {
        "reference": {name: reference[name] for name in shared},
        "ratios": ratios,
        "ratio_of_means": _mean(ours) / _mean(theirs),
        "mean_of_ratios": _mean(list(ratios.values())),
        "not_in_reference": [name for name in values if name not in reference],
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
