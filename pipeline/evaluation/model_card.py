"""README.md of a saved model: its model card, headed as Hugging Face's hub reads it.

What is told of its training is what the checkpoint, the run's log and its evaluations say; names of
folders are told without where they lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from splatshard.pipeline.models.classifier import reads_images
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.signed import unsigned
from splatshard.pipeline.train.checkpoint import AVERAGE, Checkpoint, read_checkpoint
from splatshard.pipeline.train.log import read_log
from splatshard.pipeline.train.trained import Trained, recipe_in
from splatshard.schemas.errors import SplatshardError
from splatshard.schemas.saved import SavedConfig
from splatshard.schemas.train import AugmentConfig, OptimConfig

CARD = "README.md"
TAGS = ("splatshard", "gaussian-splatting", "2d-gaussians")
OF_THE_MACHINE = {
    *("event", "step", "time", "epoch", "lr", "grad_norm", "images_per_s", "data_wait_share"),
    *("memory_bytes", "eta_s"),
}
"""What a step's record has beside the figures of its batch."""

Rows = list[tuple[str, str]]


def model_card(name: str, trained: Trained, config: SavedConfig) -> str:
    """The card of `trained`, saved in a folder `name`; of one that was saved before its card."""
    if trained.src is None:
        url = f"{trained.url}/{CARD}"
        return unsigned(fs.read_bytes(url).decode("utf-8", "replace")) if fs.exists(url) else ""
    found = read_checkpoint(trained.url)
    training, results = rows_of_training(trained, found), rows_of_results(trained)
    parts = [head(config), f"# {name}", what(config), "## How to use it", use(config)]
    parts += ["## How it was trained", table(("", ""), training)]
    if results:
        parts += ["## Results", table(("data", "result"), results)]
    return "\n\n".join(parts) + "\n"


def head(config: SavedConfig) -> str:
    """The YAML."""
    if config.model.num_classes is not None:
        task = "image-classification"
    else:
        text = config.model.text is not None
        task = "zero-shot-image-classification" if text else "image-feature-extraction"
    lines = ["# license: yours to choose, as the hub names it (apache-2.0, cc-by-4.0, other, ...)"]
    lines += ["library_name: splatshard", f"pipeline_tag: {task}", f"tags: [{', '.join(TAGS)}]"]
    return "\n".join(["---", *lines, "---"])


def what(config: SavedConfig) -> str:
    model, width = config.model, config.model.encoder.width
    reads = "images" if reads_images(model) else "images as 2D Gaussians"
    text = f"A {config.architectures[0]} of splatshard: "
    if model.num_classes is not None:
        some = ", ".join(map(code, config.classes[:5]))
        more = ", ..." if len(config.classes) > 5 else ""
        named = f" ({some}{more})" if some else ""
        return f"{text}{reads} to {model.num_classes} classes{named}, and embeddings of {width}."
    both = f"{reads} and texts" if model.text is not None else reads
    return f"{text}{both} to embeddings of {model.embed_dim}, unit vectors."


def use(config: SavedConfig) -> str:
    lines = [
        "import splatshard",
        "",
        'embed = splatshard.encoder("USER/NAME")  # this repository, or a folder with its files',
        'vectors = embed(["photo.jpg"])',
    ]
    if config.model.text is not None:
        lines.append('likeness = vectors @ embed.encode_text(["a photo of a cat"]).T')
    if config.model.num_classes is not None:
        lines.append('logits = embed.logits(["photo.jpg"])')
        if config.classes:
            lines.append("likeliest = [embed.trained.classes[i] for i in logits.argmax(1)]")
    return "\n".join(["```python", *lines, "```"])


def code(name: str) -> str:
    """A name as Markdown's code, since it may hold what Markdown or HTML reads."""
    return f"`{' '.join(name.replace('`', chr(39)).split())}`"


def cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(heads: tuple[str, str], rows: Rows) -> str:
    cells = [heads, ("---", "---"), *((cell(name), cell(value)) for name, value in rows)]
    lines = (f"| {name} | {value} |" for name, value in cells)
    return "\n".join(lines)


