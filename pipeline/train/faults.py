"""What is wrong with samples' labels, captions and teacher's embeddings, or with their shards'
cutoff and teacher, and what to do about it.

check.py looks for it in the columns of all shards before the first step, batches.py in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splatshard.schemas.errors import UsageError
from splatshard.schemas.splats import TEACHER, canonical_json
from splatshard.schemas.train import TrainConfig

Bools = NDArray[np.bool_]
Constants = dict[str, Any]
"""A shard's cutoff and teacher."""

LABELS_FROM = "class folders, .cls members, or a column of class numbers"
CAPTIONS_FROM = ".txt members, or a column of texts"


def label_faults(labels: NDArray[np.int64], config: TrainConfig) -> dict[str, Bools]:
    """Faults by name, bool [K], of labels [K], -1 where there is none."""
    missing = labels == -1
    wrong = (labels < 0) | (labels >= (config.model.num_classes or 0))
    return {"no label": missing, "label": wrong & ~missing}


def caption_faults(captions: Sequence[str | None], config: TrainConfig) -> dict[str, Bools]:
    """As `label_faults`, of K captions, None where there is none."""
    if config.data.empty_captions == "keep":
        return {}
    return {"no caption": np.array([not (caption or "").strip() for caption in captions], bool)}


def teacher_faults(embeddings: NDArray[Any]) -> dict[str, Bools]:
    """As `label_faults`, of a teacher's embeddings, halves or float32 [K, D]."""
    norms = np.linalg.norm(embeddings.astype(np.float32), axis=1)
    return {"embedding": ~((norms > 0) & np.isfinite(norms))}


def reasons(fault: str, value: Any, left: int | None, config: TrainConfig) -> tuple[str, str]:
    """What is wrong with a sample that has `value`, and the remedy. `left`: how many samples do not
    have that fault, None where it is not known that any do."""
    if fault == "no label":
        remedy = missing_remedy(f"labels ({LABELS_FROM})", '("label", ">=", 0)', left)
        return "has no label, which classification needs", remedy
    if fault == "label":
        what = f"has the label {value}, and model.num_classes is {config.model.num_classes}"
        return what, (
            "set model.num_classes to one more than the largest label"
            if value > 0
            else "labels are the numbers of classes, from 0 on: correct them in the source"
        )
    if fault == "no caption":
        remedy = missing_remedy(f"captions ({CAPTIONS_FROM})", '("caption_length", ">", 0)', left)
        if left != 0:
            remedy += ", or take them as the empty text with data.empty_captions=keep"
        return "has no caption, which contrastive training needs", remedy
    remedy = "embed again with splatshard embed"
    if fault == "no embedding":
        what = "has no teacher's embedding, or one of another length than its shard's others"
        return what, f"{remedy}, or look for damage with splatshard verify"
    return "has a teacher's embedding that is zero or not finite", remedy


def missing_remedy(source: str, condition: str, left: int | None) -> str:
    """What to do about samples without what a source with `source` has: to leave them out, for they
    do not fulfil `condition`, helps only where others are left."""
    leave_out = f"leave such samples out with data.filter=({condition},)"
    if left:
        return leave_out
    use = f"use a source with {source}, or train another stage"
    return use if left == 0 else f"{use}; if other samples have some, {leave_out}"


def other_width(size: int, width: int) -> str:
    """Of a teacher's embeddings of `size` numbers for an encoder of another width."""
    return (
        f"{size} numbers, the encoder makes {width}: set model.encoder.width to {size}, or embed "
        f"with a teacher of width {width}"
    )


def refuse_differences(constants: Mapping[str, Constants], name: str, what: str) -> None:
    """Raises UsageError unless all shards, whose `constants` are by URL, have the same cutoff, or
    the same teacher. `what` they stand for: shards, or folders."""
    groups: dict[str, list[str]] = {}
    for url, own in constants.items():
        groups.setdefault(canonical_json(own.get(name)), []).append(url)
    untaught = [url.rpartition("/")[0] for url, own in constants.items() if own.get(name) is None]
    if name == TEACHER and len(untaught) == len(constants):
        raise UsageError(
            f"{untaught[0]} has no teacher's embeddings, which distillation needs: "
            f"splatshard embed {untaught[0]} --teacher MODEL adds them"
        )
    if len(groups) == 1:
        return
    parts = [
        f"{len(urls):,} of {len(constants):,} {what} have "
        f"{value_text(name, constants[urls[0]].get(name))}, first of them {urls[0]}"
        for urls in groups.values()
    ]
    dst = untaught[0] if untaught else next(iter(constants)).rpartition("/")[0]
    remedy = (
        f"splatshard embed {dst} --teacher MODEL gives all the same"
        if name == TEACHER
        else "train on shards that were converted with one --cutoff"
    )
    raise UsageError(f"the {what} differ in their {name}: {'; '.join(parts)}: {remedy}")


def value_text(name: str, value: Any) -> str:
    """A teacher in few words; another constant as it is."""
    if name != TEACHER:
        return f"{value}"
    if value is None:
        return "no teacher's embeddings"
    weights = str(value.get("weights", ""))[:12]
    return f"{value['dim']} numbers of {value.get('model')}{weights and f', weights {weights}'}"
