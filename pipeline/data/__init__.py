"""Splat shards, or images, as training batches; start at dataset.py."""

from pipeline.data.batch import ImageBatch, TrainBatch
from pipeline.data.dataset import SplatDataset
from pipeline.data.images import ImageDataset

__all__ = ["ImageBatch", "ImageDataset", "SplatDataset", "TrainBatch"]
