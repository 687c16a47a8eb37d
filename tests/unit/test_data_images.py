"""Images as batches: the order of the splats, exact resume, bad files, filters, the same
augmentation."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from splatshard.pipeline.data import ImageBatch, ImageDataset, SplatDataset
from splatshard.pipeline.data.augment import DRAWS, augment_with, draw_plan
from splatshard.pipeline.data.augment_pixels import augment_pixels
from splatshard.pipeline.data.images import COLUMNS
from splatshard.pipeline.data.random_numbers import uniform
from splatshard.pipeline.kernels import reference
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.listing import list_shards, list_source
from splatshard.pipeline.source.read import read, scan
from splatshard.pipeline.splats import Splats
from splatshard.pipeline.train.batches import Feed, constants_of
from splatshard.pipeline.train.distributed import World
from splatshard.pipeline.train.loop import train
from splatshard.pipeline.train.trained import Trained, open_data
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SourceError, UsageError
from splatshard.schemas.model import EncoderConfig, ModelConfig
from splatshard.schemas.train import AugmentConfig
from tests.make import image_folder, image_parquet, imagenet_tar, jpeg, write_parquet, write_tar
from tests.splat_shards import keys_of
from tests.training import images_config, toy_config

SIDE = 32
CPU = World(0, 1, torch.device("cpu"))


def images_of(src: Path | str, **options: Any) -> ImageDataset:
    return ImageDataset(str(src), **{"batch_size": 4, "image_size": SIDE} | options)


def ordered(src: Path | str, **options: Any) -> list[ImageBatch]:
    return list(images_of(src, shuffle=False, drop_last=False, **options))


def made(folder: Path, kind: str) -> str:
    """Seven images with labels, as one of the kinds of sources."""
    if kind == "tar":
        return str(imagenet_tar(folder / "a.tar", 7))
    if kind == "parquet":
        return str(image_parquet(folder / "a.parquet", 7, row_group_size=3))
    image_folder(folder / "images", ("cat", "dog"), 3)
    (folder / "images/dog/0009.jpg").write_bytes(jpeg(seed=9))
    return str(folder / "images")


# Order and state


@pytest.mark.parametrize("options", [{}, {"lanes": 2}, {"shuffle": False}, {"shuffle_shards": 3}])
def test_the_order_is_that_of_the_splats(shards: Path, options: dict[str, Any]) -> None:
    for epoch in (0, 1):
        found = []
        for dataset in (
            ImageDataset(f"{shards}/images/*.tar", image_size=SIDE, batch_size=16, **options),
            SplatDataset(f"{shards}/splats", batch_size=16, **options),
        ):
            dataset.set_epoch(epoch)
            found.append([(b.keys, b.captions, b.labels.tolist(), b.position) for b in dataset])
        assert found[0] == found[1]
        assert len(found[0]) == 5


def test_both_arms_get_the_same_random_numbers(shards: Path, tmp_path: Path) -> None:
    feeds = [
        Feed(images_config(shards, tmp_path), CPU),
        Feed(toy_config(shards, tmp_path), CPU),
    ]
    for _, a, b in zip(range(7), *feeds, strict=False):  # into the second epoch
        assert a.batch.keys == b.batch.keys
        assert torch.equal(a.seeds, b.seeds)
    assert isinstance(a.batch, ImageBatch)


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
def test_what_convert_reads(tmp_path: Path, kind: str) -> None:
    src = made(tmp_path, kind)
    (ref,) = list_shards(src)
    samples = list(read(ref, hashlib.sha256()))
    batches = ordered(src)
    assert [len(batch) for batch in batches] == [4, 4]
    assert keys_of(batches) == [sample.key for sample in samples]
    rows = [(b, i) for b in batches for i in range(4)][:7]
    for (batch, i), sample in zip(rows, samples, strict=True):
        crop = decode(sample.image, "", DecodeConfig(image_size=SIDE)).pixels
        assert np.array_equal(batch.pixels[i].permute(1, 2, 0).numpy(), crop)
        assert (int(batch.labels[i]), batch.captions[i]) == (sample.label, sample.caption)
    assert (batches[0].pixels.dtype, batches[0].pixels.shape) == (torch.uint8, (4, 3, SIDE, SIDE))
    assert batches[0].heights.tolist() == batches[0].widths.tolist() == [SIDE] * 4
    known = [(sample.key, sample.label, sample.caption) for sample in scan(ref)]
    assert known == [(sample.key, sample.label, sample.caption) for sample in samples]


def test_columns_are_those_of_the_shards(shards: Path) -> None:
    """Of the same images, by the same names."""
    names = [name for name in COLUMNS if name != "members"]  # of which `shards` have none
    options: Any = {"batch_size": 16, "columns": names}
    images = ImageDataset(f"{shards}/images/*.tar", image_size=SIDE, **options)
    for found, splats in zip(images, SplatDataset(f"{shards}/splats", **options), strict=True):
        assert list(found.columns) == names
        for name in names:
            a, b = found.columns[name], splats.columns[name]
            same = a == b if isinstance(a, list) else a.equal(b) and a.dtype == b.dtype
            assert same, name
        assert found[2:4].columns["key"] == found.keys[2:4]
        assert found.to("meta").columns["label"].device.type == "meta"
    with pytest.raises(UsageError, match=r"columns names 'psnr', which images .*choose among key"):
        ImageDataset(f"{shards}/images/*.tar", image_size=SIDE, batch_size=4, columns=["psnr"])
    with pytest.raises(UsageError, match=r"columns is 'uid': give names in a list"):
        ImageDataset(f"{shards}/images/*.tar", image_size=SIDE, batch_size=4, columns="uid")


def test_columns_of_a_sample_that_stands_in_are_its_own(tmp_path: Path) -> None:
    members = {"a.jpg": jpeg(seed=1), "a.npy": b"1", "b.jpg": b"no image", "b.npy": b"2"}
    members |= {"c.jpg": jpeg(seed=3), "c.json": b'{"uid": "u3"}'}
    write_tar(tmp_path / "a.tar", members.items())
    (batch,) = ordered(tmp_path / "a.tar", batch_size=3, columns=["key", "uid", "members"])
    assert batch.valid.tolist() == [True, False, True]
    assert batch.columns["key"] == ["a", "c", "c"]
    assert batch.columns["uid"] == [None, "u3", "u3"]
    assert batch.columns["members"] == [[{"name": "npy", "data": b"1"}], [], []]


def test_batches_as_dictionaries(shards: Path) -> None:
    options: Any = {"batch_size": 16, "columns": ["caption", "original_width"]}
    plain, flat = (images_of(f"{shards}/images", **options, as_dict=x) for x in (False, True))
    loader = DataLoader(flat, batch_size=None, num_workers=1)
    tensors = ["pixels", "heights", "widths", "labels", "valid"]
    for batch, found in zip(plain, cast(Any, loader), strict=True):
        assert list(found) == [*tensors, "position", "caption", "original_width"]
        assert all(found[name].equal(getattr(batch, name)) for name in tensors)
        assert found["position"].tolist() == [list(cast(Any, batch.position))] * 16
        assert found["caption"] == batch.captions
    state = flat.state_after(found)
    assert state == plain.state_after(batch)


def test_ranks_share_a_step_and_go_on_from_any_state(shards: Path) -> None:
    """Two processes together see what one sees, from the start and after any step."""
    src, options = f"{shards}/images", {"seed": 3}
    one = list(images_of(src, batch_size=8, **options))
    two = [images_of(src, rank=r, world_size=2, **options) for r in (0, 1)]

    def together() -> Iterator[list[str]]:
        return (a.keys + b.keys for a, b in zip(*two, strict=True))

    assert [sorted(keys) for keys in together()] == [sorted(batch.keys) for batch in one]
    for done in (0, 4, 9):
        state = images_of(src, batch_size=8, **options).state_after(one[done])
        for dataset in two:
            dataset.load_state_dict(json.loads(json.dumps(state)))
        assert [sorted(k) for k in together()] == [sorted(b.keys) for b in one[done + 1 :]]


def test_dataloader_workers_deliver_the_same(shards: Path) -> None:
    dataset = images_of(f"{shards}/images", batch_size=16)
    wanted = list(dataset)
    dataset.set_epoch(0)
    found = list(DataLoader(dataset, batch_size=None, num_workers=1))
    assert [b.keys for b in found] == [b.keys for b in wanted]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(found, wanted, strict=True))


def test_a_state_of_other_images_is_refused(shards: Path, tmp_path: Path) -> None:
    state = images_of(f"{shards}/images").state_dict()
    other = images_of(made(tmp_path, "tar"))
    with pytest.raises(UsageError, match="saved with data"):
        other.load_state_dict(state)


# Bad files


def broken_tar(path: Path, bad: set[int], count: int = 8) -> Path:
    members = []
    for i in range(count):
        data = b"\xff\xd8 broken" if i in bad else jpeg(seed=i)
        members += [(f"{i:03d}.jpg", data), (f"{i:03d}.cls", str(i).encode())]
    return write_tar(path, members)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_a_bad_image_is_replaced_by_the_next_good_one(
    tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The same one whatever the batches; the last one by the first."""
    src = broken_tar(tmp_path / "a.tar", {2, 3, 7})
    with caplog.at_level(logging.WARNING):
        dataset = images_of(src, batch_size=size, shuffle=False)
        batches = list(dataset)
    keys = [key for batch in batches for key in batch.keys]
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    valid = torch.cat([batch.valid for batch in batches]).tolist()
    assert keys == ["000", "001", "004", "004", "004", "005", "006", "000"]
    assert labels == [0, 1, 4, 4, 4, 5, 6, 0]
    assert valid == [True, True, False, False, True, True, True, False]
    assert dataset.replaced == 3
    assert [r.getMessage().count("sample 002 does not decode") for r in caplog.records] == [1]
    assert "a.tar" in caplog.text


