"""The teacher's embeddings: what transformers' own model says of the same crop, in both formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.embed import embed_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.teacher import load_teacher, resolve_teacher
from splatshard.pipeline.shards.rows import read_rows, shard_metadata_of
from splatshard.pipeline.shards.verify import row_problem, verify_shard
from splatshard.pipeline.shards.write import open_writer
from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.config import (
    ConvertConfig,
    DecodeConfig,
    FitConfig,
    PackConfig,
    config_from_output,
    fingerprint,
    inputs,
    output_config,
)
from splatshard.schemas.errors import BackendError, CorruptShardError, UsageError
from splatshard.schemas.shard import OK, ShardManifest, ShardRef
from splatshard.schemas.splats import columns, shard_metadata
from tests.clips import SIDE, WIDTH, clip_folder, say_normalisation
from tests.make import datacomp_sample, encode, photo, write_tar
from tests.rows import FORMATS

CPU = torch.device("cpu")
CONFIG = ConvertConfig(
    decode=DecodeConfig(image_size=24), fit=FitConfig(num_gaussians=5, steps=1), backend="cpu"
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(clip_folder(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ShardRef:
    """Five samples, the third of which does not decode."""
    members = [m for i in range(5) for m in datacomp_sample(i)]
    members = [(n, b"broken" if n == "000000000002.jpg" else data) for n, data in members]
    path = write_tar(tmp_path_factory.mktemp("in") / "00000000.tar", members)
    return list_shards(str(path))[0]


@pytest.fixture(scope="module", params=FORMATS)
def shard(
    request: pytest.FixtureRequest, clip: str, ref: ShardRef, tmp_path_factory: Any
) -> tuple[str, ShardManifest]:
    dst = str(tmp_path_factory.mktemp("out"))
    config = replace(
        CONFIG, pack=PackConfig(format=request.param), teacher=resolve_teacher(clip), batch_size=2
    )
    return dst, convert_shard(ref, config, dst, select_backend("cpu"))


def expected(clip: str, pixels: torch.Tensor) -> torch.Tensor:
    """By transformers' model, of uint8 [B, H, W, 3]."""
    images = pixels.permute(0, 3, 1, 2) / 255
    images = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        return F.normalize(model.vision_model((images - mean) / std).pooler_output, dim=1)


def test_a_shard_holds_what_the_teacher_says_of_the_crop(
    shard: tuple[str, ShardManifest], clip: str
) -> None:
    dst, manifest = shard
    rows = list(read_rows(f"{dst}/{manifest.data_file}"))
    assert [row["status"] for row in rows] == [OK, OK, "not_an_image", OK, OK]
    assert rows[2]["teacher"] is None
    kept = [row for row in rows if row["status"] == OK]
    crops = [
        decode(dict(datacomp_sample(int(row["key"])))[f"{row['key']}.jpg"], "jpg", CONFIG.decode)
        for row in kept
    ]
    wanted = expected(clip, torch.stack([torch.from_numpy(crop.pixels) for crop in crops]))
    found = np.stack([np.frombuffer(row["teacher"], "<f2") for row in kept])
    assert found.shape == (4, WIDTH)
    assert np.abs(found - wanted.numpy()).max() < 1e-3
    assert np.abs(np.linalg.norm(found.astype(float), axis=1) - 1).max() < 1e-3
    assert verify_shard(dst, manifest) == []
    metadata = shard_metadata_of(f"{dst}/{manifest.data_file}")
    assert metadata["teacher"] == manifest.inputs["recipe"]["teacher"]
    if manifest.format == "parquet":
        assert pq.read_schema(f"{dst}/{manifest.data_file}").field("teacher").type == pa.binary()
    assert (metadata["teacher"]["model"], metadata["teacher"]["dim"]) == (clip, WIDTH)


