"""Bytes of splats against JPEG and WebP at equal quality: real shards, real files.

    python -m benchmarks.codec [--images 100] [--gaussians 400 900 1600 3136]

The first samples of datacomp-sample's shard 0, and the Kodak photographs, are converted by
`convert_shard` in every codec and container. A sample's bytes are what its payload takes in the
shard file: the compressed columns of Parquet, shared among the samples in proportion to their
bytes before compression, or its member of a tar. Beside it stand the smallest JPEG and WebP of the
same crop that reach at least the sample's PSNR, over all qualities (WebP halves the resolution of
colours, so some are beyond it; those do not count in its mean), each with the encoder's slow
and small settings (JPEG: optimised and progressive, the better of 4:2:0 and 4:4:4; WebP: method 6).
A shard's other columns would be the same beside a JPEG, so they count for neither.

PSNR is of the bytes read back; loss is what the codec took from the fit.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from benchmarks.record import DATA, save
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.verify import stored_payload_bytes
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig, PackConfig
from splatshard.schemas.shard import OK
from splatshard.schemas.splats import CODECS, EXTENSIONS, payload_bytes

SETS = {"datacomp": "datacomp-sample/shards/00000000.tar", "kodak": "kodak"}
QUALITIES = range(1, 101)
ImageFile.MAXBLOCK = 1 << 20  # or Pillow's JPEG encoder runs out of buffer at quality 100


@dataclass(frozen=True)
class Args:
    images: int = 100
    """Of each set, from its beginning."""
    gaussians: tuple[int, ...] = (400, 900, 1600, 3136)
    steps: int = 150
    codecs: tuple[str, ...] = CODECS
    formats: tuple[str, ...] = tuple(EXTENSIONS)


def crops(source: str, images: int) -> list[np.ndarray]:
    """The crops that a conversion fits, uint8 [224, 224, 3]."""
    (ref,) = list_shards(source, limit=images)
    samples = read(ref, hashlib.sha256())
    return [decode(s.image, s.image_name, DecodeConfig()).pixels for s in samples]


def curve(pixels: np.ndarray, settings: list[dict[str, Any]]) -> np.ndarray:
    """PSNR in dB and bytes of every quality and settings, [K, 2], sorted by bytes."""
    points: list[tuple[float, int]] = []
    for options in settings:
        for quality in QUALITIES:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, quality=quality, **options)
            shown = np.asarray(Image.open(buffer).convert("RGB")).astype(float)
            error = np.mean((shown - pixels) ** 2)
            points.append((10 * np.log10(255**2 / error), len(buffer.getvalue())))
    return np.array(sorted(points, key=lambda point: point[1]))


JPEG = [
    {"format": "JPEG", "optimize": True, "progressive": True, "subsampling": subsampling}
    for subsampling in (0, 2)
]
WEBP = [{"format": "WEBP", "method": 6}]


def smallest(points: np.ndarray, psnr: float) -> float:
    """Bytes of the smallest file of at least `psnr` dB; NaN if none has it."""
    enough = points[points[:, 0] >= psnr, 1]
    return float(enough[0]) if len(enough) else np.nan


def measure(source: str, args: Args, n: int, codec: str, format: str) -> dict[str, Any]:
    """One conversion: the samples' PSNR, loss and bytes."""
    (ref,) = list_shards(source, limit=args.images)
    config = ConvertConfig(
        fit=FitConfig(num_gaussians=n, steps=args.steps),
        pack=PackConfig(codec=codec, format=format),  # type: ignore[arg-type]
    )
    with TemporaryDirectory() as folder:
        manifest = convert_shard(ref, config, folder, select_backend("cpu"))
        path = str(Path(folder) / manifest.data_file)
        rows = [row for row in read_rows(path) if row["status"] == OK]
        stored = stored_payload_bytes(path)
    raw = np.array([payload_bytes(row) for row in rows], float)
    return {
        "psnr": np.array([row["psnr"] for row in rows]),
        "loss": np.array([row["psnr_loss"] for row in rows]),
        "bytes": raw * stored / raw.sum(),
    }


def main() -> None:
    import tyro  # here, so that a machine without it can import the functions

    args = tyro.cli(Args, description=__doc__)
    results = []
    print("per image; dB and bytes are means\n")
    columns = "set N codec format dB loss max bytes bits/G JPEG WebP smaller(J,W) reached"
    print(
        "{:>9}{:>6}{:>10}{:>12}{:>7}{:>7}{:>7}{:>8}{:>8}{:>8}{:>8}{:>14}{:>9}".format(
            *columns.split()
        )
    )
    for name, folder in SETS.items():
        source = str(DATA / folder)
        pixels = crops(source, args.images)
        jpeg, webp = ([curve(one, settings) for one in pixels] for settings in (JPEG, WEBP))
        for n in args.gaussians:
            for codec in args.codecs:
                for format in args.formats:
                    found = measure(source, args, n, codec, format)
                    j, w = (
                        np.array(
                            [smallest(c, p) for c, p in zip(curves, found["psnr"], strict=True)]
                        )
                        for curves in (jpeg, webp)
                    )
                    row = {
                        "set": name,
                        "images": len(pixels),
                        "num_gaussians": n,
                        "codec": codec,
                        "format": format,
                        "psnr": found["psnr"].mean(),
                        "psnr_loss": found["loss"].mean(),
                        "psnr_loss_max": found["loss"].max(),
                        "bytes": found["bytes"].mean(),
                        "bits_per_gaussian": found["bytes"].mean() * 8 / n,
                        "jpeg_bytes": j.mean(),
                        "webp_bytes": np.nanmean(w),
                        "webp_reaches": float(np.isfinite(w).mean()),
                        "smaller_than_jpeg": float((found["bytes"] < j).mean()),
                        "smaller_than_webp": float((~(found["bytes"] >= w)).mean()),
                    }
                    results.append(row)
                    print(
                        f"{name:>9}{n:>6}{codec:>10}{format:>12}{row['psnr']:>7.2f}"
                        f"{row['psnr_loss']:>7.3f}{row['psnr_loss_max']:>7.3f}{row['bytes']:>8.0f}"
                        f"{row['bits_per_gaussian']:>8.2f}{row['jpeg_bytes']:>8.0f}"
                        f"{row['webp_bytes']:>8.0f}{row['smaller_than_jpeg']:>8.0%}"
                        f"{row['smaller_than_webp']:>6.0%}{row['webp_reaches']:>9.0%}",
                        flush=True,
                    )
    save("codec", results)


if __name__ == "__main__":
    main()
