"""What a step's number alone decides: learning rate and random numbers.

Both are functions of the step and not of what came before, so a checkpoint needs no state of them.
"""

from __future__ import annotations

import hashlib
import math

import torch

from splatshard.schemas.train import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Of step `step` (from 0) of `steps`: a linear warm-up, then a cosine to `final_lr` of it."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, share))) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def seed_of(*numbers: int) -> int:
    """A seed for torch's generators, 63 bits that depend on all of `numbers`."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*numbers: int) -> None:
    """Seed torch's generators, of all devices, for a piece of work that `numbers` name."""
    torch.manual_seed(seed_of(*numbers))
