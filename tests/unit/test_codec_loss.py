"""What balanced and compact lose, whole payloads of batches, and nested budgets."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from splatshard.pipeline.codec import planes, quantise
from splatshard.pipeline.codec.layout import Codes
from splatshard.pipeline.codec.pack import gaussians_in, pack, unpack, unpack_row
from splatshard.pipeline.convert import packed_rows
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.fitting.nested import fit_nested
from splatshard.pipeline.kernels import cpu_errors, overlaps
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.splats import Splats, first
from splatshard.schemas.config import ConvertConfig, FitConfig, PackConfig
from splatshard.schemas.splats import MAX_LOSS_DB, PLANAR, PLANES, shard_metadata
from tests.make import photo, shared_data
from tests.rows import CUTOFF, HEIGHT, WIDTH, packed, random_splats, target_of, values_of
from tests.unit.codes import grid


def planes_of(pixels: np.ndarray) -> torch.Tensor:
    """[1, 3, H, W], 0 to 1."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def fitted(pixels: np.ndarray, n: int, steps: int = 30) -> tuple[torch.Tensor, Splats]:
    """Target [1, 3, H, W] and its fit."""
    target, config = planes_of(pixels), FitConfig(num_gaussians=n, steps=steps, row_stride=1)
    splats, _ = fit(target, config, select_backend("cpu"))
    return target, splats


def rows_of(
    target: torch.Tensor, splats: Splats, codec: str, nested: str = "", kernels: Any = None
) -> Any:
    config = ConvertConfig(fit=FitConfig(nested=nested), pack=PackConfig(codec=codec))  # type: ignore[arg-type]
    return packed_rows(target, splats, config, kernels or select_backend("cpu"))


