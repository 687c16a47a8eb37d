"""What a training step gets: `TrainBatch`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.splats import Splats


class Position(NamedTuple):
    """Where the order is once every rank has taken its batch of this step: `samples` into `epoch`,
    whose order has `lanes` lanes with grains of `grain` samples. See `SplatDataset.state_after`."""

    epoch: int
    samples: int
    lanes: int
    grain: int


@dataclass(frozen=True)
class TrainBatch:
    """B samples, ready to train on.

    splats    means, cholesky and colors are float32 views of one [B, N, 8] tensor; see Splats
    heights   int32 [B], px of the fitted image
    widths    int32 [B], px
    keys      as in the source
    captions  None where there is none
    labels    int64 [B]; -1 where there is none
    teacher   float32 [B, D], the teacher's embeddings; None where the shards have none
    valid     bool [B]; False for samples that fill up a last batch and are there a second time
    position  where the order is after this batch
    """

    splats: Splats
    heights: Tensor
    widths: Tensor
    keys: list[str]
    captions: list[str | None]
    labels: Tensor
    teacher: Tensor | None
    valid: Tensor
    position: Position | None = None

    def __len__(self) -> int:
        return len(self.splats)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TrainBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TrainBatch:
        """The same batch in page-locked memory; torch's DataLoader calls it for `pin_memory`."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> TrainBatch:
        values = values_of(self.splats)
        if values is None:
            s = self.splats
            splats = Splats(move(s.means), move(s.cholesky), move(s.colors), move(s.mask))
        else:
            splats = splats_of(move(values), move(self.splats.mask))
        return replace(
            self,
            splats=splats,
            heights=move(self.heights),
            widths=move(self.widths),
            labels=move(self.labels),
            teacher=None if self.teacher is None else move(self.teacher),
            valid=move(self.valid),
        )


def splats_of(values: Tensor, mask: Tensor) -> Splats:
    """Splats whose parameters are views of `values` [B, N, 8]: x, y, l11, l21, l22 in px, r, g,
    b."""
    return Splats(values[..., :2], values[..., 2:5], values[..., 5:], mask)


def values_of(splats: Splats) -> Tensor | None:
    """The tensor [B, N, 8] that `splats_of` was given, or None for splats of another kind.

    So a batch moves in one transfer instead of three.
    """
    means = splats.means
    size = (*means.shape[:-1], 8)
    strides = (size[1] * 8, 8, 1)
    offset = means.storage_offset()
    for part, start in ((means, 0), (splats.cholesky, 2), (splats.colors, 5)):
        if (
            part.untyped_storage().data_ptr() != means.untyped_storage().data_ptr()
            or part.stride() != strides
            or part.storage_offset() != offset + start
        ):
            return None
    return means.as_strided(size, strides)
