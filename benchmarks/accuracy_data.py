"""The inputs of benchmarks/accuracy.py and gvit.py: one set of pictures in different clothes.

    source     the photographs, as they came            splats     converted by splatshard
    rendered   the splats' pictures, as PNG             shuffled   splats, colours changed about
    jpeg, webp  the best file that is no larger than    tiny       as few pixels as its bytes hold
                the sample's splats

Every set has the same shards with the same samples in the same order and under the same keys, so
all arms train on the same samples at the same steps, augmented by the same random numbers.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.record import DATA
from splatshard.jobs.recipes.toys import digits
from splatshard.pipeline.codec.pack import pack_fp16, unpack_row
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.commit import publish, staged_file
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.pipeline.shards.verify import stored_payload_bytes
from splatshard.pipeline.shards.write import open_writer
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.config import config_from_output, output_config
from splatshard.schemas.shard import OK, ShardManifest
from splatshard.schemas.splats import payload_bytes, shard_metadata

SPLITS = ("train", "val")
PER_SHARD = 500
MAX_HEADER = 4096


@dataclass(frozen=True)
class Inputs:
    """A set in `folder`/train and /val. Means per image: `size_bytes`, `seconds` of one core (all
    cores' wall time on a GPU) to fit it, `psnr` in dB to the source (None: the source itself)."""

    name: str
    folder: Path
    size_bytes: float
    seconds: float = 0.0
    psnr: float | None = None

    def split(self, name: str) -> str:
        return str(self.folder / name)


def write_source(folder: Path, dataset: str, classes: int) -> Inputs:
    """The first `classes` of a dataset in shards of PER_SHARD, shuffled."""
    sizes: list[int] = []
    for split in SPLITS:
        table = photographs(split) if dataset == "tiny-imagenet" else handwriting(split)
        table = table.filter(pc.less(table["label"], classes))
        table = table.take(np.random.default_rng(0).permutation(len(table)))
        (folder / split).mkdir(parents=True)
        for begin in range(0, len(table), PER_SHARD):
            part = table.slice(begin, PER_SHARD)
            pq.write_table(part, folder / split / f"{begin // PER_SHARD:05d}.parquet")
            sizes += [len(image["bytes"]) for image in part["image"].to_pylist()]
    return Inputs("source", folder, float(np.mean(sizes)))


def photographs(split: str) -> pa.Table:
    """Tiny-ImageNet-100, 64 px."""
    pattern = "train*.parquet" if split == "train" else "validation*.parquet"
    paths = sorted((DATA / "tiny-imagenet-100").glob(pattern))
    return pa.concat_tables([pq.read_table(path) for path in paths])


def handwriting(split: str) -> pa.Table:
    """scikit-learn's digits, 32 px; every sixth is for validation, as in the recipes' toys."""
    samples = [(n, s) for n, s in enumerate(digits()) if (n % 6 == 0) == (split == "val")]
    images = [{"bytes": png(np.asarray(image)), "path": str(n)} for n, (image, *_) in samples]
    return pa.table({"image": images, "label": [label for _, (*_, label) in samples]})


def convert(source: Inputs, folder: Path, n: int, side: int) -> Inputs:
    """`splatshard convert`, default codec."""
    busy = images = 0.0
    for split in SPLITS:
        command = [sys.executable, "-m", "jobs", "convert", source.split(split)]
        command += [str(folder / split), "--num-gaussians", str(n), "--image-size", str(side)]
        begin = time.perf_counter()
        found = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
        print(f"  {split}, N={n}: {time.perf_counter() - begin:.0f} s", flush=True)
        summary = json.loads(found.stdout.splitlines()[-1])
        busy, images = busy + summary["worker_s"], images + summary["ok"]
    shards = [shard for split in SPLITS for shard in Shard.all_in(folder / split)]
    return Inputs(
        name=f"splats{n}",
        folder=folder,
        size_bytes=sum(float(shard.sizes().sum()) for shard in shards) / images,
        seconds=busy / images,
        psnr=float(np.mean([row["psnr"] for shard in shards for row in shard.rows()])),
    )


@dataclass(frozen=True)
class Shard:
    """A done splat shard."""

    dst: Path
    manifest: ShardManifest

    @staticmethod
    def all_in(dst: Path) -> list[Shard]:
        found = read_markers(str(dst)).values()
        return [Shard(dst, marker) for marker in found if isinstance(marker, ShardManifest)]

    @property
    def path(self) -> str:
        return str(self.dst / self.manifest.data_file)

    def rows(self) -> list[dict[str, Any]]:
        rows = list(read_rows(self.path))
        assert all(row["status"] == OK for row in rows), "all of these photographs decode"
        return rows

    def sizes(self) -> np.ndarray:
        """Bytes of each sample's payload, as compressed in the file, float64 [rows]."""
        raw = np.array([payload_bytes(row) for row in self.rows()], float)
        return raw * stored_payload_bytes(self.path) / raw.sum()

    def pictures(self) -> np.ndarray:
        """What the splats render to, uint8 [rows, H, W, 3]."""
        metadata = shard_metadata_of(self.path)
        draw = select_backend("cpu").render
        shown = []
        for row in self.rows():
            size = row["height"], row["width"]
            shown.append(draw(unpack_row(row, metadata), *size, metadata["cutoff"])[0])
        pixels = torch.stack(shown).clamp(0, 1) * 255
        return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def rewrite(
    source: Inputs, splats: Inputs, folder: Path, image_of: Callable[[Shard], Iterator[bytes]]
) -> None:
    """The source's shards with other image files, those that `image_of` makes of each shard."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        for shard in Shard.all_in(splats.folder / split):
            name = f"{shard.manifest.name}.parquet"
            table = pq.read_table(f"{source.split(split)}/{name}")
            images = [{"bytes": image, "path": None} for image in image_of(shard)]
            column = pa.array(images, table.schema.field("image").type)
            table = table.set_column(table.schema.get_field_index("image"), "image", column)
            pq.write_table(table, folder / split / name)


def render(source: Inputs, splats: Inputs, folder: Path) -> Inputs:
    """Arm B's: what a trainer that knows nothing of splats would see of them."""

    def images(shard: Shard) -> Iterator[bytes]:
        for pixels in shard.pictures():
            yield png(pixels)

    rewrite(source, splats, folder, images)
    return replace(splats, name=splats.name.replace("splats", "rendered"), folder=folder)


def compress(source: Inputs, splats: Inputs, folder: Path, format: str, side: int) -> Inputs:
    """Arm E's: JPEG or WebP files of at most the bytes that each sample has as splats.

    JPEG's tables (some 300 bytes, a third and more of such small files) are not counted, since a
    dataset could store them once. What even the lowest quality cannot reach counts as it is.
    """
    sizes: list[int] = []
    errors: list[float] = []

    def images(shard: Shard) -> Iterator[bytes]:
        originals = source_pixels(source, shard, side)
        for pixels, limit in zip(originals, shard.sizes(), strict=True):
            image, size = largest(pixels, format, limit)
            sizes.append(size)
            errors.append(psnr(np.asarray(Image.open(io.BytesIO(image)).convert("RGB")), pixels))
            yield image

    rewrite(source, splats, folder, images)
    name = splats.name.replace("splats", format.lower())
    return Inputs(name, folder, float(np.mean(sizes)), psnr=float(np.mean(errors)))


def shrink(source: Inputs, splats: Inputs, folder: Path, side: int) -> Inputs:
    """Arm F's: as many pixels, three bytes each, as the splats' mean bytes hold."""
    small = math.isqrt(int(splats.size_bytes / 3))
    errors: list[float] = []

    def images(shard: Shard) -> Iterator[bytes]:
        for pixels in source_pixels(source, shard, side):
            reduced = Image.fromarray(pixels).resize((small, small), Image.Resampling.BICUBIC)
            shown = np.asarray(reduced.resize((side, side), Image.Resampling.BICUBIC))
            errors.append(psnr(shown, pixels))
            yield png(np.asarray(reduced))

    rewrite(source, splats, folder, images)
    return Inputs(f"rgb{small}", folder, 3.0 * small * small, psnr=float(np.mean(errors)))


def shuffle(splats: Inputs, folder: Path) -> Inputs:
    """Arm G's: the colours of each image's Gaussians, changed about."""
    for split in SPLITS:
        refs = {ref.name: ref for ref in list_shards(str(splats.folder.parent / "source" / split))}
        (folder / split).mkdir(parents=True)
        for number, shard in enumerate(Shard.all_in(splats.folder / split)):
            given = config_from_output(shard.manifest.inputs["recipe"])
            config = replace(given, pack=replace(given.pack, codec="fp16"))
            random = torch.Generator().manual_seed(number)
            metadata = shard_metadata_of(shard.path)
            rows = [shuffled(row, metadata, random) for row in shard.rows()]
            fp16_metadata = shard_metadata("fp16", config.fit.cutoff, output_config(config))
            with staged_file(str(folder / split), shard.manifest.name) as path:
                with open_writer(path, config.pack.format, fp16_metadata) as writer:
                    writer.write(rows)
                ref, sha256 = refs[shard.manifest.name], shard.manifest.source_sha256
                publish(str(folder / split), path, ref, config, sha256, len(rows))
    return replace(splats, name=f"{splats.name}_shuffled", folder=folder, psnr=None)


def shuffled(row: dict[str, Any], metadata: dict[str, Any], random: torch.Generator) -> Any:
    splats = unpack_row(row, metadata)
    order = torch.randperm(splats.mask.shape[1], generator=random)
    splats = replace(splats, colors=splats.colors[:, order])
    return row | {"splats": pack_fp16(splats, row["height"], row["width"])[0]}


def source_pixels(source: Inputs, shard: Shard, side: int) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each sample of the source's shard."""
    path = f"{source.split(shard.dst.name)}/{shard.manifest.name}.parquet"
    for image in pq.read_table(path, columns=["image"])["image"].to_pylist():
        pixels = np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
        assert pixels.shape == (side, side, 3), "these are all of one size"
        yield pixels


def largest(pixels: np.ndarray, format: str, limit: float) -> tuple[bytes, int]:
    """The file of the highest quality within `limit` bytes, else that of the lowest; its size."""
    low, high = 1, 95
    best = encoded(pixels, format, low)
    while low < high:
        middle = (low + high + 1) // 2
        found = encoded(pixels, format, middle)
        if found[1] <= limit:
            low, best = middle, found
        else:
            high = middle - 1
    return best


def encoded(pixels: np.ndarray, format: str, quality: int) -> tuple[bytes, int]:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"method": 6} if format == "WEBP" else {"subsampling": 2}
    Image.fromarray(pixels).save(buffer, format, quality=quality, **options)
    data = buffer.getvalue()
    scan = data.rindex(b"\xff\xda", 0, MAX_HEADER) if format == "JPEG" else 0
    return data, len(data) - scan


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def psnr(shown: np.ndarray, pixels: np.ndarray) -> float:
    """dB, at most 60."""
    error = np.mean((shown.astype(float) - pixels) ** 2)
    return float(min(60.0, 10 * np.log10(255**2 / max(error, 1e-9))))
