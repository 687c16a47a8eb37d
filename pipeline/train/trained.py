"""A trained model, taken from its checkpoint or saved as a folder (saved.py), and what it says of
samples.

    checkpoint -> model -> shards that fit it, or images -> a vector per sample

Images are cropped to the size that the model reads. Shards fit when their numbers mean what those
of training meant: the cutoff, which decides the picture that the same Gaussians are. The number of
Gaussians may differ, and so may image size and codec; the stem's constants are part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from splatshard.pipeline.data import ImageBatch, ImageDataset, SplatDataset, TrainBatch
from splatshard.pipeline.data.catalog import folder_and_files
from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.classifier import image_config, reads_images
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.rows import shard_metadata_of
from splatshard.pipeline.source.classes import numbered_by
from splatshard.pipeline.storage import fs
from splatshard.pipeline.train.checkpoint import AVERAGE, CONFIG, MODEL, latest, read_checkpoint
from splatshard.pipeline.train.saved import read_config, read_model
from splatshard.schemas.config import DecodeConfig, FitConfig
from splatshard.schemas.errors import CorruptShardError, SplatshardError, UsageError
from splatshard.schemas.model import ModelConfig
from splatshard.schemas.plain import from_dict
from splatshard.schemas.saved import SavedConfig
from splatshard.schemas.shard import ShardManifest

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trained:
    """A model in eval mode on `device`: the checkpoint's at `url`, after `step` steps, or one from
    elsewhere (None). `weights` is a SHA-256 of them; `cutoff` (None: of images), `num_gaussians`,
    `precision`, the classes of images, `classes`, and `class_list`, a digest of those that
    number the labels, are those of training, on `src`. Of a model that was saved src is None, and
    `decode` and `fit` are known without it."""

    model: nn.Module
    config: ModelConfig
    url: str
    step: int | None
    weights: str
    device: torch.device
    cutoff: float | None = None
    num_gaussians: int | None = None
    precision: str = "fp32"
    classes: tuple[str, ...] = ()
    class_list: str = ""
    stage: str = ""
    src: str | None = None
    decode: DecodeConfig | None = None
    fit: FitConfig | None = None

    def computing(self) -> AbstractContextManager[Any]:
        """On a GPU in the precision of training; on a CPU, where that is slow, in fp32."""
        dtype = PRECISIONS.get(self.precision)
        if self.device.type != "cuda" or dtype is None:
            return nullcontext()
        return torch.autocast("cuda", dtype)


@dataclass(frozen=True)
class Data:
    """Batches of samples from `src`; `content` is a digest of it, `class_lists` those of the
    classes that number its labels."""

    src: str
    content: str
    batches: Iterable[TrainBatch | ImageBatch]
    class_lists: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Samples:
    """Of S samples of `src`: vectors float32 [S, D] in main memory, labels int64 [S] (-1 where
    there is none), keys and captions."""

    src: str
    vectors: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str | None]


def load_trained(url: str, weights: str, device: torch.device) -> Trained:
    """The model of a run's dst (its newest checkpoint), of one of its checkpoints, or of a folder
    that `save_pretrained` wrote, which has one kind of weights.

    `weights`: model, ema (their average) or auto, the average where there is one. Raises UsageError
    where there is no such thing, CorruptShardError for a damaged one.
    """
    url = url.rstrip("/")
    if (saved := read_config(url)) is not None:
        return _saved(url, saved, weights, device)
    found = read_checkpoint(url) if fs.exists(f"{url}/{CONFIG}") else latest(url)
    if found is None and fs.exists(f"{url}/{MODEL}"):
        raise UsageError(
            f"{url} has a {MODEL}, and no {CONFIG} of splatshard's: fetch or save the model again"
        )
    if found is None:
        raise UsageError(
            f"{url} has no checkpoint: give the dst of a splatshard train, or a saved "
            "model's folder"
        )
    name = MODEL if weights == "model" else AVERAGE
    if name not in found.files:
        if weights == "ema":
            raise UsageError(
                f"{found.url} has no average of the weights: it was trained without optim.ema; "
                "choose --weights model"
            )
        name = MODEL
    config = found.train_config()
    model = build_model(config.model)
    try:
        model.load_state_dict(found.weights(name))
    except RuntimeError as e:
        raise UsageError(f"{found.url}: {name} does not fit its configuration: {e}") from e
    refuse_not_finite(f"{found.url}/{name}", model)
    if "cutoff" not in found.shards:
        raise CorruptShardError(f"{found.url}: {CONFIG} does not say what it was trained on")
    return Trained(
        model=model.to(device).eval(),
        config=config.model,
        url=found.url,
        step=found.step,
        weights=found.files[name]["sha256"],
        device=device,
        cutoff=found.shards["cutoff"],
        num_gaussians=config.data.num_gaussians,
        precision=config.precision,
        classes=tuple(found.shards.get("classes", ())),
        class_list=found.shards.get("class_list", ""),
        stage=config.stage,
        src=config.data.src,
    )


def _saved(url: str, saved: SavedConfig, weights: str, device: torch.device) -> Trained:
    if weights != "auto":
        raise UsageError(
            f"{url} is a saved model, which has one kind of weights, and {weights} are asked for: "
            "leave it at auto"
        )
    model, digest = read_model(url, saved)
    refuse_not_finite(url, model)
    names = ("step", "cutoff", "num_gaussians", "precision", "classes", "class_list", "stage")
    return Trained(
        model=model.to(device).eval(),
        config=saved.model,
        url=url,
        weights=digest,
        device=device,
        decode=saved.decode,
        fit=saved.fit,
        **{name: getattr(saved, name) for name in names},
    )


def refuse_not_finite(url: str, model: nn.Module) -> None:
    """Raises UsageError where a weight of `model`, which was read from `url`, is no number: all its
    answers would be none, too."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UsageError(
                f"{url}: {name} has values that are not finite, since its training diverged or its "
                "file is damaged: take an earlier checkpoint, or train with a smaller optim.lr"
            )