def shapes(height: int, width: int, seed: int) -> np.ndarray:
    """Flat discs and bars on a gradient, with hard edges: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack((x / width, y / height, 0.5 + 0 * x), -1) * 0.8
    for _ in range(6):
        cx, cy, radius = rng.uniform(0, (width, height, height / 3))
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = rng.uniform(0, 1, 3)
    return (255 * pixels).astype(np.uint8)


PICTURES = {
    "photo": lambda: (photo(40, 32, 1), 40),
    "dense": lambda: (photo(32, 48, 2), 150),
    "shapes": lambda: (shapes(36, 36, 3), 60),
    "few": lambda: (shapes(24, 48, 4), 3),
    "narrow": lambda: (photo(90, 7, 5), 20),
}


@pytest.mark.parametrize("codec", PLANAR)
@pytest.mark.parametrize("name", PICTURES)
def test_the_loss_keeps_to_its_limit_and_makes_use_of_it(name: str, codec: str) -> None:
    pixels, n = PICTURES[name]()
    target, splats = fitted(pixels, n)
    (row,) = rows_of(target, splats, codec)
    assert row["psnr"] < 60
    assert row["num_gaussians"] == n
    assert 0.1 * MAX_LOSS_DB[codec] < row["psnr_loss"] <= MAX_LOSS_DB[codec] + 1e-3


@pytest.mark.parametrize("codec", PLANAR)
def test_the_loss_keeps_to_its_limit_on_photographs(codec: str) -> None:
    folder = shared_data("kodak")
    for path in sorted(folder.glob("*.png"))[:3]:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((48, 36)))
        target, splats = fitted(pixels, 100)
        (row,) = rows_of(target, splats, codec)
        assert 0.1 * MAX_LOSS_DB[codec] < row["psnr_loss"] <= MAX_LOSS_DB[codec] + 1e-3
        assert len(planes.join(row["splats"])) < (800 if codec == "balanced" else 680)


def white_and_black(kind: str, side: int) -> np.ndarray:
    """Pictures whose fits overshoot 0..1, where it does not show: uint8 [side, side, 3]."""
    pixels = np.full((side, side, 3), 255, np.uint8)
    if kind == "red":
        pixels[..., 1:] = 0
    elif kind == "dark pixel":
        pixels[side // 3, side // 2] = 0
    elif kind == "stripes":
        pixels[:, ::2] = 0
    return pixels


@pytest.mark.parametrize("codec", PLANAR)
@pytest.mark.parametrize(
    ("kind", "side", "n", "steps"),
    [
        ("white", 32, 60, 40),
        ("red", 32, 60, 40),
        ("dark pixel", 40, 60, 60),
        ("stripes", 64, 400, 100),
    ],
)
def test_the_loss_keeps_to_its_limit_where_solved_colours_do_harm(
    kind: str, side: int, n: int, steps: int, codec: str
) -> None:
    target, splats = fitted(white_and_black(kind, side), n, steps)
    splats = replace(splats, means=splats.means.clamp(-side / 2, 1.5 * side))  # as the grid does
    (row,) = rows_of(target, splats, codec)
    assert row["psnr"] < 60
    assert row["psnr_loss"] <= MAX_LOSS_DB[codec] + 1e-3


@pytest.mark.parametrize("codec", PLANAR)
def test_beyond_60_db_fits_may_lose_what_60_db_may(codec: str) -> None:
    _, splats = fitted(np.full((16, 20, 3), 120, np.uint8), 12, 100)
    exact = select_backend("cpu").render(splats, 16, 20, CUTOFF)
    noise = 1e-4 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    for near in (exact, (exact + noise).clamp(0, 1)):
        (row,) = rows_of(near, splats, codec)
        error = (select_backend("cpu").render(splats, 16, 20, CUTOFF) - near).square().mean()
        allowed = (10 ** (MAX_LOSS_DB[codec] / 10) - 1) * 1e-6 + float(error)
        assert float(row["psnr"]) >= -10 * math.log10(allowed) - 0.01
        assert math.isfinite(row["psnr_loss"])


def test_compact_is_smaller_than_balanced_and_balanced_than_fp16() -> None:
    target, splats = fitted(shapes(40, 40, 7), 120)
    sizes = [len(planes.join(rows_of(target, splats, codec)[0]["splats"])) for codec in PLANAR]
    assert 120 * 16 / 2 > sizes[0] > 1.1 * sizes[1]


@pytest.mark.parametrize("solver", ["color_change", "solve_colors"])
def test_solved_colours_take_up_a_good_part_of_the_error(solver: str) -> None:
    """And what they leave is foreseen."""
    backend = select_backend("cpu")
    if solver == "solve_colors":
        backend = replace(backend, color_change=None)
    target, splats = fitted(shapes(40, 40, 8), 100)
    codes = grid(splats, 0.1, 40, 40)

    def error(found: Splats) -> float:
        return float(quantise.squared_errors(found, target, None, CUTOFF, backend)[1, 0])

    solved, foreseen, _ = quantise.resolved(codes, splats, target, CUTOFF, backend)
    before, plain = error(splats), replace(solved, colors=splats.colors)
    assert error(plain) > 1.05 * before
    assert error(solved) - before < 0.6 * (error(plain) - before)
    assert float(foreseen) == pytest.approx(error(solved), rel=0.02)


def test_without_solving_steps_are_finer() -> None:
    target, splats = fitted(shapes(40, 40, 8), 100)
    solved = len(planes.join(rows_of(target, splats, "compact")[0]["splats"]))

    def unchanged(splats: Splats, *rest: Any) -> tuple[torch.Tensor, ...]:
        _, error, seen = overlaps.color_change(splats, *rest)
        return torch.zeros_like(splats.colors), error, seen

    kept = replace(select_backend("cpu"), color_change=unchanged)
    (row,) = rows_of(target, splats, "compact", kernels=kept)
    assert len(planes.join(row["splats"])) > 1.01 * solved


# Batches, masks, repetition


@pytest.mark.parametrize("codec", PLANAR)
def test_payloads_do_not_depend_on_the_batch_and_repeat(codec: str) -> None:
    """Images of different difficulty, so that they take different numbers of passes."""
    backend = select_backend("cpu")
    splats = random_splats(5, 30)
    scale = torch.tensor([1.0, 0.01, 3.0, 0.3, 1.0])[:, None, None]
    splats = replace(splats, colors=splats.colors * scale)
    splats = replace(splats, mask=torch.arange(30) < torch.tensor([30, 1, 0, 17, 29])[:, None])
    target = target_of(splats)
    target[3] = splats.colors.new_zeros(())
    payloads = pack(splats, target, codec, CUTOFF, backend)
    assert pack(splats, target, codec, CUTOFF, backend) == payloads
    assert payloads[2] == {"splats": dict.fromkeys(PLANES, b"")}
    for i in range(5):
        part = slice(i, i + 1)
        assert pack(splats[part], target[part], codec, CUTOFF, backend) == payloads[part], i
    turned = torch.tensor([4, 2, 0, 3, 1])
    mixed = pack(splats[turned], target[turned], codec, CUTOFF, backend)
    assert mixed == [payloads[i] for i in turned]


@pytest.fixture(scope="module")
def mixed() -> tuple[Splats, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splats, targets, what is behind them, errors allowed and before of six images: one that
    keeps its limit soon, one that never does, two with which solved colours do harm, an easy one,
    one without Gaussians."""
    dark = white_and_black("dark pixel", 32)
    pictures = (photo(32, 32, 1), photo(32, 32, 1), dark, white_and_black("red", 32), dark, dark)
    fits = [fitted(pixels, 60, 50) for pixels in pictures]
    target = torch.cat([one for one, _ in fits])
    columns = ("means", "cholesky", "colors", "mask")
    splats = Splats(*(torch.cat([getattr(one, name) for _, one in fits]) for name in columns))
    splats.means[1, 0] = 1000  # beyond the grid, and seen
    splats.cholesky[1, 0] = torch.tensor([350.0, 0, 350])
    splats.colors[1, 0] = 5
    splats.mask[5] = False
    behind = torch.zeros_like(target)
    behind[:2] = 0.05 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = quantise.squared_errors(splats, target, behind, CUTOFF, select_backend("cpu"))
    allowed = quantise.allowed_error(before[0], target, 0.2)
    return splats, target, behind, allowed * torch.tensor([1, 1, 1, 1, 0.1, 1]), before.T


