"""Makers of small inputs for tests: images, tars, folders and Parquet files as found in the wild.

Everything is deterministic and small; nothing is read from the network. `shared_data` is the way to
the real sample data, and skips the test where it is absent.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

Member = tuple[str, bytes]


def shared_data(*parts: str) -> Path:
    """A path below the sample data (SPLATSHARD_DATA or ../shared/data); skips where absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("SPLATSHARD_DATA") or beside).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"sample data absent: {path} (set SPLATSHARD_DATA)")
    return path


def photo(width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """A smooth colourful picture with an edge and some texture, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    frequency, phase = rng.uniform(2, 9, (3, 2)), rng.uniform(0, 6, 3)
    waves = [np.sin(f[0] * x + f[1] * y + p) for f, p in zip(frequency, phase, strict=True)]
    pixels = 0.5 + 0.35 * np.stack(waves, -1)
    pixels[x + y > rng.uniform(0.4, 0.9)] *= 0.6
    return (255 * (pixels + rng.normal(0, 0.01, pixels.shape))).clip(0, 255).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """An array or Pillow image as a file of `format`; options go to Pillow's save."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """`photo(...)` as a JPEG file."""
    return encode(photo(width, height, seed), "JPEG", quality=90)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height px and whose pixel data is a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return (
        signature
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(64)))
        + chunk(b"IEND", b"")
    )


def animation(format: str = "GIF", frames: int = 3, size: int = 32) -> bytes:
    """A file of several frames: GIF, WEBP or PNG (APNG)."""
    images = [Image.fromarray(photo(size, size, seed)) for seed in range(frames)]
    return encode(images[0], format, save_all=True, append_images=images[1:])


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    """A tar of (name, bytes) members in order, with a fixed modification time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def datacomp_sample(number: int) -> list[Member]:
    """jpg, txt and json of one DataComp sample (img2dataset's layout)."""
    key, caption = f"{number:012d}", f"photograph number {number}"
    fields = {"uid": f"{number:032x}", "url": None, "caption": caption, "key": key}
    fields |= {"status": "success", "original_width": 64, "original_height": 48}
    text = json.dumps(fields)
    return [
        (f"{key}.jpg", jpeg(seed=number)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", text.encode()),
    ]


def datacomp_tar(path: Path, count: int = 4, start: int = 0) -> Path:
    """A DataComp shard of `count` samples, numbered from `start`."""
    return write_tar(path, [m for i in range(count) for m in datacomp_sample(start + i)])


def imagenet_tar(path: Path, count: int = 4) -> Path:
    """An ImageNet webdataset shard: jpg and cls, label = number modulo 10."""
    samples = [
        (
            (f"n{i:08d}.jpg", jpeg(seed=i)),
            (f"n{i:08d}.cls", str(i % 10).encode()),
        )
        for i in range(count)
    ]
    return write_tar(path, [m for sample in samples for m in sample])


def image_folder(path: Path, classes: Iterable[str] = ("cat", "dog"), per_class: int = 3) -> Path:
    """A folder of JPEG files, one sub-folder per class (torchvision's ImageFolder layout)."""
    for i, name in enumerate(classes):
        (path / name).mkdir(parents=True, exist_ok=True)
        for j in range(per_class):
            (path / name / f"{j:04d}.jpg").write_bytes(jpeg(seed=100 * i + j))
    return path


def image_parquet(
    path: Path,
    count: int = 4,
    row_group_size: int | None = None,
    classes: Iterable[str] = ("a", "b", "c"),
) -> Path:
    """A Hugging Face image Parquet file: struct<bytes, path> and ClassLabel (row modulo 3)."""
    images = [{"bytes": jpeg(seed=i), "path": f"{i}.jpg"} for i in range(count)]
    return write_parquet(
        path,
        {"image": images, "label": [i % 3 for i in range(count)]},
        features={
            "image": {"_type": "Image"},
            "label": {"names": list(classes), "_type": "ClassLabel"},
        },
        row_group_size=row_group_size,
    )


def write_parquet(
    path: Path,
    columns: dict[str, list[Any]] | pa.Table,
    features: dict[str, Any] | None = None,
    row_group_size: int | None = None,
) -> Path:
    """Any table; `features` becomes Hugging Face's schema metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if features:
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path