def test_a_shard_without_a_good_image(tmp_path: Path) -> None:
    """Stands in its batch for no more than it is: another shard's, and where there is none an
    error that names it."""
    broken_tar(tmp_path / "b.tar", {0}, count=1)
    with pytest.raises(
        SourceError, match=r"b\.tar: no sample of a batch decodes, the first: 000\.jpg"
    ):
        list(images_of(tmp_path, batch_size=1))
    write_tar(tmp_path / "a.tar", [("x.jpg", jpeg())])
    (batch,) = ordered(tmp_path, batch_size=2, shuffle_shards=1)
    assert (batch.keys, batch.valid.tolist()) == (["x", "x"], [True, False])


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    src = imagenet_tar(tmp_path / "a.tar", 6)
    dataset = images_of(src)
    imagenet_tar(src, 5)
    with pytest.raises(SourceError, match="had 6 samples when it was listed, and has 5"):
        list(dataset)


def test_members_that_no_field_takes_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [
        (f"{i}.{name}", data)
        for i in range(4)
        for name, data in (("jpg", jpeg()), ("prompt", b"a cat"), ("class_id", b"3"))
    ]
    write_tar(tmp_path / "a.tar", members)
    (batch,) = ordered(tmp_path / "a.tar")
    assert batch.captions == [None] * 4
    (said,) = [r.getMessage() for r in caplog.records if "prompt" in r.getMessage()]
    assert ".prompt, .class_id are not used: no field takes such a member" in said
    assert "bytes" not in said


