"""Image bytes to a square RGB crop, by Pillow.

    bytes -> header (format, size, frames) -> pixels -> 8-bit RGB -> square crop -> EXIF orientation

Files met in the wild lie, so nothing is decoded before the header has been checked. The formats are
opened through Pillow's registry, not `Image.open`, whose size check is a process-wide warning.

The crop is the centred square over the short side, resized in one antialiased bicubic step. It is
"resize the short side, then centre-crop" up to the rounding of the long side, but a 1x5000 px image
does not become 224x1,120,000 px on the way, and the orientation can wait for the small result.

Left out: ICC profiles and gamma-correct resizing (the pipelines we compare with ignore both); AVIF,
JPEG 2000 and the rest of Pillow's formats (not in these datasets, and each is attack surface).
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SampleError

FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,  # also opens MPO
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        TiffImagePlugin.TiffImageFile,
        BmpImagePlugin.BmpImageFile,
        PpmImagePlugin.PpmImageFile,
    )
)

WEAK_MAGIC = ("BMP", "PPM")
"""Two letters that a text can begin with by chance: a bad header then means "not an image"."""

DRAFT_FACTOR = 3
"""JPEGs are decoded at 1/2, 1/4 or 1/8 when that keeps this many times the target size. The crop
then agrees with that of a full decode to 51 dB PSNR or better on 12 Kodak images, near the rounding
to 8 bits; keeping only 2x gives 42 dB, which would show in a fit at 40 dB."""

ORIENTATION_TAG = 0x0112
QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
"""The warning filter that `silence_pillow` wants in front."""

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the operation that makes the image upright."""


@dataclass
class DecodedImage:
    """`pixels`: uint8 [S, S, 3] RGB, contiguous, writable. Sizes in px, after EXIF orientation."""

    pixels: np.ndarray
    original_width: int
    original_height: int


def decode(image: bytes, name: str, config: DecodeConfig) -> DecodedImage:
    """The upright centred square of an image file, `config.image_size` px wide.

    Smaller images are enlarged, transparency is laid over white. `name` goes into messages. Raises
    SampleError with status empty_image, not_an_image, too_large, animated_image or corrupt_image,
    and MemoryError, which says nothing of the image. Several threads may decode at once. Pillow's
    warnings are silenced, for good.
    """
    if not image:
        raise SampleError("empty_image", f"{name} has zero bytes")
    silence_pillow()
    with open_header(image, name) as source:
        width, height = source.size
        check_size(width, height, name, config.max_image_pixels)
        try:
            if source.format in ("GIF", "WEBP", "PNG") and getattr(source, "is_animated", 0):
                raise SampleError("animated_image", f"{name} has more than one frame")
            crop = square(source, config.image_size)
            orientation = read_orientation(source)  # a PNG's may come after its pixels
            if orientation in TRANSPOSE:
                crop = crop.transpose(TRANSPOSE[orientation])
        except (SampleError, MemoryError):
            raise
        except Image.DecompressionBombError as e:
            raise SampleError("too_large", f"{name}: {e}") from e
        except Exception as e:
            raise SampleError(
                "corrupt_image", f"{name} does not decode: {type(e).__name__}: {e}"
            ) from e
    if orientation >= 5:
        width, height = height, width
    return DecodedImage(np.array(crop), width, height)


def silence_pillow() -> None:
    """Ignore what Pillow's modules warn of: odd EXIF, TIFF tags and palettes all decode fine.

    For the whole process: swapping its filters around each image would let threads undo each
    other's. Looked at before each image, since others (tests) do swap them.
    """
    if not warnings.filters or warnings.filters[0] != QUIET:
        warnings.filterwarnings("ignore", module=QUIET[3].pattern)


def open_header(image: bytes, name: str) -> ImageFile.ImageFile:
    """The file with its header parsed and no pixel decoded.

    Raises SampleError with status not_an_image, corrupt_image or too_large, and MemoryError.
    """
    for kind in FORMATS:
        factory, accept = Image.OPEN[kind]
        if accept(image[:16].ljust(16, b"\0")) is not True:
            continue
        try:
            return factory(io.BytesIO(image), "")
        except MemoryError:
            raise
        except Image.DecompressionBombError as e:
            raise SampleError("too_large", f"{name}: {e}") from e
        except Exception as e:
            if kind not in WEAK_MAGIC:
                raise SampleError(
                    "corrupt_image", f"{name}: bad {kind} header: {type(e).__name__}: {e}"
                ) from e
    raise SampleError("not_an_image", f"{name} begins with {image[:12]!r}, no known image format")


def check_size(width: int, height: int, name: str, max_image_pixels: int) -> None:
    """Raises SampleError too_large when the header promises more pixels than allowed."""
    if width * height > max_image_pixels:
        raise SampleError(
            "too_large",
            f"{name}: the header promises {width}x{height} px, more than the "
            f"{max_image_pixels} of --max-image-pixels",
        )


def read_orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; unreadable EXIF counts as upright, as in every viewer."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:
        return 1
    return orientation if orientation in TRANSPOSE else 1


def square(image: Image.Image, size: int) -> Image.Image:
    """The centred square over the short side as RGB, size x size px. Decodes the pixels."""
    width, height = image.size
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        drafted = image.draft(None, (DRAFT_FACTOR * size, DRAFT_FACTOR * size))
        if drafted:
            _, (_, _, width, height) = drafted  # reduced size, fractional where it was rounded up
    rgb = to_rgb(image)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return rgb.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=None)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB.

    Transparency over white; 16 and 32 bit and float by value. Pillow reads every CMYK JPEG as
    Adobe's inverted kind, as browsers do.
    """
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(foreground, mask=foreground)
    return image if image.mode == "RGB" else image.convert("RGB")


@np.errstate(over="ignore", invalid="ignore")  # floats at the end of their range
def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values [H, W] of more than 8 bits to uint8 of that shape, scaled and not clipped.

    Integers are read as 0..65535 and floats as 0..1, or 0..255 where they exceed 1. Files beyond
    that do not say what their white is, so minimum..maximum becomes 0..255. NaN is black.
    """
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float32))
    low, high = values.min(), values.max()
    if values.dtype.kind != "f" and low >= 0 and high <= 65535:
        table = np.round(np.arange(65536) / 257).astype(np.uint8)  # a look-up: no float copy
        return table[values]
    if low >= 0 and high <= 255 and values.dtype.kind == "f":
        return np.round(values * (255 if high <= 1 else 1)).astype(np.uint8)
    span = max(float(high) - float(low), 1e-9)  # a constant image becomes black
    return np.round((values - float(low)) / span * 255).astype(np.uint8)
