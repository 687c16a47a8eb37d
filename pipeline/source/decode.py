"""Image bytes to RGB pixels of the size that is wanted, by Pillow.

    bytes -> format -> bare file -> header (size, frames) -> pixels -> 8-bit RGB -> crop, resize
    -> orientation

Files met in the wild lie, so nothing is decoded before the header has been checked. The formats are
opened through Pillow's registry, not `Image.open`, whose size check is a process-wide warning.

The crop, the centred square over the short side or the whole, is resized in one antialiased bicubic
step. For the square it is "resize the short side, then centre-crop" up to the rounding of the long
side, but a 1x5000 px image does not become 224x1,120,000 px on the way. No --resize tells width
from height, so the orientation can wait for the small result.

Left out: ICC profiles and gamma-correct resizing (the pipelines we compare with ignore both); the
rest of Pillow's formats (not in these datasets, and each is attack surface).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

from splatshard.pipeline.source import containers
from splatshard.pipeline.source.containers import Bare, orientation_of
from splatshard.pipeline.source.formats import (
    CONVERT,
    WEAK_MAGIC,
    NotSupported,
    format_of,
    not_read,
)
from splatshard.pipeline.source.rgb import to_rgb
from splatshard.pipeline.source.tiff import bare_tiff
from splatshard.schemas.config import MAX_FITTED_PIXELS, DecodeConfig
from splatshard.schemas.errors import SampleError

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    AvifImagePlugin = None
else:
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are decoded on as many threads as there are

PLUGINS = {
    "JPEG": JpegImagePlugin,
    "PNG": PngImagePlugin,
    "WEBP": WebPImagePlugin,
    "GIF": GifImagePlugin,
    "BMP": BmpImagePlugin,
    "TIFF": TiffImagePlugin,
    "PPM": PpmImagePlugin,
    "AVIF": AvifImagePlugin,
}
"""Pillow's readers. A Pillow may be without AVIF or WebP: `readable` tells."""

BARE: dict[str, Callable[[bytes], Bare]] = {
    "JPEG": containers.bare_jpeg,
    "PNG": containers.bare_png,
    "WEBP": containers.bare_webp,
    "AVIF": containers.bare_avif,
    "BMP": containers.bare_bmp,
    "TIFF": bare_tiff,
    "PPM": containers.bare_ppm,
}

DRAFT_FACTOR = 3
"""JPEGs are decoded at 1/2, 1/4 or 1/8 when that keeps this many times the target size. The crop
then agrees with that of a full decode to 51 dB PSNR or better on 12 Kodak images, near the rounding
to 8 bits; keeping only 2x gives 42 dB, which would show in a fit at 40 dB."""

UNFILLED = 512
"""So many zeros may end a WebP or AVIF: a flat WebP has one per 10,000 px, others none."""

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
    """`pixels`: uint8 [H, W, 3] RGB, contiguous, writable. Sizes in px, after EXIF orientation."""

    pixels: np.ndarray
    original_width: int
    original_height: int


def decode(image: bytes, name: str, config: DecodeConfig) -> DecodedImage:
    """The upright picture of an image file, cropped and resized as `config.resize` says.

    Smaller images are enlarged, transparency is laid over white. `name` goes into messages. Raises
    SampleError with status empty_image, not_an_image, too_large, animated_image or corrupt_image,
    and MemoryError, which says nothing of the image. Several threads may decode at once. Pillow's
    warnings are silenced, for good.
    """
    if not image:
        raise SampleError("empty_image", f"{name} has zero bytes")
    silence_pillow()
    kind = format_of(image, name)
    if not readable(kind):
        raise not_read(name, kind, f"update Pillow to one that has {kind}, or {CONVERT}")
    try:
        bare = BARE.get(kind, Bare)(image)
        with open_header(bare, kind, name) as source:
            width, height = source.size
            check_size(width, height, name, config.max_image_pixels)
            check_opened(source, bare, name)
            orientation = orientation_of(bare)
            size = size_of(width, height, config)
            check_fitted(*size, name, config)
            if kind == "PNG":
                containers.check_rows(source, bare)
            crop = resized(source, size, config, bare)
    except (SampleError, MemoryError):
        raise
    except NotSupported as e:
        raise SampleError("corrupt_image", f"{name}: {e}") from e
    except Image.DecompressionBombError as e:
        raise SampleError("too_large", f"{name}: {e}") from e
    except Exception as e:
        raise SampleError(
            "corrupt_image", f"{name} does not decode: {type(e).__name__}: {e}"
        ) from e
    if orientation in TRANSPOSE:
        crop = crop.transpose(TRANSPOSE[orientation])
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


def readable(kind: str) -> bool:
    """Whether this Pillow has the format's library."""
    return getattr(PLUGINS[kind], "SUPPORTED", kind not in ("AVIF", "WEBP"))


def open_header(bare: Bare, kind: str, name: str) -> ImageFile.ImageFile:
    """The file with its header parsed and no pixel decoded.

    Raises SampleError with status not_an_image or corrupt_image, what Pillow says of sizes, and
    MemoryError.
    """
    factory, _ = Image.OPEN[kind]
    try:
        source = factory(io.BytesIO(bare.data), "")
    except (MemoryError, Image.DecompressionBombError):
        raise
    except Exception as e:
        if bare.parts:
            bare.data, bare.parts = b"".join(bare.parts), ()
            return open_header(bare, kind, name)
        if kind in WEAK_MAGIC:
            text = f"{name} begins with {bare.data[:12]!r}, no known image format"
            raise SampleError("not_an_image", text) from e
        text = f"{name}: bad {kind} header: {type(e).__name__}: {e}"
        raise SampleError("corrupt_image", text) from e
    if kind == "AVIF":  # its own orientation, as Pillow words it
        bare.exif = source.info.get("exif", b"")
    return source


