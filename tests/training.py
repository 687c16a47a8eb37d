"""What tests of training share: a toy dataset in real shards, toy configurations, short runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from splatshard.jobs.recipes.toys import COLORS, SHAPES, shapes, write_tars, write_tokenizer
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.markers import read_marker
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.train.log import read_log
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.model import (
    EncoderConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
    TextConfig,
)
from splatshard.schemas.shard import ShardManifest, to_json
from splatshard.schemas.splats import METADATA_KEY, TEACHER, canonical_json
from splatshard.schemas.train import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
)

CLASSES = len(SHAPES) * len(COLORS)
WIDTH = 16
"""Of the toy encoder."""


def make_shards(folder: Path, count: int = 90, per_shard: int = 40, seed: int = 0) -> Path:
    """Pictures of shapes, converted: {folder}/splats, with labels, captions and teacher's
    embeddings; and {folder}/tokenizer."""
    samples = list(shapes(count, seed))
    write_tars(folder / "images", samples, per_shard)
    write_tokenizer(folder / "tokenizer", [caption for _, caption, _ in samples])
    config = ConvertConfig(
        decode=DecodeConfig(image_size=32),
        fit=FitConfig(num_gaussians=8, steps=8, row_stride=1),
        backend="cpu",
    )
    dst = folder / "splats"
    dst.mkdir()
    for ref in list_shards(f"{folder}/images/*.tar"):
        convert_shard(ref, config, str(dst), select_backend("cpu"))
    add_teacher(dst)
    return folder


def add_teacher(dst: Path, width: int = WIDTH) -> None:
    """A teacher's embeddings that say what is in the pictures: a random direction per label."""
    random = np.random.default_rng(1)
    directions = random.normal(size=(CLASSES, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def with_teacher(table: pa.Table) -> pa.Table:
        values = directions[table["label"].to_numpy()].astype("<f2")
        table = table.append_column(TEACHER, pa.array([row.tobytes() for row in values]))
        return with_metadata(table, {TEACHER: {"model": "toy", "dim": width}})

    rewrite(dst, with_teacher)


def without_teacher(table: pa.Table) -> pa.Table:
    """A shard's table as of a conversion without one."""
    return with_metadata(table.drop_columns(TEACHER), {TEACHER: None})


def with_metadata(table: pa.Table, values: dict[str, Any]) -> pa.Table:
    """A shard's table with other constants; those that are None are left out."""
    found = json.loads(table.schema.metadata[METADATA_KEY]) | values
    text = canonical_json({name: value for name, value in found.items() if value is not None})
    return table.replace_schema_metadata({METADATA_KEY: text})


def rewrite(dst: Path, change: Any) -> None:
    """Change the table of every shard, and let the markers vouch for the new files."""
    for path in sorted(dst.glob("*.parquet")):
        table = change(pq.read_table(path))
        pq.write_table(table, path)
        data = path.read_bytes()
        name = path.name.rpartition("-")[0]
        marker = read_marker(str(dst), f"{name}.json")
        assert isinstance(marker, ShardManifest)
        digest = hashlib.sha256(data).hexdigest()
        marker = replace(marker, size_bytes=len(data), sha256=digest)
        (dst / f"{name}.json").write_text(to_json(marker))


def changed(shards: Path, tmp_path: Path, change: Any) -> Path:
    """Shards whose tables `change` has changed."""
    shutil.copytree(shards, tmp_path / "changed")
    rewrite(tmp_path / "changed/splats", change)
    return tmp_path / "changed"


def toy_model(shards: Path, stage: str) -> ModelConfig:
    encoder = EncoderConfig(
        width=WIDTH,
        layers=2,
        heads=2,
        tokens=9,
        stem=StemConfig(bands=2, hidden=16),
        resampler=ResamplerConfig(heads=2),
    )
    if stage == "classify":
        return ModelConfig(encoder=encoder, num_classes=CLASSES)
    text = TextConfig(
        width=WIDTH,
        layers=1,
        heads=2,
        vocab_size=len(
            json.loads((shards / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
        ),
        context_length=8,
        tokenizer=str(shards / "tokenizer"),
    )
    return ModelConfig(encoder=encoder, text=text, embed_dim=16)


def toy_config(
    shards: Path, dst: Path | str, stage: str = "classify", *, steps: int = 6, **fields: Any
) -> TrainConfig:
    """`fields` are those of TrainConfig, and `optim__lr` of its groups."""
    own = {name: value for name, value in fields.items() if "__" not in name}
    config = TrainConfig(
        stage=stage,  # type: ignore[arg-type]
        dst=str(dst),
        model=toy_model(shards, stage),
        data=DataConfig(src=str(shards / "splats"), batch_size=16, workers=0, lanes=1),
        optim=OptimConfig(steps=steps, lr=3e-3, warmup_steps=min(2, steps)),
        log=LogConfig(every=1),
        checkpoint=CheckpointConfig(every=4),
        device="cpu",
    )
    for name, value in fields.items():
        if "__" in name:
            group, _, field = name.partition("__")
            own[group] = replace(own.get(group, getattr(config, group)), **{field: value})
    return replace(config, **own)


def toy_patches() -> EncoderConfig:
    return EncoderConfig(
        input="patches", width=WIDTH, layers=2, heads=2, image_size=32, patch_size=8, tokens=16
    )


def images_config(
    shards: Path, dst: Path | str, stage: str = "classify", **fields: Any
) -> TrainConfig:
    """As `toy_config`, on patches of the images that the shards were made of."""
    fields = {"data__src": f"{shards}/images/*.tar"} | fields
    model = replace(toy_model(shards, stage), encoder=toy_patches())
    return toy_config(shards, dst, stage, **{"model": model} | fields)


def curve(dst: Path | str, name: str = "loss") -> dict[int, float]:
    """A figure by step, from the log."""
    return {r["step"]: r[name] for r in read_log(str(dst)) if r["event"] == "step"}


def weights_of(url: str) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{url}/model.safetensors")


def same_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def events(dst: Path | str) -> Sequence[str]:
    return [record["event"] for record in read_log(str(dst))]


class Stop(Exception):
    """In place of a kill, which tests/integration does."""


def stop_after(step: int) -> Any:
    def show(record: Mapping[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == step:
            raise Stop

    return show
