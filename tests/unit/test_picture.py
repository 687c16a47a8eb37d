"""`import splatshard`: one picture, fitted, drawn, saved, and what each step of it promises."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as tensors_in
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

import splatshard
from splatshard.pipeline.convert import planes
from splatshard.pipeline.fitting.fit import fit as fit_batch
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.picture import WHOLE, SplatImage
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import FormatVersionError, SourceError, UsageError
from splatshard.schemas.train import AugmentConfig
from tests.make import encode, photo

PHOTO = photo(40, 31)


@pytest.fixture(scope="module")
def splats() -> SplatImage:
    return splatshard.fit(PHOTO, 30, steps=30)


def pixels(image: np.ndarray = PHOTO) -> Tensor:
    return planes(torch.from_numpy(image)[None])


def one_gaussian(height: int = 20, width: int = 30) -> SplatImage:
    """In the middle, white, tilted."""
    return SplatImage(
        Splats(
            torch.tensor([[[width / 2, height / 2]]]),
            torch.tensor([[[4.0, 1.0, 2.0]]]),
            torch.ones(1, 1, 3),
            torch.ones(1, 1, dtype=torch.bool),
        ),
        height,
        width,
    )


# Fitting


def test_a_fit_is_that_of_convert(splats: SplatImage) -> None:
    config = FitConfig(num_gaussians=30, steps=30)
    expected, _ = fit_batch(pixels(), config, select_backend("cpu"))
    assert torch.equal(splats.means, expected.means[0])
    assert torch.equal(splats.cholesky, expected.cholesky[0])
    assert torch.equal(splats.colors, expected.colors[0])
    assert (splats.num_gaussians, splats.height, splats.width) == (30, 31, 40)
    assert repr(splats) == "SplatImage(30 Gaussians, 40x31 px)"


def test_several_pictures_of_several_sizes(tmp_path: Path, splats: SplatImage) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(photo(21, 33, seed=1), "PNG"))
    found = splatshard.fit([path, Image.fromarray(PHOTO)], 30, steps=30)
    assert [(image.height, image.width) for image in found] == [(33, 21), (31, 40)]
    assert torch.equal(found[1].means, splats.means)


def test_an_image_size_cuts_the_square() -> None:
    found = splatshard.fit(PHOTO, 9, steps=5, image_size=16)
    assert (found.height, found.width) == (16, 16)
    assert found.psnr(PHOTO) > 10  # the same square of it


def test_a_target_ends_a_fit() -> None:
    low, high = (splatshard.fit(PHOTO, 30, steps=200, target_psnr=t) for t in (18.0, 99.0))
    assert 18 <= low.psnr(PHOTO) < high.psnr(PHOTO) - 1


def test_numbers_by_size_and_by_quality() -> None:
    """As convert's options of these names."""
    by_size = splatshard.fit(PHOTO, gaussians_per_megapixel=2e4, steps=5)
    assert by_size.num_gaussians == round(2e4 * 40 * 31 / 1e6)
    assert splatshard.fit(PHOTO, steps=0).num_gaussians == 400
    grown = splatshard.fit(PHOTO, 10, target_psnr=30, max_gaussians=200, steps=40)
    assert 10 < grown.num_gaussians < 200
    assert grown.psnr(PHOTO) >= 30
    few = splatshard.fit(PHOTO, 10, target_psnr=60, max_gaussians=20, steps=10)
    assert few.num_gaussians == 20
    both = {"gaussians_per_megapixel": 2e4, "target_psnr": 60, "max_gaussians": 30}
    assert splatshard.fit(PHOTO, **both, steps=10).num_gaussians == 30


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"num_gaussians": 0}, "choose"),
        ({"num_gaussians": 400.0}, "num_gaussians is 400.0: it must be a whole number"),
        ({"num_gaussians": True}, "num_gaussians is True: it must be a whole number"),
        ({"steps": -1}, "choose"),
        ({"steps": 2.5}, "steps is 2.5: it must be a whole number"),
        ({"image_size": 4}, "choose"),
        ({"image_size": (224, 224)}, "image_size is .*: it must be a whole number"),
        ({"target_psnr": "30"}, "target_psnr is '30': it must be a number"),
        ({"gaussians_per_megapixel": 0}, "choose a number above 0"),
        ({"gaussians_per_megapixel": 9.0, "num_gaussians": 9}, "leave one of them out"),
        ({"max_gaussians": 500}, "is for images that miss --target-psnr: give that too"),
        ({"max_gaussians": 9, "target_psnr": 30}, "choose at least the 400 of --num-gaussians"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        splatshard.fit(PHOTO, **options)


def test_what_splats_are_not_asked(splats: SplatImage, tmp_path: Path) -> None:
    asked: list[tuple[Any, str]] = [
        (lambda: splats.render(1.5), "height is 1.5: it must be a whole number"),
        (lambda: splats.render(width="9"), "width is '9': it must be"),  # pyright: ignore
        (lambda: splatshard.fit(""), "the path is empty: give that of a picture"),
        (lambda: splats.plot(side=0), "side is 0: choose 1 px or more"),
        (lambda: splats.augment({"flip": 1}), "is no AugmentConfig: make one"),  # pyright: ignore
        (lambda: splats.augment(seed=1 << 70), "seed is .*: it must be a whole number"),
        (lambda: splatshard.load(b"abc"), "abc: end it in .safetensors"),  # pyright: ignore
    ]
    for call, remedy in asked:
        with pytest.raises(UsageError, match=remedy):
            call()


@pytest.mark.parametrize("data", [b"abc", bytearray(b"abc")])
def test_bytes_are_no_list_of_pictures(data: Any) -> None:
    with pytest.raises(UsageError, match=f"{type(data).__name__} is no picture"):
        splatshard.fit(data)


# Drawing


def test_a_rendering_is_what_psnr_compares(splats: SplatImage) -> None:
    rendering = splats.render()
    assert rendering.shape == (3, 31, 40)
    assert splats.psnr(PHOTO) == pytest.approx(float(psnr(rendering[None], pixels())))
    assert splats.psnr(PHOTO) > 20


def test_a_rendering_of_another_size_is_the_same_picture() -> None:
    """A pixel in three of one three times as large has the same centre."""
    image = one_gaussian()
    assert torch.allclose(image.render(60, 90)[:, 1::3, 1::3], image.render(), atol=1e-6)
    assert torch.allclose(image.render(20, 90)[:, :, 1::3], image.render(), atol=1e-6)
    assert image.render(height=60).shape == image.render(width=90).shape == (3, 60, 90)
    assert image.to_pil(10, 15).size == (15, 10)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (100_000, 100_000)])
