"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.make import shared_data


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The sample data (SPLATSHARD_DATA or ../shared/data); skips the test where it is absent."""
    return shared_data()
