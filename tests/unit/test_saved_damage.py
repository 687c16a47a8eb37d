"""Folders of saved models that are damaged, changed or of another version: each is refused
with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import splatshard
from splatshard.schemas.errors import UsageError
from tests.unit.test_saved import changed, classifier, models
from tests.unit.toy_models import tokenizer_folder


def weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors")


HEAD = "head.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: changed(f, colour=1), r"colour is no field of this version; .*update"),
        (lambda f: changed(f, version=2), r"has the version 2, and this build reads 1 to 1: up"),
        (lambda f: changed(f, version=0), "has the version 0"),
        (lambda f: changed(f, architectures=["GViT"]), "says GViT and describes a SplatClassifier"),
        (lambda f: (f / "config.json").unlink(), r"has a model\.safetensors, and no config\.json"),
        (
            lambda f: weights(f, lambda w: w[HEAD].fill_(float("nan"))),
            r"head\.weight has values that are not finite, .*: take an earlier checkpoint",
        ),
        (lambda f: changed(f, version="1"), r"has the version '1'"),
        (lambda f: changed(f, model=None), "model is None, no group of fields"),
        (lambda f: changed(f, classes=["cat"]), "classes are 1 names, and model.num_classes is 3"),
        (lambda f: changed(f, model_type="clip"), "model of the type 'clip', which splatshard did"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged .*fetch or save"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99),
            r"model\.safetensors is damaged",
        ),
        (lambda f: weights(f, lambda w: w.pop(HEAD)), r"it lacks 1 tensors, such as head\.weight"),
        (
            lambda f: weights(f, lambda w: w.update(more=torch.ones(1))),
            "it has besides 1 tensors, such as more",
        ),
        (
            lambda f: weights(f, lambda w: w.update({HEAD: torch.ones(5, 32)})),
            r"head\.weight is \[5, 32\] in it, and \[3, 32\] by config\.json",
        ),
    ],
)
def test_what_is_not_understood(damage: Any, message: str, tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(UsageError, match=message):
        splatshard.encoder(tmp_path / "a")


def test_a_tokenizer_that_is_not_whole(tmp_path: Path) -> None:
    models(tokenizer_folder(tmp_path / "t"))["clip"].save_pretrained(tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match=r"fetch or save the model again, with .* tokenizer"):
        splatshard.encoder(tmp_path / "a").encode_text("w0")
