"""What a value says where a sample's uid, caption or label is looked for: in JSON, in Parquet.

By value, since the same thing is written in many types: a label is 1, 1.0 (pandas, for a column
with a gap), true, "1" or [1]; a caption is a text, bytes in UTF-8 or a list of texts; a key is a
text, 1, 1.0 or a UUID. Zero bytes at the end of a caption or key are none of it: arrays of NumPy's
S10 and columns of fixed size are filled up with them. Bytes with zeros are no label: 3 and seven of
them are 51, as numbers are stored.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from decimal import Decimal
from typing import Any
from uuid import UUID

BOX = re.compile(r"[0-9]+( -?[0-9]*\.?[0-9]+(e-[0-9]+)?){4,}")
NUMBER = re.compile(r"\s*-?[0-9]*\.?[0-9]+\s*")
THREE_NUMBERS = re.compile(r"(?:[0-9.]+[,\s]+-?){3}")

LABELS = 1 << 63
"""A label is a signed 64-bit integer."""


def text_of(data: bytes, errors: str = "replace") -> str:
    """Bytes as text without its BOM: UTF-8, or UTF-16 where a BOM says so."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors)
    return data.decode("utf-8", errors).removeprefix("\ufeff")


def caption_of(value: Any) -> str | None:
    """A text without its BOM; of several texts, also as the text of their JSON, a line each. None
    for what is no text, such as the pairs of a map, and bytes with zeros in them."""
    if isinstance(value, list):
        texts = [caption_of(each) for each in value if each is not None]
        if not texts or None in texts:
            return None
        return "\n".join(" ".join(text.splitlines()) for text in texts if text is not None)
    if isinstance(value, bytes):
        value = text_of(value).rstrip("\0")
        if "\0" in value:
            return None
    if not isinstance(value, str):
        return None
    text = storable(value).removeprefix("\ufeff").rstrip("\0")
    return text if (texts := listed(text)) is None else caption_of(texts)


def listed(text: str) -> list[str] | None:
    """The texts of which this one is the JSON, as tables without a type for lists have captions."""
    if not (text.startswith('["') and text.rstrip().endswith('"]')):
        return None
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return texts if all(isinstance(each, str) for each in texts) else None


def not_utf8(value: Any) -> bool:
    """Whether a caption of these bytes has U+FFFD for some of them."""
    if not isinstance(value, bytes):
        return False
    try:
        text_of(value, "strict")
    except UnicodeDecodeError:
        return True
    return False


def lists_boxes(text: str) -> bool:
    """Whether a text lists objects, a line for each: numbers alone as YOLO has them (a class, a box
    or an outline in shares of the picture), or four or more with a name (KITTI, DOTA, ICDAR)."""
    if not THREE_NUMBERS.search(text[:256]):
        return False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return all(BOX.fullmatch(" ".join(line.split())) or _names_box(line) for line in lines)


def _names_box(line: str) -> bool:
    values = line.split(",") if "," in line else line.split()
    numbers = sum(bool(NUMBER.fullmatch(value)) for value in values)
    plain = ("," in line and ", " not in line) or any("." in value for value in values)
    return plain and numbers >= 4 and len(values) - numbers in (1, 2)


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
    """A text that is not empty, a whole number or a UUID; bytes where they can be read."""
    if isinstance(value, bytes):
        text = value.decode(errors="replace").rstrip("\0")
        return text if text and text.isprintable() and "\ufffd" not in text else None
    if isinstance(value, float | Decimal) and label_of(value) is not None:
        return str(int(value))
    if isinstance(value, str):
        return storable(value).rstrip("\0") or None
    return str(value) if isinstance(value, int | UUID) and not isinstance(value, bool) else None


def uid_of(value: Any) -> str | None:
    """A text, or a number or bytes as one; None for null and what is several things."""
    found = key_of(value)
    if is_null(value):
        return None
    if isinstance(value, bytes):
        return found or value.hex() or None
    return str(value) if found is None and isinstance(value, float | Decimal) else found


def is_null(value: Any) -> bool:
    """Whether a value says that there is none, as None, NaN and an empty list do."""
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def says_nothing(found: Any) -> bool:
    """Whether a field has no value, or a text of blanks alone."""
    return found is None or (isinstance(found, str) and not found.strip())


def gives_back(found: str | int, value: Any) -> bool:
    """Whether `found` alone says what `value` was, up to its type."""
    if isinstance(value, bytes):
        return str(found).encode() == value
    return found == value or str(found) == str(value)


def storable(text: str) -> str:
    r"""Lone surrogates (JSON escapes, file names) as \udNNN: UTF-8 has no bytes for them."""
    return text.encode("utf-8", "backslashreplace").decode()
