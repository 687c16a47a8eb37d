"""Decoding: every mode to RGB, geometry of the crop, and each kind of bad image to its status."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from splatshard.pipeline.source.decode import DecodedImage, decode
from splatshard.pipeline.source.formats import NotSupported
from splatshard.pipeline.source.rgb import to_8_bits
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SampleError
from splatshard.schemas.shard import SKIP_STATUSES
from tests.make import animation, encode, jpeg, photo, png_header, shared_data


def decode_at(image: bytes, size: int = 32, **options: int) -> DecodedImage:
    return decode(image, "a.jpg", DecodeConfig(image_size=size, **options))


def status_of(image: bytes) -> str:
    with pytest.raises(SampleError) as caught:
        decode_at(image)
    assert caught.value.status in SKIP_STATUSES
    assert "a.jpg" in str(caught.value)
    return caught.value.status


def resize_then_crop(image: Image.Image, size: int) -> np.ndarray:
    """The textbook form of the crop, for sides whose ratio leaves nothing to round."""
    scale = size / min(image.size)
    small = image.resize([round(s * scale) for s in image.size], Image.Resampling.BICUBIC)
    left, top = (small.width - size) // 2, (small.height - size) // 2
    return np.asarray(small.crop((left, top, left + size, top + size)))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64), (16, 24)])
def test_crop_is_short_side_resize_then_centre_crop(shape):
    pixels = photo(*shape)
    result = decode_at(encode(pixels, "PNG"))
    expected = resize_then_crop(Image.fromarray(pixels), 32)
    assert difference(result.pixels, expected) <= 1
    assert (result.original_width, result.original_height) == shape


def test_pixels_are_contiguous_writable_uint8():
    pixels = decode_at(jpeg()).pixels
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_every_format_shows_the_same_picture(format):
    pixels = photo()
    result = decode_at(encode(pixels, format)).pixels
    expected = decode_at(encode(pixels, "PNG")).pixels
    assert np.abs(result.astype(float) - expected).mean() < 6  # JPEG, WEBP and GIF lose some


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encode(photo(96, 64), format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")
    result = decode_at(image)
    assert difference(result.pixels, resize_then_crop(upright, 32)) <= 1
    assert (result.original_width, result.original_height) == upright.size


def test_unreadable_exif_counts_as_upright():
    image = encode(photo(), "JPEG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff garbage")
    assert difference(decode_at(image).pixels, decode_at(encode(photo(), "JPEG")).pixels) == 0


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_modes_become_rgb(mode):
    picture = Image.fromarray(photo(96, 64))
    grey = mode in ("L", "1", "LA", "I", "F")
    image = (picture.convert("L") if mode in "IF" else picture).convert(mode)
    expected = resize_then_crop((picture.convert("L") if grey else picture).convert("RGB"), 32)
    if mode == "I":
        image = Image.fromarray(np.asarray(image) * 257)
    result = decode_at(encode(image, "TIFF" if mode in ("CMYK", "YCbCr", "I", "F") else "PNG"))
    tolerance = {"1": 60, "P": 25, "YCbCr": 4}.get(mode, 2)  # dithered, 256 colours, rounded twice
    assert np.abs(result.pixels.astype(float) - expected).mean() < tolerance


def test_cmyk_jpeg_is_read_as_adobes_inverted_kind():
    picture = Image.fromarray(photo(96, 64))
    image = encode(picture.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in image
    expected = resize_then_crop(picture, 32)
    assert np.abs(decode_at(image).pixels.astype(float) - expected).mean() < 3


def test_transparency_lies_over_white():
    clear = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    half = Image.new("RGBA", (40, 40), (200, 0, 0, 128))
    palette = Image.new("P", (40, 40), 3)
    palette.putpalette([10, 20, 30] * 256)
    grey = Image.new("LA", (40, 40), (0, 0))
    assert decode_at(encode(clear, "PNG")).pixels.min() == 255
    assert decode_at(encode(half, "PNG")).pixels[16, 16].tolist() == [227, 127, 127]
    assert decode_at(encode(palette, "PNG", transparency=3)).pixels.min() == 255
    assert decode_at(encode(palette, "PNG", transparency=4)).pixels[0, 0].tolist() == [10, 20, 30]
    assert decode_at(encode(grey, "PNG")).pixels.min() == 255
    assert decode_at(encode(photo()[..., 0], "PNG", transparency=0)).pixels.shape == (32, 32, 3)


def test_16_bit_png_is_scaled_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    result = decode_at(encode(ramp, "PNG"), size=64).pixels[0, :, 0]
    assert difference(result, np.round(ramp[0] / 257)) <= 1
    assert len(np.unique(result)) == 64


def test_to_8_bits_of_known_levels():
    values = np.array([[0, 257, 4095, 65535]], np.uint16)
    assert to_8_bits(values, (0, 65535)).tolist() == [[0, 1, 16, 255]]
    assert to_8_bits(values, (65535, 0)).tolist() == [[255, 254, 239, 0]]
    assert to_8_bits(values, (0, 4095)).tolist() == [[0, 16, 255, 255]]


def test_to_8_bits_by_range():
    f = np.float32
    assert to_8_bits(np.array([[0, 65535]], np.int32)).tolist() == [[0, 255]]
    assert to_8_bits(np.array([[-10, 0, 200]], np.int32)).tolist() == [[0, 0, 200]]
    assert to_8_bits(np.array([[0, 0]], np.int32)).tolist() == [[0, 0]]
    assert to_8_bits(np.array([[0, 0.5, 1]], f)).tolist() == [[0, 128, 255]]
    assert to_8_bits(np.array([[0, 100, 255]], f)).tolist() == [[0, 100, 255]]
    assert to_8_bits(np.array([[np.nan, np.inf, -np.inf, 1]], f)).tolist() == [[0, 255, 0, 255]]
    assert to_8_bits(np.array([[0.2] * 10 + [3]], f)).tolist() == [[51] * 10 + [255]]  # light
    with pytest.raises(NotSupported, match=r"0\.2 to 3, of which it is not known what is white"):
        to_8_bits(np.array([[0.2] * 4 + [3]], f))


@pytest.mark.parametrize("odd", [1.004, 3, 255, 1000, 3e38, np.inf, -0.004, -300, -np.inf, np.nan])
@pytest.mark.parametrize("white", [1, 255])
def test_one_pixel_does_not_decide(white, odd):
    """It is clipped; the others are what they are without it."""
    grey = photo()[..., 0]
    values = grey.astype(np.float32) / np.float32(255 / white)
    values[0, 0] = odd
    found = to_8_bits(values)
    expected = grey.copy()
    expected[0, 0] = 255 * np.clip(np.nan_to_num(odd) / white, 0, 1) + 0.5
    assert difference(found, expected) <= 1
    assert decode_at(encode(Image.fromarray(values), "TIFF")).pixels.mean() > 60


@pytest.mark.parametrize(
    ("scale", "shift", "dtype"),
    [
        *((scale, 0, "f4") for scale in (8, 100, 1000, 65535)),
        *((scale, 0, "i4") for scale in (100, 4095, 10**6)),
        *((2, -1, "f4"), (1, -5, "f4"), (65535, -32768, "i4")),
    ],
)
def test_grey_of_unknown_white_is_a_row(scale, shift, dtype):
    values = (photo()[..., 0] / np.float32(255) * scale + shift).astype(dtype)
    with pytest.raises(SampleError, match="not known what is white: convert it to a PNG") as caught:
        decode_at(encode(Image.fromarray(values), "TIFF"))
    assert caught.value.status == "corrupt_image"


def test_draft_keeps_the_picture_of_a_full_decode():
    large = Image.fromarray(photo(96, 64)).resize((1501, 1001), Image.Resampling.BICUBIC)
    image = encode(large, "JPEG", quality=95)
    full = Image.open(io.BytesIO(image))
    side = min(full.size)
    left, top = (full.width - side) / 2, (full.height - side) / 2
    box = (left, top, left + side, top + side)
    expected = full.resize((32, 32), Image.Resampling.BICUBIC, box)
    result = decode_at(image)
    assert np.abs(result.pixels.astype(float) - np.asarray(expected)).mean() < 0.6
    assert (result.original_width, result.original_height) == (1501, 1001)


def test_mpo_is_its_first_photograph():
    first, second = (Image.fromarray(photo(96, 64, seed)) for seed in (1, 2))
    image = encode(first, "MPO", save_all=True, append_images=[second], quality=95)
    error = np.abs(decode_at(image).pixels.astype(float) - resize_then_crop(first, 32))
    assert error.mean() < 3
    assert Image.open(io.BytesIO(image)).n_frames == 2


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1), (3, 2)])
def test_extreme_shapes(shape):
    tracemalloc.start()
    result = decode_at(encode(photo(*shape), "PNG"), size=224)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.pixels.shape == (224, 224, 3)
    assert peak < 4e6


SHAPES = [(96, 64), (64, 96), (24, 24), (1, 3000), (1000, 3)]


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("resize", "side_of"), [("shortest", min), ("longest", max), ("none", lambda _: 32)]
)
def test_the_whole_picture_keeps_its_aspect(format, shape, resize, side_of):
    """Smaller images are enlarged; what is resized is what Pillow makes of the whole."""
    image = encode(photo(*shape), format)
    result = decode(image, "a", DecodeConfig(image_size=32, resize=resize)).pixels
    scale = 32 / side_of(shape)
    size = tuple(max(1, round(s * scale)) for s in shape)
    assert (result.shape[1], result.shape[0]) == size
    whole = Image.open(io.BytesIO(image)).convert("RGB")
    expected = np.asarray(whole.resize(size, Image.Resampling.BICUBIC))
    # a JPEG is decoded at a fraction of its size
    assert difference(result, expected) <= (0 if format == "PNG" else 40)
    assert np.abs(result.astype(int) - expected).mean() < 2
    assert result.flags.c_contiguous
    assert result.flags.writeable


@pytest.mark.parametrize("resize", ["shortest", "longest", "none"])
def test_the_whole_picture_is_upright(resize):
    pixels = photo(48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode(pixels, "PNG", exif=exif)
    result = decode(image, "a", DecodeConfig(image_size=32, resize=resize)).pixels
    plain = decode(encode(pixels, "PNG"), "a", DecodeConfig(image_size=32, resize=resize)).pixels
    assert (result == np.rot90(plain, -1)).all()


@pytest.mark.parametrize(("shape", "resize"), [((1, 2000), "shortest"), ((5000, 5000), "none")])
def test_more_pixels_than_are_fitted(shape, resize):
    """Refused before any pixel is decoded."""
    header = png_header(*shape)
    with pytest.raises(SampleError, match=rf"--resize {resize} makes it .* --resize longest") as e:
        decode(header, "a.png", DecodeConfig(image_size=512, resize=resize))
    assert e.value.status == "too_large"


def test_empty_image():
    assert status_of(b"") == "empty_image"


@pytest.mark.parametrize(
    "image", [b"this is a text file", b"<html>404</html>", b"P", b"BM: text", b"P5 text", b"RIFF"]
)
def test_not_an_image(image):
    assert status_of(image) == "not_an_image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_image_is_corrupt(format, share):
    image = encode(photo(200, 150), format)
    assert status_of(image[: int(share * len(image))]) == "corrupt_image"


def noise(side=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_an_end_that_was_never_written_is_corrupt(format):
    """Decoders show it as grey, without an error."""
    image = encode(noise(), format, quality=95)
    half = len(image) // 2
    with pytest.raises(
        SampleError, match=r"ends in \d,\d+ zero bytes.*download it again"
    ) as caught:
        decode_at(image[:half] + bytes(len(image) - half))
    assert caught.value.status == "corrupt_image"


@pytest.mark.parametrize("zeros", [2, 50, 511])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_last_bytes_is_corrupt(zeros, progressive):
    image = encode(noise(), "JPEG", progressive=progressive)
    assert status_of(image[:-zeros] + bytes(zeros)) == "corrupt_image"
    assert np.array_equal(decode_at(image + bytes(zeros)).pixels, decode_at(image).pixels)


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"optimize": True}), ("WEBP", {"quality": 80}), ("WEBP", {"lossless": True})],
)
def test_zeros_of_flat_pictures_and_behind_them_are_no_damage(format, options):
    flat = Image.new("RGB", (2000, 2000), (200, 10, 10))
    flat.paste(noise(), (0, 0))
    image = encode(flat, format, **options)
    assert image.count(bytes(64)) or "lossless" in options
    assert decode_at(image).pixels[20:, 20:].mean((0, 1)) == pytest.approx((200, 10, 10), abs=4)
    assert np.array_equal(decode_at(image + bytes(1000)).pixels, decode_at(image).pixels)


def test_header_alone_is_corrupt():
    assert status_of(jpeg()[:4]) == "corrupt_image"
    assert status_of(encode(photo(), "PNG")[:20]) == "corrupt_image"


def test_damaged_pixels_are_corrupt():
    image = bytearray(encode(photo(200, 150), "PNG"))
    image[len(image) // 2] ^= 0xFF
    assert status_of(bytes(image)) == "corrupt_image"


def test_huge_header_is_refused_without_allocation():
    tracemalloc.start()
    assert status_of(png_header(100_000, 100_000)) == "too_large"
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_huge_jpeg_and_bmp_headers():
    image = bytearray(jpeg())
    at = image.index(b"\xff\xc0") + 5
    image[at : at + 4] = struct.pack(">HH", 65500, 65500)
    assert status_of(bytes(image)) == "too_large"
    bitmap = bytearray(encode(photo(), "BMP"))
    bitmap[18:26] = struct.pack("<ii", 100_000, 100_000)
    assert status_of(bytes(bitmap)) == "too_large"


@pytest.mark.parametrize("limit", [1, 5])
def test_size_limit_is_ours_and_not_pillows(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow would warn, or raise
    assert decode_at(encode(photo(), "PNG")).pixels.shape == (32, 32, 3)
    assert decode_at(jpeg(), max_image_pixels=64 * 48).original_width == 64
    with pytest.raises(SampleError, match="64x48 px") as caught:
        decode_at(jpeg(), max_image_pixels=64 * 48 - 1)
    assert caught.value.status == "too_large"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations(format):
    assert status_of(animation(format)) == "animated_image"
    assert decode_at(animation(format, frames=1)).pixels.shape == (32, 32, 3)


@pytest.mark.parametrize(
    "where", ["decode.to_rgb", "decode.io.BytesIO", "containers.Image.Exif.get"]
)
def test_out_of_memory_says_nothing_of_the_sample(monkeypatch, where):
    def fail(*_: object) -> None:
        raise MemoryError

    exif = Image.Exif()
    exif[0x0112] = 1
    image = encode(photo(), "JPEG", exif=exif)
    monkeypatch.setattr(f"splatshard.pipeline.source.{where}", fail)
    with pytest.raises(MemoryError):
        decode_at(image)


def test_kodak_photographs():
    path = shared_data("kodak") / "kodim23.png"
    result = decode_at(path.read_bytes(), size=224)
    assert (result.original_width, result.original_height) == (768, 512)
    assert difference(result.pixels, resize_then_crop(Image.open(path), 224)) <= 1


def test_several_threads_decode_odd_files_in_silence():
    """Warnings are errors in tests: one that is not silenced would make a file corrupt."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"  # promises 65535 entries, has none
    odd = encode(photo(), "JPEG", exif=exif)
    warnings.simplefilter("error")
    with pytest.raises(UserWarning), Image.open(io.BytesIO(odd)) as image:
        image.getexif()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: decode_at(odd).pixels, range(64)))
    assert all(np.array_equal(pixels, results[0]) for pixels in results)
