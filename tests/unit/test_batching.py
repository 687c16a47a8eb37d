"""How many images are fitted together beside a teacher, and which stream a block gets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from splatshard.pipeline.runtime import batching
from splatshard.pipeline.runtime.batching import (
    IN_WORK,
    auto_batch_size,
    bytes_per_image,
    own_stream,
    teacher_bytes,
)
from splatshard.schemas.config import ConvertConfig, TeacherConfig

CUDA = torch.device("cuda", 0)


def teacher(dim: int, image_size: int = 224) -> TeacherConfig:
    ones = (1.0, 1.0, 1.0)
    return TeacherConfig(model="a", weights="", dim=dim, image_size=image_size, mean=ones, std=ones)


@pytest.mark.parametrize(("dim", "million"), [(768, 86), (1024, 304), (1280, 632), (1664, 1843)])
def test_the_weights_of_the_clips_there_are_fit_in(dim: int, million: int) -> None:
    """ViT-B, L, H and bigG, as singles and halves; and the larger the images, the more."""
    assert teacher_bytes(teacher(dim)) > 6e6 * million
    assert teacher_bytes(teacher(dim, 336)) > teacher_bytes(teacher(dim))


@pytest.mark.parametrize("free_gib", [80, 24, 10, 5, 1])
def test_a_teacher_takes_from_the_memory_of_fits(
    monkeypatch: pytest.MonkeyPatch, free_gib: int
) -> None:
    """What is left holds the fits of both shards in work; where nothing is left, one image."""
    free = free_gib << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    plain = ConvertConfig()
    config = replace(plain, teacher=teacher(1024))
    size = auto_batch_size(config, CUDA)
    assert 1 <= size <= auto_batch_size(plain, CUDA)
    assert teacher_bytes(teacher(1024)) + IN_WORK * size * bytes_per_image(config) <= free or (
        size == 1
    )
    assert auto_batch_size(config, torch.device("cpu")) == 16


class FakeStream:
    """What `own_stream` asks of a torch.cuda.Stream; `busy`: a block's work is not waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.busy = False
        self.broken = False

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("the device is lost")
        self.busy = False


class FakeCuda:
    """The streams made, and the one that each thread's work goes to."""

    def __init__(self) -> None:
        self.made: list[FakeStream] = []
        self.local = threading.local()

    def make(self, device: torch.device) -> FakeStream:
        self.made.append(FakeStream(device))
        return self.made[-1]

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        assert not stream.busy, "somebody else's work is still on it"
        outer, self.local.stream = getattr(self.local, "stream", None), stream
        stream.busy = True
        try:
            yield
        finally:
            self.local.stream = outer

    def stream_of(self, role: str, device: torch.device = CUDA) -> FakeStream:
        """The stream that a block of `role` gets now."""
        outer = getattr(self.local, "stream", None)
        with own_stream(device, role):
            stream = self.local.stream
        assert self.local.stream is outer
        assert not stream.busy
        return stream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", fake.make)
    monkeypatch.setattr(torch.cuda, "stream", fake.use)
    monkeypatch.setattr(batching, "_idle_streams", {})
    return fake


def test_blocks_one_after_another_share_a_stream_whatever_their_thread(cuda: FakeCuda) -> None:
    found = [cuda.stream_of("pack")]
    for _ in range(3):  # threads live for one shard
        thread = threading.Thread(target=lambda: found.append(cuda.stream_of("pack")))
        thread.start()
        thread.join()
    assert found == [found[0]] * 4
    assert cuda.made == found[:1]


def test_blocks_at_once_have_streams_of_their_own(cuda: FakeCuda) -> None:
    """As many streams as blocks ever ran at once, however often they do."""
    both = threading.Barrier(2, timeout=10)
    for _ in range(3):
        used: list[FakeStream] = []

        def work(used: list[FakeStream] = used) -> None:
            with own_stream(CUDA, "pack"):
                used.append(cuda.local.stream)
                both.wait()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(used)) == 2
    assert set(used) == set(cuda.made)
    with own_stream(CUDA, "pack"):
        assert cuda.stream_of("pack") in cuda.made
    assert len(cuda.made) == 2


def test_roles_and_devices_do_not_share_streams(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = torch.device("cuda", 1)
    upload, pack, other = (
        cuda.stream_of(role, device)
        for role, device in (("upload", CUDA), ("pack", CUDA), ("pack", second))
    )
    assert len({upload, pack, other}) == 3
    assert (upload.device, other.device) == (CUDA, second)
    for current, stream in enumerate((pack, other)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda number=current: number)
        assert cuda.stream_of("pack", torch.device("cuda")) is stream


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, KeyboardInterrupt])
def test_a_block_that_raises_gives_its_stream_back_finished(
    cuda: FakeCuda, error: type[BaseException]
) -> None:
    with pytest.raises(error), own_stream(CUDA, "pack"):
        raise error("a")
    assert not cuda.made[0].busy
    assert cuda.stream_of("pack") is cuda.made[0]
    assert len(cuda.made) == 1


def test_a_stream_that_cannot_be_waited_for_goes_to_nobody(cuda: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="lost"), own_stream(CUDA, "pack"):
        cuda.made[0].broken = True
    assert cuda.stream_of("pack") is not cuda.made[0]


def test_elsewhere_nothing_is_touched(cuda: FakeCuda) -> None:
    with own_stream(torch.device("cpu"), "pack"):
        assert getattr(cuda.local, "stream", None) is None
    assert not cuda.made
    assert not batching._idle_streams
