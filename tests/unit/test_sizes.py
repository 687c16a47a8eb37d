"""Images of several sizes in one shard: from the source to what reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splatshard.jobs.__main__ import main
from splatshard.jobs.destination.card import image_sizes
from splatshard.jobs.recipes.toys import shapes, write_tars
from splatshard.pipeline.codec.pack import unpack_row
from splatshard.pipeline.convert import Row, convert_samples, convert_shard
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.data.augment import augment
from splatshard.pipeline.fitting.start import hilbert_order
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.encoder import SplatEncoder
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.runtime import batching
from splatshard.pipeline.runtime.batching import BatchLimit, batch_limit, bytes_per_image
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import RawSample
from splatshard.pipeline.train.loop import train
from splatshard.schemas.config import (
    ConvertConfig,
    DecodeConfig,
    FitConfig,
    PackConfig,
    PruneConfig,
    output_config,
)
from splatshard.schemas.shard import OK, ShardManifest, ShardRef
from splatshard.schemas.splats import CODECS, MAX_LOSS_DB, shard_metadata
from splatshard.schemas.train import AugmentConfig
from tests.make import encode, jpeg, photo, write_tar
from tests.training import curve, toy_config
from tests.unit.toy_models import TOY

SIZES = {"a": (40, 24), "b": (24, 40), "c": (30, 30), "d": (40, 24), "e": (9, 31)}
"""Width and height by key."""
CONFIG = ConvertConfig(
    decode=DecodeConfig(image_size=24, resize="none"),
    fit=FitConfig(num_gaussians=9, steps=4),
    backend="cpu",
)
CPU = torch.device("cpu")


def shape_of(resize: str, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that `size` is fitted at."""
    side = {"shortest": min, "longest": max, "none": lambda _: 24}[resize](size)
    return round(size[0] * 24 / side), round(size[1] * 24 / side)


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ShardRef:
    folder = tmp_path_factory.mktemp("in")
    members: list[Any] = [
        (f"{key}.png", encode(photo(*size, ord(key)), "PNG")) for key, size in SIZES.items()
    ]
    members += [(f"{key}.cls", b"1") for key in SIZES]
    return list_shards(str(write_tar(folder / "mixed.tar", sorted(members))))[0]


@pytest.fixture
def shard(ref: ShardRef, tmp_path: Path) -> Callable[[ConvertConfig], tuple[str, ShardManifest]]:
    def make(config: ConvertConfig) -> tuple[str, ShardManifest]:
        dst = tmp_path / "out"
        dst.mkdir()
        return str(dst), convert_shard(ref, config, str(dst), select_backend("cpu"))

    return make


Shard = Callable[[ConvertConfig], tuple[str, ShardManifest]]


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, decode=DecodeConfig(image_size=24, resize="shortest")),
        replace(CONFIG, decode=DecodeConfig(image_size=24, resize="longest")),
        *(replace(CONFIG, pack=PackConfig(codec=codec)) for codec in CODECS),
        replace(CONFIG, pack=PackConfig(format="webdataset")),
        replace(CONFIG, fit=FitConfig(nested="4,9,20", steps=5)),
        replace(CONFIG, fit=FitConfig(init="grid", num_gaussians=9, steps=3)),
        replace(CONFIG, fit=FitConfig(init="random", num_gaussians=9, steps=3)),
        replace(CONFIG, fit=FitConfig(num_gaussians=9, steps=30, target_psnr=20)),
        replace(CONFIG, prune=PruneConfig(prune="energy", refit_steps=2)),
    ],
)  # fmt: skip
def test_rows_are_those_of_their_own_pictures(shard: Shard, config: ConvertConfig) -> None:
    """Height and width, the rendering of the payload, its PSNR; and the reader agrees."""
    dst, manifest = shard(config)
    assert verify_shard(dst, manifest) == []
    url = f"{dst}/{manifest.data_file}"
    metadata, backend = shard_metadata_of(url), select_backend("reference")
    rows: dict[str, Row] = {row["key"]: row for row in read_rows(url)}
    assert list(rows) == sorted(SIZES)
    for key, row in rows.items():
        width, height = shape_of(config.decode.resize, SIZES[key])
        assert (row["status"], row["width"], row["height"]) == (OK, width, height)
        assert (row["original_width"], row["original_height"]) == SIZES[key]
        image = encode(photo(*SIZES[key], ord(key)), "PNG")
        pixels = decode(image, "a", config.decode).pixels
        target = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        rendered = backend.render(unpack_row(row, metadata), height, width, 3.0)
        assert float(psnr(rendered, target)) == pytest.approx(row["psnr"], abs=1e-3)
    (batch,) = SplatDataset(dst, batch_size=5, shuffle=False)
    for i, key in enumerate(batch.keys):
        height, width = int(batch.heights[i]), int(batch.widths[i])
        assert (width, height) == shape_of(config.decode.resize, SIZES[key])
        stored = backend.render(unpack_row(rows[key], metadata), height, width, 3.0)
        found = backend.render(batch.splats[i : i + 1], height, width, 3.0)
        assert torch.allclose(found, stored, atol=1e-4)


