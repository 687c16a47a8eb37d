"""Configuration of a training run: frozen keyword-only dataclasses, checked at construction.

A recipe under jobs/recipes/ is a Python file that makes one `TrainConfig`; `--set data.src=...`
replaces a field by its dotted name. The same names are in the errors and in a checkpoint's
config.json, which `from_dict` of plain.py reads back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast

from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import GViTLossConfig, ModelConfig
from splatshard.schemas.plain import chosen

StageName = Literal["classify", "distill", "contrast", "gvit"]

MAY_CHANGE = (
    "dst",
    "device",
    "compile",
    "micro_batch",
    "model.encoder.gradient_checkpointing",
    "data.src",
    "data.workers",
    "data.lanes",
    "data.checksum",
    "data.cache_dir",
    "data.cache_bytes",
    "optim.epochs",
    "optim.steps",
    "checkpoint",
    "log",
)
"""Fields (or groups of them) that a resumed run may have changed: none of them changes which
samples a step sees. `data.src` may move, since the shards' fingerprint says whether they are the
same; more epochs or steps stretch what is left of the learning rate's cosine. Not in the stage
gvit, whose ramp of guidance is in shares of the steps."""


def _check(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise UsageError(f"{name} is {value!r}: {remedy}")


def _check_choices(config: object, group: str = "") -> None:
    for name, value, choices in chosen(config):
        _check(value in choices, f"{group}{name}", value, f"choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read; see splatshard.pipeline.data.SplatDataset and ImageDataset."""

    src: str = ""
    """Folder or URL that convert wrote to; several, joined by ::, are one pool. For a model that
    reads images (model.encoder.input is patches): what convert takes as its source."""
    weights: tuple[float, ...] = ()
    """One for each of several src: then they are a mixture in these proportions."""
    epoch_samples: int | None = None
    """Length of a mixture's epoch; None: as many samples as there are."""
    num_gaussians: int | None = None
    """Gaussians per sample, one of the budgets of nested shards; None: all. Not of images."""
    batch_size: int = 256
    """Samples per step, of all processes together: another number of processes is the same run."""
    seed: int = 0
    """Of the order and of the augmentation."""
    filter: tuple[tuple[str, str, float], ...] = ()
    """Conditions on columns that samples must fulfil, as in (("psnr", ">=", 25),); of images, on
    label and caption_length."""
    shuffle_shards: int = 2
    """Shards whose samples are mixed. Each reading process holds up to four times as many bytes as
    they have; of images these are the files."""
    lanes: int | None = None
    """Parts of the shards that are read side by side; None: one per reading process at the first
    start. A resumed run goes on with those that it has."""
    workers: int = 2
    """Reading processes of each training process; 0: it reads by itself."""
    checksum: bool = True
    """Compare each file's SHA-256 with its marker when it is first opened. Splat shards only, as
    are the next two."""
    cache_dir: str = ""
    """Local folder for remote shards; empty: below the user's cache."""
    cache_bytes: int = 100 << 30
    """Bytes that it may hold at most."""
    empty_captions: Literal["error", "keep"] = "error"
    """What a sample without a caption is to contrastive training: an error, or the empty text."""

    def __post_init__(self) -> None:
        sources = [part for part in self.src.split("::") if part]
        _check(
            not self.weights or len(self.weights) == len(sources),
            "data.weights",
            self.weights,
            f"give one for each of the {len(sources)} sources in data.src, or none",
        )
        _check(1 <= self.batch_size <= 1 << 24, "data.batch_size", self.batch_size, "at least 1")
        _check(self.workers >= 0, "data.workers", self.workers, "choose 0 or more")
        _check(self.lanes is None or self.lanes >= 1, "data.lanes", self.lanes, "at least 1")
        _check_choices(self, "data.")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to the training samples: to Gaussians by pipeline/data/augment.py, to images by
    augment_pixels.py beside it, the same with the same numbers, but for dropout, which images
    cannot have. With these defaults only the size changes.

    Ranges are drawn from evenly, for each image on its own; a factor of 0.4 means 0.6 to 1.4.
    """

    height: int = 224
    """Of the augmented image, px; a model that reads images wants its image_size."""
    width: int = 224
    """As height."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Share of the image's area in the crop; (1, 1) takes the whole image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the crop, drawn evenly on a logarithmic scale; a crop that would be wider
    or higher than the image is clamped to it. Without meaning for the whole image."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Degrees, at most, either way."""
    shear: float = 0.0
    """Degrees, at most, either way, along x."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Factor about the centre, drawn evenly on a logarithmic scale."""
    shift: float = 0.0
    """Share of width and height, at most, either way."""
    brightness: float = 0.0
    """Factor of all colours."""
    contrast: float = 0.0
    """Factor of the distance to the mean grey; adds one Gaussian to each image."""
    saturation: float = 0.0
    """Factor of the distance to greyscale."""
    hue: float = 0.0
    """Degrees, at most, either way."""
    grayscale: float = 0.0
    """Probability of no colours at all."""
    dropout: float = 0.0
    """Probability of each Gaussian to be left out; one is always kept."""
    rescale: bool = False
    """Divide the colours of those that dropout keeps by the probability of keeping, so that the
    expected picture is the same."""

    def __post_init__(self) -> None:
        for names, lowest, highest, remedy in _AUGMENT_RANGES:
            for name in names:
                value = getattr(self, name)
                _check(lowest <= value <= highest, f"augment.{name}", value, f"choose {remedy}")
        below = 0 <= self.dropout < 1
        _check(below, "augment.dropout", self.dropout, "choose 0 (off) to below 1")
        low, high = self.crop_scale
        remedy = "choose two shares, 0 < low <= high <= 1"
        _check(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, remedy)
        for name in ("crop_ratio", "zoom"):
            low, high = getattr(self, name)
            remedy = "choose two numbers, 0 < low <= high"
            _check(0 < low <= high < math.inf, f"augment.{name}", (low, high), remedy)