def config_to_save(trained: Trained) -> SavedConfig:
    """All that `load_trained` needs to know, without the run. Where the shards of training are gone
    and it was not known before, how pictures become Gaussians is not known after."""
    decode, fit = None, None
    if trained.cutoff is not None:
        with suppress(UsageError):
            decode, fit = fit_of_training(trained)
    names = ("step", "cutoff", "num_gaussians", "precision", "class_list", "stage")
    return SavedConfig(
        architectures=(type(trained.model).__name__,),
        model=trained.config,
        decode=decode,
        fit=fit,
        classes=_named(trained),
        **{name: getattr(trained, name) for name in names},
    )


def _named(trained: Trained) -> tuple[str, ...]:
    """The classes of a classifier in the order of its labels: of images as they are known, of
    shards as the file beside them has them, if it has those."""
    number = trained.config.num_classes
    names = trained.classes
    if trained.class_list and trained.src is not None and not names:
        with suppress(SplatshardError):
            names = numbered_by(trained.src.split("::")[0], trained.class_list)
    return names if len(names) == number else ()


def data_of(trained: Trained) -> str:
    """What the model was trained on, or where it lies, if that is not known any more."""
    return trained.url if trained.src is None else trained.src


def fit_of_training(
    trained: Trained, side: int | None = None, number: int | None = None
) -> tuple[DecodeConfig, FitConfig]:
    """How a picture becomes what a model of splats was trained on, neither nested nor pruned nor
    packed; `side`, px of a square, and `number` of Gaussians where they are given. Raises
    UsageError where the shards are gone and these are not."""
    src = data_of(trained).split("::")[0].rstrip("/")
    decode, config = trained.decode, trained.fit
    if decode is None and trained.src is not None:
        decode, config = recipe_of(src)
    if side is not None:
        decode = DecodeConfig(image_size=side)
    number = number or trained.num_gaussians
    if decode is None or (number is None and config is None):
        gone = f"{src}, on whose shards {trained.url} was trained, is not there any more"
        if trained.src is None:
            gone = f"{src} was saved when the shards of its training were gone"
        raise UsageError(
            f"{gone}, and so is how a picture becomes its Gaussians: give splatshard.fit's, or to "
            "explain --image-size and --num-gaussians, as they were converted"
        )
    config = replace(config or FitConfig(), nested="")
    config = replace(config, cutoff=trained.cutoff or config.cutoff)
    if number is not None:
        config = replace(
            config, num_gaussians=number, gaussians_per_megapixel=None, max_gaussians=None
        )
    return decode, config


