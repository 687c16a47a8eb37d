"""What `benchmarks.read` reads: photographs as splat shards, as JPEG tars, as plain samples.

All of it is made of photographs of datacomp-sample at 224 px. They are fitted once for each N (for
some minutes); `fits-{N}.npz` keeps that between runs. A run that lasts long enough needs more rows,
and rows must not repeat within a file, where compression would find them: so each photograph stands
there eight times, mirrored and turned, which is exact on splats. Whole files are then copied under
new names until there are enough rows.

PSNR and bytes per image are those of the upright ones, in a shard of their own.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.record import DATA
from splatshard.pipeline.codec import planes
from splatshard.pipeline.codec.pack import pack_fp16, unpack
from splatshard.pipeline.codec.quantise import on_grid
from splatshard.pipeline.convert import FittedBatch, Images, decode_batches, fit_batches, pack_batch
from splatshard.pipeline.convert import planes as pixels_to_planes
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.runtime.batching import BatchLimit
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.shards.commit import publish
from splatshard.pipeline.shards.write import open_writer
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import RawSample, read
from splatshard.pipeline.splats import Splats, cholesky_from_covariances, covariances
from splatshard.schemas.config import (
    ConvertConfig,
    DecodeConfig,
    FitConfig,
    PackConfig,
    output_config,
)
from splatshard.schemas.shard import ShardManifest, ShardRef, to_json
from splatshard.schemas.splats import EXTENSIONS, PLANAR, shard_metadata

SIZE = 224
"""Side of the images, px."""
ROWS = {400: 9600, 900: 6400}
"""Rows of all files by N, 3200 for others: so an epoch lasts a few tenths of a second."""
TURNS = 8
JPEG_ROWS = 800
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of shards and what is in it, for each row: the bytes of the file, those of image or
    Gaussians in it, and the mean PSNR in dB against the 224 px crop (NaN where it was none)."""

    url: str
    rows: int
    file_bytes: float
    payload_bytes: float
    psnr: float


@dataclass(frozen=True, kw_only=True)
class Fits:
    """Photographs and their fits: rows as far as known before packing, uint8 [B, S, S, 3]."""

    rows: list[dict[str, Any]]
    pixels: torch.Tensor
    splats: Splats
    steps: torch.Tensor


def config_of(n: int, codec: str, format: str) -> ConvertConfig:
    return ConvertConfig(
        fit=FitConfig(num_gaussians=n),
        pack=PackConfig(format=format, codec=codec),  # type: ignore[arg-type]
    )


def fits(n: int, folder: Path, images: int) -> Fits:
    """The first `images` photographs fitted with `n` Gaussians; from `folder` where it has them."""
    path = folder / f"fits-{n}.npz"
    if not path.exists():
        made = make_fits(n, images)
        means, cholesky, colors = made.splats.means, made.splats.cholesky, made.splats.colors
        with path.with_suffix(".part").open("wb") as stream:
            np.savez(
                stream,
                rows=np.frombuffer(json.dumps(made.rows).encode(), np.uint8),
                pixels=made.pixels.numpy(),
                gaussians=torch.cat((means, cholesky, colors), -1).numpy(),
                mask=made.splats.mask.numpy(),
                steps=made.steps.numpy(),
            )
        path.with_suffix(".part").rename(path)
    with np.load(path) as file:
        array = {name: file[name] for name in file.files}
    parts = torch.from_numpy(array["gaussians"]).split((2, 3, 3), -1)
    return Fits(
        rows=json.loads(array["rows"].tobytes()),
        pixels=torch.from_numpy(array["pixels"]),
        splats=Splats(*parts, torch.from_numpy(array["mask"])),
        steps=torch.from_numpy(array["steps"]),
    )


def make_fits(n: int, images: int) -> Fits:
    config = config_of(n, "fp16", "parquet")
    backend, clock, limit = select_backend("cpu"), StageTimer(), BatchLimit(BATCH)
    decoded = decode_batches(photographs(images), limit, config, backend.device, clock)
    done = [f for batch in fit_batches(decoded, config, backend, limit, clock) for f in batch.fits]
    fitted = [splats for _, splats, _ in done]
    values = [
        torch.cat([getattr(s, x) for s in fitted]) for x in ("means", "cholesky", "colors", "mask")
    ]
    return Fits(
        rows=[row for images, _, _ in done for row in images.rows],
        pixels=torch.cat([images.pixels for images, _, _ in done]),
        splats=Splats(*values),
        steps=torch.cat([steps for _, _, steps in done]),
    )


