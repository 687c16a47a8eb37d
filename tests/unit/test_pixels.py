"""Pictures as people hold them: the same pixels from all of them, and nothing guessed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from splatshard.pipeline.source.pixels import pixels_of
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SourceError, UsageError
from tests.make import encode, photo

WHOLE = DecodeConfig(resize="none")
PHOTO = photo(23, 17)
EXPECTED = torch.from_numpy(PHOTO.transpose(2, 0, 1) / np.float32(255))
RGBA = np.dstack((PHOTO, np.full(PHOTO.shape[:2], 51, np.uint8)))  # a fifth of it, over white


@pytest.mark.parametrize(
    "picture",
    [
        PHOTO,
        PHOTO[:, ::-1][:, ::-1],  # not contiguous
        PHOTO.astype(np.float64) / 255,
        Image.fromarray(PHOTO),
        torch.from_numpy(PHOTO).permute(2, 0, 1),
        (torch.from_numpy(PHOTO).permute(2, 0, 1) / 255).requires_grad_(),
    ],
)
def test_all_are_the_same_pixels(picture: Any) -> None:
    found = pixels_of(picture, WHOLE)
    assert found.dtype == torch.float32
    assert torch.equal(found, EXPECTED)


def test_files_are_decoded_as_convert_does(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(PHOTO, "PNG"))
    assert torch.equal(pixels_of(path, WHOLE), EXPECTED)
    assert torch.equal(pixels_of(f"file://{path}", WHOLE), EXPECTED)


@pytest.mark.filterwarnings("error")
def test_a_picture_of_one_column() -> None:
    """Whose planes need not be copied, and Pillow's may not be written."""
    assert pixels_of(Image.fromarray(PHOTO[:, :1]), WHOLE).add_(1).shape == (3, 17, 1)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_short_floats(kind: torch.dtype) -> None:
    found = pixels_of(EXPECTED.to(kind), WHOLE)
    assert torch.equal(found, EXPECTED.to(kind).float())


def test_grey_is_grey() -> None:
    for grey in (PHOTO[:, :, 0], PHOTO[:, :, :1], torch.from_numpy(PHOTO[None, :, :, 0])):
        found = pixels_of(grey, WHOLE)
        assert torch.equal(found, EXPECTED[:1].expand(3, -1, -1))


def test_transparency_is_over_white() -> None:
    expected = EXPECTED / 5 + 4 / 5
    for picture in (RGBA, Image.fromarray(RGBA), RGBA / 255):
        assert (pixels_of(picture, WHOLE) - expected).abs().max() < 0.6 / 255
    channels_first = torch.from_numpy(RGBA).permute(2, 0, 1)
    assert torch.equal(pixels_of(channels_first, WHOLE), pixels_of(RGBA, WHOLE))


def test_pictures_stand_upright() -> None:
    """By EXIF, as in a file."""
    image = Image.fromarray(PHOTO)
    image.getexif()[0x0112] = 6
    assert torch.equal(pixels_of(image, WHOLE), EXPECTED.rot90(-1, (1, 2)))


@pytest.mark.parametrize("resize", ["square", "shortest", "longest"])
def test_sizes_are_those_of_a_file(tmp_path: Path, resize: Any) -> None:
    config = DecodeConfig(image_size=9, resize=resize)
    path = tmp_path / "a.png"
    path.write_bytes(encode(PHOTO, "PNG"))
    expected = pixels_of(path, config)
    for picture in (PHOTO, Image.fromarray(PHOTO), torch.from_numpy(PHOTO).permute(2, 0, 1)):
        assert torch.equal(pixels_of(picture, config), expected)
    floats = pixels_of(PHOTO / 255, config)
    assert (floats - expected).abs().max() < 1.1 / 255  # which are rounded twice, these not
    assert not torch.equal(floats, (floats * 255).round() / 255)


