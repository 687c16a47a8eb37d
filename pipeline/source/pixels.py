"""Pictures as people hold them in Python, to pixels: a file, Pillow, NumPy, torch.

What an array means is not guessed: integers are uint8 from 0 to 255, floats are 0 to 1, NumPy has
the channels last and torch has them first, as their own readers give them. All else is refused,
with what to call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeGuard, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from splatshard.pipeline.source.containers import Bare
from splatshard.pipeline.source.decode import check_fitted, cut, decode, size_of
from splatshard.pipeline.source.formats import NotSupported
from splatshard.pipeline.source.rgb import to_rgb
from splatshard.pipeline.storage import fs
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SampleError, UsageError

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""One picture: the path or URL of a file, Pillow's, NumPy's [H, W] or [H, W, C], torch's [H, W] or
[C, H, W]; C is 1 (grey), 3 (RGB) or 4 (RGBA). uint8, or floats from 0 to 1."""

CHANNELS = (1, 3, 4)

T = TypeVar("T")


def several(given: T | Sequence[T]) -> TypeGuard[Sequence[T]]:
    """Whether it is a list of pictures: a path is a sequence, too."""
    return isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)


def pixels_of(picture: Picture, config: DecodeConfig) -> Tensor:
    """RGB float32 [3, H, W], 0 to 1, in main memory: upright, over white, cut and resized as
    `config` says. Raises UsageError for what is no picture or may mean more than one, and what
    reading a file raises."""
    if isinstance(picture, str | os.PathLike):
        pixels = file_pixels(os.fspath(picture), config)
    elif isinstance(picture, Image.Image):
        pixels = np.asarray(sized(pillow_rgb(picture), config))
    elif isinstance(picture, np.ndarray):
        pixels = of_size(rgb_values(channels_last(picture)), config)
    elif isinstance(picture, Tensor):
        pixels = of_size(rgb_values(channels_first(picture)), config)
    else:
        kind = type(picture).__name__
        raise UsageError(
            f"{kind} is no picture: give a path, a PIL image (Image.open(io.BytesIO(data)) of the "
            "bytes of a file), a NumPy array [H, W, 3] or a torch tensor [3, H, W]; or a "
            "list of them"
        )
    planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # which may be written
    return planes.float().div_(255) if planes.dtype == torch.uint8 else planes


def file_pixels(url: str, config: DecodeConfig) -> np.ndarray:
    """uint8 [H, W, 3], as convert decodes it."""
    if not url:
        raise UsageError("the path is empty: give that of a picture")
    if fs.is_local(url) and os.path.isdir(fs.local_path(url)):
        raise UsageError(f"{url} is a folder: give a list of its files, or of some")
    with fs.open_read(fs.absolute(url)) as stream:
        data = stream.read()
    try:
        return decode(data, url, config).pixels
    except SampleError as e:
        raise UsageError(str(e)) from e


def pillow_rgb(image: Image.Image) -> Image.Image:
    """The frame that is shown now, upright, over white, 8 bits. Raises UsageError for files that
    Pillow has opened and may have misread: decode does not take its word for those."""
    tags = getattr(image, "tag_v2", {})
    plain = image.mode in ("L", "RGB") and tags.get(284, 1) == 1 and 338 not in tags
    plain = plain and set(tags.get(258, (1,))) == {8} and tags.get(262) in (1, 2)
    grey = "transparency" in image.info and image.mode in ("1", "L", "I", "I;16")
    if (image.format == "TIFF" and not plain) or (image.format == "PNG" and grey):
        raise UsageError(
            f"{image!r}: Pillow reads some {image.format} files of this kind as other pictures: "
            "give the path of the file in its place"
        )
    try:
        return to_rgb(ImageOps.exif_transpose(image), Bare(b""))
    except NotSupported as e:
        raise UsageError(f"{image!r}: {e}") from e