def rows_of_training(trained: Trained, found: Checkpoint) -> Rows:
    config = found.train_config()
    optim, data = config.optim, config.data
    average = trained.weights == found.files.get(AVERAGE, {}).get("sha256")
    rows = [("stage", config.stage), ("data", " and ".join(map(short, data.src.split("::"))))]
    rows += list(rows_of_inputs(trained, found))
    began = [short(name) for name in (config.init_clip, config.init) if name]
    rows += [
        ("began with", ", then ".join(began) or "random weights"),
        ("steps", f"{found.step:,}, each of {data.batch_size:,} samples"),
        ("optimiser", f"AdamW, rate {optim.lr:g}, weight decay {optim.weight_decay:g}"),
        ("trained parameters", trainable(optim)),
        ("augmentation", augmentation(config.augment)),
        ("precision", config.precision),
        ("weights", f"their average (decay {optim.ema:g})" if average else "of the last step"),
    ]
    return rows + [(name, f"{value:.4g}, in training") for name, value in last_figures(trained)]


def rows_of_inputs(trained: Trained, found: Checkpoint) -> Iterator[tuple[str, str]]:
    """Of shards, what they were converted with."""
    if trained.cutoff is None:
        return
    recipe = recipe_in(trained.src or "") or {}
    number = trained.num_gaussians or recipe.get("fit", {}).get("num_gaussians")
    dense = recipe.get("fit", {}).get("gaussians_per_megapixel")
    if dense and not trained.num_gaussians:
        number = f"{dense:g} per megapixel"
    yield "Gaussians", f"{number or '?'} an image, cutoff {trained.cutoff:g} standard deviations"
    if recipe:
        decode = recipe["decode"]
        size = "whole" if decode["resize"] == "none" else f"{decode['image_size']} px"
        yield "image size", f"{size} ({decode['resize']})"
        yield "codec", recipe["pack"]["codec"]
    if teacher := found.shards.get("teacher"):
        yield "teacher", short(str(teacher.get("model", "")))


def trainable(config: OptimConfig) -> str:
    """Patterns of the parameters that were trained."""
    if config.trainable == ("*",):
        return "all"
    return ", ".join(f"`{name}`" for name in (*config.trainable, *config.later))


def augmentation(config: AugmentConfig | None) -> str:
    """Its fields that differ from nothing done."""
    if config is None:
        return "none"
    changed = [f for f in fields(config) if getattr(config, f.name) != f.default]
    return ", ".join(f"{f.name} {getattr(config, f.name)}" for f in changed) or "none"


def last_figures(trained: Trained) -> list[tuple[str, float]]:
    """Loss and metrics of the last step that the log has before the checkpoint."""
    run = trained.url.rpartition("/checkpoints/")[0]
    try:
        steps = [r for r in read_log(run) if r["event"] == "step" and r["step"] <= trained.step]
    except (SplatshardError, ValueError, KeyError):
        return []
    last = steps[-1].items() if steps else ()
    return [(k, v) for k, v in last if k not in OF_THE_MACHINE and isinstance(v, int | float)]


def rows_of_results(trained: Trained) -> Rows:
    """What `splatshard evaluate` wrote of these weights beside the run."""
    run, _, step = trained.url.rpartition("/checkpoints/")
    rows: Rows = []
    for url in sorted(fs.find(f"{run}/evaluation/{step}")) if run else ():
        result = result_in(url)
        if result.get("inputs", {}).get("weights") == trained.weights:
            main = result["main"]
            value = f"{result['task']}, {main['metric']} {main['value']:.4f}"
            rows.append((result["dataset"], f"{value} ({result['samples']:,} samples)"))
    return rows


def result_in(url: str) -> dict[str, Any]:
    """A result's file; empty for another."""
    try:
        found = json.loads(fs.read_bytes(url))
    except (ValueError, SplatshardError):
        return {}
    return found if isinstance(found, dict) and "main" in found else {}


def short(place: str) -> str:
    """A name on the hub as it is; of a folder's path or URL the last part."""
    place = place.partition("?")[0].rstrip("/")
    return place.rpartition("/")[2] if "://" in place or place.startswith(("/", ".")) else place
