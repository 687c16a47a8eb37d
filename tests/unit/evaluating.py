"""The evaluation job, for its tests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from splatshard.jobs import evaluate

Capsys = pytest.CaptureFixture[str]


def run_job(capsys: Capsys, *arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, what it prints as JSON, and what it tells people."""
    capsys.readouterr()
    code = evaluate.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err
