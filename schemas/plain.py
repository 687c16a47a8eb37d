"""Configurations as plain data and back, for JSON; and the choices that their fields have.

    to_dict(config) -> dictionaries, lists, numbers, text -> from_dict(cls, values)

For any dataclass whose fields are numbers, text, tuples and other dataclasses; what a field takes
is read from its annotation, so that it is said once.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, TypeVar, cast

from splatshard.schemas.errors import UsageError

Config = TypeVar("Config")


def to_dict(config: object) -> dict[str, Any]:
    """Plain data for JSON: tuples become lists there."""
    return dataclasses.asdict(cast(Any, config))


def from_dict(cls: type[Config], values: object) -> Config:
    """The dataclass `cls` from plain data, as `to_dict` and JSON make it; numbers stay as they are,
    so that what is made of them is the same text again.

    Raises UsageError for fields that it does not have or lacks, and for values that it does not
    take: the data are another version's.
    """
    return cast(Config, _typed(cls, values, ""))


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values of nested plain data; tuples as lists, as JSON gives them."""
    if isinstance(value, dict) and value:
        for key, inner in cast("dict[str, object]", value).items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, list(cast("tuple[object, ...]", value)) if isinstance(value, tuple) else value


def chosen(config: object) -> Iterator[tuple[str, object, tuple[str, ...]]]:
    """Name, value and choices of each field that has choices (Literal)."""
    for name, choices in _choices(type(config)).items():
        yield name, getattr(config, name), choices


@cache
def _choices(kind: type[Any]) -> dict[str, tuple[str, ...]]:
    hints = typing.get_type_hints(kind)
    return {n: typing.get_args(h) for n, h in hints.items() if typing.get_origin(h) is Literal}


def _typed(kind: Any, value: Any, name: str) -> Any:
    """`value`, which is plain data, as the type annotation `kind` says."""
    if dataclasses.is_dataclass(kind):
        return _group(kind, value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, name)
    if origin is tuple:
        return _tuple(arguments, value, name)
    number = kind is float and type(value) is int
    if kind in _WORDS and type(value) is not kind and not number:
        raise UsageError(f"{name} is {value!r}: it must be {_WORDS[kind]}")
    return value  # one of several choices is looked at by the dataclass itself


def _group(kind: Any, value: Any, name: str) -> Any:
    """The dataclass `kind`; what it lacks are its defaults."""
    if not isinstance(value, dict):
        raise UsageError(f"{name or 'the configuration'} is {value!r}, no group of fields")
    values, hints = cast("dict[str, Any]", value), typing.get_type_hints(kind)
    dotted = f"{name}." if name else ""
    for key in values:
        if key not in hints:
            raise UsageError(f"{dotted}{key} is no field of this version")
    for field in dataclasses.fields(kind):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise UsageError(f"{dotted}{field.name} is missing, which this version needs")
    return kind(**{key: _typed(hints[key], item, dotted + key) for key, item in values.items()})


def _tuple(kinds: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"{name} is {value!r}: it must be a list")
    items = cast("list[Any]", value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds):
        raise UsageError(f"{name} is {value!r}: it must have {len(kinds)} parts")
    return tuple(_typed(kind, item, name) for kind, item in zip(kinds, items, strict=True))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
}
