"""Splat shards, or images, as training batches; start at dataset.py."""

from splatshard.pipeline.data.batch import ImageBatch, TrainBatch
from splatshard.pipeline.data.dataset import SplatDataset
from splatshard.pipeline.data.images import ImageDataset
from splatshard.pipeline.data.table import SplatTable

__all__ = ["ImageBatch", "ImageDataset", "SplatDataset", "SplatTable", "TrainBatch"]
