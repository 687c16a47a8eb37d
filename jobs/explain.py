"""The explain job: what a classifier looks at in images, Gaussian by Gaussian.

    image -> crop -> Gaussians, fitted or predicted -> scores -> {name}.png, {name}.json

For classifiers of splats, whose Gaussians are fitted here as those of the run's shards were (size,
steps, number, cutoff; not pruned, not packed), and for GViT, which predicts its own.
pipeline/evaluation/explain.py says what the scores are. With --boxes it plays the pointing game:
how often the largest value of an image's map lies in the object's box.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from splatshard.jobs.cli.command import EXIT_OK, parse, run
from splatshard.jobs.cli.options import (
    USUAL_ENVIRONMENT,
    Checkpoint,
    Debug,
    Device,
    Json,
    Number,
    StorageOptions,
    Weights,
    torch_device,
    use_storage_options,
)
from splatshard.jobs.cli.text import count, print_json, say
from splatshard.jobs.destination.class_texts import lines_of
from splatshard.jobs.destination.plan_file import write_text
from splatshard.jobs.pages.explain_images import boxes_in_crops, gaussians_of, read_image
from splatshard.pipeline.storage.fs import absolute
from splatshard.schemas.config import DecodeConfig, FitConfig
from splatshard.schemas.errors import SplatshardError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from splatshard.jobs.pages.explain_images import Take
    from splatshard.pipeline.evaluation.explain import Box, Explanation
    from splatshard.pipeline.source.decode import DecodedImage
    from splatshard.pipeline.train.trained import Trained

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Draw what a classifier of splats looks at: attention and class gradient of each Gaussian.

    Writes {name}.png and {name}.json for each image.
    """

    ckpt: Checkpoint
    images: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="(at least one)"),
    ]
    """Image files."""
    label: Number = None
    """The class that is explained, from 0; default: the likeliest of each image."""
    boxes: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """The objects' boxes, for the pointing game: CSV with the columns image, left, top, right,
    bottom in px of the original, or JSON lines with these fields."""
    classnames: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Names of the classes, a line each; empty: looked for beside the training data."""
    num_gaussians: Number = None
    """Gaussians per image; default: as in training."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="PX", help_behavior_hint="")] = None
    """Side of the crop that is fitted; default: that of the training shards."""
    weights: Weights = "auto"
    device: Device = "auto"
    output: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Where results go; empty: explain/STEP beside the run's checkpoints."""
    storage_options: Annotated[StorageOptions, USUAL_ENVIRONMENT] = ""
    json: Annotated[
        Json, tyro.conf.arg(help="End standard output with a summary as one JSON line.")
    ] = False
    debug: Debug = False

    def __post_init__(self) -> None:
        if not self.images:
            raise UsageError("IMAGE is missing: give at least one image file")
        if self.label is not None and self.label < 0:
            raise UsageError(f"--label {self.label}: classes are numbered from 0")
        if self.image_size is not None:
            DecodeConfig(image_size=self.image_size)
        if self.num_gaussians is not None:
            FitConfig(num_gaussians=self.num_gaussians)
        names: dict[str, str] = {}
        for image in self.images:
            if (other := names.setdefault(name_of(image), image)) is not image:
                raise UsageError(
                    f"{other} and {image} would both be written to {name_of(image)}.png: explain "
                    "them one after the other, each with its own --output"
                )


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard explain argv`."""
    return run(lambda: explain(parse(ExplainOptions, "explain", argv)))


def explain(options: ExplainOptions) -> int:
    """The whole job; returns the exit code."""
    use_storage_options(options.storage_options)
    from splatshard.pipeline.train.trained import load_trained

    trained = load_trained(absolute(options.ckpt), options.weights, torch_device(options.device))
    classes = check_model(trained, options)
    names = classnames_of(trained, options, classes)
    size, take = gaussians_of(trained, options.image_size, options.num_gaussians)
    images = {image: read_image(image, size) for image in options.images}
    boxes = boxes_in_crops(options.boxes, images, size) if options.boxes else {}
    output = absolute(options.output).rstrip("/") if options.output else output_of(trained)
    results: dict[str, Result] = {}
    for image, decoded in images.items():
        results[image] = explained(trained, decoded, take, options.label, names, boxes.get(image))
        drawing = results[image].pop("picture")
        results[image] |= {"image": image, "checkpoint": trained.url, "step": trained.step}
        write(output, name_of(image), results[image], drawing)
        one = results[image]
        say(f"{image}: {one['class']} {one['probability']:.3f}, {one['psnr']:.2f} dB")
    summary = summary_of(results, output)
    tell_pointing(summary)
    say(f"pictures are in {output}")
    if options.json:
        print_json(summary)
    return EXIT_OK


def check_model(trained: Trained, options: ExplainOptions) -> int:
    """Number of classes. Raises UsageError for a model that is no classifier of Gaussians, or has
    no class --label."""
    config = trained.config
    if config.num_classes is None:
        raise UsageError(
            f"{trained.url} is no classifier, and a class is what is explained: give a checkpoint "
            "of a run with stage classify"
        )
    if config.encoder.input != "splats":
        raise UsageError(
            f"{trained.url} is a classifier of patches, which has no Gaussians: explain is for "
            "classifiers of splats and for GViT"
        )
    if options.label is not None and options.label >= config.num_classes:
        raise UsageError(
            f"--label {options.label}: the model has {config.num_classes} classes, choose 0 to "
            f"{config.num_classes - 1}"
        )
    return config.num_classes


def name_of(image: str) -> str:
    """What an image's files are called."""
    last = image.rstrip("/").rpartition("/")[2]
    return last.rpartition(".")[0] or last


def output_of(trained: Trained) -> str:
    """`explain/{step}` beside the run's checkpoints: those are deleted in time."""
    run_dst, _, step = trained.url.rpartition("/checkpoints/")
    return f"{run_dst}/explain/{step}" if run_dst else absolute("explain")


def classnames_of(trained: Trained, options: ExplainOptions, classes: int) -> list[str]:
    """A name for each class: its number where no file says another. Raises UsageError for names
    of another number of classes."""
    from splatshard.pipeline.evaluation.class_texts import CLASSNAMES
    from splatshard.pipeline.train.trained import data_of

    src = data_of(trained).split("::")[0].rstrip("/")
    known = trained.src is None and not options.classnames  # of a saved model, or not at all
    try:
        names = [] if known else lines_of(options.classnames, CLASSNAMES, src)
    except SplatshardError:
        if options.classnames:
            raise
        names = []  # the training data are not there any more
    if names and len(names) != classes:
        if not options.classnames:
            return [f"class {i}" for i in range(classes)]
        raise UsageError(
            f"--classnames {options.classnames} has {count(len(names), 'name')}, the model has "
            f"{classes:,} classes: give a line for each"
        )
    names = names or list(trained.classes)
    return names if len(names) == classes else [f"class {i}" for i in range(classes)]


# One image


def explained(
    trained: Trained,
    decoded: DecodedImage,
    take: Take,
    label: int | None,
    names: list[str],
    boxes: list[Box] | None,
) -> Result:
    """All that is written of an image; under `picture` the PNG. Raises UsageError where the model
    says nothing finite of it."""
    import torch

    from splatshard.jobs.pages.explain_picture import sheet
    from splatshard.pipeline.convert import planes
    from splatshard.pipeline.evaluation import explain as explain_module
    from splatshard.pipeline.kernels.select import select_backend
    from splatshard.pipeline.psnr import psnr

    backend = select_backend("triton" if trained.device.type == "cuda" else "cpu")
    space = trained.config.gvit
    cutoff = (space.cutoff if space is not None else trained.cutoff) or FitConfig().cutoff
    pixels = planes(torch.from_numpy(decoded.pixels)[None]).to(trained.device)
    splats, rendering = take(pixels)
    size = pixels.shape[-1]
    found = explain_module.explain(cast(Any, trained.model), splats, size, size, label)
    if not bool(found.logits.isfinite().all()):
        raise UsageError(f"{trained.url}: the model's logits are not finite: its weights are bad")
    maps = {
        name: explain_module.saliency_map(
            found.splats, getattr(found, name), size, size, cutoff, backend
        )
        for name in explain_module.SCORES
    }
    result = figures(found, names) | {"psnr": psnr(rendering, pixels).item(), "size": size}
    result["maximum"] = {name: place_of(map_HW) for name, map_HW in maps.items()}
    if boxes:
        result["boxes"] = boxes
        result["hit"] = {name: explain_module.pointing_hit(x, boxes) for name, x in maps.items()}
        result["chance"] = explain_module.covered(boxes, size, size).float().mean().item()
    image, rendered = (x[0].permute(1, 2, 0).cpu().numpy() for x in (pixels, rendering))
    result["picture"] = sheet(
        image,
        rendered,
        found.splats,
        found.attention.cpu().numpy(),
        found.gradient.cpu().numpy(),
        maps["gradient"].cpu().numpy(),
        title_of(result),
        boxes or [],
    )
    return result


def figures(found: Explanation, names: list[str]) -> Result:
    """The numbers of an explanation, JSON-ready; six digits are enough for scores."""

    def rounded(values: Tensor) -> list[Any]:
        return json.loads(
            json.dumps(values.tolist()), parse_float=lambda x: float(f"{float(x):.6g}")
        )

    probabilities = found.probabilities
    best = found.logits.argsort(descending=True, stable=True)[:5].tolist()
    return {
        "label": found.label,
        "class": names[found.label],
        "logit": found.logits[found.label].item(),
        "probability": probabilities[found.label].item(),
        "predicted": best[0],
        "top5": [{"class": names[i], "probability": probabilities[i].item()} for i in best],
        "attention_elsewhere": found.elsewhere.sum().item(),
        "attention_kind": "last block" if len(found.elsewhere) == 1 else "rollout",
        "gaussians": {
            "means": rounded(found.splats.means[0]),
            "cholesky": rounded(found.splats.cholesky[0]),
            "colors": rounded(found.splats.colors[0]),
            "gradient": rounded(found.gradient),
            "contribution": rounded(found.contribution),
            "attention": rounded(found.attention),
        },
    }


def place_of(map_HW: Tensor) -> list[float]:
    """x, y in px of the largest value of a map."""
    row, column = divmod(int(map_HW.flatten().argmax()), map_HW.shape[1])
    return [column + 0.5, row + 0.5]


def title_of(result: Result) -> str:
    """The picture's first line."""
    title = f"{result['class']}: {100 * result['probability']:.1f} %"
    if result["predicted"] != result["label"]:
        best = result["top5"][0]
        title += f"   (likeliest: {best['class']}, {100 * best['probability']:.1f} %)"
    number = len(result["gaussians"]["gradient"])
    return f"{title}   {number:,} Gaussians, {result['psnr']:.1f} dB"


def write(output: str, name: str, result: Result, drawing: bytes) -> None:
    """The two files of an image. Raises StorageError and UnavailableError."""
    from splatshard.pipeline.storage.fs import write_bytes

    write_bytes(f"{output}/{name}.png", drawing)
    write_text(output, f"{name}.json", json.dumps(result, sort_keys=True) + "\n")


# All images


def summary_of(results: dict[str, Result], output: str) -> Result:
    """Classes of the images and, where there were boxes, the pointing game."""
    from splatshard.pipeline.evaluation.explain import SCORES

    short = ("label", "class", "probability", "predicted", "psnr", "hit")
    images = {
        image: {name: result[name] for name in short if name in result}
        for image, result in results.items()
    }
    summary: Result = {"output": output, "images": images}
    if played := [result for result in results.values() if "hit" in result]:
        hits = {name: sum(r["hit"][name] for r in played) / len(played) for name in SCORES}
        chance = sum(r["chance"] for r in played) / len(played)
        summary["pointing"] = {"images": len(played), "hits": hits, "chance": chance}
    return summary


def tell_pointing(summary: Result) -> None:
    """The pointing game's result, for people."""
    if "pointing" not in summary:
        return
    game = summary["pointing"]
    shares = ", ".join(f"{100 * share:.1f} % by {name}" for name, share in game["hits"].items())
    say(
        f"pointing game, {count(game['images'], 'image')}: {shares}; "
        f"chance {100 * game['chance']:.1f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
