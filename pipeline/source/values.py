"""What a value says where a sample's uid, caption or label is looked for: in JSON, in Parquet.

By value, since the same thing is written in many types: a label is 1, 1.0 (pandas, for a column
with a gap), true, "1" or [1]; a caption is a text, bytes in UTF-8 or a list of texts.
"""

from __future__ import annotations

import codecs
import math
import re
from decimal import Decimal
from typing import Any
from uuid import UUID

LABELS = 1 << 63
"""A label is a signed 64-bit integer."""


def text_of(data: bytes, errors: str = "replace") -> str:
    """Bytes as text without its BOM: UTF-8, or UTF-16 where a BOM says so."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors)
    return data.decode("utf-8", errors).removeprefix("\ufeff")


def caption_of(value: Any) -> str | None:
    """A text without its BOM; of several texts a line each. None for what is no text."""
    if isinstance(value, list | tuple):
        texts = [caption_of(each) for each in value if each is not None]
        if not texts or None in texts:
            return None
        return "\n".join(" ".join(text.splitlines()) for text in texts if text is not None)
    if isinstance(value, bytes):
        value = text_of(value)
    return storable(value).removeprefix("\ufeff") if isinstance(value, str) else None


def label_of(value: Any) -> int | None:
    """A whole number, in whatever type; None for what is none, or too large."""
    if isinstance(value, list | tuple) and len(value) == 1:
        return label_of(value[0])
    if isinstance(value, bytes):
        value = text_of(value)
    if isinstance(value, str):
        found = re.fullmatch(r"\ufeff?\s*([+-]?[0-9]{1,18})(\.0*)?\s*", value)
        return int(found[1]) if found else None
    if not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        return None
    return int(value) if abs(value) < LABELS and value == int(value) else None


def key_of(value: Any) -> str | None:
    """A text or a whole number."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, str | int) and not isinstance(value, bool):
        return storable(str(value))
    return None


def uid_of(value: Any) -> str | None:
    """A text, or a number or bytes as one; None for null and what is several things."""
    if isinstance(value, bytes):
        return key_of(value) or value.hex()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, float | Decimal | UUID) else key_of(value)


def is_null(value: Any) -> bool:
    """Whether a value says that there is none, as None and NaN do."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def gives_back(found: str | int, value: Any) -> bool:
    """Whether `found` alone says what `value` was, up to its type."""
    if isinstance(value, bytes):
        return str(found).encode() == value
    return found == value or str(found) == str(value)


def storable(text: str) -> str:
    r"""Lone surrogates (JSON escapes, file names) as \udNNN: UTF-8 has no bytes for them."""
    return text.encode("utf-8", "backslashreplace").decode()
