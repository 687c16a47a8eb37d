"""The explain job's input: crops as convert makes them, their Gaussians, the boxes within.

A classifier of splats gets Gaussians that are fitted here, as those of the run's shards were (size,
steps, start, cutoff), but neither nested, pruned nor packed; GViT predicts its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from splatshard.jobs.cli.text import say
from splatshard.jobs.pages.explain_boxes import boxes_of, read_boxes
from splatshard.pipeline.storage.fs import absolute
from splatshard.schemas.config import DecodeConfig, FitConfig
from splatshard.schemas.errors import SampleError, SourceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from splatshard.pipeline.evaluation.explain import Box
    from splatshard.pipeline.kernels.backend import Backend
    from splatshard.pipeline.source.decode import DecodedImage
    from splatshard.pipeline.splats import Splats
    from splatshard.pipeline.train.trained import Trained

    Take = Callable[[Tensor], tuple[Splats, Tensor]]
    """Pixels [1, 3, S, S], 0 to 1, to the splats that the model reads and their rendering, [1, 3,
    S, S]."""


def gaussians_of(trained: Trained, side: int | None, number: int | None) -> tuple[int, Take]:
    """Side of the crops in px, and what takes them; `side` and `number` of Gaussians: other ones
    than those of training. Raises UsageError where these cannot be known."""
    from splatshard.pipeline.kernels.select import select_backend
    from splatshard.pipeline.train.trained import data_of, fit_of_training

    if trained.config.gvit is not None:
        return predicting(trained, side, number)
    backend = select_backend("triton" if trained.device.type == "cuda" else "cpu")
    decode, config = fit_of_training(trained, side, number)
    if decode.resize != "square":
        raise UsageError(
            f"{data_of(trained)}, on whose shards {trained.url} was trained, was converted with "
            f"--resize {decode.resize}, and explain makes squares: give --image-size, their side "
            "in px"
        )
    return decode.image_size, lambda pixels: fitted(pixels, config, backend)


def predicting(trained: Trained, side: int | None, number: int | None) -> tuple[int, Take]:
    """As `gaussians_of`, for GViT."""
    import torch

    from splatshard.pipeline.models.gaussian_space import render, splats_from_parameters
    from splatshard.pipeline.models.gvit import GViT

    space = trained.config.gvit
    assert space is not None, "the config is of a GViT"
    model, size = cast(GViT, trained.model), space.predictor.image_size
    if side not in (None, size):
        raise UsageError(f"--image-size {side}: the model reads {size} px: leave it out")

    @torch.no_grad()
    def predicted(pixels: Tensor) -> tuple[Splats, Tensor]:
        g = model.predictor(pixels, None, number)
        return splats_from_parameters(g, size, size, space), render(g, size, size, space)

    return size, predicted


def fitted(pixels: Tensor, config: FitConfig, backend: Backend) -> tuple[Splats, Tensor]:
    """Splats and rendering of pixels [1, 3, S, S], 0 to 1."""
    import torch

    from splatshard.pipeline.fitting.recipe import fit_images

    height, width = pixels.shape[2:]
    splats, _ = fit_images(pixels, config, backend)
    with torch.no_grad():
        return splats, backend.render(splats, height, width, config.cutoff)


def read_image(url: str, size: int) -> DecodedImage:
    """The crop that convert makes of an image file. Raises UsageError for what cannot be read."""
    from splatshard.pipeline.source.decode import decode
    from splatshard.pipeline.source.formats import READ
    from splatshard.pipeline.storage import fs

    try:
        with fs.open_read(absolute(url)) as stream:
            return decode(stream.read(), url, DecodeConfig(image_size=size))
    except (SourceError, SampleError, OSError) as e:
        raise UsageError(f"{e}: give an image file ({', '.join(f.name for f in READ)})") from e


def boxes_in_crops(url: str, images: dict[str, DecodedImage], size: int) -> dict[str, list[Box]]:
    """The boxes of each image, px of its crop; none of an image whose boxes the crop cut off.
    Raises UsageError for an image without."""
    from splatshard.pipeline.evaluation.explain import box_in_crop

    boxes = read_boxes(url)
    found: dict[str, list[Box]] = {}
    for image, decoded in images.items():
        width, height = decoded.original_width, decoded.original_height
        given = boxes_of(boxes, image, url)
        if outside := [b for b in given if b[2] > width + 1 or b[3] > height + 1 or min(b) < -1]:
            raise UsageError(
                f"--boxes {url}: the box {outside[0]} of {image} is not within its "
                f"{width}x{height} px: give px of the original"
            )
        moved = [box_in_crop(box, width, height, size) for box in given]
        if kept := [box for box in moved if box is not None]:
            found[image] = kept
        else:
            say(f"{image}: its box is not in the crop, so it has no part in the pointing game")
    return found