def turned(splats: Splats, turn: int, size: int) -> Splats:
    """Splats of a square image of `size` px, mirrored in x (bit 0), y (1), on the diagonal (2)."""
    means, (xx, xy, yy) = splats.means.double(), covariances(splats.cholesky.double()).unbind(-1)
    if turn & 4:
        means, xx, yy = means.flip(-1), yy, xx
    mirrored = torch.tensor([turn & 1, turn >> 1 & 1], dtype=torch.bool)
    means = torch.where(mirrored, size - means, means)
    xy = -xy if turn in (1, 2, 5, 6) else xy
    cholesky = cholesky_from_covariances(torch.stack((xx, xy, yy), -1)).float()
    return replace(splats, means=means.float(), cholesky=cholesky)


def splat_shards(n: int, codec: str, folder: Path, images: int) -> dict[str, Source]:
    """Shards of `n` Gaussians per image in each format below `folder`, made unless they are
    there."""
    copies = max(1, ROWS.get(n, 3200) // (images * TURNS))
    names = {format: f"{format}-{codec}-{n}" for format in EXTENSIONS}
    notes = {format: folder / f"{name}.json" for format, name in names.items()}
    if not all(note.exists() for note in notes.values()):
        fitted = fits(n, folder, images)
        rows = packed_rows(fitted, config_of(n, codec, "parquet"))
        for format, name in names.items():
            config = config_of(n, codec, format)
            shutil.rmtree(folder / name, ignore_errors=True)
            first = commit(folder / name, "00000000", rows, config)
            for copy in range(1, copies):
                data_file = f"copy-{copy}-{first.data_file}"
                shutil.copyfile(folder / name / first.data_file, folder / name / data_file)
                marker = replace(first, name=f"{copy:08d}", data_file=data_file)
                (folder / name / f"{copy:08d}.json").write_text(to_json(marker))
            shutil.rmtree(folder / "upright", ignore_errors=True)
            upright = commit(folder / "upright", name, rows[:images], config)
            payload = payload_bytes(folder / "upright" / upright.data_file, format)
            quality = upright.statistics["psnr_mean"]
            write_note(notes[format], images, upright.size_bytes, payload, quality)
    rows_of_all = images * TURNS * copies
    return {name: source_of(folder / names[name], notes[name], rows_of_all) for name in EXTENSIONS}


def packed_rows(fitted: Fits, config: ConvertConfig) -> list[dict[str, Any]]:
    """Rows of all turns; the upright ones first, as a conversion writes them.

    The others are put on the grid with the step that was found for the upright one, and their
    colours are not solved again: that would take an hour and gain nothing here.
    """
    codec, backend = config.pack.codec, select_backend("cpu")
    rows = [dict(row) for row in fitted.rows]
    images = Images(rows=rows, pixels=fitted.pixels)
    pack_batch(
        FittedBatch(rows=rows, fits=[(images, fitted.splats, fitted.steps)]), config, backend
    )
    payloads = [{"splats": row["splats"]} for row in rows]
    stored = unpack(payloads, SIZE, SIZE, codec)
    result = list(rows)
    for turn in range(1, TURNS):
        splats = turned(stored, turn, SIZE)
        check_turned(splats[:4], fitted.pixels[:4], turn, rows, config)
        for begin in range(0, len(rows), BATCH):
            part = slice(begin, begin + BATCH)
            if codec in PLANAR:
                step = planes.decode([row["splats"] for row in rows[part]]).step
                shape = torch.empty(1, 3, SIZE, SIZE)
                packed = planes.encode(on_grid(splats[part], splats[part], step, shape))
            else:
                packed = pack_fp16(splats[part], SIZE, SIZE)
            for row, payload in zip(rows[part], packed, strict=True):
                result.append(row | {"key": f"{row['key']}-{turn}", "splats": payload})
    return result


def check_turned(
    splats: Splats,
    pixels: torch.Tensor,
    turn: int,
    rows: list[dict[str, Any]],
    config: ConvertConfig,
) -> None:
    """Assert that turned splats are as good a picture of the turned pixels as before."""
    image = pixels_to_planes(pixels)
    image = image.transpose(2, 3) if turn & 4 else image
    image = image.flip([axis for bit, axis in ((1, 3), (2, 2)) if turn & bit]).contiguous()
    rendered = select_backend("cpu").render(splats, SIZE, SIZE, config.fit.cutoff)
    for found, row in zip(psnr(rendered, image).tolist(), rows, strict=False):
        assert abs(found - row["psnr"]) < 0.05, f"turn {turn}: {found} dB, {row['psnr']} upright"


def peer_samples(source: Source, n: int, folder: Path) -> str:
    """The npz file from which the peers write the rows of Parquet shards of fp16 payloads."""
    path = folder / f"peers-{n}.npz"
    if not path.exists():
        shards = sorted(Path(source.url).glob("*.parquet"))
        table = pa.concat_tables(
            pq.read_table(p, columns=["key", "caption", "splats"]) for p in shards
        )
        payloads = np.frombuffer(b"".join(table["splats"].to_pylist()), np.uint8)
        texts = list(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
        np.savez(
            path,
            payloads=payloads.reshape(len(texts), 16 * n),
            texts=np.frombuffer(json.dumps(texts).encode(), np.uint8),
        )
    return str(path)


def commit(
    dst: Path, name: str, rows: Sequence[dict[str, Any]], config: ConvertConfig
) -> ShardManifest:
    dst.mkdir(parents=True, exist_ok=True)
    path = dst / f"_{name}"
    metadata = shard_metadata(config.pack.codec, config.fit.cutoff, output_config(config))
    with open_writer(path, config.pack.format, metadata) as writer:
        writer.write(list(rows))
    ref = ShardRef(name=name, kind="tar", urls=(name,), size_bytes=0, etag="")
    return publish(str(dst), path, ref, config, hashlib.sha256().hexdigest(), len(rows))


def payload_bytes(path: Path, format: str) -> int:
    """Bytes that the file spends on Gaussians: the columns as compressed, or the tar's members."""
    if format == "parquet":
        groups = pq.ParquetFile(path).metadata
        chunks = (
            groups.row_group(g).column(c)
            for g in range(groups.num_row_groups)
            for c in range(groups.num_columns)
        )
        return sum(c.total_compressed_size for c in chunks if c.path_in_schema.startswith("splats"))
    with tarfile.open(path) as tar:
        return sum(member.size for member in tar if member.name.endswith(".splat"))


def jpeg_tars(folder: Path, images: int, quality: int | None) -> Source:
    """Tars of jpg, txt and json as img2dataset writes them, made unless they are there.

    At 224 px (short side resized bicubic, centre crop) as JPEG of `quality`; as they came if None.
    """
    dst = folder / (f"jpeg-224-q{quality}" if quality else "jpeg-original")
    note = dst.with_suffix(".json")
    copies = max(1, JPEG_ROWS // images)
    if not note.exists():
        shutil.rmtree(dst, ignore_errors=True)
        dst.mkdir()
        payload, quality_db = [], []
        for copy in range(copies):
            with tarfile.open(dst / f"{copy:08d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in photographs(images):
                    data, decibels = jpeg_of(sample.image, quality)
                    payload.append(len(data))
                    quality_db.append(decibels)
                    members = {"jpg": data, "txt": sample.caption, "json": sample.metadata}
                    for suffix, data in members.items():
                        data = data if isinstance(data, bytes) else (data or "").encode()
                        info = tarfile.TarInfo(f"{copy}{sample.key}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        size = sum(path.stat().st_size for path in dst.glob("*.tar"))
        write_note(note, len(payload), size, sum(payload), fmean(quality_db))
    return source_of(dst, note, images * copies)


def jpeg_of(image: bytes, quality: int | None) -> tuple[bytes, float]:
    """A photograph's JPEG file and its PSNR in dB against the crop that was encoded."""
    if quality is None:
        return image, math.nan
    crop = decode(image, "", DecodeConfig(image_size=SIZE)).pixels
    stream = io.BytesIO()
    Image.fromarray(crop).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as stored:
        error = np.asarray(stored).astype(np.float64) - crop
    return stream.getvalue(), float(10 * np.log10(255**2 / np.mean(error**2)))


def photographs(images: int) -> Iterator[RawSample]:
    refs = list_shards(str(DATA / "datacomp-sample" / "shards"))
    return islice((s for ref in refs for s in read(ref, hashlib.sha256())), images)


def write_note(path: Path, rows: int, size: int, payload: int, decibels: float) -> None:
    """What is known of a source, written last: it is whole once this is there."""
    per_row = {"file_bytes": size / rows, "payload_bytes": payload / rows}
    path.write_text(json.dumps({**per_row, "psnr": decibels}))


def source_of(dst: Path, note: Path, rows: int) -> Source:
    return Source(url=str(dst), rows=rows, **json.loads(note.read_text()))