def test_of_pictures_that_are_no_squares_it_sees_the_centre(clip: str, tmp_path: Path) -> None:
    """In shards of several sizes, whether converted with the teacher or embedded later."""
    sizes = [(40, 24), (24, 40), (24, 24), (40, 24)]
    members = [(f"{i}.png", encode(photo(*size, i), "PNG")) for i, size in enumerate(sizes)]
    (ref,) = list_shards(str(write_tar(tmp_path / "a.tar", members)))
    plain = replace(CONFIG, decode=DecodeConfig(resize="none"))
    config = replace(plain, teacher=resolve_teacher(clip))
    backend, rows = select_backend("cpu"), []
    for name in ("converted", "embedded"):
        dst = str(tmp_path / name)
        Path(dst).mkdir()
        made = convert_shard(ref, config if name == "converted" else plain, dst, backend)
        if name == "embedded":
            made = embed_shard(dst, made, ref, config, CPU)
        rows.append(list(read_rows(f"{dst}/{made.data_file}")))
    assert rows[0] == rows[1]
    for i, row in enumerate(rows[0]):
        pixels = torch.from_numpy(photo(*sizes[i], i))
        top, left = (pixels.shape[0] - 24) // 2, (pixels.shape[1] - 24) // 2
        wanted = expected(clip, pixels[None, top : top + 24, left : left + 24])
        assert np.abs(np.frombuffer(row["teacher"], "<f2") - wanted[0].numpy()).max() < 1e-3


def test_training_reads_them(shard: tuple[str, ShardManifest]) -> None:
    dst, manifest = shard
    stored = {
        row["key"]: np.frombuffer(row["teacher"], "<f2").astype(np.float32)
        for row in read_rows(f"{dst}/{manifest.data_file}")
        if row["teacher"]
    }
    seen = 0
    for batch in SplatDataset(dst, batch_size=3, drop_last=False, seed=2):
        assert batch.teacher is not None
        assert batch.teacher.dtype == torch.float32
        for key, teacher in zip(batch.keys, batch.teacher.numpy(), strict=True):
            assert (teacher == stored[key]).all()
            seen += 1
    assert seen == 6  # four samples in two batches of three


def test_without_a_teacher_nothing_changes(ref: ShardRef, tmp_path: Path) -> None:
    """No column, no entry in the recipe: fingerprints of earlier shards still hold."""
    manifest = convert_shard(ref, CONFIG, str(tmp_path), select_backend("cpu"))
    assert "teacher" not in output_config(CONFIG)
    assert "teacher" not in pq.read_schema(tmp_path / manifest.data_file).names
    assert "teacher" not in columns(shard_metadata("fp16", 3.0, output_config(CONFIG))).names
    (batch,) = SplatDataset(str(tmp_path), batch_size=4)
    assert batch.teacher is None


