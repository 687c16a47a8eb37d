"""Real shards of both formats, made once for a file."""

from __future__ import annotations

from typing import Any

import pytest

from tests.rows import FORMATS
from tests.splat_shards import make_dataset

COUNTS = [10, 7, 1, 16, 9]
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Rows]]:
    """A destination and its ok rows by key, for each format."""
    found = {}
    for format in FORMATS:
        dst = str(tmp_path_factory.mktemp(format))
        found[format] = dst, make_dataset(dst, COUNTS, format)
    return found


@pytest.fixture(scope="module")
def dst(shards: dict[str, tuple[str, Rows]]) -> str:
    return shards["parquet"][0]


@pytest.fixture(scope="module")
def rows(shards: dict[str, tuple[str, Rows]]) -> Rows:
    return shards["parquet"][1]