def recipe_of(src: str) -> tuple[DecodeConfig | None, FitConfig | None]:
    """Decoding and fit of the shards in `src`; None where they cannot be read."""
    try:
        recipe = recipe_in(src)
        return from_dict(DecodeConfig, recipe["decode"]), from_dict(FitConfig, recipe["fit"])
    except (SplatshardError, KeyError, TypeError):
        return None, None


def recipe_in(src: str) -> dict[str, Any]:
    """The recipe of the shards in `src`; empty where they cannot be read."""
    try:
        markers = read_markers(folder_and_files(src.split("::")[0].rstrip("/"))[0]).values()
        return next(m.inputs["recipe"] for m in markers if isinstance(m, ShardManifest))
    except (SplatshardError, StopIteration, KeyError, TypeError):
        return {}


def open_data(trained: Trained, src: str, batch: int) -> Data:
    """The samples of `src`, in order, in batches of `batch`, as the model reads them.

    Raises UsageError for shards where it reads images, or the reverse, and what reading raises.
    """
    return (open_images if reads_images(trained.config) else open_shards)(trained, src, batch)


def open_images(trained: Trained, src: str, batch: int) -> Data:
    """The images of `src`, as convert understands it, cropped to the model's size; class folders
    have the numbers of training. Raises what ImageDataset raises."""
    if trained.num_gaussians is not None:
        raise UsageError(
            f"--num-gaussians {trained.num_gaussians}: {trained.url} is a model that reads images; "
            "leave it out"
        )
    image_size = image_config(trained.config).image_size

    def opened(classes: tuple[str, ...]) -> ImageDataset:
        return ImageDataset(
            src,
            image_size=image_size,
            classes=classes,
            batch_size=batch,
            rank=0,
            world_size=1,
            shuffle=False,
            drop_last=False,
        )

    dataset = opened(())
    folders = {s.ref.labels for s in dataset.sources[0].shards if s.ref.kind == "folder"}
    if trained.classes and folders - {(), trained.classes}:
        dataset = opened(trained.classes)
    return Data(src, dataset.sources[0].content, dataset, frozenset(dataset.class_lists))


def open_shards(trained: Trained, src: str, batch: int) -> Data:
    """The shards of `src`, in order, with the model's number of Gaussians.

    Raises UsageError where they have not so many, or are of another cutoff than those of training,
    and what SplatDataset raises.
    """
    dataset = SplatDataset(
        src,
        batch_size=batch,
        num_gaussians=trained.num_gaussians,
        rank=0,
        world_size=1,
        shuffle=False,
        drop_last=False,
    )
    first = dataset.sources[0].shards[0]  # convert writes no others beside it
    cutoff = shard_metadata_of(first.url, first.format)["cutoff"]
    if cutoff != trained.cutoff:
        raise UsageError(
            f"{src} was fitted with a cutoff of {cutoff} standard deviations, {trained.url} was "
            f"trained on shards with {trained.cutoff}, where the same numbers are other pictures: "
            f"convert it with --cutoff {trained.cutoff}"
        )
    return Data(src, dataset.sources[0].content, dataset, frozenset(dataset.class_lists))


@torch.no_grad()
def samples_of(trained: Trained, data: Data, embed: Callable[[Any], Tensor]) -> Samples:
    """`embed` ([B, D] of a batch) of every sample, each once. Raises CorruptShardError for a sample
    that the model makes no finite numbers of, and what reading raises."""
    vectors: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []
    captions: list[str | None] = []
    for batch in data.batches:
        valid = batch.valid
        with trained.computing():
            found = embed(batch.to(trained.device)).float().cpu()[valid]
        kept = [i for i, good in enumerate(valid.tolist()) if good]
        keys += [batch.keys[i] for i in kept]
        captions += [batch.captions[i] for i in kept]
        if not bool(found.isfinite().all()):
            bad = int((~found.isfinite().all(1)).int().argmax())
            key = keys[len(keys) - len(found) + bad]
            raise CorruptShardError(
                f"{data.src}: the model makes numbers of sample {key} "
                "that are not finite: run splatshard verify on it"
            )
        vectors.append(found)
        labels.append(batch.labels[valid])
    if not keys:
        raise UsageError(f"{data.src} has no samples to evaluate on")
    return Samples(data.src, torch.cat(vectors), torch.cat(labels), keys, captions)
