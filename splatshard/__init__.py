"""Image datasets to shards of 2D Gaussians, and vision models trained directly on them.

    splats = splatshard.fit("photo.jpg", num_gaussians=400)     a SplatImage, to render, plot, save
    splats = splatshard.load("photo.safetensors")               the same, saved before
    for batch in splatshard.open("splats/", batch_size=8): ...  a SplatDataset, to train on
    sample = splatshard.SplatTable("s3://out/splats")[3]        one sample, by number or key
    embed = splatshard.encoder("runs/1")                        pictures to embeddings; an Embedder

All else is in splatshard.pipeline (start at convert.py), splatshard.jobs and splatshard.schemas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splatshard.pipeline.data import ImageDataset, SplatDataset, SplatTable
    from splatshard.pipeline.data import SplatDataset as open
    from splatshard.pipeline.evaluation.embedder import Embedder, encoder
    from splatshard.pipeline.picture import SplatImage, fit, load

__all__ = [
    "Embedder",
    "ImageDataset",
    "SplatDataset",
    "SplatImage",
    "SplatTable",
    "encoder",
    "fit",
    "load",
    "open",
]

_PLACES = {
    "ImageDataset": "data",
    "SplatDataset": "data",
    "SplatTable": "data",
    "SplatImage": "picture",
    "Embedder": "evaluation.embedder",
    "encoder": "evaluation.embedder",
    "fit": "picture",
    "load": "picture",
}
"""Modules of pipeline/: a name is imported when it is used, since torch takes seconds."""


def __getattr__(name: str) -> Any:
    meant = "SplatDataset" if name == "open" else name
    if meant not in _PLACES:
        raise AttributeError(f"module 'splatshard' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"splatshard.pipeline.{_PLACES[meant]}")
    except ModuleNotFoundError as e:
        if e.name != "transformers":
            raise
        text = f"splatshard.{name} needs transformers: install splatshard with its extra `train`"
        raise ModuleNotFoundError(text, name=e.name) from e
    return getattr(module, meant)


def __dir__() -> list[str]:
    return __all__