def test_what_reads_a_batch_reads_unequal_sizes(shard: Shard) -> None:
    """Augmentation to one size, by each picture's own; an encoder sees each by itself."""
    dst, _ = shard(CONFIG)
    (batch,) = SplatDataset(dst, batch_size=5, shuffle=False)
    config = AugmentConfig(height=16, width=16, crop_scale=(1.0, 1.0), flip=0.0)
    draw = torch.Generator()
    whole = augment(batch.splats, batch.heights, batch.widths, config, draw)
    backend, encoder = select_backend("reference"), SplatEncoder(TOY).eval()
    with torch.no_grad():
        seen = encoder(batch.splats, batch.heights, batch.widths)
    for i in range(len(batch)):
        part = slice(i, i + 1)
        height, width = int(batch.heights[i]), int(batch.widths[i])
        stretched = torch.tensor([16 / width, 16 / height])
        means = batch.splats.means[part] * stretched
        shown = batch.splats.mask[part] & whole.mask[part]
        assert torch.allclose(whole.means[part][shown], means[shown], atol=1e-4)
        alone = (batch.heights[part], batch.widths[part])
        with torch.no_grad():
            assert torch.allclose(encoder(batch.splats[part], *alone), seen[part], atol=1e-4)
    assert backend.render(whole, 16, 16, 3.0).isfinite().all()


