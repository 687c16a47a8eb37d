"""TIFF of several directories: pages cost the sample, for nobody knows which is meant; previews
behind the picture cost nothing, and its transparency mask is applied."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from splatshard.schemas.errors import SampleError
from tests.make import encode
from tests.tiffs import tiff
from tests.unit.decoding import SIDE, pixels_of, reason, samples

tifffile = pytest.importorskip("tifffile")

Page = tuple[np.ndarray, dict[str, Any]]
FIRST = samples(3, 8)
OTHER = np.ascontiguousarray(FIRST[::-1])
GREY = OTHER[..., 0]
MASK = GREY > 99


def pages(*further: Page, first: np.ndarray = FIRST, **options: Any) -> bytes:
    """A file of `first` and what is behind it, with tifffile's options of each."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, **options) as file:
        for pixels, kind in ((first, {}), *further):
            photometric = "rgb" if pixels.ndim == 3 else "minisblack"
            file.write(pixels, **{"photometric": photometric, "metadata": None, **kind})
    return stream.getvalue()


def told(image: bytes) -> str:
    """Why it is a row."""
    with pytest.raises(SampleError) as caught:
        pixels_of(image)
    assert caught.value.status == "animated_image"
    return str(caught.value)


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("bigtiff", [False, True])
def test_pages_are_told(bigtiff: bool, byteorder: str) -> None:
    options = {"bigtiff": bigtiff, "byteorder": byteorder}
    assert np.array_equal(pixels_of(pages(**options)), FIRST)
    said = told(pages((OTHER, {}), (OTHER, {}), **options))
    assert said == (
        "a.tif has 3 pages: save the one that is meant as a file of its own, or all as one if they "
        "are channels (photometric='rgb' of tifffile)"
    )
    for kind in ({"subfiletype": 2}, {"tile": (16, 16)}, {"compression": "deflate"}):
        assert "has 2 pages" in told(pages((OTHER, kind), **options))
    assert "has 2 pages" in told(pages((GREY, {}), **options))


def test_arrays_whose_channels_are_pages() -> None:
    channels = np.moveaxis(FIRST, -1, 0)
    for values in (channels, channels / np.float32(255), channels.astype(np.uint16) * 257):
        stream = io.BytesIO()
        tifffile.imwrite(stream, values, photometric="minisblack")
        assert "has 3 pages" in told(stream.getvalue())
    stream = io.BytesIO()
    tifffile.imwrite(stream, channels, photometric="rgb")
    assert np.array_equal(pixels_of(stream.getvalue()), FIRST)


