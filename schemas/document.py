"""Small JSON files as they are found, perhaps damaged: one way to read them.

    document(text, "out/_run.json", "delete it")    its members, or a CorruptShardError that names
                                                    the file and says what to do

What is wrong with the members is for those who know what they mean.
"""

from __future__ import annotations

import codecs
import json
import math
import reprlib
from typing import Any, cast

from splatshard.schemas.errors import CorruptShardError

LEVELS = 64
"""Dictionaries and lists in one another; Python's own limit is met in some functions and not in
others."""


def document(text: str | bytes, name: str, remedy: str) -> dict[str, Any]:
    """The JSON object that `text` is; `name` (a path or URL) and `remedy` go into the message.

    Raises CorruptShardError for all else.
    """
    try:
        found = strict_json(text)
    except (ValueError, RecursionError) as e:
        raise CorruptShardError(f"{name} is not JSON ({e}); {remedy}") from e
    if not isinstance(found, dict):
        raise CorruptShardError(f"{name} is not a JSON object; {remedy}")
    return cast("dict[str, Any]", found)


def strict_json(text: str | bytes) -> object:
    """What `text` says, in UTF-8. Raises ValueError and RecursionError, also for what only Python
    takes for JSON: NaN, 1e999, and halves of characters, which no file and no log could hold; and
    for more than LEVELS levels."""
    text = text.decode() if isinstance(text, bytes) else text
    found: object = _DECODER.decode(text)
    if "\\ud" in text or "\\uD" in text:  # a half, or a pair as json.dumps writes it
        json.dumps(found, ensure_ascii=False).encode()
    if text.count("[") + text.count("{") > LEVELS and not is_shallow(found):
        raise ValueError(f"more than {LEVELS} levels in one another")
    return found


def first_json(text: bytes) -> object:
    """What `text` begins with, in any way that others write JSON: lines, NaN, a BOM. Raises
    ValueError and RecursionError."""
    return json.JSONDecoder().raw_decode(text_in_utf(text).lstrip())[0]


def text_in_utf(text: bytes) -> str:
    """`text` without its BOM, which may be that of UTF-16. Raises ValueError."""
    utf_16 = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return text.decode("utf-16" if utf_16 else "utf-8-sig")


def is_shallow(value: object, levels: int = LEVELS) -> bool:
    """Whether `value` has at most so many dictionaries and lists in one another."""
    if isinstance(value, dict):
        inner = list(cast("dict[str, object]", value).values())
    elif isinstance(value, list):
        inner = cast("list[object]", value)
    else:
        return True
    return levels > 0 and all(is_shallow(each, levels - 1) for each in inner)


def is_object(value: object) -> bool:
    """A dictionary, as JSON's objects are read, of at most LEVELS levels."""
    return isinstance(value, dict) and is_shallow(cast("dict[str, object]", value))


def is_text(value: object) -> bool:
    """A string that UTF-8 has bytes for."""
    if not isinstance(value, str):
        return False
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{reprlib.repr(text)} is no finite number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)