def channels_last(array: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] as [H, W, C]."""
    if isinstance(array, np.ma.MaskedArray):
        raise UsageError("a masked array is no picture: call .filled(0), or another colour")
    return _checked(array, array.shape[-1:], array.shape[:1], "[H, W, 3]", "transpose(1, 2, 0)")


def channels_first(tensor: Tensor) -> np.ndarray:
    """[H, W] or [C, H, W], on any device, as [H, W, C]."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        what = "without values (meta)" if tensor.is_meta else "sparse or quantized"
        raise UsageError(f"a tensor that is {what} is no picture: give a dense one with its values")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()  # bfloat16 and those of 8 bits are not NumPy's
    shape = tuple(tensor.shape)
    array = _checked(tensor.numpy(), shape[:1], shape[-1:], "[3, H, W]", "permute(2, 0, 1)")
    return array.transpose(1, 2, 0) if len(shape) == 3 else array


def _checked(
    array: np.ndarray, channels: tuple[int, ...], other: tuple[int, ...], form: str, call: str
) -> np.ndarray:
    """`array`, [H, W] with a channel more. Raises UsageError unless its `channels` are some, and
    its `other` end cannot be them as well."""
    shape = list(array.shape)
    if array.ndim == 2 and array.size:
        return array[:, :, None]
    if array.ndim == 4:
        raise UsageError(f"{shape} is a batch: give a list of pictures, such as list(images)")
    if array.ndim != 3 or not array.size:
        raise UsageError(f"{shape} is no picture: give one of {form}")
    if channels[0] not in CHANNELS:
        call = f": call .{call}" if other[0] in CHANNELS else ", with 1, 3 or 4 channels"
        raise UsageError(f"{shape} is not {form}{call}")
    if other[0] in CHANNELS:
        raise UsageError(f"{shape} may be {form} or the other way round: give it as a PIL image")
    return array


def rgb_values(array: np.ndarray) -> np.ndarray:
    """[H, W, C] to RGB [H, W, 3], uint8 or float32. Raises UsageError for other values."""
    if array.dtype == np.uint8:
        if array.shape[2] == 4:
            return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(array)), Bare(b"")))
        return np.broadcast_to(array, (*array.shape[:2], 3))
    if array.dtype.kind != "f":
        raise UsageError(
            f"{array.dtype} is neither uint8 nor floats from 0 to 1: {_numbers_remedy(array)}"
        )
    array = array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise UsageError(
            f"values of {low:g} to {high:g}, where floats are to be 0 to 1: {_remedy(low, high)}"
        )
    if array.shape[2] == 4:
        alpha = array[:, :, 3:]
        array = array[:, :, :3] * alpha + (1 - alpha)
    return np.broadcast_to(array, (*array.shape[:2], 3))


def _numbers_remedy(array: np.ndarray) -> str:
    """Of values that are no floats."""
    kind = array.dtype.kind
    if kind == "b":
        return "multiply by 1.0 (then True is white)"
    if kind not in "iu":
        return "give numbers of one of these kinds"
    if array.dtype.itemsize > 2 and array.min() >= 0 and array.max() <= 255:
        return "call .astype(np.uint8), or of torch .byte(), if 255 is white"
    most = np.iinfo(array.dtype).max
    if array.dtype.itemsize > 2:
        return "divide by what is white, as image / np.float32(65535)"
    return f"divide by what is white ({most:,}?), as image / np.float32({most})"


def _remedy(low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return "replace what is not finite"
    if low >= 0 and 2 < high <= 255:
        return "divide by 255, or give uint8"
    if low > -0.5 and high < 1.5:
        return "call .clip(0, 1), if that is overshoot"
    return "undo the normalisation (x * std + mean)"


def of_size(values: np.ndarray, config: DecodeConfig) -> np.ndarray:
    """RGB [H, W, 3] cut and resized; floats stay floats."""
    if values.dtype == np.uint8:
        return np.asarray(sized(Image.fromarray(np.ascontiguousarray(values)), config))
    planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in values.transpose(2, 0, 1))
    return np.stack([np.asarray(sized(plane, config)) for plane in planes], -1).clip(0, 1)


def sized(image: Image.Image, config: DecodeConfig) -> Image.Image:
    """Cut and resized."""
    size = size_of(*image.size, config)
    try:
        check_fitted(*size, "the picture", config)
    except SampleError as e:
        raise UsageError(str(e)) from e
    return image if size == image.size else cut(image, size, *image.size, config)
