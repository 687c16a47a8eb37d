"""Image readers for `benchmarks.read`: JPEG tars to float32 [B, 3, 224, 224], 0 to 1.

Each batch comes with keys and captions, as a CLIP loader has them. Decoders write into one uint8
batch, and floats are made of it in one pass: a loop over images with a stack at its end, as most
transforms are, is 17 % slower at 224 px. What is left out to the JPEG readers' good: normalisation,
random crops, and reading the JSON member.

    webdataset  its reader, grouping and batching; decoding by
        Pillow       the usual: open, RGB
        draft        Pillow, told the size that is wanted: libjpeg then decodes at 1/2, 1/4 or 1/8
                     where that leaves 224 px
        simplejpeg   libjpeg-turbo without Pillow; scaled while decoding as draft does (its
                     min_width and min_height), resized by Pillow
        torchvision  decode_jpeg and its own resize, where it can be imported
    bare loop   Pillow over the same bytes in memory: no tar, no grouping, no key, no caption

Images at original size are cropped to the centred square and resized, bicubic, in one step.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image

SIZE = 224
BATCH = 256


class ImageBatch(NamedTuple):
    """`pixels` float32 [B, 3, SIZE, SIZE]; keys and captions of the B images."""

    pixels: torch.Tensor
    keys: list[str]
    captions: list[str]


Decode = Callable[[bytes], np.ndarray]


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(square(Image.open(io.BytesIO(data))))


def pillow_draft(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIZE, SIZE))
    return np.asarray(square(image))


def square(image: Image.Image) -> Image.Image:
    """The centred square as RGB at SIZE px."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size == (SIZE, SIZE):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)


def simplejpeg_decode(data: bytes) -> np.ndarray:
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(data, min_height=SIZE, min_width=SIZE)
    if pixels.shape[:2] == (SIZE, SIZE):
        return pixels
    return np.asarray(square(Image.fromarray(pixels)))


def torchvision_decode(data: bytes) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import center_crop, resize

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    if pixels.shape[1:] != (SIZE, SIZE):
        pixels = center_crop(resize(pixels, [SIZE], antialias=True), [SIZE, SIZE])
    return pixels.permute(1, 2, 0).numpy()


DECODERS: dict[str, Decode] = {
    "Pillow": pillow,
    "draft": pillow_draft,
    "simplejpeg": simplejpeg_decode,
    "torchvision": torchvision_decode,
}


def missing(decoder: str) -> str:
    """Why a decoder cannot run here; "" when it can."""
    sample = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(sample, "JPEG")
    try:
        DECODERS[decoder](sample.getvalue())
    except (ImportError, RuntimeError) as e:  # a torchvision of another torch raises the latter
        return f"{type(e).__name__}: {e}"
    return ""


def floats(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [B, SIZE, SIZE, 3] to float32 [B, 3, SIZE, SIZE], 0 to 1, contiguous."""
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


class WebdatasetImages:
    """Epochs over JPEG tars; `urls` are paths or what webdataset opens."""

    def __init__(self, urls: list[str], decoder: str, batch: int = BATCH) -> None:
        decode = DECODERS[decoder]

        def collate(samples: list[tuple[bytes, bytes, str]]) -> ImageBatch:
            pixels = np.empty((len(samples), SIZE, SIZE, 3), np.uint8)
            for place, (image, _, _) in zip(pixels, samples, strict=True):
                place[:] = decode(image)
            captions = [caption.decode() for _, caption, _ in samples]
            return ImageBatch(floats(pixels), [key for _, _, key in samples], captions)

        self._pipeline = (
            webdataset.WebDataset(urls, shardshuffle=False)
            .to_tuple("jpg", "txt", "__key__")
            .batched(batch, collation_fn=collate)
        )

    def __iter__(self) -> Iterator[ImageBatch]:
        return iter(self._pipeline)


class BareLoop:
    """Epochs over images that are in memory already."""

    def __init__(self, urls: list[str], decoder: str, batch: int = BATCH) -> None:
        samples: Any = webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg")
        self._images = [image for (image,) in samples]
        self._decode, self._batch = DECODERS[decoder], batch

    def __iter__(self) -> Iterator[ImageBatch]:
        for begin in range(0, len(self._images), self._batch):
            images = self._images[begin : begin + self._batch]
            pixels = np.empty((len(images), SIZE, SIZE, 3), np.uint8)
            for place, image in zip(pixels, images, strict=True):
                place[:] = self._decode(image)
            yield ImageBatch(floats(pixels), [""] * len(images), [""] * len(images))


def tars(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob("*.tar"))
