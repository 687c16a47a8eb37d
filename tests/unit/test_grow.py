"""Numbers of Gaussians that follow the image: per megapixel, and as many as a PSNR needs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splatshard.pipeline.convert import Row, convert_samples, convert_shard
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.fitting.fit import fit
from splatshard.pipeline.fitting.grow import GRID, fit_growing, numbers, padded
from splatshard.pipeline.fitting.recipe import fit_and_prune, fit_images
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.runtime.batching import bytes_per_image
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import RawSample
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import (
    MAX_FITTED_GAUSSIANS,
    ConvertConfig,
    DecodeConfig,
    FitConfig,
    PackConfig,
    PruneConfig,
    config_from_output,
    output_config,
)
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import OK
from tests.make import encode, photo, write_tar
from tests.rows import FORMATS

CPU = select_backend("cpu")
GROWING = FitConfig(num_gaussians=10, steps=40, target_psnr=33.0, max_gaussians=200)


def pictures() -> Tensor:
    """[3, 3, 32, 32]: a photograph, a flat picture, a photograph with noise that no fit reaches."""
    flat = torch.full((3, 32, 32), 0.5)
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    photograph = torch.from_numpy(photo(32, 32)).permute(2, 0, 1) / 255
    return torch.stack((photograph, flat, noise))


def quality(splats: Splats, target: Tensor) -> list[float]:
    return psnr(CPU.render(splats, *target.shape[2:], 3.0), target).tolist()


# As many as a PSNR needs


def test_every_image_gets_as_many_as_it_needs() -> None:
    target = pictures()
    splats, steps = fit_growing(target, GROWING, CPU)
    found, reached = splats.num_gaussians.tolist(), quality(splats, target)
    assert found[1] == 10
    assert 10 < found[0] < 200
    assert found[2] == 200
    assert min(reached[:2]) >= 33 > reached[2]
    few, _ = fit(target, replace(GROWING, max_gaussians=None), CPU)
    assert quality(few, target)[0] < 33
    assert quality(few, target)[2] < reached[2] - 1  # more is better where it is not enough, too
    assert steps[1] <= 40 < steps[0] <= steps[2]


def test_what_an_image_gets_does_not_depend_on_the_others() -> None:
    target = pictures()
    splats, steps = fit_growing(target, GROWING, CPU)
    for i in range(3):
        alone, taken = fit_growing(target[i : i + 1], GROWING, CPU)
        count = int(splats.num_gaussians[i])
        assert (alone.mask.shape[1], int(taken[0])) == (count, int(steps[i]))
        for one, field in zip(alone.fields, splats.fields, strict=True):
            assert torch.equal(one[0], field[i, :count])
    assert not splats.mask[1, 10:].any()


def test_rows_have_their_own_numbers() -> None:
    """Through packing; the PSNR in a row is the target but for the codec's loss."""
    config = ConvertConfig(decode=DecodeConfig(image_size=32), fit=GROWING, backend="cpu")
    images = [photo(32, 32, 0), photo(32, 32, 0) // 64 + 100, photo(32, 32, 3)]
    samples = [RawSample(f"{i}", encode(x, "PNG")) for i, x in enumerate(images)]
    (rows,) = convert_samples(samples, config, CPU, StageTimer())
    found = [row["num_gaussians"] for row in rows]
    assert [row["status"] for row in rows] == [OK] * 3
    assert found[1] == 10 < found[0] <= 200
    assert all(row["psnr"] + row["psnr_loss"] >= 33 for row in rows)
    for sample, row in zip(samples, rows, strict=True):
        ((alone,),) = convert_samples([sample], config, CPU, StageTimer())
        assert alone == row


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "fitting", [GROWING, FitConfig(gaussians_per_megapixel=6e5, steps=2)], ids=["psnr", "area"]
)
def test_readers_take_what_each_sample_has(tmp_path: Path, format: str, fitting: FitConfig) -> None:
    images = {"a": photo(32, 32, 0), "b": photo(32, 24, 0) // 64 + 100, "c": photo(40, 40, 3)}
    members = [(f"{key}.png", encode(image, "PNG")) for key, image in images.items()]
    (ref,) = list_shards(str(write_tar(tmp_path / "a.tar", members)))
    config = ConvertConfig(
        decode=DecodeConfig(resize="none"), fit=fitting, pack=PackConfig(format=format)  # type: ignore[arg-type]
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    dst = str(tmp_path / "out")
    manifest = convert_shard(ref, config, dst, CPU)
    assert verify_shard(dst, manifest) == []
    rows = {row["key"]: row for row in read_rows(f"{dst}/{manifest.data_file}")}
    numbers = [row["num_gaussians"] for row in rows.values()]
    assert max(numbers) > min(numbers)
    most = fitting.max_gaussians or MAX_FITTED_GAUSSIANS
    for chosen, width in ((None, max(numbers)), (most, most)):
        (batch,) = SplatDataset(dst, batch_size=3, num_gaussians=chosen)
        assert batch.splats.mask.shape[1] == width
        for key, count in zip(batch.keys, batch.splats.num_gaussians.tolist(), strict=True):
            assert count == rows[key]["num_gaussians"]
    with pytest.raises(UsageError, match=f"its samples have up to {most}"):
        SplatDataset(dst, batch_size=3, num_gaussians=most + 1)


def test_an_image_that_diverges_ends() -> None:
    """With a NaN in its picture nothing is finite; its neighbours go on."""
    target = pictures()
    target[1, 0, 3, 3] = math.nan
    splats, _ = fit_growing(target, GROWING, CPU)
    assert splats.num_gaussians.tolist()[1] == 10
    assert quality(splats, target)[0] >= 33


@pytest.mark.parametrize("count", [10, 17, 190])
def test_numbers_lie_on_a_grid_and_rise(count: int) -> None:
    quality = torch.tensor([33.0, 32.9999, 31.0, 29.0, 21.0, -50.0, math.nan, math.inf])
    found = numbers(quality, count, GROWING).tolist()
    assert found[0] == found[6] == found[7] == count
    assert found[1:6] == sorted(found[1:6])
    assert all(count < n <= 200 for n in found[1:6])
    for n in found[1:6]:
        place = math.log2(n / 10) * GRID
        assert n == 200 or abs(n - 10 * 2 ** (round(place) / GRID)) < 1
    assert numbers(quality, 200, GROWING).tolist() == [200] * 8


def test_padding_renders_nothing() -> None:
    splats, _ = fit(pictures(), FitConfig(num_gaussians=9, steps=2), CPU)
    wide = padded(splats, 20)
    assert wide.mask.shape == (3, 20)
    shown = (CPU.render(x, 32, 32, 3.0) for x in (splats, wide))
    assert torch.equal(*shown)


# Per megapixel


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 25), 8), ((100, 50), 40), ((2, 2), 1), ((64, 64), 33)]
)
def test_per_megapixel(size: tuple[int, int], expected: int) -> None:
    config = FitConfig(gaussians_per_megapixel=8000, steps=1)
    assert config.count(size[0] * size[1]) == expected
    target = torch.rand(1, 3, *size)
    splats, _ = fit_images(target, config, CPU)
    same, _ = fit(target, FitConfig(num_gaussians=expected, steps=1), CPU)
    assert splats.num_gaussians.tolist() == [expected]
    assert all(map(torch.equal, splats.fields, same.fields))


