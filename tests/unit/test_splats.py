"""Conversions between parametrisations, against their definitions."""

from __future__ import annotations

import torch

from splatshard.pipeline.splats import (
    Splats,
    cat,
    cholesky_from_covariances,
    cholesky_from_scales_and_angles,
    conics,
    covariances,
    first,
    scales_and_angles,
)


def factors(n=200) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return torch.stack((x[:, 0].exp(), 2 * x[:, 1], x[:, 2].exp()), -1)


def matrix(symmetric: torch.Tensor) -> torch.Tensor:
    xx, xy, yy = symmetric.unbind(-1)
    return torch.stack((xx, xy, xy, yy), -1).unflatten(-1, (2, 2))


def test_covariances_and_conics_are_inverse():
    lower = factors()
    matrices = torch.stack((lower[:, 0], 0 * lower[:, 0], lower[:, 1], lower[:, 2]), -1).unflatten(
        -1, (2, 2)
    )
    torch.testing.assert_close(matrix(covariances(lower)), matrices @ matrices.mT)
    eye = torch.eye(2, dtype=torch.float64).expand(200, 2, 2)
    torch.testing.assert_close(
        matrix(conics(lower)) @ matrix(covariances(lower)), eye, atol=1e-7, rtol=0
    )
    torch.testing.assert_close(cholesky_from_covariances(covariances(lower)), lower)


def test_scales_and_angles_are_the_eigen_decomposition():
    lower = factors()
    scales, angles = scales_and_angles(lower)
    values = torch.linalg.eigvalsh(matrix(covariances(lower))).flip(-1)
    torch.testing.assert_close(scales.square(), values, rtol=1e-6, atol=1e-9)
    axis = torch.stack((angles.cos(), angles.sin()), -1)[..., None]
    stretched = matrix(covariances(lower)) @ axis
    torch.testing.assert_close(stretched, axis * scales[:, :1, None].square(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        cholesky_from_scales_and_angles(scales, angles), lower, rtol=1e-6, atol=1e-8
    )


def test_slicing_keeps_the_batch():
    splats = Splats(torch.zeros(3, 4, 2), torch.zeros(3, 4, 3), torch.zeros(3, 4, 3),
                    torch.tensor([[True] * 2 + [False] * 2] * 3))  # fmt: skip
    assert len(splats) == 3
    assert len(splats[1:2]) == 1
    assert splats[torch.tensor([2, 0])].num_gaussians.tolist() == [2, 2]


def test_batches_and_gaussians_are_put_together():
    one, two = (
        Splats(*(torch.rand(2, 3, k) for k in (2, 3, 3)), torch.full((2, 3), drawn))
        for drawn in (True, False)
    )
    batch, wide = cat([one, two]), cat([one, two], dim=1)
    assert batch.means.shape == (4, 3, 2)
    assert wide.cholesky.shape == (2, 6, 3)
    for whole, dim in ((batch, 0), (wide, 1)):
        for both, a, b in zip(whole.fields, one.fields, two.fields, strict=True):
            assert torch.equal(both, torch.cat((a, b), dim))
    assert all(
        torch.equal(x, y[:, :2]) for x, y in zip(first(one, 2).fields, one.fields, strict=True)
    )
