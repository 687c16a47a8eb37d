"""Where the time of decoding goes, and what decoding at a smaller size would do to the picture.

    python -m benchmarks.decode

On the photographs of datacomp-sample and on Kodak's as JPEG of quality 90; the least of `rounds`,
ms of CPU time per image. Decoded smaller: by draft (1/2, 1/4, 1/8), from files at least `factor`
times as large; by simplejpeg, where it is installed, to the smallest N/8 that is `factor` times the
crop or more. Of the crops that it changes: how many, and dB against the crop as it is now.
"""

from __future__ import annotations

import io
import math
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from unittest.mock import patch

import numpy as np
import tyro
from PIL import Image

from benchmarks.record import DATA, save
from splatshard.pipeline.source import decode as decode_module
from splatshard.pipeline.source.containers import UPRIGHT, bare_jpeg, orientation_of
from splatshard.pipeline.source.decode import decode, open_header, square
from splatshard.schemas.config import DecodeConfig

CONFIG = DecodeConfig()
SIZE = CONFIG.image_size


@dataclass(frozen=True)
class Args:
    rounds: int = 3


def datacomp() -> list[bytes]:
    """But for those that EXIF turns, which simplejpeg does not."""
    files: list[bytes] = []
    for shard in sorted((DATA / "datacomp-sample" / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            found = (tar.extractfile(m) for m in tar if m.name.endswith(".jpg"))
            files += [file.read() for file in found if file]
    return [image for image in files if orientation_of(bare_jpeg(image)) == UPRIGHT]


def kodak() -> list[bytes]:
    return [as_jpeg(Image.open(path)) for path in sorted((DATA / "kodak").rglob("*.png"))]


def as_jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


def crop(image: bytes) -> np.ndarray:
    return decode(image, "a.jpg", CONFIG).pixels


def scaled_crop(image: bytes, factor: float) -> np.ndarray:
    import simplejpeg

    least = math.ceil(SIZE * factor)
    pixels = simplejpeg.decode_jpeg(image, min_height=least, min_width=least)
    return np.asarray(square(Image.fromarray(pixels), SIZE, bare_jpeg(image)))


def ms_per_image(work: Callable[[bytes], object], images: list[bytes], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        for image in images:
            work(image)
        seconds.append(time.process_time() - begin)
    return 1000 * min(seconds) / len(images)


def parts(images: list[bytes], rounds: int) -> dict[str, float]:
    """ms of a decode, of its header alone, of header and libjpeg, and of the resize."""

    def header(image: bytes) -> Image.Image:
        return open_header(bare_jpeg(image), "JPEG", "a.jpg")

    def loaded(image: bytes) -> None:
        header(image).load()

    headers = ms_per_image(header, images, rounds)
    loads = ms_per_image(loaded, images, rounds)
    whole = ms_per_image(crop, images, rounds)
    return {"whole": whole, "header": headers, "libjpeg": loads - headers, "rest": whole - loads}


def smaller(images: list[bytes], rounds: int) -> list[dict]:
    """Each way to decode at a smaller size: ms, share of crops that change, dB of those."""
    now = [crop(image) for image in images]
    rows = []
    for factor in (1.0, 1.5, 2.0, 3.0):
        with patch.object(decode_module, "DRAFT_FACTOR", factor):
            rows.append({"way": "draft", "factor": factor} | compared(crop, images, now, rounds))
    if find_spec("simplejpeg"):
        for factor in (1.0, 1.25, 1.5, 2.0):
            found = compared(lambda x, f=factor: scaled_crop(x, f), images, now, rounds)
            rows.append({"way": "simplejpeg", "factor": factor} | found)
    return rows


def compared(
    work: Callable[[bytes], np.ndarray], images: list[bytes], now: list[np.ndarray], rounds: int
) -> dict:
    errors = [np.mean((work(i) - x.astype(float)) ** 2) for i, x in zip(images, now, strict=True)]
    changed = [10 * math.log10(255**2 / error) for error in errors if error]
    return {
        "ms": ms_per_image(work, images, rounds),
        "changed": len(changed) / len(images),
        "psnr_mean": float(np.mean(changed)) if changed else None,
        "psnr_least": min(changed, default=None),
    }


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    found = []
    for name, images in (("datacomp", datacomp()), ("kodak", kodak())):
        row = {"set": name, "images": len(images), "ms": parts(images, args.rounds)}
        row["smaller"] = smaller(images, args.rounds)
        found.append(row)
        print(name, {part: round(value, 3) for part, value in row["ms"].items()})
        for way in row["smaller"]:
            print("  ", {k: round(v, 3) if isinstance(v, float) else v for k, v in way.items()})
    save("decode", found)


if __name__ == "__main__":
    main()
