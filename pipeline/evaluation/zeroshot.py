"""Zero-shot classification: class names and prompts to the text side of a classifier.

class_texts.py says where both are found. A class is the mean of its prompts' unit vectors, made
one again (arXiv 2103.00020).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.models.clip import SplatCLIP, load_tokenizer, tokenize
from splatshard.schemas.errors import UsageError

DEFAULT_TEMPLATES = ("a photo of a {c}.",)
TOGETHER = 256


def checked_templates(templates: Sequence[str], url: str) -> list[str]:
    """Raises UsageError for a prompt without a place for the class."""
    for number, template in enumerate(templates):
        if len(re.findall(r"\{c?\}", template)) < 1:
            raise UsageError(
                f"{url}: line {number + 1}, {template!r}, has no {{c}} for the class's name"
            )
    return list(templates)


def filled(template: str, name: str) -> str:
    """`template` about the class `name`; {} is {c}, as open_clip writes it."""
    return re.sub(r"\{c?\}", lambda _: name, template)


@torch.no_grad()
def class_vectors(
    model: SplatCLIP, names: Sequence[str], templates: Sequence[str], device: torch.device
) -> Tensor:
    """Unit vectors float32 [C, E], in main memory. Raises UsageError for a tokenizer that cannot
    be loaded."""
    prompts = [filled(template, name) for name in names for template in templates]
    vectors = text_vectors(model, prompts, device).view(len(names), len(templates), -1)
    return F.normalize(vectors.mean(1), dim=1)


@torch.no_grad()
def text_vectors(
    model: SplatCLIP, texts: Sequence[str], device: torch.device, tokenizer: Any = None
) -> Tensor:
    """Unit vectors float32 [T, E] of texts, in main memory, by the `tokenizer` of `load_tokenizer`.
    Raises as `class_vectors`."""
    text = model.config.text
    assert text is not None, "the model has a text tower"
    tokenizer = tokenizer or load_tokenizer(text)
    found = []
    for start in range(0, len(texts), TOGETHER):
        ids, _ = tokenize(tokenizer, texts[start : start + TOGETHER], text.context_length)
        found.append(F.normalize(model.encode_text(ids.to(device)).float(), dim=1).cpu())
    return torch.cat(found)
