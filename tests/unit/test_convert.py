"""The straight line without Ray: batches by memory and by size, halving, overlap, same bytes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splatshard.pipeline import convert
from splatshard.pipeline.codec.pack import unpack_row
from splatshard.pipeline.convert import Row, convert_samples, convert_shard
from splatshard.pipeline.fitting import recipe
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.runtime import batching
from splatshard.pipeline.runtime.batching import BatchLimit, auto_batch_size
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.verify import row_problem
from splatshard.pipeline.source.decode import DecodedImage
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import RawSample
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import (
    ConvertConfig,
    DecodeConfig,
    FitConfig,
    PackConfig,
    PruneConfig,
    output_config,
)
from splatshard.schemas.errors import BackendError, SampleError
from splatshard.schemas.shard import ShardManifest, ShardRef
from splatshard.schemas.splats import CODECS, columns, shard_metadata
from tests.make import datacomp_sample, jpeg, photo, write_tar

CONFIG = ConvertConfig(
    decode=DecodeConfig(image_size=24), fit=FitConfig(num_gaussians=6, steps=3), backend="cpu"
)
CUDA = torch.device("cuda")


def convert_batch(samples: list[RawSample], config: ConvertConfig, backend: Backend) -> list[Row]:
    """Samples to rows, one each, in order, as one batch."""
    config = replace(config, batch_size=len(samples))
    return [row for rows in convert_samples(samples, config, backend, StageTimer()) for row in rows]


def test_a_batch_is_full_when_its_members_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are those of any other batches, and images do not count."""
    monkeypatch.setattr(convert, "BATCH_BYTES", 100)
    config, backend = replace(CONFIG, batch_size=4), select_backend("cpu")
    sizes = [99, 1, 100, 1000, 0, 0, 0, 0, 0]
    samples = [
        RawSample(f"{i}", jpeg(seed=i), members=(("npy", bytes(size)),))
        for i, size in enumerate(sizes)
    ]
    batches = list(convert_samples(samples, config, backend, StageTimer()))
    assert [len(batch) for batch in batches] == [2, 1, 1, 4, 1]
    monkeypatch.setattr(convert, "BATCH_BYTES", 10**9)
    whole = list(convert_samples(samples, config, backend, StageTimer()))
    assert [len(batch) for batch in whole] == [4, 4, 1]
    assert [row for batch in batches for row in batch] == [row for batch in whole for row in batch]


@pytest.fixture
def ref(tmp_path: Path) -> ShardRef:
    """Seven samples, the third of which does not decode."""
    members = [m for i in range(7) for m in datacomp_sample(i)]
    members = [(n, b"broken" if n == "000000000002.jpg" else data) for n, data in members]
    (ref,) = list_shards(str(write_tar(tmp_path / "in" / "00000000.tar", members)))
    return ref


def run(
    ref: ShardRef, dst: Path, config: ConvertConfig = CONFIG, backend: Backend | None = None
) -> tuple[ShardManifest, list[dict[str, Any]]]:
    dst.mkdir()
    manifest = convert_shard(ref, config, str(dst), backend or select_backend("cpu"))
    return manifest, list(read_rows(f"{dst}/{manifest.data_file}"))


def small_memory(most: int, seen: list[int]) -> Backend:
    """The CPU kernel on a device that runs out of memory above `most` images."""
    backend = select_backend("cpu")

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(splats: Any, *args: Any) -> Any:
            seen.append(len(splats))
            if len(splats) > most:
                raise torch.cuda.OutOfMemoryError(f"{len(splats)} images are too many")
            return function(splats, *args)

        return call

    return replace(
        backend, render=checked(backend.render), loss_and_grad=checked(backend.loss_and_grad)
    )


# Batch size


def test_sixteen_images_on_the_cpu() -> None:
    assert auto_batch_size(CONFIG, torch.device("cpu")) == 16


