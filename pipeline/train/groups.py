"""Which parameters are trained, how AdamW treats them, and the average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from splatshard.schemas.errors import UsageError
from splatshard.schemas.train import OptimConfig

NOT_DECAYED = ("predictor.start",)
"""GViT's learned Gaussians: zero is the middle of the image, in grey."""


@dataclass(frozen=True)
class Groups:
    """Names of the parameters that are trained from the start, and of those that are from step
    `later_from` on. `unused` would be, but the loss does not depend on them."""

    now: tuple[str, ...]
    later: tuple[str, ...]
    later_from: int
    unused: tuple[str, ...] = ()

    def at(self, step: int) -> tuple[str, ...]:
        """Those that are trained in step `step`."""
        return self.now + self.later if step >= self.later_from else self.now


def groups_of(model: nn.Module, config: OptimConfig) -> Groups:
    """What the patterns of `config` choose. Raises UsageError for one that chooses nothing."""
    names = [name for name, _ in model.named_parameters()]
    now = _chosen(names, config.trainable, "optim.trainable")
    later = _chosen(names, config.later, "optim.later") if config.later else set[str]()
    start = config.warmup_steps if config.later_from is None else config.later_from
    return Groups(
        tuple(name for name in names if name in now),
        tuple(name for name in names if name in later - now),
        start,
    )


def _chosen(names: Sequence[str], patterns: Sequence[str], field: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            groups = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UsageError(
                f"{field} has the pattern {pattern!r}, which no parameter of the model matches; "
                f"there are {', '.join(g + '*' for g in groups)}"
            )
        found |= matches
    return found


def freeze(model: nn.Module, trained: Sequence[str]) -> None:
    """Only parameters named in `trained` get gradients."""
    chosen = set(trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name not in chosen:
            parameter.grad = None


def make_optimizer(model: nn.Module, groups: Groups, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all that is ever trained; what has no gradient yet it leaves alone.

    No weight decay on what has fewer than two dimensions (biases, norms, the logit scale), nor on
    NOT_DECAYED.
    """
    chosen = set(groups.now + groups.later)
    named = [(name, p) for name, p in model.named_parameters() if name in chosen]
    decayed = [p for name, p in named if p.ndim >= 2 and name not in NOT_DECAYED]
    others = [p for name, p in named if p.ndim < 2 or name in NOT_DECAYED]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.is_cuda for _, p in named),
    )


class Average:
    """An exponential moving average of the weights: a <- a + (1 - d) (w - a) after every step.

    d is min(decay, (1 + step) / (10 + step)), so that it forgets the random start soon.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        state = model.state_dict()
        names = [name for name in self.values if name in trained]
        averages, values = [self.values[n] for n in names], [state[n] for n in names]
        torch._foreach_lerp_(averages, values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def load(self, values: dict[str, Tensor]) -> None:
        """Go on from saved values, which must be of the same model."""
        for name, value in self.values.items():
            value.copy_(values[name])


def report(model: nn.Module, groups: Groups) -> dict[str, object]:
    """Parameters in all, and the share of them that is trained."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(sizes.values())
    now, later = (sum(sizes[n] for n in names) for names in (groups.now, groups.later))
    return {
        "parameters": total,
        "trainable": now,
        "trainable_share": now / total,
        "trainable_later": later,
        "later_from": groups.later_from if groups.later else None,
        "unused": list(groups.unused),
    }
