"""Distances between pictures: SSIM beside a loop over windows, features of a CLIP from a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from splatshard.pipeline.models.reconstruct import (
    load_tower,
    perceptual_loss,
    reconstruction_loss,
    ssim,
)
from splatshard.schemas.errors import UsageError

K1, K2, RADIUS, DEVIATION = 0.01, 0.03, 5, 1.5


def pictures(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.rand(2, 2, 3, height, width, generator=g, dtype=torch.float64)
    return x, 0.7 * x + 0.3 * noise


def naive_ssim(x: Tensor, y: Tensor) -> float:
    """Of one channel [H, W]: the window of every pixel by itself."""
    height, width = x.shape
    values = []
    for row in range(height):
        for column in range(width):
            weights, a, b = [], [], []
            for r in range(max(0, row - RADIUS), min(height, row + RADIUS + 1)):
                for c in range(max(0, column - RADIUS), min(width, column + RADIUS + 1)):
                    square = (r - row) ** 2 + (c - column) ** 2
                    weights.append(math.exp(-square / (2 * DEVIATION**2)))
                    a.append(x[r, c].item())
                    b.append(y[r, c].item())
            total = sum(weights)
            w = [v / total for v in weights]
            mean_a = sum(p * q for p, q in zip(w, a, strict=True))
            mean_b = sum(p * q for p, q in zip(w, b, strict=True))
            var_a = sum(p * (q - mean_a) ** 2 for p, q in zip(w, a, strict=True))
            var_b = sum(p * (q - mean_b) ** 2 for p, q in zip(w, b, strict=True))
            triples = zip(w, a, b, strict=True)
            cov = sum(p * (q - mean_a) * (r - mean_b) for p, q, r in triples)
            light = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
            values.append(light * (2 * cov + K2**2) / (var_a + var_b + K2**2))
    return sum(values) / len(values)


@pytest.mark.parametrize("size", [(13, 17), (3, 24), (1, 1)])
def test_ssim_is_that_of_a_loop_over_windows(size: tuple[int, int]) -> None:
    x, y = pictures(*size)
    wanted = [
        sum(naive_ssim(p, q) for p, q in zip(a, b, strict=True)) / 3
        for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(ssim(x, y), torch.tensor(wanted), atol=2e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ssim(x, y), torch.tensor(wanted), atol=2e-5, rtol=0)


def test_ssim_is_one_for_the_same_and_falls_with_noise() -> None:
    x, y = (p.float() for p in pictures(20, 20))
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    worse = 0.3 * x + 0.7 * y.flip(-1)
    assert (ssim(x, y) < 1).all()
    assert (ssim(x, worse) < ssim(x, y)).all()


def test_gradients_of_the_reconstruction() -> None:
    """By finite differences, along the gradient; float32, so no gradcheck."""
    x, y = (p.float() for p in pictures(13, 12))
    leaf = y.clone().requires_grad_()
    reconstruction_loss(leaf, x, 0.7).backward()
    assert leaf.grad is not None
    step = 2e-4 * leaf.grad / leaf.grad.abs().max()
    change = reconstruction_loss(y + step, x, 0.7) - reconstruction_loss(y - step, x, 0.7)
    torch.testing.assert_close(change, 2 * (step * leaf.grad).sum(), rtol=0.02, atol=0)


def test_reconstruction_is_the_mixture() -> None:
    x, y = (p.float() for p in pictures(13, 12))
    l1, dssim = (x - y).abs().mean(), 1 - ssim(x, y).mean()
    for share in (0.0, 0.2, 1.0):
        wanted = (1 - share) * l1 + share * dssim
        torch.testing.assert_close(reconstruction_loss(x, y, share), wanted)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy CLIP as open_clip would save it."""
    g = torch.Generator().manual_seed(0)
    width, layers = 64, 2

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])

    state = {
        "visual.conv1.weight": some(width, 3, 8, 8),
        "visual.class_embedding": some(width),
        "visual.positional_embedding": some(17, width),
        "visual.proj": some(width, 16),
        "token_embedding.weight": some(50, width),
        "positional_embedding": some(8, width),
        "text_projection": some(width, 16),
        "logit_scale": torch.tensor(1.0),
    }
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower in ("visual.transformer", "transformer"):
        for i in range(layers):
            block = f"{tower}.resblocks.{i}"
            norms += [f"{block}.ln_1", f"{block}.ln_2"]
            state |= {
                f"{block}.attn.in_proj_weight": some(3 * width, width),
                f"{block}.attn.in_proj_bias": some(3 * width),
                f"{block}.attn.out_proj.weight": some(width, width),
                f"{block}.attn.out_proj.bias": some(width),
                f"{block}.mlp.c_fc.weight": some(128, width),
                f"{block}.mlp.c_fc.bias": some(128),
                f"{block}.mlp.c_proj.weight": some(width, 128),
                f"{block}.mlp.c_proj.bias": some(width),
            }
    for norm in norms:
        state |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    path = tmp_path_factory.mktemp("clip") / "toy.safetensors"
    save_file(state, path)
    return path


def test_perceptual_loss_of_local_weights(weights: Path) -> None:
    tower = load_tower(str(weights), "gelu")
    x, y = (p.float() for p in pictures(32, 32))
    assert perceptual_loss(tower, x, x).item() == pytest.approx(0, abs=1e-6)
    near, far = (perceptual_loss(tower, x + s * (y - x), x).item() for s in (0.2, 1))
    assert 0 < near < far < 4
    leaf = y.clone().requires_grad_()
    perceptual_loss(tower, leaf, x).backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().amax(1).min() > 0
    assert all(p.grad is None for p in tower.parameters())
    small = [p[..., :21, :27] for p in (x, y)]  # resized to what the tower wants
    assert perceptual_loss(tower, *small) > 0


def test_loading_says_what_is_missing(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give gelu, or quick_gelu"):
        load_tower(str(weights))
    with pytest.raises(UsageError, match="no CLIP can be loaded"):
        load_tower(str(tmp_path))
