"""Small image datasets for the recipes that run in a minute, made on the spot.

    python -m jobs.recipes.toys shapes images/     1,200 pictures of 24 kinds, 32 px, with captions
    python -m jobs.recipes.toys digits images/     scikit-learn's 1,797 digits, 32 px
    python -m jobs.recipes.toys teacher images/    a CLIP of the shapes' pixels: images/teacher

The first two write tars of 150 samples, as `splatshard convert` reads them: images/train/*.tar and,
of every sixth sample, images/val/*.tar. shapes also writes images/tokenizer, of the captions' words
alone, and the pictures of images/val once more, images/scenes/*.png with images/boxes.csv, for
`splatshard explain --boxes`. The teacher is trained on images/train, 64 wide as the recipes'
students, and saved as transformers does, for `--teacher`.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "white": (240, 240, 240),
    "purple": (150, 50, 180),
}
SHAPES = ("disc", "square", "triangle", "ring")
SIDE = 32
PER_TAR = 150

Sample = tuple[Image.Image, str, int]
"""Picture, caption, label."""


def shapes(count: int, seed: int = 0) -> Iterator[Sample]:
    """`a red disc`, of random size and place on a dark ground; labels: shape x 6 + colour."""
    random = np.random.default_rng(seed)
    colors = list(COLORS)
    for number in range(count):
        shape, color = divmod(int(random.integers(len(SHAPES) * len(colors))), len(colors))
        x, y, r = random.uniform((11, 11, 6), (SIDE - 11, SIDE - 11, 10)).tolist()
        ground = tuple(int(v) for v in random.integers(0, 60, 3))
        image = Image.new("RGB", (SIDE, SIDE), ground)
        _draw(ImageDraw.Draw(image), SHAPES[shape], COLORS[colors[color]], (x, y, r), ground)
        opening = ("a {} {}", "one {} {}", "picture of a {} {}")[number % 3]
        yield image, opening.format(colors[color], SHAPES[shape]), shape * len(colors) + color


def _draw(
    draw: ImageDraw.ImageDraw,
    shape: str,
    color: tuple[int, ...],
    place: tuple[float, float, float],
    ground: tuple[int, ...],
) -> None:
    x, y, r = place
    box = (x - r, y - r, x + r, y + r)
    if shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - 0.9 * r, y + 0.7 * r), (x + 0.9 * r, y + 0.7 * r)], color)
    else:
        draw.ellipse(box, fill=color)
    if shape == "ring":
        draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=ground)


def digits() -> Iterator[Sample]:
    """scikit-learn's handwritten digits, 8 px, enlarged."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    for pixels, label in zip(data.images, data.target.tolist(), strict=True):
        small = Image.fromarray((pixels * 15.9).astype(np.uint8)).convert("RGB")
        yield small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), f"the digit {label}", label


def write_scenes(folder: Path, samples: Sequence[Sample]) -> None:
    """Pictures of shapes as PNG in {folder}/scenes, and where the shapes are in {folder}/boxes.csv:
    all that is not the ground, whose colour is the first pixel's."""
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    lines = ["image,left,top,right,bottom"]
    for number, (image, _, _) in enumerate(samples):
        name = f"{number:06d}.png"
        image.save(folder / "scenes" / name)
        pixels = np.asarray(image)
        shape = (pixels != pixels[0, 0]).any(-1)
        rows, columns = (np.flatnonzero(shape.any(axis)) for axis in (1, 0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        lines.append(",".join([name, *map(str, box)]))
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")


def write_tars(folder: Path, samples: Sequence[Sample], per_tar: int = PER_TAR) -> None:
    """Tars in WebDataset's layout: .png, .txt, .cls."""
    folder.mkdir(parents=True, exist_ok=True)
    for begin in range(0, len(samples), per_tar):
        with tarfile.open(folder / f"{begin // per_tar:05d}.tar", "w") as tar:
            for number, (image, caption, label) in enumerate(samples[begin : begin + per_tar]):
                picture = io.BytesIO()
                image.save(picture, "PNG")
                key = f"{begin + number:06d}"
                _add(tar, f"{key}.png", picture.getvalue())
                _add(tar, f"{key}.txt", caption.encode())
                _add(tar, f"{key}.cls", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tokenizer(folder: Path, captions: Sequence[str]) -> int:
    """A tokenizer of the captions' words, one token each, that transformers loads; its size."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in captions for word in caption.split()})
    names = ["<unk>", *words, "<start>", "<end>"]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    ends = [(name, names.index(name)) for name in ("<start>", "<end>")]
    tokenizer.post_processor = TemplateProcessing("<start> $A <end>", special_tokens=ends)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    )
    wrapped.save_pretrained(str(folder))
    return len(names)


def train_teacher(folder: Path, epochs: int = 20) -> None:
    """{folder}/teacher: a CLIP of the pixels of {folder}/train, as transformers has it."""
    import tempfile
    from dataclasses import replace

    import torch

    from splatshard.jobs.recipes.contrast_shapes import config
    from splatshard.pipeline.models.clip import SplatCLIP
    from splatshard.pipeline.models.export import save_clip
    from splatshard.pipeline.train.loop import train
    from splatshard.pipeline.train.trained import load_trained
    from splatshard.schemas.model import EncoderConfig

    text, augment = config.model.text, config.augment
    assert text is not None, "the recipe is of a CLIP"
    assert augment is not None, "it augments"
    patches = EncoderConfig(
        input="patches", width=64, layers=2, heads=4, tokens=16, patch_size=8, image_size=SIDE
    )
    tokenizer = str(folder / "tokenizer")
    with tempfile.TemporaryDirectory() as run:
        own = replace(
            config,
            model=replace(config.model, encoder=patches, text=replace(text, tokenizer=tokenizer)),
            data=replace(config.data, src=f"{folder}/train/*.tar"),
            augment=replace(augment, dropout=0.0),
            optim=replace(config.optim, epochs=epochs, warmup_steps=min(30, epochs)),
            dst=run,
        )
        result = train(own)
        model = load_trained(run, "auto", torch.device("cpu")).model
        assert isinstance(model, SplatCLIP)
        save_clip(str(folder / "teacher"), model)
    print(f"{folder}/teacher is a CLIP, after {result.steps} steps with a loss of", end=" ")
    print(f"{result.record['loss']:.2f}")
    print(
        f"next: splatshard convert '{folder}/train/*.tar' splats/train --num-gaussians 24 "
        f"--image-size {SIDE} --teacher {folder}/teacher"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=("shapes", "digits", "teacher"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    if options.kind == "teacher":
        train_teacher(options.folder)
        return
    samples = list(shapes(1200) if options.kind == "shapes" else digits())
    write_tars(options.folder / "train", [s for i, s in enumerate(samples) if i % 6])
    write_tars(options.folder / "val", samples[::6])
    if options.kind == "shapes":
        captions = [caption for _, caption, _ in samples]
        size = write_tokenizer(options.folder / "tokenizer", captions)
        print(f"{options.folder}/tokenizer has {size} tokens")
        write_scenes(options.folder, samples[::6])
    print(
        f"next: splatshard convert '{options.folder}/train/*.tar' splats/train "
        "--num-gaussians 24 --image-size 32"
    )


if __name__ == "__main__":
    main()
