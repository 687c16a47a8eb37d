"""The four stages: what each computes of a batch, and its loss.

    classify   logits                                cross-entropy with the labels
    distill    the encoder's CLS token               squared distance of unit vectors to the
                                                     teacher's: stage 1 of arXiv 2509.22615
    contrast   image and text embeddings, scale      CLIP's loss (arXiv 2103.00020): stage 2
    gvit       logits, the Gaussians' picture        cross-entropy, and the picture's distance from
                                                     the image (pipeline/models/gvit.py)

A stage is two functions. `embed` turns samples into features, sample by sample: tensors [B, ...],
and scalars that are parameters. `loss` turns the features of all of a process's samples into the
mean loss over them. The cut between them is where gradients are cached (step.py), and where
processes exchange features.

CLIP's loss is local: each process compares its own rows with the columns of all, so its memory is
B x (B x processes) and not its square; `World.gather` says why that is the same gradient.

Distillation sums over the embedding where an MSE would divide by its length: the same but for the
factor, and with a width of 512 an MSE's gradients come too near to AdamW's epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splatshard.pipeline.data import ImageBatch
from splatshard.pipeline.models.classifier import encode
from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.gaussian_space import render
from splatshard.pipeline.models.gvit import GViT, gvit_loss
from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.models.reconstruct import load_tower
from splatshard.pipeline.train.augmentation import start_seeds
from splatshard.pipeline.train.batches import Step
from splatshard.pipeline.train.distributed import World
from splatshard.schemas.train import TrainConfig

Features = tuple[Tensor, ...]
Metrics = dict[str, Tensor]

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Stage:
    """`couples`: whether a sample's loss depends on the other samples of the batch."""

    embed: Callable[[nn.Module, Step], Features]
    loss: Callable[[Features, Step, TrainConfig, World], tuple[Tensor, Metrics]]
    couples: bool = False


def vision_of(model: nn.Module) -> nn.Module:
    """The vision tower of a CLIP or a classifier."""
    return cast(nn.Module, model.vision if isinstance(model, SplatCLIP) else model.encoder)


def classify_features(model: nn.Module, step: Step) -> Features:
    """Logits [B, C]."""
    return (model(step.batch).float(),)


def classify_loss(
    features: Features, step: Step, config: TrainConfig, world: World
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of logits [B, C], a scalar; the share of samples whose label has the highest
    logit."""
    logits, labels = features[0], step.batch.labels
    loss = F.cross_entropy(logits, labels, label_smoothing=config.optim.label_smoothing)
    return loss, {"accuracy": (logits.argmax(1) == labels).float().mean()}


def distill_features(model: nn.Module, step: Step) -> Features:
    """CLS tokens [B, D]."""
    return (encode(vision_of(model), step.batch).float(),)


def distill_loss(
    features: Features, step: Step, config: TrainConfig, world: World
) -> tuple[Tensor, Metrics]:
    """|s - t|^2 of the normalised student's and teacher's embeddings [B, D], a scalar, the mean
    over B; their mean cosine."""
    assert step.batch.teacher is not None, "checked with the batch"
    student, teacher = F.normalize(features[0], dim=1), F.normalize(step.batch.teacher, dim=1)
    loss = (student - teacher).square().sum(1).mean()
    return loss, {"cosine": (student * teacher).sum(1).mean()}


def contrast_features(model: nn.Module, step: Step) -> Features:
    """Normalised embeddings [B, E] of images and texts, and the scale of their products, a
    scalar."""
    model = cast(SplatCLIP, model)
    assert step.tokens is not None, "contrastive batches have tokens"
    image = model.encode_image(step.batch).float()
    text = model.encode_text(step.tokens).float()
    return F.normalize(image, dim=1), F.normalize(text, dim=1), model.logit_scale.float().exp()


def contrast_loss(
    features: Features, step: Step, config: TrainConfig, world: World
) -> tuple[Tensor, Metrics]:
    """Cross-entropy, a scalar, of this process's images [B, E] among all texts and of its texts
    [B, E] among all images; the share of its images that are nearest to their own text."""
    image, text, scale = features
    labels = torch.arange(len(image), device=image.device) + world.rank * len(image)
    to_text = scale * image @ world.gather(text).mT
    to_image = scale * text @ world.gather(image).mT
    loss = (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2
    accuracy = (to_text.argmax(1) == labels).float().mean()
    return loss, {"accuracy": accuracy, "logit_scale": scale.detach()}


def gvit_features(model: nn.Module, step: Step) -> Features:
    """Logits [B, C] and pictures [B, 3, H, W], white is 1."""
    model = cast(GViT, model)
    pixels = _pixels(step)
    found = model(pixels, start_seeds(step.seeds), *step.guidance)
    height, width = pixels.shape[2:]
    return found.logits.float(), render(found.g, height, width, model.space)


def gvit_losses(
    features: Features,
    step: Step,
    config: TrainConfig,
    world: World,
    tower: PatchEncoder | None = None,
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of logits [B, C] and reconstruction of pictures [B, 3, H, W] by their weights,
    a scalar, and each of them. `tower`: see `gvit_loss`."""
    assert config.gvit is not None, "checked by the configuration"
    (logits, rendered), labels = features, step.batch.labels
    smoothing = config.optim.label_smoothing
    loss, metrics = gvit_loss(
        logits, labels, rendered, _pixels(step), config.gvit, tower, smoothing
    )
    return loss, metrics | {"gamma": loss.new_full((), step.guidance.gamma)}


def _pixels(step: Step) -> Tensor:
    assert isinstance(step.batch, ImageBatch), "a GViT reads images"
    return step.batch.pixels


STAGES: dict[str, Stage] = {
    "classify": Stage(classify_features, classify_loss),
    "distill": Stage(distill_features, distill_loss),
    "contrast": Stage(contrast_features, contrast_loss, couples=True),
    "gvit": Stage(gvit_features, gvit_losses),
}


def stage_of(config: TrainConfig, device: torch.device) -> Stage:
    """The stage of a run. The tower of a perceptual loss is loaded here, once, and is no part of
    the model: it is not trained, saved or averaged. Raises UsageError where it cannot be loaded."""
    stage = STAGES[config.stage]
    if config.gvit is None or not config.gvit.perceptual:
        return stage
    tower = load_tower(config.gvit.tower).to(device)
    return replace(stage, loss=lambda *given: gvit_losses(*given, tower=tower))


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    """Keep a CLIP's logit scale at 100 or below (arXiv 2103.00020)."""
    scale: Any = getattr(model, "logit_scale", None)
    if scale is not None:
        scale.clamp_(max=MAX_LOGIT_SCALE)
