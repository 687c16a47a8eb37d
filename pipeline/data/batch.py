"""What a training step gets: `TrainBatch` of splats, `ImageBatch` of pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from splatshard.pipeline.splats import Splats


class Position(NamedTuple):
    """Where the order is once every rank has taken its batch of this step: `samples` into `epoch`,
    whose order has `lanes` lanes with grains of `grain` samples. See `state_after` of the
    datasets."""

    epoch: int
    samples: int
    lanes: int
    grain: int


class AnyBatch(Protocol):
    """A batch that knows its place in the order."""

    @property
    def position(self) -> Position | None: ...


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
    columns   those asked for by name: a tensor [B] of numbers (NaN or -1 where there is none), a
              list of texts or None, or for members a list of lists of {"name": str, "data": bytes}
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
    columns: Mapping[str, Tensor | list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.splats)

    def __getitem__(self, part: slice) -> TrainBatch:
        """Some of the samples."""
        return replace(self, splats=self.splats[part], **_parts(self, part))

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
            splats = splats_from_values(move(values), move(self.splats.mask))
        return replace(self, splats=splats, **_moved(self, move))

    def as_dict(self) -> dict[str, Any]:
        """The batch as a flat dictionary: means, cholesky, colors, mask; heights, widths, labels,
        valid, teacher where there is one, position int64 [B, 4]; and `columns` by their names.

        All but texts and members are tensors that begin with B, so that whoever moves, slices or
        joins batches can. Texts come only if named in `columns`; one that is not there is empty.
        """
        means, cholesky, colors, mask = self.splats.fields
        return _flat(self, {"means": means, "cholesky": cholesky, "colors": colors, "mask": mask})


@dataclass(frozen=True)
class ImageBatch:
    """B images, ready to train on: as TrainBatch, with pixels in place of splats.

    pixels    [B, 3, H, W] RGB: uint8 as the dataset makes it; float32, white is 1, once `floating`
    teacher   None: embeddings are in splat shards
    valid     bool [B]; False also for a sample that stands in for one that does not decode
    columns   as TrainBatch has them
    """

    pixels: Tensor
    heights: Tensor
    widths: Tensor
    keys: list[str]
    captions: list[str | None]
    labels: Tensor
    teacher: Tensor | None
    valid: Tensor
    position: Position | None = None
    columns: Mapping[str, Tensor | list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, part: slice) -> ImageBatch:
        """Some of the samples."""
        return replace(self, pixels=self.pixels[part], **_parts(self, part))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ImageBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """The same batch in page-locked memory; torch's DataLoader calls it for `pin_memory`."""
        return self._map(Tensor.pin_memory)

    def floating(self) -> ImageBatch:
        """The same batch with float32 pixels where white is 1."""
        if self.pixels.is_floating_point():
            return self
        return replace(self, pixels=self.pixels.float() / 255)

    def as_dict(self) -> dict[str, Any]:
        """The batch as a flat dictionary: as that of TrainBatch, with pixels in place of splats."""
        return _flat(self, {"pixels": self.pixels})

    def _map(self, move: Callable[[Tensor], Tensor]) -> ImageBatch:
        return replace(self, pixels=move(self.pixels), **_moved(self, move))


Batch = TrainBatch | ImageBatch


def position_of(batch: AnyBatch | Mapping[str, Any]) -> Position | None:
    """The position of a batch, or of one as a dictionary."""
    if not isinstance(batch, Mapping):
        return batch.position
    rows = batch.get("position")
    return None if rows is None else Position(*rows[-1].tolist())


def _flat(batch: Batch, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """`inputs`, and what both kinds of batches have, see `TrainBatch.as_dict`."""
    found: dict[str, Any] = inputs | {"heights": batch.heights, "widths": batch.widths}
    found |= {"labels": batch.labels, "valid": batch.valid}
    if batch.teacher is not None:
        found["teacher"] = batch.teacher
    if batch.position is not None:
        found["position"] = torch.tensor(batch.position).repeat(len(batch), 1)
    return found | {name: _without_none(values) for name, values in batch.columns.items()}


def _without_none(values: Tensor | list[Any]) -> Tensor | list[Any]:
    if isinstance(values, Tensor):
        return values
    return ["" if value is None else value for value in values]


def _parts(batch: Batch, part: slice) -> dict[str, Any]:
    """Some samples of the fields that both kinds of batches have."""
    return {
        "heights": batch.heights[part],
        "widths": batch.widths[part],
        "keys": batch.keys[part],
        "captions": batch.captions[part],
        "labels": batch.labels[part],
        "teacher": None if batch.teacher is None else batch.teacher[part],
        "valid": batch.valid[part],
        "columns": {name: values[part] for name, values in batch.columns.items()},
    }


def _moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The tensors that both kinds of batches have, moved."""
    columns = batch.columns.items()
    return {
        "heights": move(batch.heights),
        "widths": move(batch.widths),
        "labels": move(batch.labels),
        "teacher": None if batch.teacher is None else move(batch.teacher),
        "valid": move(batch.valid),
        "columns": {k: move(v) if isinstance(v, Tensor) else v for k, v in columns},
    }


def splats_from_values(values: Tensor, mask: Tensor) -> Splats:
    """Splats whose parameters are views of `values` [B, N, 8]: x, y, l11, l21, l22 in px, r, g, b;
    `mask` bool [B, N]."""
    return Splats(values[..., :2], values[..., 2:5], values[..., 5:], mask)


def values_of(splats: Splats) -> Tensor | None:
    """The tensor [B, N, 8] that `splats_from_values` was given, or None for splats of another kind.

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