def test_sizes_that_are_none(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="a rendering of"):
        one_gaussian().render(*size)


def test_psnr_needs_the_same_size() -> None:
    with pytest.raises(UsageError, match=r"40x31 px, these Gaussians of 30x20: .*render\(31, 40\)"):
        SplatImage(one_gaussian().splats, 20, 30, decode=splatshard.fit(PHOTO, 1).decode).psnr(
            PHOTO
        )


def test_a_notebook_shows_the_picture(splats: SplatImage) -> None:
    shown = Image.open(io.BytesIO(splats._repr_png_()))
    assert np.array_equal(np.asarray(shown), np.asarray(splats.to_pil()))


def test_a_plot_shows_picture_rendering_and_ellipses() -> None:
    image = replace(one_gaussian(), decode=WHOLE)
    black = Image.new("RGB", (60, 41))  # a rounded side
    plot = np.asarray(image.plot(black, side=60)).astype(int)
    assert plot.shape == (40, 3 * 60 + 2 * 8, 3)
    original, rendering, outlines = plot[:, :60], plot[:, 68:128], plot[:, 136:]
    assert original.max() == 0
    assert rendering[20, 30].min() > 240
    # the ellipse's right end is one standard deviation, 4 px of 30, and its tilt, away
    assert outlines[20 + 2, 30 + 8].min() > outlines[20, 30].max() > 80 > outlines[2, 2].max()
    assert image.plot(side=60).size == (128, 40)
    with pytest.raises(UsageError, match="224x224 px, these Gaussians of 30x20, another shape"):
        image.plot(Image.new("RGB", (224, 224)))


