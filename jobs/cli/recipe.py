"""Recipes: Python files that make a `config`, and single fields set from the command line.

    splatshard train classify_digits --set optim.epochs=3 --set data.src=splats

A recipe is run as the Python that it is, so use your own: its path in place of the name. Values are
typed by the configuration: numbers, True, None and tuples as in Python, text as it stands.
"""

from __future__ import annotations

import ast
import dataclasses
import runpy
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splatshard.schemas.errors import UsageError
from splatshard.schemas.plain import from_dict, to_dict
from splatshard.schemas.train import TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
"""Those that are installed."""


def load_recipe(path: str, settings: Sequence[str] = ()) -> TrainConfig:
    """The `config` that the file at `path` makes, or the recipe of ours with that name, with
    `settings` ("a.b=value").

    Raises UsageError for a file that cannot be read or makes no TrainConfig, and for settings that
    it does not take.
    """
    known = {file.stem: file for file in sorted(RECIPES.glob("[a-z]*_*.py"))}
    if not Path(path).is_file() and path in known:
        path = str(known[path])
    if not Path(path).is_file():
        there = f"there are {', '.join(known)}, or give a Python file that makes a TrainConfig"
        raise UsageError(f"{path}: no such recipe; {there}")
    if not path.endswith(".py"):
        raise UsageError(f"{path}: a recipe is a Python file (.py) that makes a TrainConfig")
    try:
        config = runpy.run_path(path).get("config")
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(f"{path}: the recipe fails with {type(e).__name__}: {e}") from e
    if not isinstance(config, TrainConfig):
        raise UsageError(f"{path}: a recipe must make a TrainConfig named config")
    return with_settings(config, settings)


def with_settings(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """`config` with fields replaced, all at once. Raises UsageError, naming the field."""
    values = to_dict(config)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write field=value, as in data.batch_size=64")
        _set(values, name, text)
    return from_dict(TrainConfig, values)


def _set(values: dict[str, Any], name: str, text: str) -> None:
    """Put the field `name` of nested plain data, which are a TrainConfig's."""
    kind: Any = TrainConfig
    *groups, last = name.split(".")
    for place in [*groups, last]:
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if place not in hints:
            there = f"choose one of {', '.join(hints)}" if hints else "it has no fields"
            raise UsageError(f"--set {name}={text}: there is no field {place}: {there}")
        kind = _group_of(hints[place])
    for place in groups:
        if values[place] is None:
            values[place] = {}  # a group that the recipe leaves out: its defaults
        values = values[place]
    values[last] = _value(name, text, kind)


def _group_of(hint: Any) -> Any:
    """What may be there of `X | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _value(name: str, text: str, kind: Any) -> Any:
    """The text as a Python value where it is one; what is meant as text stays text."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if dataclasses.is_dataclass(kind) and value is not None:
        raise UsageError(f"--set {name}={text}: it is a group: set its fields, or it to None")
    one = typing.get_origin(kind) is tuple and not isinstance(value, list | tuple)
    return (value,) if one else value
