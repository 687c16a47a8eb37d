"""Alpha compositing: the dense twin by itself on the CPU, and gsplat against it on a GPU."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from splatshard.pipeline.kernels.gsplat_alpha import (
    load_gsplat,
    reach_px,
    reference_alpha,
    render_alpha,
)
from splatshard.pipeline.splats import Splats
from splatshard.schemas.errors import BackendError

NAMES = ("means", "cholesky", "colors")


def make(batch: int, n: int, height: int, width: int, size: float = 3.0, seed: int = 0):
    """Float64 splats, a tenth of them masked out, and opacities [batch, n] in 0..1."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    means = (uniform(batch, n, 2) * 1.2 - 0.1) * torch.tensor([width, height])
    diagonal = size * (0.5 + uniform(2, batch, n))
    cholesky = torch.stack((diagonal[0], size * (uniform(batch, n) - 0.5), diagonal[1]), -1)
    mask = uniform(batch, n) < 0.9
    mask[:, :1] = True
    return Splats(means, cholesky, uniform(batch, n, 3) - 0.2, mask), uniform(batch, n)


def flat(color: tuple[float, float, float], n: int = 1) -> Splats:
    """n Gaussians so wide that each is constant over a small picture."""
    wide = torch.tensor([1e6, 0, 1e6], dtype=torch.float64).expand(1, n, 3)
    colors = torch.tensor(color, dtype=torch.float64).expand(1, n, 3)
    return Splats(torch.zeros(1, n, 2).double(), wide, colors, torch.ones(1, n, dtype=torch.bool))


def constant(image: torch.Tensor) -> list[float]:
    """The one colour of a picture."""
    torch.testing.assert_close(image, image[..., :1, :1].expand_as(image), atol=1e-9, rtol=0)
    return image[0, :, 0, 0].tolist()


def test_gradients_by_finite_differences():
    splats, opacities = make(2, 4, 4, 5, size=4.0)
    splats = replace(splats, mask=torch.ones(2, 4, dtype=torch.bool))
    background = torch.rand(2, 3, dtype=torch.float64)
    leaves = [getattr(splats, n).requires_grad_() for n in NAMES]
    leaves += [(0.3 + 0.4 * opacities).requires_grad_(), background.requires_grad_()]

    def render(means, cholesky, colors, opacities, background):
        s = Splats(means, cholesky, colors, splats.mask)
        return reference_alpha(s, opacities, 4, 5, background)

    assert torch.autograd.gradcheck(render, leaves)


def test_one_gaussian_over_a_background():
    """Opacity times weight of its colour, the rest of the background's."""
    splats, opacities = make(1, 1, 9, 7)
    background = torch.tensor([[0.2, 0.5, 0.9]], dtype=torch.float64)
    image = reference_alpha(splats, opacities, 9, 7, background)
    mu, (l11, l21, l22) = splats.means[0, 0], splats.cholesky[0, 0]
    factor = torch.tensor([[l11, 0], [l21, l22]])
    for y in range(9):
        for x in range(7):
            z = torch.linalg.solve(factor, torch.tensor([x + 0.5, y + 0.5]).double() - mu)
            alpha = float(opacities[0, 0]) * math.exp(-0.5 * float(z @ z))
            alpha = alpha if alpha >= 1 / 255 else 0.0
            expected = alpha * splats.colors[0, 0] + (1 - alpha) * background[0]
            torch.testing.assert_close(image[0, :, y, x], expected)


def test_the_first_is_in_front():
    red, blue = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    splats = flat(red, 2)
    splats = replace(splats, colors=torch.tensor([[red, blue]], dtype=torch.float64))
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert constant(reference_alpha(splats, half, 3, 2)) == pytest.approx([0.5, 0, 0.25])
    turned = replace(splats, colors=splats.colors.flip(1))
    assert constant(reference_alpha(turned, half, 3, 2)) == pytest.approx([0.25, 0, 0.5])