@pytest.mark.parametrize(
    ("free_gib", "image_size", "num_gaussians", "expected"),
    [
        (140, 224, 400, 512),
        (10, 224, 400, 336),
        (10, 224, 4900, 240),
        (8, 1024, 400, 13),
        (0.1, 4096, 400, 1),
    ],
)
def test_batches_fit_into_free_memory(
    monkeypatch: pytest.MonkeyPatch,
    free_gib: float,
    image_size: int,
    num_gaussians: int,
    expected: int,
) -> None:
    free = int(free_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    config = replace(
        CONFIG,
        decode=DecodeConfig(image_size=image_size),
        fit=FitConfig(num_gaussians=num_gaussians),
    )
    size = auto_batch_size(config, CUDA)
    assert size == expected
    assert 2 * size * batching.bytes_per_image(config) <= free or size == 1


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(ref: ShardRef, tmp_path: Path) -> None:
    _, expected = run(ref, tmp_path / "whole")
    seen: list[int] = []
    config = replace(CONFIG, batch_size=5)
    _, rows = run(ref, tmp_path / "halved", config, small_memory(2, seen))
    assert rows == expected
    assert [n for n in seen if n > 2] == [4]  # 4 of the first 5 decode; never tried again


def test_one_image_that_does_not_fit_fails_the_shard(ref: ShardRef, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(BackendError, match=r"one image alone .* --num-gaussians or --image-size"):
        run(ref, tmp_path / "out", backend=small_memory(0, seen))
    assert seen == [6, 3, 1]
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_checking_the_packed_splats_is_halved_too() -> None:
    seen: list[int] = []
    limit = BatchLimit(8)

    def work(part: slice) -> list[int]:
        seen.append(part.stop - part.start)
        if part.stop - part.start > 3:
            raise torch.cuda.OutOfMemoryError("no")
        return list(range(10))[part]

    assert [i for part in limit.in_parts(10, work) for i in part] == list(range(10))
    assert seen == [8, 4, 2, 2, 2, 2, 2]
    assert limit.images == 2


# Sizes


def test_images_of_several_sizes_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": (16, 16), "b": (12, 20), "c": (16, 16), "e": (20, 12), "f": (12, 20)}

    def decode(image: bytes, name: str, config: DecodeConfig) -> DecodedImage:
        if name not in sizes:
            raise SampleError("corrupt_image", f"{name} is bad")
        height, width = sizes[name]
        return DecodedImage(np.ascontiguousarray(photo(width, height, ord(name))), width, height)

    monkeypatch.setattr(convert, "decode", decode)
    samples = [RawSample(key=name, image_name=name) for name in "abcdef"]
    backend = select_backend("cpu")
    rows = convert_batch(samples, CONFIG, backend)
    assert [row["key"] for row in rows] == list("abcdef")
    assert [row["status"] == "ok" for row in rows] == [True, True, True, False, True, True]
    for sample, row in zip(samples, rows, strict=True):
        assert row == convert_batch([sample], CONFIG, backend)[0]
        if row["status"] == "ok":
            assert (row["height"], row["width"]) == sizes[row["key"]]


def test_a_batch_in_which_nothing_decodes() -> None:
    samples = [RawSample(key=str(i), image=b"no", image_name="x.jpg") for i in range(3)]
    rows = convert_batch(samples, CONFIG, select_backend("cpu"))
    assert [row["status"] for row in rows] == ["not_an_image"] * 3


# Payloads and figures


def test_rows_tell_the_quality_of_what_they_hold() -> None:
    backend = select_backend("cpu")
    samples = [RawSample(key=str(i), image=jpeg(seed=i), image_name="x.jpg") for i in range(3)]
    pixels = [convert.decode_sample(sample, CONFIG)[1].pixels for sample in samples]  # type: ignore[union-attr]
    target = convert.planes(torch.from_numpy(np.stack(pixels)))
    for codec in CODECS:
        config = replace(CONFIG, pack=PackConfig(codec=codec))
        metadata = shard_metadata(codec, 3.0, output_config(config))
        fits, _ = fit(target, config.fit, backend)
        wanted = psnr(backend.render(fits, 24, 24, 3.0), target)
        for i, row in enumerate(convert_batch(samples, config, backend)):
            stored = unpack_row(row, metadata)
            found = psnr(backend.render(stored, 24, 24, 3.0), target[i : i + 1])
            assert row["psnr"] == pytest.approx(float(found), abs=1e-4)
            assert row["psnr"] + row["psnr_loss"] == pytest.approx(float(wanted[i]), abs=1e-4)


@pytest.mark.parametrize("codec", ["fp16", "balanced"])
def test_rows_of_nested_budgets(codec: str) -> None:
    """Every prefix has its PSNR, and rows do not depend on the batch."""
    config = replace(CONFIG, fit=FitConfig(nested="4,9", steps=5), pack=PackConfig(codec=codec))  # type: ignore[arg-type]
    backend = select_backend("cpu")
    samples = [RawSample(key=str(i), image=jpeg(seed=i), image_name="x.jpg") for i in range(3)]
    samples.insert(1, RawSample(key="bad", image=b"no", image_name="x.jpg"))
    rows = convert_batch(samples, config, backend)
    assert [row["status"] for row in rows] == ["ok", "not_an_image", "ok", "ok"]
    metadata = shard_metadata(codec, 3.0, output_config(config))
    names = set(columns(metadata).names)
    for sample, row in zip(samples, rows, strict=True):
        assert row.keys() <= names
        assert row == convert_batch([sample], config, backend)[0]
        if row["status"] != "ok":
            continue
        assert row.keys() >= {"splats", "splats_9", "psnr", "psnr_4", "psnr_loss"}
        image = convert.decode_sample(sample, config)[1]
        assert image
        target = convert.planes(torch.from_numpy(image.pixels)[None])
        for name, budget in (("psnr_4", 4), ("psnr", 9)):
            stored = unpack_row(row, metadata, budget)
            assert stored.num_gaussians.tolist() == [budget]
            found = psnr(backend.render(stored, 24, 24, 3.0), target)
            assert row[name] == pytest.approx(float(found), abs=1e-4)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e35, 1e25])
