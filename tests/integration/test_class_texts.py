"""Class names beside the images: convert copies them, and the other jobs take no offence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from splatshard.jobs import repair
from splatshard.jobs.destination.class_texts import lines_of
from splatshard.pipeline.evaluation.class_texts import CLASSNAMES, TEMPLATES
from tests.integration.running import assert_verified, convert_json, run_json, tars

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("shared_ray")]


def test_evaluation_finds_them_without_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    src, dst = tars(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "in" / CLASSNAMES).write_text("cat\ndog\n")
    (tmp_path / "in" / TEMPLATES).write_text("a {c}\n")
    code, _, err = convert_json(capsys, src, dst)
    assert (code, err.count("copied for evaluation")) == (0, 2), err
    assert_verified(capsys, dst)
    code, _, err = convert_json(capsys, src, dst)
    assert (code, "copied" in err) == (0, False), err
    (dst / CLASSNAMES).unlink()
    assert convert_json(capsys, src, dst)[0] == 0
    assert run_json(capsys, repair, dst, "--workers=1")[0] == 0
    shutil.rmtree(tmp_path / "in")
    assert lines_of("", CLASSNAMES, str(dst)) == ["cat", "dog"]
    assert lines_of("", TEMPLATES, str(dst)) == ["a {c}"]
    assert_verified(capsys, dst)