def quantised(
    splats: Splats,
    target: torch.Tensor,
    behind: torch.Tensor,
    allowed: torch.Tensor,
    before: torch.Tensor,
    backend: Backend | None = None,
) -> Codes:
    """`quantise`, of a part of `mixed`."""
    backend = backend or select_backend("cpu")
    return quantise.quantise(splats, target, behind, allowed, before.T, CUTOFF, backend)


def counting() -> tuple[Backend, list[int], list[int]]:
    """The CPU's backend, and how many images each call of its two kernels has had."""
    backend = select_backend("cpu")
    measured: list[int] = []
    solved: list[int] = []

    def squared_errors(splats: Splats, *rest: Any) -> torch.Tensor:
        measured.append(len(splats))
        return cpu_errors.squared_errors(splats, *rest)

    def color_change(splats: Splats, *rest: Any) -> tuple[torch.Tensor, ...]:
        solved.append(len(splats))
        return overlaps.color_change(splats, *rest)

    counted = replace(backend, squared_errors=squared_errors, color_change=color_change)
    return counted, measured, solved


def test_images_that_are_final_leave_the_loop(mixed: Any) -> None:
    """So each takes as many passes as alone; colours are solved once."""
    passes = []
    for i in range(len(mixed[0])):
        backend, measured, solved = counting()
        quantised(*(value[i : i + 1] for value in mixed), backend)
        passes.append(len(measured))
        assert solved == [1]
    assert passes[1] == max(passes) == 12
    assert len(set(passes)) > 2
    backend, measured, solved = counting()
    quantised(*mixed, backend)
    assert measured == [n for number in range(12) if (n := sum(p > number for p in passes))]
    assert solved == [6]


def test_codes_do_not_depend_on_the_batch(mixed: Any) -> None:
    found = quantised(*mixed)
    for i in range(len(mixed[0])):
        assert_same(found[i : i + 1], quantised(*(value[i : i + 1] for value in mixed)))
    turned = torch.tensor([4, 2, 0, 5, 3, 1])
    assert_same(found[turned], quantised(*(value[turned] for value in mixed)))