# Classes


def test_labels_and_classes_are_those_of_convert(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = images_of(image_folder(tmp_path / "train", ("ant", "bee", "cat"), 2))
    assert train.classes == list_source(f"{tmp_path}/train").classes == ("ant", "bee", "cat")
    val = image_folder(tmp_path / "val", ("ant", "cat"), 1)
    (val / "bee").mkdir()  # a class without an image
    (batch,) = ordered(val)
    assert [(k, int(label)) for k, label in zip(batch.keys, batch.labels, strict=True)][:2] == [
        ("ant/0000", 0),
        ("cat/0000", 2),
    ]
    assert images_of(val, drop_last=False).classes == train.classes
    assert "no image in 1 of the class folders" in caplog.text
    assert images_of(imagenet_tar(tmp_path / "a.tar", 4)).classes == ()


def test_classes_of_another_split(tmp_path: Path) -> None:
    val = image_folder(tmp_path / "val", ("ant", "cat"), 2)
    names = ("cat", "bee", "ant")
    dataset = images_of(val, classes=names, shuffle=False)
    (batch,) = dataset
    assert (dataset.classes, batch.labels.tolist()) == (names, [2, 2, 0, 0])
    assert keys_of(ordered(val, classes=names, filter=(("label", "==", 0),)))[0] == "cat/0000"
    with pytest.raises(UsageError, match=r"has images in cat, which the given classes .* not name"):
        images_of(val, classes=("ant", "bee"))


def test_a_mixture_numbers_its_classes_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [image_folder(tmp_path / n, (n, "cat"), 4) for n in ("ant", "dog")]
    mixture = {str(folder): 1.0 for folder in folders}
    assert ImageDataset(mixture, image_size=SIDE, batch_size=4).classes == ()
    assert "/ant and " in caplog.text
    assert "are numbered by different lists of classes" in caplog.text
    caplog.clear()
    names = ("ant", "cat", "dog")
    dataset = ImageDataset(mixture, image_size=SIDE, batch_size=4, classes=names)
    assert dataset.classes == names
    assert "numbered" not in caplog.text
    pairs = {
        (key[:3], label)
        for batch in dataset
        for key, label in zip(batch.keys, batch.labels.tolist(), strict=True)
    }
    assert pairs == {("ant", 0), ("cat", 1), ("dog", 2)}


def test_a_model_keeps_the_classes_of_its_images(tmp_path: Path) -> None:
    """Images to evaluate on have the numbers of training, though a folder is missing."""
    val = image_folder(tmp_path / "val", ("ant", "cat"), 2)
    train = images_of(image_folder(tmp_path / "train", ("ant", "bee", "cat"), 2))
    kept = constants_of(train, toy_config(tmp_path, tmp_path))["classes"]
    config = ModelConfig(encoder=EncoderConfig(input="patches", resampler=None), num_classes=3)
    trained = Trained(torch.nn.Identity(), config, "run", 1, "", CPU.device, classes=tuple(kept))
    (batch,) = open_data(trained, str(val), 4).batches
    assert batch.labels.tolist() == [0, 0, 2, 2]


# Filters and other arguments


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
def test_a_filter_on_labels(tmp_path: Path, kind: str) -> None:
    src = made(tmp_path, kind)
    (ref,) = list_shards(src)
    wanted = [s.key for s in scan(ref) if s.label is not None and s.label < 1]
    assert 0 < len(wanted) < 7
    assert keys_of(ordered(src, filter=(("label", "<", 1),))) == wanted
    with pytest.raises(UsageError, match=r"no sample of .* passes"):
        images_of(src, filter=(("label", ">", 99),))


def test_a_filter_on_captions(tmp_path: Path) -> None:
    images = [jpeg(seed=i) for i in range(3)]
    src = write_parquet(tmp_path / "a.parquet", {"jpg": images, "text": ["a long one", None, "b"]})
    assert keys_of(ordered(src, filter=(("caption_length", ">", 3),))) == ["a-00000000"]
    with pytest.raises(UsageError, match="'psnr', which images do not have: choose one of label"):
        images_of(src, filter=(("psnr", ">", 3),))


def test_splat_shards_are_no_images(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"splats has splat shards.*images/00000\.tar"):
        images_of(shards / "splats")
    with pytest.raises(UsageError, match=r"no splat shards.*images are converted first"):
        train(toy_config(shards, tmp_path, data__src=f"{shards}/images"))


def test_a_mixture_of_images(tmp_path: Path) -> None:
    sources = [imagenet_tar(tmp_path / name, count) for name, count in (("a.tar", 4), ("b.tar", 4))]
    dataset = ImageDataset(
        {str(sources[0]): 3, str(sources[1]): 1}, image_size=SIDE, batch_size=4, epoch_samples=16
    )
    assert len(keys_of(dataset)) == 16
    assert [len(source.shards) for source in dataset.sources] == [1, 1]


# Augmentation

FULL = AugmentConfig(
    height=40, width=48, crop_scale=(0.3, 0.9), flip=0.5, rotation=25, shear=10, zoom=(0.8, 1.3),
    shift=0.1, brightness=0.3, contrast=0.3, saturation=0.4, hue=30, grayscale=0.2,
)  # fmt: skip


def smooth_splats(batch: int = 6, n: int = 40, side: int = 64) -> Splats:
    """Wide Gaussians well within the picture, so that none of it is lost at the border."""
    g = torch.Generator().manual_seed(0)
    means = (torch.rand(batch, n, 2, generator=g) * 0.4 + 0.3) * side
    cholesky = torch.rand(batch, n, 3, generator=g) * 2
    cholesky[..., ::2] += 2.5
    colors = torch.randn(batch, n, 3, generator=g) * 0.2 + 0.1
    return Splats(means, cholesky, colors, torch.ones(batch, n, dtype=torch.bool))


@pytest.mark.parametrize(("contrast", "least"), [(0.0, 49), (0.3, 37)])
def test_pixels_are_augmented_as_splats_are(contrast: float, least: float) -> None:
    """The picture of augmented splats against the augmented picture: 50.1 to 52.7 dB, which is
    bilinear interpolation. With contrast 38.7 to 52.8, since the mean grey of Gaussians that stick
    out of the image is an estimate."""
    config = replace(FULL, contrast=contrast)
    side, splats = torch.full((6,), 64), smooth_splats()
    plan = draw_plan(uniform(torch.arange(6), DRAWS), side, side, config)
    found = augment_pixels(reference.render(splats, 64, 64), plan, config)
    wanted = reference.render(augment_with(splats, plan, config, None), 40, 48)
    assert float(wanted.std()) > 0.2
    assert float((found - wanted).square().mean((1, 2, 3)).max()) < 10 ** (-least / 10)


def test_without_augmentation_pixels_stay() -> None:
    pixels, side = torch.rand(2, 3, 12, 12), torch.tensor([12, 12])
    config = AugmentConfig(height=12, width=12)
    plan = draw_plan(torch.rand(2, DRAWS), side, side, config)
    torch.testing.assert_close(augment_pixels(pixels, plan, config), pixels, atol=1e-5, rtol=0)
    config = replace(config, flip=1.0)
    plan = draw_plan(torch.rand(2, DRAWS), side, side, config)
    found = augment_pixels(pixels, plan, config)
    torch.testing.assert_close(found, pixels.flip(3), atol=1e-5, rtol=0)
