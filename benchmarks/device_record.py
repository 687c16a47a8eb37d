"""What the parts of `benchmarks.device_check` share: sizes, the JSON lines, pictures."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.device_predictions import PREDICTIONS
from benchmarks.pictures import made_images


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much each part does; the defaults are for an H200."""

    toy: bool = False
    image: int = 224
    gaussians: tuple[int, ...] = (400, 1600, 4900)
    steps: int = 150
    paper_steps: int = 3000
    pictures: int = 16
    """Different ones; batches repeat them."""
    checked: int = 8
    """Images that are compared with the float64 reference."""
    batch: int = 512
    batches: tuple[int, ...] = (64, 1024)
    repeats: int = 15
    product: int = 8192
    busy_products: int = 150
    tar_images: int = 512
    tar_copies: int = 8
    tar_side: int = 400
    read_samples: int = 300_000
    reader_workers: int = 8
    train_steps: tuple[int, int] = (60, 20)
    """Of the small classifier, and of the one of ViT-B's width."""
    train_batch: int = 256
    layers: int = 12
    width: int = 768
    heads: int = 12


TOY = Size(
    toy=True,
    image=13,
    gaussians=(5,),
    steps=2,
    paper_steps=2,
    pictures=2,
    checked=2,
    batch=2,
    batches=(2,),
    repeats=1,
    product=64,
    busy_products=1,
    tar_images=1,
    tar_copies=2,
    tar_side=24,
    read_samples=40,
    reader_workers=0,
    train_steps=(2, 2),
    train_batch=2,
    layers=1,
    width=16,
    heads=2,
)


class Tell:
    """Adds a line of JSON to the file, and prints it for people."""

    def __init__(self, path: Path, part: str, toy: bool) -> None:
        self.path, self.part, self.toy = path, part, toy

    def __call__(self, name: str, value: float, unit: str, **more: Any) -> None:
        """A figure of this part, beside its prediction; predictions are not of toys."""
        prediction = None if self.toy else PREDICTIONS.get(name)
        record: dict[str, Any] = {"part": self.part, "name": name}
        record |= {"value": value if math.isfinite(value) else None, "unit": unit}
        text = f"{name:36} {value:14,.4g} {unit}"
        if prediction:
            holds = prediction.holds(value)
            record |= {"predicted": [prediction.low, prediction.high], "holds": holds}
            text += f"   predicted {prediction.low:g} to {prediction.high:g}"
            text += "" if holds else "   OUTSIDE"
        self.write(record | more)
        print(f"{self.part:10} {text}", flush=True)

    def write(self, record: dict[str, Any]) -> None:
        """One whole line at a time, so that a part that is killed leaves whole lines."""
        line = json.dumps(record | {"at": round(time.time(), 2)}) + "\n"
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "wb", 0) as file:
            file.write(line.encode())


@cache
def pictures(size: Size) -> Tensor:
    """float32 [pictures, 3, H, W], 0 to 1, on the CPU: made ones, the same on every machine."""
    return made_images(size.pictures, size.image)