def test_a_fingerprint_is_of_the_weights(clip: str, ref: ShardRef, tmp_path: Path) -> None:
    """Other weights, or another normalisation, are another shard; a copy of the files is not,
    but for their name."""
    first = resolve_teacher(clip)
    same = resolve_teacher(str(clip_folder(tmp_path / "same")))
    other = resolve_teacher(str(clip_folder(tmp_path / "other", seed=1)))
    assert replace(same, model=clip) == first
    assert other.weights != first.weights
    say_normalisation(tmp_path / "same", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    shifted = resolve_teacher(str(tmp_path / "same"))
    assert (shifted.mean, shifted.std) == ((0.5,) * 3, (0.5,) * 3)
    configs = [replace(CONFIG, teacher=t) for t in (None, first, other, shifted)]
    assert len({fingerprint(inputs(config, ref)) for config in configs}) == 4


def test_a_folder_is_found_from_everywhere(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(clip).parent)
    assert resolve_teacher(Path(clip).name) == resolve_teacher(clip)


def test_a_recipe_gives_its_teacher_back(clip: str) -> None:
    config = replace(CONFIG, teacher=resolve_teacher(clip), backend="auto")
    assert config_from_output(output_config(config)) == config


def test_a_worker_with_other_weights(clip: str, ref: ShardRef, tmp_path: Path) -> None:
    config = replace(CONFIG, teacher=replace(resolve_teacher(clip), weights="0" * 64))
    with pytest.raises(UsageError, match=r"has the weights .* here, not 000000000000"):
        convert_shard(ref, config, str(tmp_path), select_backend("cpu"))
    assert not list(tmp_path.glob("*.json"))


def test_no_such_teacher(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        resolve_teacher(str(tmp_path / "nowhere"))


def test_damaged_normalisation(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    say_normalisation(folder, [0.5], [0.5, 0.5, 0.0])
    with pytest.raises(UsageError, match=r"preprocessor_config\.json cannot be understood"):
        resolve_teacher(str(folder))


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    config = resolve_teacher(str(clip_folder(tmp_path, scale=float("nan"))))
    pixels = torch.from_numpy(photo(24, 24))[None]
    with pytest.raises(BackendError, match="not finite"):
        load_teacher(config, CPU).embed(pixels)


def taught_rows(shard: tuple[str, ShardManifest]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    dst, manifest = shard
    url = f"{dst}/{manifest.data_file}"
    return list(read_rows(url)), shard_metadata_of(url)


@pytest.mark.parametrize(
    ("number", "teacher", "problem"),
    [
        (0, None, "no teacher's embedding"),
        (0, b"\0\0" * WIDTH, "of length 0, not 1"),
        (0, b"\0\x7e" + b"\0\0" * (WIDTH - 1), "of length nan"),
        (0, b"\0\x3c" + b"\0\0" * WIDTH, f"{2 * WIDTH + 2} bytes, not {2 * WIDTH}"),
        (2, b"\0\x3c" + b"\0\0" * (WIDTH - 1), "yet it has splats"),
    ],
)
def test_verify_looks_at_them(
    shard: tuple[str, ShardManifest], number: int, teacher: bytes | None, problem: str
) -> None:
    rows, metadata = taught_rows(shard)
    assert row_problem(rows[number], metadata) == ""
    assert problem in row_problem(rows[number] | {"teacher": teacher}, metadata)


def test_a_reader_refuses_embeddings_of_two_lengths(
    shard: tuple[str, ShardManifest], tmp_path: Path
) -> None:
    from splatshard.pipeline.data.read_parquet import teacher_of

    column = pa.array([b"\0" * 4, b"\0" * 6], pa.binary())
    with pytest.raises(ValueError, match="not all of one length"):
        teacher_of(column)
    with pytest.raises(ValueError, match="no teacher"):
        teacher_of(pa.array([b"\0" * 4, None], pa.binary()))
    assert (teacher_of(pa.array([b"\0\x3c"] * 3, pa.binary())[1:]) == 1).all()


def test_metadata_with_a_teacher_that_is_none(
    shard: tuple[str, ShardManifest], tmp_path: Path
) -> None:
    rows, metadata = taught_rows(shard)
    format = shard[1].format
    path = tmp_path / shard[1].data_file
    for teacher in (None, 3, {"dim": 0}, {"dim": "8"}):
        with open_writer(path, format, metadata | {"teacher": teacher}) as writer:
            writer.write(rows[2:3])
        with pytest.raises(CorruptShardError, match="not a splat shard"):
            list(read_rows(str(path)))


def test_a_sources_own_member_of_that_name_is_no_embedding(tmp_path: Path) -> None:
    """In a tar both would be called `teacher`."""
    members = [(n, d) for n, d in datacomp_sample(0)]
    members.append(("000000000000.teacher", b"\0\x3c"))
    (ref,) = list_shards(str(write_tar(tmp_path / "in" / "a.tar", members)))
    config = replace(CONFIG, pack=PackConfig(format="webdataset"))
    convert_shard(ref, config, str(tmp_path / "out"), select_backend("cpu"))
    (batch,) = SplatDataset(str(tmp_path / "out"), batch_size=1)
    assert batch.teacher is None
