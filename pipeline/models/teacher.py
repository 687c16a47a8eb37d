"""The teacher: an RGB CLIP whose view of each image is stored beside its Gaussians.

    crop (uint8) -> its centred square -> the teacher's size (antialiased bicubic) -> vision tower
    -> CLS -> unit length

So stage 1 of arXiv 2509.22615 reads shards only, neither pixels nor a teacher. It is the CLS token
after the final norm, before any projection, that the student's is compared with there. Stored as
little-endian halves: of a unit vector they keep the direction to about 2^-12.

On CUDA the tower runs in half precision (autocast; the released CLIPs were trained so), elsewhere
in single. transformers is imported when a teacher is loaded, not before: without one, a conversion
does not need it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splatshard.schemas.config import TeacherConfig
from splatshard.schemas.errors import BackendError, UsageError

SIZES = ("heads", "activation", "layer_norm_eps", "patch_size", "image_size")
"""Of a tower's configuration, what its parameters' shapes do not say."""

PREPROCESSING = "preprocessor_config.json"

_loaded: dict[tuple[TeacherConfig, str], Teacher] = {}
_lock = threading.Lock()


class Teacher:
    """A loaded teacher on its device; `config` says which it is."""

    def __init__(self, tower: nn.Module, config: TeacherConfig, device: torch.device) -> None:
        self.tower = tower.to(device).eval()
        self.config = config
        self.device = device

    def __call__(self, pixels: Tensor) -> list[bytes]:
        """The embeddings of images uint8 [B, H, W, 3] as they are stored, see `embed`."""
        return [row.tobytes() for row in self.embed(pixels).numpy().astype("<f2")]

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings float16 [B, dim] of unit length, in main memory, of images uint8
        [B, H, W, 3]. Raises BackendError when they are not finite."""
        side = self.config.image_size
        images = centred(pixels).to(self.device).permute(0, 3, 1, 2).float().div_(255)
        if images.shape[2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (self.config.mean, self.config.std)
        )
        with self._half():
            cls = self.tower((images - mean) / std)
        unit = F.normalize(cls.float(), dim=1)
        if not unit.isfinite().all():
            raise BackendError(
                f"teacher {self.config.model} gives embeddings that are not finite: its weights "
                "are damaged, or too large for half precision"
            )
        return unit.half().cpu()

    def _half(self) -> AbstractContextManager[Any]:
        cuda = self.device.type == "cuda"
        return torch.autocast("cuda", torch.float16) if cuda else nullcontext()


def centred(pixels: Tensor) -> Tensor:
    """The centred square over the shorter side of images [B, H, W, 3], as CLIP's own preprocessing
    has it."""
    height, width = pixels.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def resolve_teacher(model: str) -> TeacherConfig:
    """What a recipe says of the teacher `model`: a name of the Hugging Face hub or a folder, see
    `pipeline.models.pretrained.load_clip`. A folder is recorded by its absolute path, since workers
    and later jobs run elsewhere. Raises UsageError where it cannot be loaded."""
    model = os.path.abspath(model) if os.path.exists(model) else model
    tower = _tower(model)
    mean, std = _normalisation(model)
    return TeacherConfig(
        model=model,
        weights=_digest(tower),
        dim=tower.config.width,
        image_size=tower.config.image_size,
        mean=mean,
        std=std,
    )


def load_teacher(config: TeacherConfig, device: torch.device) -> Teacher:
    """The teacher on `device`; a process loads it once. Raises UsageError where it cannot be
    loaded here, or has other weights than `config` says."""
    key = (config, str(device))
    with _lock:
        if key not in _loaded:
            tower = _tower(config.model)
            if (found := _digest(tower)) != config.weights:
                raise UsageError(
                    f"teacher {config.model} has the weights {found[:12]} here, not "
                    f"{config.weights[:12]}: give every worker the same files, or name the new "
                    "teacher and redo the shards"
                )
            _loaded[key] = Teacher(tower, config, device)
        return _loaded[key]


def _tower(model: str) -> Any:
    """The vision tower, a PatchEncoder."""
    try:
        from transformers.utils import logging

        from splatshard.pipeline.models.pretrained import load_clip
    except ImportError as e:
        raise UsageError(
            f"--teacher {model}: needs transformers: install it, or splatshard with its "
            "extra `train`"
        ) from e
    logging.disable_progress_bar()  # a line of its own in the log of every worker
    return load_clip(model).vision


def _digest(tower: Any) -> str:
    """SHA-256 over the tower's sizes and parameters, whatever file they came from."""
    sizes = {name: getattr(tower.config, name) for name in SIZES}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name, value in sorted(tower.state_dict().items()):
        array = value.detach().float().contiguous().cpu().numpy()
        digest.update(f"{name}\0{array.shape}\0".encode())
        digest.update(array.astype("<f4", copy=False).data)
    return digest.hexdigest()


Triple = tuple[float, float, float]


def _normalisation(model: str) -> tuple[Triple, Triple]:
    """Mean and deviation that the model's own files name, else those of CLIP."""
    from transformers.utils.hub import cached_file

    from splatshard.pipeline.models.patches import CLIP_MEAN, CLIP_STD

    path = cached_file(
        model,
        PREPROCESSING,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return CLIP_MEAN, CLIP_STD
    try:
        with open(path, encoding="utf-8") as stream:
            values = json.load(stream)
        means, stds = (
            tuple(map(float, values.get(name, default)))
            for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        )
        if len(means) != 3 or len(stds) != 3 or min(stds) <= 0:
            raise ValueError(f"image_mean {means}, image_std {stds}")
    except (ValueError, TypeError, AttributeError) as e:
        raise UsageError(f"teacher {model}: {PREPROCESSING} cannot be understood ({e})") from e
    return means, stds
