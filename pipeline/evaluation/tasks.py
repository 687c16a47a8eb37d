"""The tasks on which a trained model is evaluated: its vectors of the samples, then evaluate.py.

Each gives `{"samples": S, "metrics": {...}}` and raises UsageError for samples that do not fit the
task (no label, a label beyond the classes, no caption), before any figure is made of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splatshard.pipeline.evaluation.metrics import (
    classification,
    linear_probe,
    retrieval,
    retrieval_bounds,
)
from splatshard.pipeline.evaluation.zeroshot import class_vectors, text_vectors
from splatshard.pipeline.models.classifier import encode
from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.gaussian_space import render
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.train.losses import vision_of
from splatshard.pipeline.train.trained import Data, Samples, Trained, samples_of
from splatshard.schemas.errors import UsageError

Found = dict[str, Any]


def zeroshot(
    trained: Trained, shards: Data, names: Sequence[str], templates: Sequence[str]
) -> Found:
    """Classification by the prompt that is nearest to the image."""
    model = cast(SplatCLIP, trained.model)
    samples = samples_of(trained, shards, unit_images(model))
    check_labels(samples, len(names), f"{len(names)} class names")
    classes = class_vectors(model, names, templates, trained.device)
    return _found(samples, classification(samples.vectors @ classes.T, samples.labels))


def retrieve(trained: Trained, shards: Data) -> Found:
    """Texts by image and images by text, and what chance gives, and the best of models where texts
    are alike. Each line of a caption is a text."""
    model = cast(SplatCLIP, trained.model)
    samples = samples_of(trained, shards, unit_images(model))
    captions = ((caption or "").splitlines() for caption in samples.captions)
    lines = [[line for line in caption if line.strip()] for caption in captions]
    empty = [key for key, texts in zip(samples.keys, lines, strict=True) if not texts]
    if empty:
        raise UsageError(
            f"{samples.src}: {len(empty)} of {len(lines)} samples have no caption, the first of "
            f"them {empty[0]}: retrieval needs one for each; choose another task, or give "
            "--classnames"
        )
    image_of = torch.tensor([i for i, texts in enumerate(lines) for _ in texts])
    texts = [text for some in lines for text in some]
    vectors = text_vectors(model, texts, trained.device)
    found = _found(samples, retrieval(samples.vectors, vectors, image_of))
    return found | {"texts": len(texts), **retrieval_bounds(texts, image_of)}


def classify(trained: Trained, shards: Data) -> Found:
    """A classifier's own logits; of a GViT the mean PSNR of its Gaussians' pictures, too, dB."""
    classes, model = trained.config.num_classes, trained.model
    assert classes is not None, "the model is a classifier"
    check_classes(shards, {trained.class_list} - {""}, trained.url)
    predicts = isinstance(model, GViT)
    samples = samples_of(trained, shards, logits_and_psnr(model) if predicts else model)
    check_labels(samples, classes, f"the model's {classes} classes")
    metrics = classification(samples.vectors[:, :classes], samples.labels)
    if predicts:
        metrics["psnr"] = float(samples.vectors[:, classes].mean())
    return _found(samples, metrics)


def probe(trained: Trained, train: Data, shards: Data) -> Found:
    """A linear classifier on the encoder's CLS token; of a GViT the one of its Gaussians."""

    check_classes(shards, train.class_lists, train.src)
    known, samples = (samples_of(trained, each, tokens(trained.model)) for each in (train, shards))
    check_labels(known, None, "")
    classes = int(known.labels.max()) + 1
    check_labels(samples, classes, f"the {classes} classes of the training shards")
    logits, weight = linear_probe(known.vectors, known.labels, samples.vectors, classes)
    found = _found(samples, classification(logits, samples.labels))
    return found | {"training_samples": len(known.keys), "l2": weight}


def logits_and_psnr(model: GViT) -> Any:
    """A function from a batch of images to [B, C + 1]: logits, and how well the image is drawn, at
    most 100 dB."""

    def found(batch: Any) -> Tensor:
        pixels = batch.floating().pixels
        logits, _, g = model(pixels)
        height, width = pixels.shape[2:]
        quality = psnr(render(g, height, width, model.space), pixels).clamp(max=100)
        return torch.cat((logits.float(), quality.float()[:, None]), 1)

    return found


def tokens(model: nn.Module) -> Any:
    """A function from a batch to the encoder's CLS tokens [B, D]; of a GViT those of the Gaussians
    that it predicts."""

    def found(batch: Any) -> Tensor:
        if not isinstance(model, GViT):
            return encode(vision_of(model), batch)
        pixels = batch.floating().pixels
        return model.read(model.predictor(pixels), *pixels.shape[2:])

    return found


def unit_images(model: SplatCLIP) -> Any:
    """A function from a batch to unit vectors [B, E]."""
    return lambda batch: F.normalize(model.encode_image(batch).float(), dim=1)


def check_classes(shards: Data, known: Collection[str], url: str) -> None:
    """Raises UsageError where the labels of `shards` are numbered by other classes than those of
    `url`, `known`."""
    if known and shards.class_lists and shards.class_lists != set(known):
        raise UsageError(
            f"{shards.src}: its labels are numbered by other classes than those of {url}, so that "
            "the same number is another class: convert it with --classes and the DST of the "
            "training shards, or give both the same folders; cast a ClassLabel to the names and "
            "order of the other (cast_column of Hugging Face's datasets)"
        )


def check_labels(samples: Samples, classes: int | None, what: str) -> None:
    """Raises UsageError for a label that is missing, or not below `classes`."""
    for bad, problem in (
        (samples.labels < 0, "have no label, or a negative one"),
        (samples.labels >= (classes or 1 << 62), f"have a label beyond {what}"),
    ):
        if bool(bad.any()):
            first = int(bad.int().argmax())
            raise UsageError(
                f"{samples.src}: {int(bad.sum())} of {len(bad)} samples {problem}, the first of "
                f"them {samples.keys[first]} ({int(samples.labels[first])})"
            )


def _found(samples: Samples, metrics: dict[str, float]) -> Found:
    return {"samples": len(samples.keys), "metrics": metrics}
