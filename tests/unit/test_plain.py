"""Configurations as plain data and back; and that what a field may be is said once."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splatshard.schemas.config import (
    MAX_FITTED_GAUSSIANS,
    ConvertConfig,
    FitConfig,
    TeacherConfig,
)
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import GViTConfig, GViTLossConfig, ModelConfig, TextConfig
from splatshard.schemas.plain import chosen, from_dict, to_dict
from splatshard.schemas.splats import MAX_PAYLOAD_GAUSSIANS
from splatshard.schemas.train import AugmentConfig, OptimConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
TEACHER = TeacherConfig(
    model="m", weights="a", dim=3, image_size=8, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)
)
GVIT = TrainConfig(
    stage="gvit",
    model=ModelConfig(num_classes=3, gvit=GViTConfig()),
    augment=AugmentConfig(),
    optim=OptimConfig(steps=1),
    gvit=GViTLossConfig(),
)
WHOLE = [ConvertConfig(teacher=TEACHER), GVIT, ModelConfig(text=TextConfig())]


def parts_of(config: Any) -> Iterator[Any]:
    """`config` and the configurations in it."""
    yield config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(inner := getattr(config, field.name)):
            yield from parts_of(inner)


PARTS = {type(part): part for config in WHOLE for part in parts_of(config)}


@pytest.mark.parametrize("config", PARTS.values(), ids=lambda config: type(config).__name__)
def test_every_configuration_survives_json(config: Any) -> None:
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_every_configuration_is_among_them() -> None:
    written = {
        node.name
        for name in ("config", "model", "train")
        for node in ast.walk(ast.parse((ROOT / f"schemas/{name}.py").read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert written == {kind.__name__ for kind in PARTS}


CHOICES = [(part, name, value) for part in PARTS.values() for name, value, _ in chosen(part)]


@pytest.mark.parametrize(
    ("config", "name", "value"), CHOICES, ids=[f"{type(c).__name__}.{n}" for c, n, _ in CHOICES]
)
def test_every_choice_is_checked_where_it_is_made(config: Any, name: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}.* '?zip'?: choose one of .*{value}"):
        dataclasses.replace(config, **{name: "zip"})
    with pytest.raises(UsageError, match=rf"{name}.* '?zip'?: choose one of .*{value}"):
        from_dict(type(config), to_dict(config) | {name: "zip"})


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (ConvertConfig, {"fit": {"colour": 1}}, r"fit\.colour is no field of this version"),
        (ConvertConfig, {"fit": 3}, r"fit is 3, no group of fields"),
        (ConvertConfig, None, r"the configuration is None, no group"),
        (ConvertConfig, {"teacher": {"model": "m"}}, r"teacher\.weights is missing"),
        (FitConfig, {"steps": 1.5}, r"steps is 1\.5: it must be a whole number"),
        (FitConfig, {"steps": True}, r"steps is True: it must be a whole number"),
        (FitConfig, {"cutoff": "wide"}, r"cutoff is 'wide': it must be a number"),
        (FitConfig, {"whitened": 1}, r"whitened is 1: it must be True or False"),
        (OptimConfig, {"betas": 0.9}, r"betas is 0\.9: it must be a list"),
        (OptimConfig, {"betas": [0.9]}, r"betas is \[0\.9\]: it must have 2 parts"),
        (TrainConfig, {"optim": {}}, r"stage is missing"),
    ],
)
def test_plain_data_of_another_version(kind: type[Any], values: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        from_dict(kind, values)


def test_a_whole_number_is_a_number_and_stays_whole() -> None:
    """Else a recipe's text, and with it every fingerprint, would be another."""
    config = from_dict(FitConfig, {"cutoff": 3, "target_psnr": None})
    assert (repr(config.cutoff), config.target_psnr) == ("3", None)


def test_what_is_fitted_can_be_read() -> None:
    assert MAX_FITTED_GAUSSIANS <= MAX_PAYLOAD_GAUSSIANS


def lists_of_names() -> Iterator[tuple[frozenset[str], bool, str]]:
    """Sets of names that are written down, in a Literal or elsewhere, and where."""
    for top in ("schemas", "pipeline", "jobs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            tree = ast.parse(path.read_text())
            subscripts = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
            literals = [
                node.slice for node in subscripts if ast.unparse(node.value).endswith("Literal")
            ]
            for node in ast.walk(tree):
                if isinstance(node, ast.Tuple | ast.List | ast.Set):
                    values = [e.value for e in node.elts if isinstance(e, ast.Constant)]
                    if len(values) == len(node.elts) > 1:
                        names = frozenset(map(str, values))
                        yield names, node in literals, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_no_list_of_choices_stands_twice() -> None:
    places: dict[frozenset[str], list[str]] = defaultdict(list)
    choices: set[frozenset[str]] = set()
    for names, literal, place in lists_of_names():
        places[names].append(place)
        if literal:
            choices.add(names)
    assert len(choices) > 15
    twice = {tuple(sorted(names)): places[names] for names in choices if len(places[names]) > 1}
    assert not twice, "define it once, as a Literal, and take typing.get_args of that"