# Augmenting


def test_an_augmentation_is_another_picture(splats: SplatImage) -> None:
    flipped = splats.augment(AugmentConfig(height=31, width=40, flip=1.0))
    assert torch.allclose(flipped.render(), splats.render().flip(2), atol=1e-4)
    crop = AugmentConfig(height=24, width=24, crop_scale=(0.3, 0.5), saturation=0.4)
    one, same, other = (splats.augment(crop, seed=seed) for seed in (1, 1, 2))
    assert (one.height, one.width) == (24, 24)
    assert torch.equal(one.render(), same.render())
    assert not torch.equal(one.render(), other.render())
    assert one.splats.mask.all()
    assert torch.allclose(splats.augment().render(), splats.render(), atol=1e-5)
    assert one.psnr(one.render()) > 100  # compared as it is, not cut and resized
    with pytest.raises(UsageError, match="is of 40x31 px, these Gaussians of 24x24"):
        one.psnr(PHOTO)


# Files


def test_files_hold_every_bit(tmp_path: Path, splats: SplatImage) -> None:
    splats.save(tmp_path / "a.safetensors")
    found = splatshard.load(tmp_path / "a.safetensors")
    for one, other in zip(found.splats.fields, splats.splats.fields, strict=True):
        assert torch.equal(one, other)
    assert repr(found) == repr(splats)
    assert (found.cutoff, found.decode) == (splats.cutoff, splats.decode)
    assert (tmp_path / "a.safetensors").stat().st_size < 32 * 30 + 700


def rewritten(path: Path, tensors: dict[str, Tensor], **told: Any) -> None:
    """The file with other content."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = json.loads(header["__metadata__"]["splatshard"]) | told
    path.write_bytes(
        tensors_to_bytes(tensors_in(data) | tensors, {"splatshard": json.dumps(metadata)})
    )


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"colors": torch.zeros(3, 3)}, {}),
        ({"means": torch.full((1, 2), torch.nan)}, {}),
        ({"cholesky": torch.zeros(1, 3)}, {}),
        ({"means": torch.zeros(1, 2, dtype=torch.float64)}, {}),
        ({"means": torch.zeros(())}, {}),
        ({}, {"height": 0}),
        ({}, {"height": "20"}),
        ({}, {"width": 1e300}),
        ({}, {"cutoff": None}),
        ({}, {"decode": []}),
        ({}, {"version": "1"}),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], told: dict[str, Any]
) -> None:
    path = tmp_path / "a.safetensors"
    one_gaussian().save(path)
    rewritten(path, tensors, **told)
    with pytest.raises(UsageError, match=r"a\.safetensors is damaged, or no file .* save it again"):
        splatshard.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(SourceError, match=r"a\.safetensors"):
        splatshard.load(path)
    one_gaussian().save(path)
    data = path.read_bytes()
    for damaged in (b"", data[:-1], tensors_to_bytes({"weight": torch.zeros(2)})):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="is damaged, or no file that SplatImage"):
            splatshard.load(path)
    path.write_bytes(data)
    rewritten(path, {}, version=2)
    with pytest.raises(FormatVersionError, match="version 2: update splatshard"):
        splatshard.load(path)
    with pytest.raises(UsageError, match=r"a\.npz: end it in \.safetensors"):
        splatshard.load("a.npz")
    with pytest.raises(UsageError, match=r"a\.png: end it in \.safetensors"):
        one_gaussian().save("a.png")
    with pytest.raises(UsageError, match=r"a\.png: end it in \.ply"):
        one_gaussian().to_ply("a.png")


def test_a_ply_is_written(tmp_path: Path) -> None:
    one_gaussian().to_ply(tmp_path / "a.ply")
    assert (tmp_path / "a.ply").read_bytes().startswith(b"ply\n")


# The package


def test_the_package_names_what_it_has() -> None:
    assert dir(splatshard) == splatshard.__all__
    assert all(callable(getattr(splatshard, name)) for name in splatshard.__all__)
    assert splatshard.open is splatshard.SplatDataset
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        splatshard.fitt  # noqa: B018


def test_importing_it_takes_no_time() -> None:
    script = "import sys, splatshard; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