def test_a_large_image_has_at_most_what_a_fit_may_have() -> None:
    config = FitConfig(gaussians_per_megapixel=8000)
    assert config.count(4096**2) == MAX_FITTED_GAUSSIANS
    capped = FitConfig(gaussians_per_megapixel=8000, target_psnr=30, max_gaussians=1000)
    assert (capped.count(50_000), capped.count(10**6)) == (400, 1000)
    sized = capped.sized(250, 200)
    assert (sized.num_gaussians, sized.max_gaussians) == (400, 1000)
    assert sized.sized(9, 9) == sized


def test_rows_of_several_sizes_have_numbers_by_their_sizes() -> None:
    """And the energy rule's refit looks at the rows that suit that number."""
    config = ConvertConfig(
        decode=DecodeConfig(resize="none"),
        fit=FitConfig(gaussians_per_megapixel=10_000, steps=2),
        prune=PruneConfig(prune="energy", prune_share=0.5, refit_steps=2),
        backend="cpu",
    )
    sizes = [(40, 30), (30, 40), (20, 10)]
    samples = [RawSample(f"{i}", encode(photo(*s), "PNG")) for i, s in enumerate(sizes)]
    rows: list[Row] = next(convert_samples(samples, config, CPU, StageTimer()))
    assert [row["num_gaussians"] for row in rows] == [6, 6, 1]
    target = torch.from_numpy(photo(40, 30)).permute(2, 0, 1)[None] / 255
    fixed = replace(config, fit=FitConfig(num_gaussians=12, steps=2))
    found, wanted = (fit_and_prune(target, c, CPU)[0].fields for c in (config, fixed))
    assert all(map(torch.equal, found, wanted))


# Configurations


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_gaussians": 900}, "--max-gaussians 900: is for images that miss --target-psnr"),
        ({"max_gaussians": 9, "target_psnr": 30}, "--max-gaussians 9: choose at least the 400"),
        ({"max_gaussians": 10**6, "target_psnr": 30}, "--max-gaussians 1000000: choose 1 to"),
        ({"gaussians_per_megapixel": 0}, "--gaussians-per-megapixel 0: choose a number above 0"),
        ({"gaussians_per_megapixel": 9, "nested": "4,9"}, "does not go with --nested"),
        ({"gaussians_per_megapixel": 9, "init": "encoder:a"}, "an encoder's start"),
        ({"max_gaussians": 9, "target_psnr": 30, "nested": "4,9"}, "does not go with --nested"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FitConfig(**options)


@pytest.mark.parametrize(
    "fitting",
    [
        FitConfig(gaussians_per_megapixel=8000),
        FitConfig(gaussians_per_megapixel=8000.5, target_psnr=30, max_gaussians=100),
        GROWING,
    ],
)
def test_recipes_of_them_go_round(fitting: FitConfig) -> None:
    config = ConvertConfig(fit=fitting)
    assert config_from_output(json.loads(json.dumps(output_config(config)))) == config
    assert output_config(config) != output_config(ConvertConfig())


def test_pruning_would_undo_it() -> None:
    with pytest.raises(UsageError, match="--prune energy: does not go with --max-gaussians"):
        ConvertConfig(fit=GROWING, prune=PruneConfig(prune="energy"))


def test_room_is_for_all_that_an_image_may_get() -> None:
    plain = ConvertConfig(fit=FitConfig(num_gaussians=200))
    growing = ConvertConfig(fit=GROWING)
    dense = ConvertConfig(fit=FitConfig(gaussians_per_megapixel=200))
    assert bytes_per_image(growing, 10**6) == bytes_per_image(plain, 10**6)
    assert bytes_per_image(dense, 10**6) == bytes_per_image(plain, 10**6)
