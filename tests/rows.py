"""Random splats and shard rows for tests of packing, writing and committing; no fit is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.pack import pack
from pipeline.splats import Splats
from pipeline.write import open_writer
from schemas.config import ConvertConfig, PackConfig, recipe
from schemas.shard import ShardRef
from schemas.splats import EXTENSIONS, shard_metadata

FORMATS = tuple(EXTENSIONS)
CODEC_NAMES = ("fp16", "q11")
HEIGHT, WIDTH = 48, 64


def random_splats(batch: int = 2, n: int = 20, seed: int = 0) -> Splats:
    """Plausible splats for a WIDTH x HEIGHT image, some of them outside of it; no padding."""
    g = torch.Generator().manual_seed(seed)
    side = torch.tensor([WIDTH, HEIGHT])
    means = (torch.rand(batch, n, 2, generator=g) * 1.5 - 0.25) * side
    cholesky = torch.randn(batch, n, 3, generator=g)
    cholesky[..., ::2] = cholesky[..., ::2].exp()
    colors = torch.randn(batch, n, 3, generator=g) * 0.5
    return Splats(means, cholesky, colors, torch.ones(batch, n, dtype=torch.bool))


def values_of(splats: Splats) -> torch.Tensor:
    """[B, N, 8]: x, y, l11, l21, l22, r, g, b."""
    return torch.cat((splats.means, splats.cholesky, splats.colors), -1)


def make_rows(number: int = 4, n: int = 20, codec: str = "fp16") -> list[dict[str, Any]]:
    """Rows as convert.py gives them; every fourth is a skipped sample."""
    payloads = pack(random_splats(number, n), HEIGHT, WIDTH, codec)
    rows = []
    for i, payload in enumerate(payloads):
        row: dict[str, Any] = {
            "key": f"{i:012d}",
            "uid": f"{i:032x}",
            "caption": f"a photo of number {i}, café",
            "label": i,
            "metadata": json.dumps({"url": f"https://example.org/{i}"}),
            "members": [{"name": "seg.png", "data": bytes([i]) * 5}],
            "status": "ok",
            "num_gaussians": 0,
        }
        if i % 4 == 3:
            row |= {"status": "corrupt_image", "error": "image file is truncated"}
        else:
            row |= {"width": WIDTH, "height": HEIGHT, "original_width": 640, "psnr": 25.1 + i}
            row |= {"original_height": 480, "num_gaussians": n, "steps": 100, "splats": payload}
        rows.append(row)
    return rows


def config_of(format: str = "parquet", codec: str = "fp16") -> ConvertConfig:
    return ConvertConfig(pack=PackConfig(format=format, codec=codec))  # type: ignore[arg-type]


def metadata_of(config: ConvertConfig) -> dict[str, object]:
    return shard_metadata(config.pack.codec, config.fit.cutoff, recipe(config))


def write_shard(
    path: Path, rows: list[dict[str, Any]], format: str = "parquet", codec: str = "fp16"
) -> Path:
    """Write `rows` to `path` and return it."""
    with open_writer(path, format, metadata_of(config_of(format, codec))) as writer:
        writer.write(rows)
    return path


def make_ref(name: str = "00000000") -> ShardRef:
    return ShardRef(name=name, kind="tar", urls=(f"/in/{name}.tar",), size_bytes=9, etag="e")
