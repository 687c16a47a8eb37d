"""Where Gaussians start if a trained GViT says so: one pass of its encoder.

    target -> the encoder's size (antialiased bicubic) -> Gaussians -> the target's size

Images of any size: the encoder sees them at the size that it was trained on, and what it says is
scaled. Any number of Gaussians, but it is best at the one that it was trained with. Colours are
solved anew by the caller (start.py), so the cutoff need not be that of training. After arXiv
2506.23532, whose predictions are never refined.

A recipe has such a start as `encoder:URL#DIGEST`, a checkpoint and the beginning of its weights'
SHA-256: other weights are other shards, and a worker that finds others than the recipe says stops.

transformers is imported when an encoder is loaded, not before.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.splats import Splats, cat
from splatshard.schemas.config import ENCODER
from splatshard.schemas.errors import UsageError

if TYPE_CHECKING:
    from splatshard.pipeline.train.trained import Trained

DIGEST = 16
"""Hex digits of the weights' SHA-256 in a recipe."""
ATTENTION = 1 << 26
"""Most numbers in an attention bias [images, heads, tokens, tokens]: 256 MiB."""

_loaded: dict[tuple[str, str], Trained] = {}
_lock = threading.Lock()


def resolve_encoder(init: str, count: int) -> str:
    """What a recipe says of the start `init`, encoder:CHECKPOINT, for `count` Gaussians.

    CHECKPOINT is a run's dst or one of its checkpoints. Raises UsageError where it is no GViT, or
    one that cannot give as many Gaussians or has its colours composited.
    """
    trained = _load(init.removeprefix(ENCODER), torch.device("cpu"))
    gvit = trained.config.gvit
    if gvit is None:
        raise UsageError(
            f"--init {init}: that model predicts no Gaussians: give a run of the stage gvit"
        )
    if gvit.renderer != "sum":
        raise UsageError(
            f"--init {init}: its Gaussians are composited ({gvit.renderer}), while those of shards "
            "are a sum: train with model.gvit.renderer=sum"
        )
    if gvit.start == "learned" and gvit.gaussians != count:
        raise UsageError(
            f"--init {init}: gives {gvit.gaussians} Gaussians and no other number, but {count} are "
            "wanted: choose that many, or a run with model.gvit.start=image"
        )
    return f"{ENCODER}{trained.url}#{trained.weights[:DIGEST]}"


@torch.no_grad()
def predict(target: Tensor, init: str, count: int) -> Splats:
    """`count` Gaussians for each image of `target` [B, 3, H, W], 0 to 1, from the encoder that
    `init` describes. Raises UsageError where it cannot be loaded or has other weights."""
    from splatshard.pipeline.models.gaussian_space import splats_from_parameters
    from splatshard.pipeline.models.gvit import GViT

    trained = load(init, target.device)
    model = cast(GViT, trained.model)
    side = model.space.predictor.image_size
    tokens = 1 + model.space.predictor.tokens + count
    together = max(1, ATTENTION // (model.space.predictor.heads * tokens * tokens))
    height, width = target.shape[2:]
    stretch = target.new_tensor((width / side, height / side))
    parts: list[Splats] = []
    for pixels in target.split(together):
        if (height, width) != (side, side):
            size = (side, side)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        with trained.computing():
            g = model.predictor(pixels, None, count)
        found = splats_from_parameters(g, side, side, model.space)
        x, y = stretch.unbind()
        cholesky = found.cholesky * torch.stack((x, y, y))
        parts.append(Splats(found.means * stretch, cholesky, found.colors, found.mask))
    return cat(parts)


def load(init: str, device: torch.device) -> Trained:
    """The encoder that `resolve_encoder` gave `init` for, on `device`; a process loads it once.
    Raises UsageError where it cannot be loaded here, or has other weights than `init` says."""
    key = (init, str(device))
    with _lock:
        if key not in _loaded:
            url, _, digest = init.removeprefix(ENCODER).rpartition("#")
            trained = _load(url, device)
            if trained.weights[:DIGEST] != digest:
                raise UsageError(
                    f"encoder {url} has the weights {trained.weights[:DIGEST]} here, not {digest}: "
                    "give every worker the same files, or name it anew and redo the shards"
                )
            _loaded[key] = trained
        return _loaded[key]


def _load(url: str, device: torch.device) -> Trained:
    try:
        from splatshard.pipeline.train.trained import load_trained
    except ImportError as e:
        raise UsageError(
            f"--init {ENCODER}{url}: needs transformers: install it, or splatshard with its "
            "extra `train`"
        ) from e
    from splatshard.pipeline.storage.fs import absolute

    return load_trained(absolute(url), "auto", device)