@pytest.mark.parametrize(
    ("picture", "remedy"),
    [
        (PHOTO.transpose(2, 0, 1), r"\[3, 17, 23\] is not \[H, W, 3\]: call .transpose\(1, 2, 0\)"),
        (torch.from_numpy(PHOTO), r"\[17, 23, 3\] is not \[3, H, W\]: call .permute\(2, 0, 1\)"),
        (PHOTO[:3], r"\[3, 23, 3\] may be \[H, W, 3\] or the other way round: give it as a PIL"),
        (PHOTO[None], r"\[1, 17, 23, 3\] is a batch: give a list of pictures, such as list"),
        (PHOTO[:, :, :2], r"\[17, 23, 2\] is not \[H, W, 3\], with 1, 3 or 4 channels"),
        (PHOTO[:0], "no picture"),
        (PHOTO[0, 0], "no picture"),
        (PHOTO.astype(np.float32), r"values of [0-9]+ to 2[0-9]+, .* 0 to 1: divide by 255"),
        (4 * (EXPECTED - 0.5), "undo the normalisation"),
        (EXPECTED / 2 + 0.8, "clip"),
        (EXPECTED * torch.nan, "replace what is not finite"),
        (PHOTO.astype(np.uint16), r"uint16 is neither .* \(65,535\?\), as image / np.float32"),
        (PHOTO > 99, r"bool is neither uint8 nor floats .*: multiply by 1\.0"),
        (PHOTO.astype(np.int64), r"int64 is neither .*: call .astype\(np.uint8\)"),
        (PHOTO.astype(np.int64) * 99, r"int64 is neither .*: divide by what is white, as image"),
        (PHOTO.astype(complex), "complex128 is neither .*: give numbers of one of these kinds"),
        (np.ma.masked_array(PHOTO, PHOTO > 99), r"a masked array is no picture: call .filled"),
        (EXPECTED.to_sparse(), "sparse or quantized is no picture: give a dense one"),
        (EXPECTED.to("meta"), r"without values \(meta\) is no picture"),
        (Image.fromarray(np.full((4, 4), 7e6, np.float32)), "not supported: grey values"),
        (encode(PHOTO, "PNG"), r"bytes is no picture: .*Image.open\(io.BytesIO\(data\)\)"),
        (None, "NoneType is no picture: .*; or a list of them"),
        (iter([PHOTO]), "list_iterator is no picture: .*; or a list of them"),
        (Path(__file__).parent, "unit is a folder: give a list of its files"),
    ],
)
def test_what_may_mean_something_else_is_refused(picture: Any, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        pixels_of(picture, WHOLE)


def test_what_pillow_may_have_misread_is_refused(tmp_path: Path) -> None:
    grey = PHOTO[:, :, 0]
    wide = grey.astype(np.uint16) * 257
    colours = np.stack([np.arange(256, dtype=np.uint16)] * 3)  # of 8 bits, which 16 are read as
    for number, (values, options) in enumerate(
        (
            (65535 - wide, {"photometric": "miniswhite"}),
            (PHOTO.astype(np.uint16).transpose(2, 0, 1) * 257, {"planarconfig": "separate"}),
            (grey, {"photometric": "palette", "colormap": colours}),
        )
    ):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, values, **{"photometric": "rgb"} | options)
        assert pixels_of(path, WHOLE).mean() > 0.1
        with pytest.raises(UsageError, match=r"Pillow reads some TIFF files .* give the path"):
            pixels_of(Image.open(io.BytesIO(path.read_bytes())), WHOLE)
    path = tmp_path / "a.png"
    Image.fromarray(grey).save(path, transparency=int(grey[0, 0]))
    assert pixels_of(path, WHOLE)[:, 0, 0].tolist() == [1, 1, 1]
    with pytest.raises(UsageError, match=r"Pillow reads some PNG files .* give the path"):
        pixels_of(Image.open(io.BytesIO(path.read_bytes())), WHOLE)
    for values, kind in ((PHOTO, "TIFF"), (grey, "TIFF"), (PHOTO, "PNG"), (RGBA, "PNG")):
        path = tmp_path / f"plain.{kind.lower()}"
        Image.fromarray(values).save(path, kind)
        assert torch.equal(
            pixels_of(Image.open(io.BytesIO(path.read_bytes())), WHOLE), pixels_of(path, WHOLE)
        )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a\.png"):
        pixels_of(tmp_path / "a.png", WHOLE)
    (tmp_path / "a.png").write_bytes(encode(PHOTO, "PNG")[:-40])
    with pytest.raises(UsageError, match=r"a\.png does not decode"):
        pixels_of(tmp_path / "a.png", WHOLE)