def test_opacity_zero_and_one():
    white = torch.ones(1, 3, dtype=torch.float64)
    none, full = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    splats = flat((0.0, 0.5, 0.0))
    assert constant(reference_alpha(splats, none, 2, 2, white)) == [1, 1, 1]
    opaque = constant(reference_alpha(splats, full, 2, 2, white))
    assert opaque == pytest.approx([0.001, 0.5005, 0.001])  # alpha is at most 0.999
    leaf = full.clone().requires_grad_()
    reference_alpha(splats, leaf, 2, 2).sum().backward()
    assert not leaf.grad.any()  # clamped: no gradient


def test_faint_alpha_is_skipped_and_a_full_pixel_takes_no_more():
    faint = torch.full((1, 1), 0.9 / 255, dtype=torch.float64)
    assert constant(reference_alpha(flat((1.0, 1, 1)), faint, 2, 2)) == [0, 0, 0]
    # 0.9, 0.9, 0.9 leave 1e-3; a fourth of 0.95 would leave 5e-5 and is not drawn
    opacities = torch.tensor([[0.9, 0.9, 0.9, 0.95, 0.05]], dtype=torch.float64)
    colors = torch.zeros(1, 5, 3, dtype=torch.float64)
    colors[0, 3], colors[0, 4] = 100, 1000
    splats = replace(flat((0.0, 0, 0), 5), colors=colors)
    white = torch.ones(1, 3, dtype=torch.float64)
    assert constant(reference_alpha(splats, opacities, 2, 2, white)) == pytest.approx([1e-3] * 3)


