"""Arrow's values as Python's, and as JSON has them, at any depth.

JSON has no form for some of them:

    NaN, infinity                 text: nan, inf, -inf
    dates, times, decimals, UUID  text, as Python prints them; nanoseconds with all nine digits
    durations                     text, as Python prints them; nanoseconds as their number
    bytes in maps                 base64
    maps                          lists of [key, value]

and Python none for others. They cost no more than themselves:

    times beyond the year 9999, or of an unknown time zone    the number that is stored
    texts that are not UTF-8 (Spark and others do not check)  NotText: in JSON with \\xNN
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa


class NotText(bytes):
    """The bytes of a text that is not UTF-8."""


def values_of(column: pa.Array) -> list[Any]:
    """Python's values of a column."""
    kind = _exact(column.type)
    column = column if kind == column.type else column.cast(kind)
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, LookupError):  # one of them; ValueError: Unicode, zones
        return [_value(column[i : i + 1]) for i in range(len(column))]


def _value(one: pa.Array) -> Any:
    """The value of an array of one."""
    try:
        return one.to_pylist()[0]
    except (ValueError, OverflowError, LookupError):
        dense = one.dictionary_decode() if pa.types.is_dictionary(one.type) else one
        return _decoded(dense.cast(_stored(dense.type)).to_pylist()[0], dense.type)


def _stored(kind: pa.DataType) -> pa.DataType:
    """The type without what Python may have no value for: texts as bytes, times as numbers."""
    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.large_binary()
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pa.int64()
    return _within(kind, _stored)


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """A value of `_stored(kind)`, its texts decoded where they can be."""
    types = pa.types
    if value is None:
        return None
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return NotText(value)
    if types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if types.is_map(kind):
        return [(_decoded(k, kind.key_type), _decoded(v, kind.item_type)) for k, v in value]
    if types.is_nested(kind):
        return [_decoded(each, kind.value_type) for each in value]
    return value


def plain(value: Any) -> Any:
    """A value of Arrow's as JSON has it; see the top of this file."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, NotText):
        return value.decode(errors="backslashreplace")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    special = isinstance(value, date | time | timedelta | Decimal | UUID)
    infinite = isinstance(value, float) and not math.isfinite(value)
    return str(value) if special or infinite else value


def _exact(kind: pa.DataType) -> pa.DataType:
    """The type from which Python gets all of a value: its own times end at microseconds, and only
    pandas has others."""
    if pa.types.is_float16(kind):
        return pa.float32()  # older Arrow gives numpy's
    if not pa.types.is_temporal(kind) or getattr(kind, "unit", "") != "ns":
        return _within(kind, _exact)
    return pa.int64() if pa.types.is_duration(kind) else pa.string()


def _within(kind: pa.DataType, of: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `of` its inner types in place of these."""

    def within(field: pa.Field) -> pa.Field:
        return field.with_type(of(field.type))

    types = pa.types
    if types.is_struct(kind):
        return pa.struct([within(kind.field(i)) for i in range(kind.num_fields)])
    if types.is_list(kind):
        return pa.list_(within(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(within(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(within(kind.value_field), kind.list_size)
    if types.is_map(kind):
        return pa.map_(within(kind.key_field), within(kind.item_field), kind.keys_sorted)
    return kind