def test_codes_are_the_coarsest_tried_that_keep_to_the_limit(
    mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or where none does, those that add least."""
    tried: list[tuple[Codes, torch.Tensor]] = []
    rendered = quantise.rendered
    monkeypatch.setattr(
        quantise, "rendered", lambda codes, *_: tried.append(codes) or rendered(codes, *_)
    )
    for i in range(5):
        splats, target, behind, allowed, before = (value[i : i + 1] for value in mixed)
        tried.clear()
        found = quantised(splats, target, behind, allowed, before)
        spent = []
        for codes in tried[1:]:  # the first is for the solution
            stored = rendered(codes, target)
            errors = quantise.squared_errors(stored, target, behind, CUTOFF, select_backend("cpu"))
            spent.append(float((errors[0] - before[:, 0]) / allowed))
        keep = [k for k, share in enumerate(spent) if share <= 1]
        wanted = (
            max(keep, key=lambda k: float(tried[1 + k].step)) if keep else spent.index(min(spent))
        )
        assert_same(found, tried[1 + wanted])


def assert_same(found: Codes, wanted: Codes) -> None:
    for field in fields(Codes):
        assert torch.equal(getattr(found, field.name), getattr(wanted, field.name)), field.name


@pytest.mark.parametrize("codec", PLANAR)
def test_nothing_to_pack(codec: str) -> None:
    empty = dict.fromkeys(PLANES, b"")
    assert packed(random_splats(2, 0), codec) == [{"splats": empty}] * 2
    assert packed(random_splats(0, 4), codec) == []
    masked = random_splats(2, 4)
    masked = replace(masked, mask=torch.zeros_like(masked.mask))
    assert packed(masked, codec) == [{"splats": empty}] * 2
    stored = unpack([{"splats": empty}] * 2, HEIGHT, WIDTH, codec)
    assert stored.means.shape == (2, 0, 2)
    assert unpack([], HEIGHT, WIDTH, codec).means.shape == (0, 0, 2)


FINITE = st.floats(-(2.0**127), 2.0**127, width=32)
POSITIVE = st.floats(2.0**-126, 2.0**127, width=32)


@pytest.mark.parametrize("codec", PLANAR)
@given(
    st.lists(
        st.tuples(FINITE, FINITE, POSITIVE, FINITE, POSITIVE, FINITE, FINITE, FINITE),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=60)
def test_any_finite_splats_pack_to_finite_ones(
    codec: str, gaussians: list[tuple[float, ...]]
) -> None:
    """Fits that went wrong without an infinity in them; how they look does not matter."""
    means, cholesky, colors = torch.tensor(gaussians)[None].split((2, 3, 3), -1)
    splats = Splats(means, cholesky, colors, torch.ones(1, len(gaussians), dtype=torch.bool))
    target = torch.full((1, 3, 6, 9), 0.5)
    (payload,) = pack(splats, target, codec, CUTOFF, select_backend("reference"))
    found = unpack([payload], 6, 9, codec)
    assert found.num_gaussians.tolist() == [len(gaussians)]
    assert (found.cholesky[..., ::2] > 0).all()
    assert values_of(found).isfinite().all()


# Nested budgets


@pytest.mark.parametrize("codec", PLANAR)
def test_a_prefix_of_a_nested_payload_is_the_first_gaussians(codec: str) -> None:
    budgets = (5, 12, 30)
    splats = random_splats(2, 30)
    metadata = shard_metadata(codec, CUTOFF, {"fit": {"nested": "5,12,30"}})
    payloads = packed(splats, codec, budgets)
    rows = [payload | {"height": HEIGHT, "width": WIDTH} for payload in payloads]
    for row in rows:
        assert [gaussians_in(row[f"splats{suffix}"], codec) for suffix in ("", "_12", "_30")] == [
            5, 7, 18,
        ]  # fmt: skip
        whole = unpack_row(row, metadata)
        for budget in budgets:
            prefix = unpack_row(row, metadata, budget)
            assert prefix.num_gaussians.tolist() == [budget]
            assert torch.equal(values_of(prefix), values_of(first(whole, budget)))
    assert packed(splats, codec, (30,)) == packed(splats, codec)


@pytest.mark.parametrize("codec", PLANAR)
def test_nested_budgets_together_keep_to_the_limit(codec: str) -> None:
    target, splats = fitted(shapes(40, 40, 9), 90)
    (row,) = rows_of(target, splats, codec, "20,50,90")
    assert row["psnr_loss"] <= MAX_LOSS_DB[codec] + 1e-3
    metadata = shard_metadata(codec, CUTOFF, {"fit": {"nested": "20,50,90"}})
    backend = select_backend("cpu")
    for name, budget in (("psnr_20", 20), ("psnr_50", 50), ("psnr", 90)):
        stored = unpack_row(row | {"height": 40, "width": 40}, metadata, budget)
        image = backend.render(stored, 40, 40, CUTOFF).clamp(0, 1)
        error = (image - target).square().mean()
        assert row[name] == pytest.approx(-10 * math.log10(float(error)), abs=1e-3)


@pytest.mark.parametrize(
    ("codec", "nested", "side", "seed", "steps"),
    [("balanced", "8,16,32,64", 32, 2, 40), ("compact", "16,32,64", 48, 5, 60)],
)
def test_the_last_budget_pays_for_what_the_others_lost(
    codec: str, nested: str, side: int, seed: int, steps: int
) -> None:
    """Each of the others keeps to its share against the fit, and yet they lose more than that."""
    config = FitConfig(nested=nested, steps=steps)
    target = planes_of(shapes(side, side, seed))
    splats, _ = fit_nested(target, config.budgets, config, select_backend("cpu"))
    (row,) = rows_of(target, splats, codec, nested)
    assert 0.5 * MAX_LOSS_DB[codec] < row["psnr_loss"] <= MAX_LOSS_DB[codec] + 1e-3
