"""Originals beside their Gaussians: only of sources that the user has named, and unchanged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splatshard.jobs.destination.sources import remember
from splatshard.jobs.pages import view_sample
from splatshard.jobs.pages.view_data import View
from tests.make import encode, photo, write_tar
from tests.viewing import ROWS, ask, convert, make_source, pixels_of, refusal


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A source and its shards."""
    make_source(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    return tmp_path / "in", tmp_path / "out"


def reason(src: str, dst: Path, row: int = 0) -> str:
    """Why there is no original; no picture is sent then, either."""
    view = View(str(dst), src, "cpu")
    found = ask(view, f"/api/original?shard=a&row={row}")["reason"]
    if found:
        for path in ("original", "residual"):
            status, error = refusal(view, f"/image/{path}?shard=a&row={row}")
            assert status in (400, 500)
            assert error in found
    return found


def test_sources_are_read_only_where_the_user_has_named_them(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    src, dst = made
    assert f"if it may be read, say so with --src, such as --src {src}" in reason("", dst)
    (tmp_path / "other").mkdir()
    assert "which is not in" in reason(str(tmp_path / "other"), dst)
    assert reason(str(src), dst) == ""
    remember(str(dst), str(src))
    assert reason("", dst) == ""


def test_originals_are_those_of_their_rows_in_any_order(made: tuple[Path, Path]) -> None:
    """Also when one that was read before comes again, or another shard in between."""
    src, dst = made
    view = View(str(dst), str(src), "cpu")
    crops = {}
    for shard, row in (("a", 2), ("a", 4), ("a", 1), ("b", 1), ("b", 2), ("a", 0), ("a", 2)):
        picture = ask(view, f"/image/original?shard={shard}&row={row}")
        assert crops.setdefault((shard, row), picture) == picture
        rendering = ask(view, f"/image/residual?shard={shard}&row={row}&gain=1")
        assert rendering != picture
    assert len(set(crops.values())) == len(crops)


def test_a_source_that_has_changed_or_is_gone_is_told(made: tuple[Path, Path]) -> None:
    src, dst = made
    others = [(f"a{i}.png", encode(photo(48, 40, 50 + i), "PNG")) for i in range(ROWS)]
    write_tar(src / "a.tar", others)
    assert "the source of a has changed since it was converted" in reason(str(src), dst)
    (src / "a.tar").unlink()
    found = reason(str(src), dst)
    assert found.startswith("it cannot be read: ")
    assert "a.tar" in found


def test_a_plan_that_does_not_know_the_shard_is_told(made: tuple[Path, Path]) -> None:
    src, dst = made
    (dst / "_plan.json").unlink()
    assert "says what a is made of" in reason(str(src), dst)


def test_the_residual_of_a_perfect_picture_is_black(made: tuple[Path, Path]) -> None:
    """It is what rendering and original differ by, so nothing where they are the same."""
    src, dst = made
    view = View(str(dst), str(src), "cpu")
    image = view_sample.picture(view, "a", 1, None)
    crop = np.asarray(view_sample.as_pillow(image.render(backend="cpu")))
    view.originals.crop = lambda *_: crop  # type: ignore[method-assign]
    assert pixels_of(ask(view, "/image/residual?shard=a&row=1&gain=16")).max() == 0
