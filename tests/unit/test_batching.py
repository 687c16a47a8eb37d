"""How many images are fitted together beside a teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.batching import (
    IN_WORK,
    auto_batch_size,
    bytes_per_image,
    teacher_bytes,
)
from schemas.config import ConvertConfig, TeacherConfig

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
