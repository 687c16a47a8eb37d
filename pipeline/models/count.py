"""Parameters by group, and the share that trains.

The published facts (arXiv 2509.22615): ViT-B/16 (Small), width 512, has 38.6 M vision parameters;
stage 2 trains 9.7 % with the text tower frozen (stem, first two blocks, final norm, projection),
13.8 % with the text tower's last block, norm and projection. `STAGE2` and `STAGE2_TEXT` are these
two. With our stem and resampler, and open_clip's text tower of 12 layers:

    stem and resampler       3.66 M    of the whole, 105.18 M:
    first two blocks         6.30 M    trained, text frozen    10.23 M    9.7 %    (9.7)
    norm and projection      0.26 M    with the text's part    13.65 M   13.0 %   (13.8)
    text: block, norm, pr.   3.42 M

What remains: 0.8 points of the second. The two published shares differ by 4.1 points; if that is
one block, norm and projection of width 512 (3.42 M), the whole is 83 M, as with a text tower of 6
layers (44.5 M instead of 63.4 M), and then a stem of 1.6 M gives both shares. The paper's abstract
and tables say neither how deep the text tower is nor how large the stem.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

STAGE2 = (
    "vision.stem.*",
    "vision.resampler.*",
    "vision.class_embedding",
    "vision.encoder.layers.0.*",
    "vision.encoder.layers.1.*",
    "vision.post_layernorm.*",
    "visual_projection.*",
)
"""What stage 2 trains with the text tower frozen."""

GROUPS = {
    "predictor": ("predictor.*",),
    "vision embeddings": ("vision.embeddings.*", "vision.class_embedding"),
    "stem": ("vision.stem.*",),
    "resampler": ("vision.resampler.*",),
    "vision blocks": ("vision.encoder.*",),
    "vision norms": ("vision.pre_layrnorm.*", "vision.post_layernorm.*"),
    "vision projection": ("visual_projection.*",),
    "text embeddings": ("text.embeddings.*",),
    "text blocks": ("text.encoder.*",),
    "text norm": ("text.final_layer_norm.*",),
    "text projection": ("text_projection.*",),
    "logit scale": ("logit_scale",),
    "head": ("head.*",),
}
"""By name; a classifier's `encoder.` counts as `vision.`."""


def stage2_text(text_layers: int) -> tuple[str, ...]:
    """STAGE2 and the last block, norm and projection of a text tower of so many blocks."""
    last = f"text.encoder.layers.{text_layers - 1}.*"
    return (*STAGE2, last, "text.final_layer_norm.*", "text_projection.*")


@dataclass(frozen=True)
class Count:
    """Parameters of a group: all, and those that train."""

    name: str
    total: int
    trainable: int


def count(model: nn.Module, trainable: Iterable[str] | None = None) -> list[Count]:
    """By group, then `all`. `trainable` are patterns of names (fnmatch); None counts what requires
    a gradient."""
    patterns = None if trainable is None else tuple(trainable)
    sums = {name: [0, 0] for name in (*GROUPS, "other", "all")}
    for name, parameter in model.named_parameters():
        trains = parameter.requires_grad if patterns is None else matches(name, patterns)
        for group in (group_of(name), "all"):
            sums[group][0] += parameter.numel()
            sums[group][1] += parameter.numel() * trains
    return [Count(name, *pair) for name, pair in sums.items() if pair[0] or name == "all"]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name is like one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def group_of(name: str) -> str:
    """The group that a parameter's name belongs to, or `other`."""
    if name.startswith("encoder."):
        name = "vision." + name.removeprefix("encoder.")
    return next((group for group, like in GROUPS.items() if matches(name, like)), "other")


def share(counts: list[Count]) -> float:
    """Trainable parameters of `all`, 0 to 1."""
    return counts[-1].trainable / max(1, counts[-1].total)


def table(counts: list[Count]) -> str:
    """For people: a line for each group."""
    lines = [f"{'parameters':18} {'all':>12} {'trainable':>12}"]
    lines += [f"{c.name:18} {c.total:12,} {c.trainable:12,}" for c in counts]
    return "\n".join([*lines, f"trainable share {100 * share(counts):.1f} %"])
