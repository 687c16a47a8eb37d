"""Splat shards as training batches; start at dataset.py."""

from pipeline.data.batch import TrainBatch
from pipeline.data.dataset import SplatDataset

__all__ = ["SplatDataset", "TrainBatch"]