_AUGMENT_RANGES = (
    (("height", "width"), 1, 65536, "1 to 65536 px"),
    (("flip", "grayscale"), 0, 1, "a probability, 0 to 1"),
    (("shift", "brightness", "contrast", "saturation"), 0, 1, "0 (off) to 1"),
    (("rotation", "hue"), 0, 180, "0 (off) to 180 degrees"),
    (("shear",), 0, 80, "0 (off) to 80 degrees"),
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning rate over the run, and which parameters move."""

    steps: int | None = None
    """Steps of the run; give this or epochs."""
    epochs: int | None = None
    """Passes over the data; what a last step cannot fill is left out of each."""
    lr: float = 5e-4
    """The highest learning rate."""
    final_lr: float = 0.0
    """Share of it that is left at the end of the cosine."""
    warmup_steps: int = 500
    """Steps of linear warm-up; not more than the run has."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decays."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.2
    """Of matrices; none on biases, norms and whatever else has one dimension or none."""
    clip: float | None = 1.0
    """Largest norm of all gradients together; None: as they are."""
    ema: float | None = None
    """Decay of an average of the weights, kept beside them, such as 0.9998; None: no average."""
    label_smoothing: float = 0.0
    """Of classification."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns (fnmatch) of names of parameters that are trained; all others stay as they are."""
    later: tuple[str, ...] = ()
    """Patterns of those that are trained, too, from step `later_from` on."""
    later_from: int | None = None
    """Before the run ends; None: once the warm-up is over."""

    def __post_init__(self) -> None:
        both = (self.steps, self.epochs)
        _check(
            (self.steps is None) != (self.epochs is None),
            "optim.steps, optim.epochs",
            both,
            "give one of them, the other one None: --set optim.epochs=None or optim.steps=None",
        )
        _check(all(n is None or n >= 1 for n in both), "optim.steps, optim.epochs", both, "from 1")
        _check(0 < self.lr < 10, "optim.lr", self.lr, "choose a value above 0")
        _check(0 <= self.final_lr <= 1, "optim.final_lr", self.final_lr, "choose a share, 0 to 1")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            _check(value >= 0, f"optim.{name}", value, "must not be negative")
        _check((self.later_from or 0) >= 0, "optim.later_from", self.later_from, "from 0, or None")
        in_range = all(0 <= beta < 1 for beta in self.betas)
        _check(in_range, "optim.betas", self.betas, "choose 0 <= beta < 1")
        _check(self.eps > 0, "optim.eps", self.eps, "must be positive")
        _check(self.clip is None or self.clip > 0, "optim.clip", self.clip, "positive, or None")
        _check(
            self.ema is None or 0 < self.ema < 1, "optim.ema", self.ema, "0 < decay < 1, or None"
        )
        _check(
            0 <= self.label_smoothing < 1, "optim.label_smoothing", self.label_smoothing,
            "choose 0 <= smoothing < 1",
        )  # fmt: skip
        _check(bool(self.trainable), "optim.trainable", self.trainable, "give a pattern, as in '*'")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved; always at its end."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """How many of the last ones stay."""

    def __post_init__(self) -> None:
        _check(self.every >= 1, "checkpoint.every", self.every, "at least 1")
        _check(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told of the run: {dst}/log.jsonl always."""

    every: int = 10
    """Steps between records."""
    tensorboard: bool = False
    """Write {dst}/tensorboard as well."""

    def __post_init__(self) -> None:
        _check(self.every >= 1, "log.every", self.every, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, from shards in `data.src` to checkpoints in `dst`."""

    stage: StageName
    """classify: labels. distill: the teacher's embeddings that are in the shards (stage 1 of
    GaussianVision). contrast: captions, as CLIP (stage 2). gvit: labels, of a model that predicts
    the Gaussians it classifies by."""
    dst: str = ""
    """Folder or URL for checkpoints and log.jsonl. The same command again goes on from there."""
    model: ModelConfig
    """See schemas/model.py."""
    init: str = ""
    """Where weights come from at the first start: another run's dst, one of its checkpoints (their
    average where there is one, optim.ema), a saved model's folder or a .safetensors file.
    Parameters of the same name and shape are taken; empty: random."""
    init_clip: str = ""
    """An RGB CLIP whose blocks, projections and text tower the model begins with, before `init`: a
    local folder or a name that transformers knows; empty: none."""
    seed: int = 0
    """Of random weights and of dropout in the model."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig | None = None
    """None: samples as they are in the shards."""
    optim: OptimConfig
    gvit: GViTLossConfig | None = None
    """The loss and the guidance of the stage gvit; None in the others."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the model computes in; weights, losses and the optimiser are fp32."""
    micro_batch: int | None = None
    """Samples that one process has in its forward pass at a time; None: all of its share. Negatives
    of contrastive training are those of the whole batch all the same; it then takes a second
    forward pass."""
    compile: bool = False
    """torch.compile the towers."""
    device: str = "auto"
    """auto: cuda where there is one."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _check_choices(self)
        size = self.micro_batch
        _check(size is None or size >= 1, "micro_batch", size, "at least 1, or None")
        classes = self.model.num_classes
        if self.stage == "classify":
            _check(bool(classes), "model.num_classes", classes, "classification needs a number")
        if self.stage == "contrast":
            remedy = "contrastive training needs a text tower"
            _check(self.model.text is not None, "model.text", self.model.text, remedy)
        self._check_gvit()

    def _check_gvit(self) -> None:
        """The stage gvit has a model of that kind and its loss, and no other stage has either."""
        if self.stage != "gvit":
            remedy = f"of the stage gvit; this is {self.stage}: leave it at None"
            _check(self.gvit is None, "gvit", self.gvit, remedy)
            _check(self.model.gvit is None, "model.gvit", self.model.gvit, remedy)
            return
        _check(self.gvit is not None, "gvit", None, "the stage gvit wants a GViTLossConfig()")
        _check(self.model.gvit is not None, "model.gvit", None, "give it a GViTConfig()")
        loss = cast(GViTLossConfig, self.gvit)
        remedy = "gvit.perceptual wants a CLIP's weights: give a local folder, or set that to 0"
        _check(not loss.perceptual or bool(loss.tower), "gvit.tower", loss.tower, remedy)
