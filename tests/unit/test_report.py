"""The report's page: self-contained, everything escaped, honest where something is absent."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splatshard.jobs.destination.figures import dataset_figures
from splatshard.jobs.destination.plan import StaleShard, Status
from splatshard.jobs.pages.report_page import MAX_ELLIPSES, Picture, ReportData, Skip, page
from splatshard.jobs.report import (
    ReportOptions,
    as_jpeg,
    encode,
    jpeg_figures,
    main,
    shown,
    spread,
    survey,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.schemas.config import ConvertConfig, output_config
from splatshard.schemas.shard import FailedShard, ShardManifest
from tests.make import photo

EVIL = "<script>alert('x')</script>\"&"


def make_manifest(name: str = "00000000", ok: int = 3, skipped: int = 1) -> ShardManifest:
    return ShardManifest(
        name=name,
        data_file=f"{name}.parquet",
        size_bytes=20_000,
        sha256="0" * 64,
        format="parquet",
        samples=ok + skipped,
        counts={"ok": ok, "corrupt_image": skipped},
        statistics={"psnr_mean": 30.0, "num_gaussians_mean": 16.0, "payload_bytes": 256.0 * ok}
        if ok
        else {},
        fingerprint="f",
        inputs={"recipe": output_config(ConvertConfig()), "source": {"size_bytes": 1}},
        source_url="in.tar",
        source_sha256="0",
    )


def make_picture(caption: str = "a photograph", ellipses: int = 3) -> Picture:
    png = encode(photo(32, 32), "PNG")
    return Picture(
        shard="00000000",
        key=f"key {EVIL}",
        caption=caption,
        psnr=31.25,
        num_gaussians=ellipses,
        payload_bytes=256,
        width=32,
        height=32,
        original=png,
        reconstruction=png,
        backdrop=encode(photo(32, 32), "JPEG"),
        ellipses=[(5.0, 6.0, 3.0, 2.0, 45.0, 0.5, -0.9, 0.1)] * ellipses,
    )


def make_data(**changes: Any) -> ReportData:
    manifests = (make_manifest(),)
    status = Status(done=manifests, failed=(), corrupt=(), missing=(), stale=(), unplanned=())
    data = ReportData(
        dst="/somewhere/splats",
        figures=dataset_figures(manifests),
        status=status,
        surveyed=1,
        psnrs=[28.0, 30.0, 32.0],
        payload_sizes=[256, 256, 256],
        skips=[Skip(shard="00000000", key=EVIL, reason="corrupt_image", message=EVIL)],
        skipped={"corrupt_image": 1},
        pictures=[make_picture(EVIL)],
        jpeg=jpeg_figures([as_jpeg(photo(32, 32))]),
        recipe=output_config(ConvertConfig()),
        recipes=1,
        run={
            "images_per_s": 4.2,
            "wall_s": 90.0,
            "time_to_first_shard_s": 20.0,
            "workers": 2,
            "backend": "cpu",
        },
    )
    return replace(data, **changes)


class Balance(HTMLParser):
    """Checks that every element is closed, and collects all addresses."""

    VOID = ("meta", "img", "image", "rect", "line", "ellipse")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = ("src", "href")
        self.addresses += [value or "" for name, value in attributes if name in names]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check(html: str) -> None:
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert all(address.startswith("data:image/") for address in parser.addresses)
    assert "<script" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"https?://", html)


def test_the_page_is_self_contained_and_escaped() -> None:
    html = page(make_data())
    check(html)
    assert html.count("&lt;script&gt;") >= 4  # caption, key, skipped key, message
    for words in ("30.00 dB", "images/s</dt><dd>4.2", "JPEG q75", "corrupt_image", "num_gaussians"):
        assert words in html


def test_the_best_picture_comes_first_as_the_help_says() -> None:
    """They are given in the order of their PSNR."""
    some = [replace(make_picture(), psnr=psnr) for psnr in (21.5, 25.5, 33.5)]
    html = page(make_data(pictures=some))
    assert sorted(("33.50 dB", "25.50 dB", "21.50 dB"), key=html.index) == [
        "33.50 dB",
        "25.50 dB",
        "21.50 dB",
    ]
    options = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    assert "Pictures in the gallery, from the best PSNR to the worst." in options


def test_sizes_are_those_in_the_file() -> None:
    html = page(make_data())
    assert "splats are what their payloads take in the file" in html
    assert "before the container compresses" not in html


def test_long_captions_are_cut_before_they_are_escaped() -> None:
    html = page(make_data(pictures=[make_picture("&" * 500)]))
    check(html)
    assert "&amp;" * 160 + "…" in html
    assert "&amp;" * 161 not in html


def test_a_source_that_is_gone_is_said() -> None:
    picture = replace(make_picture(), original=None)
    html = page(make_data(pictures=[picture], jpeg=None))
    check(html)
    assert "source gone" in html
    assert "1 original could not be read from the source" in html
    assert "JPEG sizes cannot be measured" in html


def test_nothing_converted_and_nothing_run() -> None:
    manifests = (make_manifest(ok=0, skipped=2),)
    status = Status(done=manifests, failed=(), corrupt=(), missing=(), stale=(), unplanned=())
    html = page(
        make_data(
            status=status,
            figures=dataset_figures(manifests),
            psnrs=[],
            payload_sizes=[],
            pictures=[],
            jpeg=None,
            run={},
        )
    )
    check(html)
    assert "images/s" not in html


def test_what_is_not_whole_is_on_top() -> None:
    failed = FailedShard(
        name="1", source_url="in", error="SourceError", message=EVIL, fingerprint="f"
    )
    status = Status(
        done=(make_manifest(),),
        failed=(failed,),
        corrupt=(("2", "not JSON"),),
        missing=("3",),
        stale=(StaleShard(name="4", differences=("recipe.fit.steps: 1 -> 2",)),),
        unplanned=(),
    )
    html = page(make_data(status=status))
    check(html)
    assert "1 failed, 1 missing, 1 stale, 1 corrupt" in html


def test_ellipses_are_bounded() -> None:
    html = page(make_data(pictures=[make_picture(ellipses=MAX_ELLIPSES + 50)]))
    assert html.count("<ellipse ") == MAX_ELLIPSES


@pytest.mark.parametrize("number", [0, 1, 2, 5, 9, 10, 99])
def test_spread_takes_both_ends_and_nothing_twice(number: int) -> None:
    items = list(range(10))
    chosen = spread(items, number)
    assert len(chosen) == min(number, 10)
    assert chosen == sorted(set(chosen))
    if number >= 2:
        assert (chosen[0], chosen[-1]) == (0, 9)


def test_a_page_on_s3_is_not_opened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["s3://bucket/out", "--open"]) == 1
    assert "--open: a browser cannot read s3://bucket/out; say --output" in capsys.readouterr().err
    assert ReportOptions(dst="s3://bucket/out", open=True, output="page.html").open


def test_jpeg_figures_are_those_of_the_crops() -> None:
    crops = [photo(64, 64, seed) for seed in range(3)]
    figures = jpeg_figures([as_jpeg(crop) for crop in crops])
    assert figures is not None
    sizes = [len(encode(crop, "JPEG", quality=75)) for crop in crops]
    assert figures.bytes_mean == pytest.approx(np.mean(sizes))
    assert figures.raw_bytes == 64 * 64 * 3
    assert 25 < figures.psnr_mean < 60
    assert jpeg_figures([]) is None


def test_pictures_that_are_too_long_for_a_jpeg_are_left_out_of_its_figures() -> None:
    """And do not keep the others of their shard from it."""
    crops = [np.zeros((height, 1, 3), np.uint8) for height in (65_500, 65_501)]
    figures = jpeg_figures([as_jpeg(crop) for crop in crops])
    assert figures is not None
    assert (figures.images, figures.raw_bytes) == (1, 3 * 65_500)


@pytest.mark.parametrize(("size", "expected"), [((64, 48), (64, 48)), ((3000, 2000), (1024, 683))])
def test_large_pictures_are_shown_smaller(size: tuple[int, int], expected: tuple[int, int]) -> None:
    small = shown(photo(*size))
    assert (small.shape[1], small.shape[0]) == expected


def test_pictures_that_are_no_squares_keep_their_aspect() -> None:
    """The gallery's boxes are squares, within which pictures are fitted whole."""
    style = page(make_data()).split("</style>")[0]
    assert re.search(r"\.triple img[^}]*object-fit: ?contain", style)


GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"


@pytest.mark.parametrize(
    "name", ["v1-q11-webdataset", "v2-fp16-parquet", "v2-nested-balanced-parquet"]
)
def test_sizes_of_samples_add_up_to_what_is_stored(name: str, tmp_path: Path) -> None:
    """Of shards of both versions, which a page can be made of, too."""
    dst = str(GOLDEN / name)
    (manifest,) = read_markers(dst).values()
    assert isinstance(manifest, ShardManifest)
    entries, skips, skipped = survey(dst, [manifest])
    assert (len(entries), len(skips), skipped) == (2, 1, {"not_an_image": 1})
    stored = manifest.statistics["payload_bytes"]
    assert sum(entry.payload_bytes for entry in entries) == pytest.approx(stored, abs=1)
    assert main([dst, f"--output={tmp_path}/x.html", "--backend=reference"]) == 0
    assert (tmp_path / "x.html").read_text().count("<ellipse ") == 2 * 16
