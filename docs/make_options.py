"""docs/options.md, from the code: `make docs` writes it, a test compares.

Commands: what their `--help` says. Configurations: the dataclasses in schemas/, where the text
below a field says what it is.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from splatshard.jobs.__main__ import JOBS, main
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.train import TrainConfig

PAGE = Path(__file__).with_name("options.md")
WIDTH = 140

TOP = """
# Options

Written by `make docs`: do not edit. The options of every command, as its `--help` has them; then
every field of the configurations, with (its type; its default).

- [Commands](#commands): {commands}
- [A conversion](#a-conversion): the recipe that `_plan.json` and the markers keep
- [A training run](#a-training-run): what a recipe under jobs/recipes/ sets

## Commands
"""

CONVERSION = """
## A conversion

`ConvertConfig` of schemas/config.py. Each field but the teacher's is a flag of `splatshard convert`
as well: `fit.target_psnr` is `--target-psnr`.
"""

TRAINING = """
## A training run

`TrainConfig` of schemas/train.py, with the models of schemas/model.py. A recipe sets them in
Python, the command line by `--set optim.lr=1e-3`, with numbers, True, None and tuples as in Python.
"""


def page() -> str:
    """The whole page."""
    top = TOP.format(commands=", ".join(f"[{job}](#splatshard-{job})" for job in JOBS))
    parts = [
        *paragraphs(top),
        *(part for job in JOBS for part in command(job)),
        *paragraphs(CONVERSION),
        *groups(ConvertConfig),
        *paragraphs(TRAINING),
        *groups(TrainConfig),
    ]
    return "\n\n".join(parts) + "\n"


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text`, each filled to WIDTH; a list stays one."""
    parts = text.strip().split("\n\n")
    return [points(p.split("\n")) if p.startswith("- ") else filled(p) for p in parts]


def points(lines: list[str]) -> str:
    """A list."""
    return "\n".join(filled(line, "  ") for line in lines)


def filled(text: str, indent: str = "") -> str:
    """`text` in lines of WIDTH at most."""
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


# Commands


def command(job: str) -> Iterator[str]:
    """The section of a command: how it is called, what it does, its options by group."""
    usage, *about = re.split(r"\n\s*\n", help_of(job).strip("\n"))
    start = next(i for i, part in enumerate(about) if is_group(part))
    yield f"### splatshard {job}"
    yield f"    {' '.join(usage.split()).removeprefix('usage: ')}"
    yield from map(filled, about[:start])
    for part in about[start:]:
        assert is_group(part), f"splatshard {job} --help: no options in {part!r}"
        title, _, body = part.strip().partition("\n")
        *described, lines = re.split(r"^ +-{9,} *\n", body, flags=re.M)[1:]
        if described:
            yield filled(f"{title.strip().capitalize()}. {' '.join(described)}")
        yield points(list(entries(lines.split("\n"))))


def help_of(job: str) -> str:
    """What `splatshard JOB --help` prints where a terminal has 100 columns and ASCII alone."""
    printed = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(printed):
        main([job, "--help"])
    printed.seek(0)
    return printed.read()


def is_group(part: str) -> bool:
    """Whether a paragraph of a help text is a group of options: a title, a rule below it."""
    return re.match(r" ?[a-z][a-z -]* *\n -{9,} *\n", part) is not None


def entries(lines: list[str]) -> Iterator[str]:
    """The options of a group, which begin two columns in; their texts stand further right."""
    name, text = "", ""
    for line in [*lines, "  end"]:
        if not re.match(r"  \S", line):
            text += f" {line}"
        elif name.count("[") > name.count("]") and not text:  # its values take several lines
            name += line.strip()
        else:
            if name and not name.startswith("-h, "):
                yield entry(name, " ".join(text.split()))
            name, _, text = line.strip().partition("  ")


def entry(name: str, text: str) -> str:
    """``- `--steps INT`: Optimisation steps per image. Default: 100.``"""
    known = r"required|repeatable|at least one|default: (?:.(?!\(default))*"
    if found := re.search(rf" ?\(({known})\)$", text):
        hint = found[1][:1].upper() + found[1][1:]
        text = text[: found.start()]
        if hint not in [f"Default: {nothing}" for nothing in ("False", "None", "empty")]:
            text += f" {hint}."
    if len(name) > WIDTH / 2:
        name = name.replace(",", ", ")  # else too long for a line
    return f"- `{name}`: {text}"


# Configurations


def groups(root: type[Any]) -> Iterator[str]:
    """A section for each dataclass under `root`, with the dotted names of its fields."""
    places: dict[type[Any], list[str]] = {root: [""]}
    order = [root]
    for kind in order:
        for name, hint in typing.get_type_hints(kind).items():
            inner = dataclass_in(hint)
            if inner is not None:
                places.setdefault(inner, [])
                places[inner] += [f"{place}.{name}".strip(".") for place in places[kind]]
                if inner not in order:
                    order.append(inner)
    for kind in order:
        yield from group(kind, places[kind])


def dataclass_in(hint: Any) -> type[Any] | None:
    """The dataclass in `hint`, also of `X | None`."""
    for part in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(part):
            return typing.cast("type[Any]", part)
    return None


def group(kind: type[Any], places: list[str]) -> Iterator[str]:
    """The section of one dataclass, which stands at `places` of the configuration."""
    title = ", ".join(f"`{place}`" for place in places if place)
    yield f"### {title}{': ' if title else ''}{kind.__name__}"
    yield filled(inspect.getdoc(kind) or "")
    texts, hints = field_texts(kind), typing.get_type_hints(kind)
    lines: list[str] = []
    for field in dataclasses.fields(kind):
        name = f"{places[0]}.{field.name}".strip(".")
        text = f": {texts[field.name]}" if field.name in texts else ""
        lines.append(f"- `{name}` ({type_name(hints[field.name])}; {default(field)}){text}")
    yield points(lines)


def field_texts(kind: type[Any]) -> dict[str, str]:
    """The texts below the fields of a dataclass and of those that it extends."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = typing.cast(ast.ClassDef, tree).body
        for node, after in pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                texts[node.target.id] = " ".join(str(after.value.value).split())
    return texts


def type_name(hint: Any) -> str:
    """A type as people say it: `int or None`, `linear | cosine`, `(float, float)`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"tuple of {type_name(arguments[0])}"
        return f"({', '.join(map(type_name, arguments))})"
    return "None" if hint is type(None) else hint.__name__


def default(field: dataclasses.Field[Any]) -> str:
    """`100`; of a group nothing more than whether it may be left out."""
    if field.default is not dataclasses.MISSING:
        value: Any = field.default
        if isinstance(value, tuple):
            value = tuple(map(rounded, typing.cast("tuple[Any, ...]", value)))
        return str(value) if value != "" else "empty"
    if field.default_factory is not dataclasses.MISSING:
        return "its defaults"
    return "required"


def rounded(value: Any) -> Any:
    """4/3 as 1.3333."""
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