def check_size(width: int, height: int, name: str, max_image_pixels: int) -> None:
    """Raises SampleError too_large when the header promises more pixels than allowed."""
    if width * height > max_image_pixels:
        raise SampleError(
            "too_large",
            f"{name}: the header promises {width}x{height} px, more than the "
            f"{max_image_pixels} of --max-image-pixels",
        )


def check_opened(source: ImageFile.ImageFile, bare: Bare, name: str) -> None:
    """Raises SampleError animated_image, and NotSupported for what only an opened file shows."""
    animated = source.format in ("GIF", "WEBP", "AVIF") and has_frames(source)
    if animated or bare.animated:
        raise SampleError("animated_image", f"{name} has more than one frame")
    if bare.pages > 1:
        raise SampleError(
            "animated_image",
            f"{name} has {bare.pages:,} pages: save the one that is meant as a file of its own, or "
            "all as one if they are channels (photometric='rgb' of tifffile)",
        )
    if source.format == "GIF":
        canvas = (0, 0, *source.size)
        if source.tile[0][1] != canvas and "transparency" not in source.info:
            raise NotSupported("a GIF whose picture does not fill its canvas")
    if source.format in ("JPEG", "MPO", "WEBP", "AVIF"):
        check_filled(source, bare, name)
    if source.format == "BMP":
        at = 24 if bare.data[14] == 12 else 28
        layout: Any = source.tile[0][3]
        if bare.data[at] == 4 and layout[0] != "P;4":
            raise NotSupported("a BMP of 4 bits with the first grey levels as its palette")


def check_filled(source: ImageFile.ImageFile, bare: Bare, name: str) -> None:
    """Raises SampleError where the file's end was never written, which decoders show as grey: zeros
    in place of a JPEG's end, or more of them than a flat picture has."""
    if not bare.data.endswith(b"\0\0"):
        return
    zeros = len(bare.data) - len(bare.data.rstrip(b"\0"))
    width, height = source.size
    if source.format in ("JPEG", "MPO"):
        scan = len(bare.data) - len(bare.parts[-1]) if bare.parts else 0
        unfilled = bare.data.find(b"\xff\xd9", scan) < 0
    else:
        unfilled = zeros > UNFILLED + width * height // 2048
    if unfilled:
        raise SampleError(
            "corrupt_image",
            f"{name} ends in {zeros:,} zero bytes, as a download does whose room was made before: "
            "download it again",
        )


def has_frames(source: ImageFile.ImageFile) -> bool:
    """Whether there is a second frame; broken bytes behind the first are none."""
    try:
        return bool(getattr(source, "is_animated", False))
    except MemoryError:
        raise
    except Exception:
        return False


def size_of(width: int, height: int, config: DecodeConfig) -> tuple[int, int]:
    """Width and height in px that an image of `width` x `height` px is fitted at."""
    side = config.image_size
    if config.resize == "square":
        return side, side
    if config.resize == "none":
        return width, height
    scale = side / (min if config.resize == "shortest" else max)(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def check_fitted(width: int, height: int, name: str, config: DecodeConfig) -> None:
    """Raises SampleError too_large for a picture of more pixels than are fitted."""
    if width * height > MAX_FITTED_PIXELS:
        raise SampleError(
            "too_large",
            f"{name}: --resize {config.resize} makes it {width}x{height} px, more than the "
            f"{MAX_FITTED_PIXELS} that are fitted: choose --resize longest or square",
        )


def masked(rgb: Image.Image, bare: Bare) -> Image.Image:
    """White where the mask of a TIFF says that nothing is painted."""
    if not bare.mask:
        return rgb
    with TiffImagePlugin.TiffImageFile(io.BytesIO(bare.mask), "") as mask:
        painted = mask.convert("L")
    image = Image.new("RGB", rgb.size, "white")
    image.paste(rgb, mask=painted)
    return image


def resized(
    image: ImageFile.ImageFile, size: tuple[int, int], config: DecodeConfig, bare: Bare
) -> Image.Image:
    """The image as RGB, `size` (width and height) in px: of squares the centre, else the whole.
    Decodes the pixels."""
    width, height = image.size
    same = config.resize != "square" and image.size == size
    if isinstance(image, JpegImagePlugin.JpegImageFile) and not same:
        drafted = image.draft(None, (DRAFT_FACTOR * size[0], DRAFT_FACTOR * size[1]))
        if drafted:
            _, (_, _, width, height) = drafted  # reduced size, fractional where it was rounded up
    rgb = masked(to_rgb(image, bare), bare)
    return rgb if same else cut(rgb, size, width, height, config)


def cut(
    image: Image.Image, size: tuple[int, int], width: float, height: float, config: DecodeConfig
) -> Image.Image:
    """An image of `width` x `height` px, its centre where a square is wanted, else the whole,
    resized to `size` (width and height) in px."""
    side = min(width, height)
    across, down = (side, side) if config.resize == "square" else (width, height)
    left, top = (width - across) / 2, (height - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=None)
