"""Random splats and shard rows for tests of packing, writing and committing; no fit is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from splatshard.pipeline.codec.pack import Payload, pack
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.write import open_writer
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import ConvertConfig, FitConfig, PackConfig, output_config
from splatshard.schemas.shard import ShardRef
from splatshard.schemas.splats import EXTENSIONS, psnr_columns, shard_metadata

FORMATS = tuple(EXTENSIONS)
HEIGHT, WIDTH = 48, 64
CUTOFF = 3.0
NOISE = 0.05
"""What the targets of `packed` have that their splats have not: PSNRs of some 26 dB."""


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


def target_of(splats: Splats, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Images [B, 3, H, W] that `splats` may be fits of: their rendering and some noise."""
    rendered = select_backend("reference").render(splats, height, width, CUTOFF)
    noise = torch.randn(rendered.shape, generator=torch.Generator().manual_seed(0))
    return (rendered + NOISE * noise).clamp(0, 1)


def packed(
    splats: Splats,
    codec: str = "balanced",
    budgets: tuple[int, ...] = (),
    height: int = HEIGHT,
    width: int = WIDTH,
) -> list[dict[str, Payload]]:
    """Payloads of `splats`, against their `target_of`; fp16 does not look at a target."""
    black = torch.zeros(len(splats), 3, height, width)
    target = black if codec == "fp16" else target_of(splats, height, width)
    return pack(splats, target, codec, CUTOFF, select_backend("reference"), budgets)


def make_rows(
    number: int = 4, n: int = 20, codec: str = "fp16", budgets: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Rows as convert.py gives them, of `n` Gaussians or nested `budgets` (the last is all); every
    fourth is a skipped sample."""
    n = budgets[-1] if budgets else n
    payloads = packed(random_splats(number, n), codec, budgets)
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
            row |= {"original_height": 480, "num_gaussians": n, "steps": 100, "psnr_loss": 0.125}
            row |= payload | dict.fromkeys(psnr_columns(budgets), 20.5)
        rows.append(row)
    return rows


def config_of(
    format: str = "parquet", codec: str = "fp16", budgets: tuple[int, ...] = ()
) -> ConvertConfig:
    return ConvertConfig(
        fit=FitConfig(nested=",".join(map(str, budgets))),
        pack=PackConfig(format=format, codec=codec),  # type: ignore[arg-type]
    )


def metadata_of(config: ConvertConfig) -> dict[str, Any]:
    return shard_metadata(config.pack.codec, config.fit.cutoff, output_config(config))


def write_shard(
    path: Path,
    rows: list[dict[str, Any]],
    format: str = "parquet",
    codec: str = "fp16",
    budgets: tuple[int, ...] = (),
) -> Path:
    """Write `rows` to `path` and return it."""
    with open_writer(path, format, metadata_of(config_of(format, codec, budgets))) as writer:
        writer.write(rows)
    return path


def make_ref(name: str = "00000000") -> ShardRef:
    return ShardRef(name=name, kind="tar", urls=(f"/in/{name}.tar",), size_bytes=9, etag="e")
