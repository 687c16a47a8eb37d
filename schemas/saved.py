"""`config.json` of a saved model: what `save_pretrained` writes, beside `model.safetensors`.

`model_type` and `architectures` are where Hugging Face's libraries look for them. All that is not
understood is refused, so that no newer version's file is read as something else.
"""

from __future__ import annotations

from dataclasses import dataclass

from splatshard.schemas.config import DecodeConfig, FitConfig
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import ModelConfig

MODEL_TYPE = "splatshard"
SAVED_VERSION = 1
"""Of the file, and of the names of the weights."""


@dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """The model, and what its samples are."""

    model_type: str = MODEL_TYPE
    architectures: tuple[str, ...]
    """SplatCLIP, SplatClassifier or GViT, as `model` says."""
    version: int = SAVED_VERSION
    model: ModelConfig
    stage: str = ""
    """Of its training."""
    step: int | None = None
    """After which the weights were taken."""
    precision: str = "fp32"
    """In which it was trained, and computes on a GPU."""
    cutoff: float | None = None
    """Of the Gaussians, standard deviations; None: it reads images."""
    num_gaussians: int | None = None
    """Of each sample, where training read a budget of nested shards; None: as `fit` says."""
    decode: DecodeConfig | None = None
    """How an image becomes the pixels that are fitted; None: not known, or it reads images."""
    fit: FitConfig | None = None
    """How pixels become Gaussians; None: not known, or it reads images."""
    classes: tuple[str, ...] = ()
    """Names of a classifier's classes in the order of the labels, where they are known."""
    class_list: str = ""
    """Digest of the classes that number the labels."""

    def __post_init__(self) -> None:
        classes = self.model.num_classes
        if self.classes and len(self.classes) != classes:
            raise UsageError(
                f"classes are {len(self.classes)} names, and model.num_classes is {classes}: give "
                "a name for each, or none"
            )