@pytest.mark.parametrize("augment", [None, AugmentConfig(height=24, width=24)])
def test_training_and_evaluation_on_unequal_sizes(
    tmp_path: Path, augment: AugmentConfig | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """And on unequal numbers of Gaussians; a batch has all of them."""
    samples = [
        (image.resize((20 + 8 * (i % 3), 24)), caption, label)
        for i, (image, caption, label) in enumerate(shapes(18, 0))
    ]
    write_tars(tmp_path / "images", samples)
    (tmp_path / "splats").mkdir()
    fitting = FitConfig(num_gaussians=4, steps=8, target_psnr=25, max_gaussians=9)
    for ref in list_shards(f"{tmp_path}/images/*.tar"):
        config = replace(CONFIG, fit=fitting)
        convert_shard(ref, config, f"{tmp_path}/splats", select_backend("cpu"))
    (batch,) = SplatDataset(f"{tmp_path}/splats", batch_size=18)
    assert (len(set(batch.widths.tolist())), int(batch.splats.num_gaussians.max())) == (3, 9)
    train(toy_config(tmp_path, tmp_path / "run", steps=2, augment=augment))
    assert all(math.isfinite(loss) for loss in curve(tmp_path / "run").values())
    assert main(["evaluate", f"{tmp_path}/run", f"{tmp_path}/splats"]) == 0
    assert "(classify, 18 samples)" in capsys.readouterr().err


def test_commands_on_unequal_sizes(shard: Shard, capsys: pytest.CaptureFixture[str]) -> None:
    dst, _ = shard(CONFIG)
    output = Path(dst).parent
    assert main(["export", dst, "b", f"--output={output}/b.png", "--backend=cpu"]) == 0
    assert "24x40 px" in capsys.readouterr().err
    assert main(["report", dst, f"--output={output}/r.html", "--backend=cpu"]) == 0
    page = (output / "r.html").read_text()
    for width, height in SIZES.values():
        assert f'viewBox="0 0 {width} {height}"' in page
        assert f'width="{width}" height="{height}" alt="reconstruction' in page
    assert main(["verify", dst]) == 0


@pytest.mark.parametrize(
    ("decode", "words"),
    [
        ({"image_size": 64}, "squares of 64 px, raw 12,288 B"),
        ({"image_size": 64, "resize": "longest"}, "longest side 64 px"),
        ({"image_size": 64, "resize": "none"}, "as large as in the source"),
    ],
)
def test_the_card_says_how_large_pictures_are(decode: dict[str, Any], words: str) -> None:
    assert image_sizes(decode) == words


# Batches and memory


def test_batches_are_full_when_their_pixels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are cut, rows are the same; a large image goes alone."""
    sizes = [(8, 8), (8, 8), (48, 40), (8, 8), (60, 60), (8, 8), (8, 9), (9, 8)]
    samples = [RawSample(f"{i}", jpeg(*size, i)) for i, size in enumerate(sizes)]
    backend = select_backend("cpu")
    whole = list(convert_samples(samples, CONFIG, backend, StageTimer()))
    assert [len(batch) for batch in whole] == [8]
    monkeypatch.setattr(batching, "CPU_ROOM", bytes_per_image(CONFIG, 48 * 40))
    parts = list(convert_samples(samples, CONFIG, backend, StageTimer()))
    assert [len(batch) for batch in parts] == [3, 2, 3]
    assert [row for batch in parts for row in batch] == whole[0]
    few = list(convert_samples(samples, replace(CONFIG, batch_size=2), backend, StageTimer()))
    assert [len(batch) for batch in few] == [2, 1, 2, 2, 1]


def test_large_images_of_one_size_go_in_parts() -> None:
    limit = BatchLimit(16, 1000)
    seen: list[int] = []

    def work(part: slice) -> int:
        seen.append(part.stop - part.start)
        return 0

    for count, each in ((5, 400), (3, 2000), (20, 10), (2, 0)):
        list(limit.in_parts(count, work, each))
    assert seen == [2, 2, 1, 1, 1, 1, 16, 4, 2]


def test_less_memory_than_expected_leaves_small_images_together() -> None:
    limit = BatchLimit(16, 1600)
    seen: list[int] = []

    def work(part: slice) -> int:
        seen.append(part.stop - part.start)
        if each * seen[-1] > 1000:
            raise torch.cuda.OutOfMemoryError("no")
        return 0

    for each in (400, 100):
        list(limit.in_parts(8, work, each))
    assert seen == [4, 2, 2, 2, 2, 8]


@pytest.mark.parametrize("free_gib", [100, 4])
def test_room_on_a_gpu_is_a_share_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free_gib: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib << 30, 1 << 40))
    limit = batch_limit(CONFIG, torch.device("cuda"))
    assert limit.images == 512
    assert limit.room == pytest.approx(0.4 * (free_gib << 30), abs=1)
    square = batch_limit(replace(CONFIG, decode=DecodeConfig()), CPU)
    assert (square.images, square.room) == (16, None)


# Shapes


@pytest.mark.parametrize("size", [(16, 16), (5, 9), (9, 5), (1, 40), (40, 1), (3, 50), (70, 4)])
def test_the_order_of_pixels_has_no_leaps(size: tuple[int, int]) -> None:
    """Every pixel once, neighbours near each other, along the longer side from end to end."""
    height, width = size
    order = hilbert_order(height, width)
    assert sorted(order.tolist()) == list(range(height * width))
    y, x = np.divmod(order.numpy(), width)
    leap = np.abs(np.diff(y)) + np.abs(np.diff(x))
    assert leap.max(initial=0) <= 2 * min(size)
    along = x if width > height else y
    if max(size) > 4 * min(size):
        fifth = len(along) // 5
        assert along[:fifth].max() < along[-fifth:].min()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 5), (1, 600), (600, 2)])
def test_pictures_of_a_few_pixels(size: tuple[int, int]) -> None:
    """More Gaussians than pixels, or one row of them, is still a row with a PSNR."""
    samples = [RawSample("a", encode(photo(*size), "PNG"), "a.png")]
    config = replace(CONFIG, fit=FitConfig(num_gaussians=20, steps=8))
    ((row,),) = convert_samples(samples, config, select_backend("cpu"), StageTimer())
    assert (row["status"], row["width"], row["height"]) == (OK, *size)
    assert 8 < row["psnr"] <= 100


@pytest.mark.parametrize("codec", ["balanced", "fp16"])
def test_as_many_gaussians_as_a_fit_may_have(codec: str) -> None:
    """More than pixels, and than 16 bits count to: all are there, each where it was."""
    config = replace(CONFIG, pack=PackConfig(codec=codec))  # type: ignore[arg-type]
    config = replace(config, fit=FitConfig(num_gaussians=65_536, steps=2))
    samples = [RawSample("a", encode(photo(280, 200), "PNG"), "a.png")]
    ((row,),) = convert_samples(samples, config, select_backend("cpu"), StageTimer())
    assert (row["status"], row["num_gaussians"]) == (OK, 65_536)
    assert row["psnr"] > 15
    assert row["psnr_loss"] < MAX_LOSS_DB.get(codec, 1) + 1e-3
    metadata = shard_metadata(codec, 3.0, output_config(config))
    splats = unpack_row(row, metadata)
    rendered = select_backend("cpu").render(splats, 200, 280, 3.0)
    target = torch.from_numpy(photo(280, 200)).permute(2, 0, 1)[None] / 255
    assert float(psnr(rendered, target)) == pytest.approx(row["psnr"], abs=1e-3)