def test_masked_and_missing_gaussians_draw_nothing():
    splats, opacities = make(2, 5, 4, 6)
    background = torch.rand(2, 3, dtype=torch.float64)
    plain = background[:, :, None, None].expand(2, 3, 4, 6)
    hidden = replace(splats, mask=torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(reference_alpha(hidden, opacities, 4, 6, background), plain)
    none = splats.means[:, :0]
    empty = Splats(none, splats.cholesky[:, :0], splats.colors[:, :0], splats.mask[:, :0])
    torch.testing.assert_close(reference_alpha(empty, opacities[:, :0], 4, 6, background), plain)


def test_reach_covers_every_pixel_that_is_drawn():
    """gsplat bins by it; a pixel outside would be lost."""
    splats, opacities = make(3, 40, 60, 50, size=4.0, seed=2)
    reach = reach_px(splats, opacities)
    assert reach.dtype == torch.int32
    assert not reach[~splats.mask].any()
    assert not reach_px(splats, torch.full_like(opacities, 1 / 256)).any()
    x, y = torch.arange(50) + 0.5, torch.arange(60) + 0.5
    for b in range(3):
        for i in range(40):
            one = Splats(*(getattr(splats, n)[b : b + 1, i : i + 1] for n in NAMES),
                         splats.mask[b : b + 1, i : i + 1])  # fmt: skip
            one = replace(one, colors=torch.ones(1, 1, 3).double())
            drawn = reference_alpha(one, opacities[b : b + 1, i : i + 1], 60, 50)[0, 0] > 0
            dx = (x - splats.means[b, i, 0]).abs() <= reach[b, i, 0]
            dy = (y - splats.means[b, i, 1]).abs() <= reach[b, i, 1]
            assert not (drawn & ~(dy[:, None] & dx)).any()


# What is missing


@pytest.fixture
def fresh():
    load_gsplat.cache_clear()
    yield
    load_gsplat.cache_clear()


def fake(monkeypatch: pytest.MonkeyPatch, kernels: object) -> None:
    """A gsplat on a machine with CUDA, whose compiled part is `kernels`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    package, cuda = ModuleType("gsplat"), ModuleType("gsplat.cuda")
    package.__version__ = "1.5.3"  # type: ignore[attr-defined]
    package.isect_offset_encode = None  # type: ignore[attr-defined]
    package.__path__ = cuda.__path__ = []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gsplat", package)
    monkeypatch.setitem(sys.modules, "gsplat.cuda", cuda)
    monkeypatch.setitem(sys.modules, "gsplat.cuda._backend", kernels)


@pytest.mark.usefixtures("fresh")
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch):
    splats, opacities = make(1, 2, 4, 4)
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(BackendError, match=r"gsplat cannot be imported .*: pip install gsplat"):
        render_alpha(splats, opacities, 4, 4)
    fake(monkeypatch, None)
    monkeypatch.delattr(sys.modules["gsplat"], "isect_offset_encode")
    with pytest.raises(BackendError, match=r"1\.5\.3 has no batched rasteriser: pip install"):
        render_alpha(splats, opacities, 4, 4)
    fake(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="sees no CUDA device: install a CUDA build"):
        render_alpha(splats, opacities, 4, 4)
    fake(monkeypatch, SimpleNamespace(_C=None))
    with pytest.raises(BackendError, match="no compiled CUDA kernels, and there is no nvcc"):
        render_alpha(splats, opacities, 4, 4)
    fake(monkeypatch, None)  # the import itself fails, as a failing compiler makes it
    with pytest.raises(BackendError, match=r"do not compile \(.*CUDA toolkit with nvcc"):
        render_alpha(splats, opacities, 4, 4)


@pytest.mark.usefixtures("fresh")
def test_a_batch_beyond_the_sort_keys_is_refused(monkeypatch: pytest.MonkeyPatch):
    fake(monkeypatch, SimpleNamespace(_C=object()))
    splats, opacities = make(64, 1, 4, 4)
    with pytest.raises(ValueError, match="more than gsplat can number"):
        render_alpha(splats, opacities, 1 << 17, 1 << 17)


# On a GPU


@pytest.fixture(scope="module")
def with_gsplat():
    """Skips where gsplat is absent or cannot be built, which is tried once."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of those who compile
            load_gsplat()
    except BackendError as e:
        pytest.skip(str(e))


@pytest.mark.gpu
@pytest.mark.usefixtures("with_gsplat")
@pytest.mark.parametrize("shape", [(1, 1, 5, 3), (2, 30, 31, 45), (3, 300, 50, 129)])
@pytest.mark.parametrize("with_background", [False, True])
def test_gsplat_matches_the_twin(shape: tuple[int, int, int, int], with_background: bool):
    """But for single pixels where alpha falls to the other side of 1/255: gsplat's exp is rough."""
    batch, n, height, width = shape
    splats, opacities = make(batch, n, height, width)
    opacities[:, ::7], opacities[:, 3::7] = 1, 0
    background = torch.rand(batch, 3, dtype=torch.float64) if with_background else None
    weight = torch.randn(batch, 3, height, width, dtype=torch.float64)
    images, gradients = [], []
    for render, kind in (
        (reference_alpha, {"dtype": torch.float64}),
        (render_alpha, {"dtype": torch.float32, "device": "cuda"}),
    ):
        inputs = [*(getattr(splats, name) for name in NAMES), opacities]
        leaves = [x.detach().to(**kind).requires_grad_() for x in inputs]
        on = Splats(*leaves[:3], splats.mask.to(leaves[0].device))
        back = None if background is None else background.to(**kind)
        image = render(on, leaves[3], height, width, back)
        images.append(image.detach().double().cpu())
        image.backward(weight.to(**kind))
        gradients.append([x.grad.double().cpu() for x in leaves])
    off = (images[1] - images[0]).abs()
    assert off.max() < 0.01
    assert (off > 1e-4).double().mean() < 2e-3
    for twin, ours in zip(*gradients, strict=True):
        assert (ours - twin).norm() <= 0.01 * twin.norm() + 1e-6


@pytest.mark.gpu
@pytest.mark.usefixtures("with_gsplat")
def test_gsplat_draws_nothing_for_nothing():
    splats, opacities = make(2, 4, 6, 5)
    hidden = Splats(*(getattr(splats, n).float().cuda() for n in NAMES), splats.mask.cuda() & False)
    background = torch.rand(2, 3, device="cuda")
    image = render_alpha(hidden, opacities.float().cuda(), 6, 5, background)
    torch.testing.assert_close(image, background[:, :, None, None].expand_as(image))
