"""The demo job: real photographs to splat shards and a report, with nothing but this machine.

    splatshard demo DIR          `make demo` in a checkout

The photographs are those inside the scikit-image wheel, so nothing else is downloaded. Crops of
them become a DataComp-shaped input, 4 tars of 16 samples plus one whose download broke off, since
real datasets have those. Then convert, verify and report run as from the command line.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import random
import shlex
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from splatshard.jobs import convert, report, verify
from splatshard.jobs.cli.command import EXIT_OK, parse, run
from splatshard.jobs.cli.text import count, duration, say
from splatshard.schemas.errors import UsageError

PHOTOGRAPHS = {
    "astronaut.png": "an astronaut in an orange suit in front of a flag and a shuttle model",
    "chelsea.png": "a tabby cat looking past the camera",
    "coffee.png": "a cup of coffee with a spoon on a wooden table",
    "rocket.jpg": "a rocket on its launch pad at dusk",
    "motorcycle_left.png": "a motorcycle in a garage, seen from the left",
    "motorcycle_right.png": "a motorcycle in a garage, seen from the right",
    "hubble_deep_field.jpg": "a field of distant galaxies",
    "retina.jpg": "the retina of a human eye",
}
"""Files of skimage/data that are in the wheel, and what they show."""

SHARDS = 4
CROPS = 8
"""Per photograph: 64 samples in all."""

SIDE_PX = 320
JPEG_QUALITY = 92

Sample = tuple[str, bytes, str]
"""Key, image file, caption."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Convert 64 crops of real photographs, verify the shards and write the report."""

    dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DIR]")] = "demo"
    """Folder for the input (DIR/input) and the shards (DIR/splats)."""
    num_gaussians: int = 400
    """Gaussians per image."""
    steps: int = 100
    """Optimisation steps per image."""
    image_size: int = 224
    """Side of the fitted crop in px."""


def main(argv: list[str] | None = None) -> int:
    """Exit code of the first job that fails, 0 when all went well."""
    return run(lambda: demo(parse(DemoOptions, "demo", argv)))


def demo(options: DemoOptions) -> int:
    """Build the input, then convert, verify, report."""
    started = time.monotonic()
    folder = Path(options.dir)
    tars = build_input(folder / "input")
    say(f"input: {count(len(tars), 'tar')} in {folder / 'input'}")
    pattern = str(folder / "input" / f"{{{tars[0].stem}..{tars[-1].stem}}}.tar")
    splats = str(folder / "splats")
    flags = [
        f"--num-gaussians={options.num_gaussians}",
        f"--steps={options.steps}",
        f"--image-size={options.image_size}",
    ]
    for job, arguments in (
        (convert, [pattern, splats, *flags, "--overwrite-stale"]),
        (verify, [splats]),
        (report, [splats]),
    ):
        name = job.__name__.rpartition(".")[2]
        say(f"\n$ splatshard {name} {shlex.join(arguments)}")
        code = job.main(arguments)
        if code != EXIT_OK:
            return code
    page = (folder / "splats" / "report.html").resolve()
    say(f"\ndemo done in {duration(time.monotonic() - started)}. Open {page.as_uri()}")
    return EXIT_OK


def build_input(folder: Path) -> list[Path]:
    """The demo tars: the same bytes every time; one that is already right is left alone."""
    samples = list(crops())
    tars = []
    for shard in range(SHARDS):
        mine = samples[shard::SHARDS]
        if shard == SHARDS - 1:
            key, image, caption = mine[0]
            mine.append((f"{int(key) + 900:012d}", image[: len(image) // 2], caption))
        path = folder / f"{shard:08d}.tar"
        write_if_different(path, tar_bytes(mine))
        tars.append(path)
    return tars


def crops() -> Iterator[Sample]:
    """CROPS squares of each photograph, at seeded places and sizes."""
    chance = random.Random(0)
    for number, (name, caption) in enumerate(PHOTOGRAPHS.items()):
        with Image.open(photograph(name)) as opened:
            photo = opened.convert("RGB")
        for crop in range(CROPS):
            side = round(min(photo.size) * chance.uniform(0.45, 1.0))
            left = chance.randint(0, photo.width - side)
            top = chance.randint(0, photo.height - side)
            square = photo.crop((left, top, left + side, top + side))
            if side > SIDE_PX:
                square = square.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            square.save(buffer, "JPEG", quality=JPEG_QUALITY)
            yield f"{number * CROPS + crop:012d}", buffer.getvalue(), caption


def photograph(name: str) -> Path:
    """A file of the installed scikit-image. Raises UsageError when it is not there."""
    found = importlib.util.find_spec("skimage")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / "data" / name
        if path.exists():
            return path
    raise UsageError(f"the demo needs {name} of scikit-image: pip install scikit-image")


def tar_bytes(samples: list[Sample]) -> bytes:
    """A DataComp shard: jpg, txt and json per sample, uid = 32 hex digits of the image's hash."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, image, caption in samples:
            record = {
                "uid": hashlib.sha256(image).hexdigest()[:32],
                "key": key,
                "caption": caption,
                "url": None,
                "status": "success",
                "sha256": hashlib.sha256(image).hexdigest(),
            }
            members = (("jpg", image), ("txt", caption.encode()))
            for extension, data in (*members, ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_if_different(path: Path, data: bytes) -> None:
    """Keeps the modification time of a file that already holds `data`."""
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