def test_scans_and_stacks() -> None:
    first, second = Image.fromarray(FIRST), Image.fromarray(OTHER)
    assert "has 2 pages" in told(encode(first, "TIFF", save_all=True, append_images=[second]))
    cropped = second.crop((0, 0, SIDE - 1, SIDE // 3))  # the last page of a fax
    assert "has 2 pages" in told(encode(first, "TIFF", save_all=True, append_images=[cropped]))
    larger = second.resize((3 * SIDE, 3 * SIDE))
    assert "has 2 pages" in told(encode(first, "TIFF", save_all=True, append_images=[larger]))
    stack = np.stack([GREY] * 5)
    for options in ({"imagej": True}, {"ome": True}, {"volumetric": True, "tile": (16, 16, 16)}):
        stream = io.BytesIO()
        tifffile.imwrite(stream, stack, photometric="minisblack", **options)
        assert "has 5 pages" in told(stream.getvalue())
    for values, pages in ((stack, 5), (np.stack([FIRST] * 3), 3)):
        stream = io.BytesIO()
        kind = "rgb" if pages == 3 else "minisblack"
        tifffile.imwrite(stream, values, photometric=kind, truncate=True)
        with tifffile.TiffFile(io.BytesIO(stream.getvalue())) as file:
            assert len(file.pages) == 1
        assert f"has {pages} pages" in told(stream.getvalue())
    stream = io.BytesIO()  # of MetaMorph: as many values as planes
    planes = (33629, 5, 4, tuple(range(8)), True)
    tifffile.imwrite(stream, GREY, photometric="minisblack", extratags=[planes])
    assert "has 4 pages" in told(stream.getvalue())
    stream = io.BytesIO()
    tifffile.imwrite(stream, FIRST, photometric="rgb", truncate=True)
    assert np.array_equal(pixels_of(stream.getvalue()), FIRST)
    large = b"ImageJ=1.53t\nimages=700\nslices=700\n"  # one directory, the others' pixels behind it
    assert "has 700 pages" in told(tiff(GREY[..., None], 8, 1, tags={270: (2, large)}))
    one = b"ImageJ=1.53t\nimages=1\nmin=0.0\n"
    assert np.array_equal(pixels_of(tiff(FIRST, 8, 2, tags={270: (2, one)})), FIRST)


@pytest.mark.parametrize(
    "behind",
    [
        [(OTHER, {"subfiletype": 1})],  # a thumbnail, an overview of GDAL
        [(OTHER, {"subfiletype": 1}), (MASK, {"subfiletype": 5})],
        [(MASK[:14, :14], {"subfiletype": 4})],  # of a smaller level
        [(OTHER[:14, :14], {}), (OTHER[:7, :7], {})],  # a pyramid, rounded up
        [(OTHER[:13, :9], {})],  # a thumbnail without a word
        [(OTHER, {"extratags": [(255, 3, 1, 2, True)]})],
    ],
)
@pytest.mark.parametrize("bigtiff", [False, True])
def test_previews_and_masks_are_no_pages(behind: Sequence[Page], bigtiff: bool) -> None:
    image = pages(*behind, bigtiff=bigtiff)
    with tifffile.TiffFile(io.BytesIO(image)) as file:
        assert len(file.pages) == 1 + len(behind)
    assert np.array_equal(pixels_of(image), FIRST)


AS_GDAL = {"subfiletype": 4, "photometric": 4, "compression": "deflate", "rowsperstrip": 5}
MASKS: list[Page] = [
    (MASK, {"subfiletype": 4}),
    (MASK, {"photometric": 4}),
    (MASK, AS_GDAL),
    (255 * MASK.astype(np.uint8), {"photometric": 4, "tile": (16, 16)}),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("first", [FIRST, GREY])
def test_a_transparency_mask_is_applied(mask: Page, order: str, first: np.ndarray) -> None:
    """White where it is 0; also behind a smaller level with a mask of its own."""
    rgb = first if first.ndim == 3 else np.stack([first] * 3, -1)
    expected = np.where(MASK[..., None], rgb, 255)
    small = (OTHER[::2, ::2].copy(), {"subfiletype": 1}), (~MASK[::2, ::2], {"subfiletype": 5})
    for further in ((mask,), (*small, mask)):
        image = pages(*further, first=first, byteorder=order)
        assert np.array_equal(pixels_of(image), expected)


def test_masks_that_are_not_read_are_told() -> None:
    for mask in (MASK[:20], MASK[:, :20], MASK.astype(np.uint16)):
        image = pages((mask, {"photometric": 4}))
        assert "not supported: a TIFF with a transparency mask of " in reason(image)


def test_levels_in_sub_directories_are_no_pages() -> None:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        file.write(FIRST, photometric="rgb", subifds=1, metadata=None)
        file.write(OTHER[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
    assert np.array_equal(pixels_of(stream.getvalue()), FIRST)


@pytest.mark.parametrize("big", [False, True])
def test_broken_bytes_behind_a_page_cost_nothing(big: bool) -> None:
    """Where the next directory should be: beyond the end, within the pixels, the first one again,
    or nothing, as the file ends before it is said."""
    image = tiff(FIRST, 8, 2, big=big)
    word, place = ("<Q", 8) if big else ("<I", 4)
    (start,) = struct.unpack_from(word, image, place)
    step, count = (20, "<Q") if big else (12, "<H")
    (entries,) = struct.unpack_from(count, image, start)
    end = start + struct.calcsize(count) + entries * step
    for following in (1 << 31, len(image) - 3, 16, start, 1):
        broken = image[:end] + struct.pack(word, following) + image[end + struct.calcsize(word) :]
        assert np.array_equal(pixels_of(broken), FIRST), following
    assert np.array_equal(pixels_of(tiff(GREY[..., None], 8, 1, big=big))[..., 0], GREY)


def test_loops_end() -> None:
    image = pages((OTHER, {}))
    with tifffile.TiffFile(io.BytesIO(image)) as file:
        first, second = (page.offset for page in file.pages)
    (count,) = struct.unpack_from("<H", image, second)
    end = second + 2 + 12 * count
    looped = image[:end] + struct.pack("<I", first) + image[end + 4 :]
    assert "has 2 pages" in told(looped)
    looped = image[:end] + struct.pack("<I", second) + image[end + 4 :]
    assert "has 2 pages" in told(looped)
