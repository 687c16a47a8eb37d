"""The straight line without Ray: batches by memory and by size, halving, overlap, same bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import batching, convert
from pipeline.batching import BatchLimit, auto_batch_size
from pipeline.convert import convert_batch, convert_shard
from pipeline.decode import DecodedImage
from pipeline.kernels.backend import Backend, select_backend
from pipeline.read import RawSample
from pipeline.shards import read_rows
from pipeline.sources import list_shards
from schemas.config import ConvertConfig, DecodeConfig, FitConfig
from schemas.errors import BackendError, SampleError
from schemas.shard import ShardManifest, ShardRef
from tests.make import datacomp_sample, jpeg, photo, write_tar

CONFIG = ConvertConfig(
    decode=DecodeConfig(image_size=24), fit=FitConfig(num_gaussians=6, steps=3), backend="cpu"
)
CUDA = torch.device("cuda")


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
