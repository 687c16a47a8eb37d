"""How many images are fitted together: from free memory, and fewer after running out of it.

A GPU needs hundreds of images at a time to be busy, and its memory decides how many fit. The
estimate is on the safe side; what it misses shows as torch.cuda.OutOfMemoryError, after which the
batch is halved and the work goes on.

On the CPU images go through the kernel one by one, and a larger batch would only leave the caches.

Images of several sizes (--resize) are counted in estimated bytes too, at both places: a batch is
full when the fits of its images would fill the room there is, and those of one size go to the
device in parts that fit. A larger image goes alone.

Left out: growing a batch again after it was halved (a shard takes seconds, the next one starts
anew), and measuring bytes per image instead of estimating them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from splatshard.schemas.config import ConvertConfig, TeacherConfig
from splatshard.schemas.errors import BackendError

Result = TypeVar("Result")

_idle_streams: dict[tuple[torch.device, str], list[torch.cuda.Stream]] = {}
_idle_lock = threading.Lock()

CPU_BATCH = 16
CPU_ROOM = 1 << 29
"""Bytes of a CPU's batch of images of several sizes: 16 of 350 x 350 px."""
MAX_BATCH = 512
"""Stages overlap between batches, so a shard should hold several: at 512 pictures of 224 px a
kernel already has 400,000 tiles, or 50,000 programs of Gaussians, for an H200's 8,448 warps."""
MULTIPLE = 16
FREE_SHARE = 0.4
"""Of the free memory that a batch may take: a worker has two shards in work, and the rest is for
the allocator's gaps and compilers."""

BYTES_PER_PX = 240
BYTES_PER_GAUSSIAN = 1024
"""What one image has on the device at once, estimated from the code, not measured. Per pixel: 24
for target and residual, 16 for tile lists, up to 45 float32 planes in the start and in relocation
(structure tensor, density and its cumulated copy, rendering, blur, peaks), and 3 for each of the up
to 4 batches on their way. Per Gaussian: 8 parameters, their gradients, two moments, and some 28 x 8
temporaries of a step in torch."""

TEACHER_TOGETHER = 64
"""Images that go through a teacher together, however many are fitted: so its memory is bounded."""
SMALLEST_PATCH = 14
"""px, of the CLIPs there are; it is not part of a recipe."""
IN_WORK = 2
"""Shards of which a worker may be embedding images at the same time."""


def auto_batch_size(config: ConvertConfig, device: torch.device) -> int:
    """Images per batch where --batch-size is not given: 16 on the CPU, else by free memory.

    In multiples of 16, at most 512; large images may leave room for less than 16, down to 1.
    """
    if device.type != "cuda":
        return CPU_BATCH
    fitting = room(config, device) // bytes_per_image(config)
    if fitting < MULTIPLE:
        return max(1, fitting)
    return min(MAX_BATCH, fitting // MULTIPLE * MULTIPLE)


def batch_limit(config: ConvertConfig, device: torch.device) -> BatchLimit:
    """What is fitted together: images of one size are counted, those of several weighed too."""
    if config.decode.resize == "square":
        return BatchLimit(config.batch_size or auto_batch_size(config, device))
    most = CPU_BATCH if device.type != "cuda" else MAX_BATCH
    return BatchLimit(config.batch_size or most, max(1, room(config, device)))


def room(config: ConvertConfig, device: torch.device) -> int:
    """Bytes that a batch may take on `device`."""
    if device.type != "cuda":
        return CPU_ROOM
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if config.teacher is not None:
        free_bytes -= teacher_bytes(config.teacher)
    return int(free_bytes * FREE_SHARE)


def bytes_per_image(config: ConvertConfig, pixels: int | None = None) -> int:
    """Estimated memory of one image of `pixels` (None: the square) in a batch; see BYTES_PER_PX."""
    pixels = config.decode.image_size**2 if pixels is None else pixels
    gaussians = config.fit.max_gaussians or config.fit.count(pixels)
    return BYTES_PER_PX * pixels + BYTES_PER_GAUSSIAN * gaussians


def teacher_bytes(teacher: TeacherConfig) -> int:
    """Estimated device memory of a teacher at work, on the large side.

    Weights: 12 dim^2 in each of dim / 32 blocks (ViT-L/14 has 24 of 1024, ViT-B/16 12 of 768), as
    singles and as the halves of autocast. Activations: 40 bytes per number of every token (input
    and residual as singles, query, key, value, their sum, two of the MLP's four-fold width as
    halves).
    """
    weights = 12 * teacher.dim**2 * (teacher.dim // 32 + 1) * 6
    tokens = (teacher.image_size // SMALLEST_PATCH) ** 2 + 1
    return weights + IN_WORK * TEACHER_TOGETHER * tokens * teacher.dim * 40


class BatchLimit:
    """The most images that go to the device at once, and the most bytes of them if `room` says so;
    halved for good when memory runs out."""

    def __init__(self, images: int, room: int | None = None) -> None:
        self.images = images
        self.room = room

    def in_parts(
        self, count: int, work: Callable[[slice], Result], each: int = 0
    ) -> Iterator[Result]:
        """work(part) for consecutive slices of `count` images of `each` bytes, as many as the limit
        lets, at least one.

        Raises BackendError when one image alone is too large for the device.
        """
        start = 0
        while start < count:
            part = slice(start, min(start + self._together(each), count))
            try:
                result = work(part)
            except torch.cuda.OutOfMemoryError as e:
                size = part.stop - part.start
                if size == 1:
                    raise BackendError(
                        "one image alone does not fit into the device's memory: choose a smaller "
                        f"--num-gaussians or --image-size, or free the device ({e})"
                    ) from e
                if self.room is None or not each:
                    self.images = size // 2
                else:  # so that smaller images still go together
                    self.room = size // 2 * each
            else:
                yield result
                start = part.stop

    def _together(self, each: int) -> int:
        if self.room is None or not each:
            return self.images
        return max(1, min(self.images, self.room // each))


@contextmanager
def own_stream(device: torch.device, role: str) -> Iterator[None]:
    """On CUDA the block's kernels and copies run beside those of other threads, and have finished
    when it ends, however it ends; elsewhere nothing changes.

    Torch keeps freed memory for the stream that it was asked for on. So streams are kept too: a
    `role` has as many as its blocks ever ran at once.

    A tensor made in a block is, once freed, overwritten by the next block of its role: whoever used
    it on another stream must have waited for that before. Blocks that pack and teach leave nothing
    on the device. Uploaded pixels are read by those, which end with a wait, and by the fit, which
    waits for its splats; where it fails, what its kernels may still read goes into no row.
    """
    if device.type != "cuda":
        yield
        return
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with _idle_lock:
        idle = _idle_streams.setdefault((device, role), [])
        stream = idle.pop() if idle else torch.cuda.Stream(device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # if this raises, nobody gets the stream
        with _idle_lock:
            idle.append(stream)
