"""Parameters by group, and the share that is trained.

The published facts (arXiv 2509.22615): ViT-B/16 (Small), width 512, has 38.6 M vision parameters;
stage 2 trains 9.7 % with the text tower frozen (stem, first two blocks, final norm, projection),
13.8 % with the text tower's last block, norm and projection. jobs/recipes/contrast_stage2.py trains
the one, then the other. With our stem and resampler, and open_clip's text tower of 12 layers:

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

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

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


@dataclass(frozen=True)
class Count:
    """Parameters of a group: all, those that are trained, and those that are trained later."""

    name: str
    total: int
    trained: int
    later: int


def count(model: nn.Module, now: Collection[str], later: Collection[str] = ()) -> list[Count]:
    """By group, then `all`. `now` are names of parameters that are trained from the start, `later`
    of those that are from some step on."""
    now, later = set(now), set(later)
    sums = {name: [0, 0, 0] for name in (*GROUPS, "other", "all")}
    for name, parameter in model.named_parameters():
        for group in (group_of(name), "all"):
            for i, counted in enumerate((True, name in now, name in later)):
                sums[group][i] += parameter.numel() * counted
    return [Count(name, *found) for name, found in sums.items() if found[0] or name == "all"]


def group_of(name: str) -> str:
    """The group that a parameter's name belongs to, or `other`."""
    if name.startswith("encoder."):
        name = "vision." + name.removeprefix("encoder.")
    matching = (
        group
        for group, patterns in GROUPS.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    )
    return next(matching, "other")


def table(counts: list[Count], later_from: int | None = None) -> str:
    """For people: a line for each group, then shares. `later_from`: the step from which some are
    trained, too; None where none are."""
    column = "" if later_from is None else f" {f'from step {later_from:,}':>17}"
    lines = [f"{'parameters':18} {'all':>12} {'trained':>12}{column}"]
    for c in counts:
        more = f" {c.later:17,}" if column else ""
        lines.append(f"{c.name:18} {c.total:12,} {c.trained:12,}{more}")
    whole = counts[-1]
    share = f"{100 * whole.trained / whole.total:.1f} % are trained"
    if column:
        all_of_them = 100 * (whole.trained + whole.later) / whole.total
        share += f", {all_of_them:.1f} % from step {later_from:,} on"
    return "\n".join([*lines, share])
