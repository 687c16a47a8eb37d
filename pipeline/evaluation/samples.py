"""An RGB CLIP on the images themselves: the reference that models on splats are compared with.

Images are read and cropped as convert does it, at the size that the model wants, and normalised as
its files say.
"""

from __future__ import annotations

import hashlib

import torch

from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.models.pretrained import load_clip
from splatshard.pipeline.models.teacher import resolve_teacher
from splatshard.pipeline.train.trained import Trained
from splatshard.schemas.splats import canonical_json


def load_rgb(name: str, device: torch.device) -> Trained:
    """The CLIP `name`, see `pipeline.models.pretrained.load_clip`, which reads images. Raises
    UsageError where it cannot be loaded."""
    model, how = load_clip(name), resolve_teacher(name)
    digest = hashlib.sha256(how.weights.encode())  # the vision tower's; and what else there is
    for parameter, value in sorted(model.state_dict().items()):
        if not parameter.startswith("vision."):
            digest.update(f"{parameter}\0".encode() + value.float().contiguous().numpy().tobytes())
    digest.update(canonical_json([how.mean, how.std]).encode())
    assert isinstance(model.vision, PatchEncoder), "an RGB CLIP"
    model.vision.mean, model.vision.std = how.mean, how.std
    return Trained(
        model=model.to(device).eval(),
        config=model.config,
        url=name,
        step=None,
        weights=digest.hexdigest(),
        device=device,
    )