def test_a_fit_that_diverged_is_a_row(codec: str, value: float) -> None:
    """Whether or not there is an infinity in it; its neighbours stay as they are."""
    backend = select_backend("cpu")
    config = replace(CONFIG, pack=PackConfig(codec=codec))  # type: ignore[arg-type]
    pixels = torch.from_numpy(np.stack([photo(24, 24, i) for i in range(3)]))
    fits, steps = fit(convert.planes(pixels), config.fit, backend)

    def rows_of(splats: Splats) -> list[dict[str, Any]]:
        images = convert.Images(
            rows=[{"key": str(i), "status": "ok"} for i in range(3)], pixels=pixels
        )
        convert.pack_images(images, splats, steps, config, backend)
        return images.rows

    wanted = rows_of(fits)
    colors = fits.colors.clone()
    colors[1, 2] *= value
    found = rows_of(replace(fits, colors=colors))
    assert (found[0], found[2]) == (wanted[0], wanted[2])
    if math.isfinite(value):
        assert found[1]["status"] in ("ok", "fit_diverged")
    else:
        assert found[1]["status"] == "fit_diverged"
        assert "splats" not in found[1]
    if found[1]["status"] == "ok":
        metadata = shard_metadata(codec, 3.0, output_config(config))
        row = dict.fromkeys(columns(metadata).names) | found[1]
        assert row_problem(row, metadata) == ""


@pytest.mark.parametrize("rule", ["luminosity", "energy"])
@pytest.mark.parametrize("field", ["means", "cholesky", "colors"])
def test_pruning_does_not_drop_what_shows_that_a_fit_diverged(
    rule: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [RawSample(key=str(i), image=jpeg(40, 24, i)) for i in range(2)]
    config = replace(CONFIG, prune=PruneConfig(prune=rule, prune_threshold=9.0))  # type: ignore[arg-type]
    backend = select_backend("cpu")
    wanted = convert_batch(samples, config, backend)
    assert [row["status"] for row in wanted] == ["ok", "ok"]

    def poisoned(*args: Any) -> tuple[Splats, torch.Tensor]:
        splats, steps = fit(*args)
        splats.colors[0, 2] = 0
        getattr(splats, field)[0, 2] = math.nan
        return splats, steps

    monkeypatch.setattr(recipe, "fit", poisoned)
    found = convert_batch(samples, config, backend)
    assert found[0]["status"] == "fit_diverged"
    assert found[1] == wanted[1]


# Overlap


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads as on a GPU."""
    monkeypatch.setattr(convert, "overlaps", lambda device: True)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_overlapping_writes_the_same_bytes(
    ref: ShardRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int | None
) -> None:
    plain, _ = run(ref, tmp_path / "plain")
    monkeypatch.setattr(convert, "overlaps", lambda device: True)
    threads = threading.active_count()
    overlapped, _ = run(ref, tmp_path / "overlapped", replace(CONFIG, batch_size=batch_size))
    assert overlapped == plain
    assert threading.active_count() == threads


@pytest.mark.usefixtures("overlapping")
def test_threads_end_when_the_consumer_raises(ref: ShardRef, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(rows: list[dict[str, Any]]) -> None:
        raise Stop

    threads = threading.active_count()
    config = replace(CONFIG, batch_size=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(Stop) as caught:
        convert_shard(ref, config, str(tmp_path / "out"), select_backend("cpu"), stop)
    assert threading.active_count() == threads, caught
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


@pytest.mark.usefixtures("overlapping")
def test_errors_of_the_source_and_of_the_fit_come_through(ref: ShardRef, tmp_path: Path) -> None:
    threads = threading.active_count()
    config = replace(CONFIG, batch_size=2)
    with pytest.raises(BackendError, match="one image alone"):
        run(ref, tmp_path / "out", config, small_memory(0, []))
    with pytest.raises(OSError, match="gone"):
        run(ref, tmp_path / "out2", config, replace(select_backend("cpu"), loss_and_grad=gone))
    assert threading.active_count() == threads


def gone(*_: Any) -> Any:
    raise OSError("gone")


def test_decoding_in_threads_gives_the_same_pixels() -> None:
    samples = [RawSample(key=str(i), image=jpeg(seed=i), image_name="x.jpg") for i in range(40)]
    alone = [convert.decode_sample(sample, CONFIG) for sample in samples]
    decode = convert.partial(convert.decode_sample, config=CONFIG)
    together = list(convert.map_ahead(decode, samples, 4))
    for (_, a), (_, b) in zip(alone, together, strict=True):
        assert a is not None
        assert b is not None
        assert np.array_equal(a.pixels, b.pixels)
