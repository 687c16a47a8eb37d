"""A converted source with all that `splatshard view` has to show, for its tests."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import write_plan
from splatshard.jobs.pages.view_data import View
from splatshard.jobs.pages.view_server import answer, open_server
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig, PackConfig
from tests.make import encode, photo, write_tar

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&amp;"
)
BUDGETS = (6, 12, 24)
SHARDS, ROWS, BROKEN = ("a", "b"), 5, 3
"""Every shard has so many rows, of which the one numbered BROKEN is no image."""
CONFIG = ConvertConfig(
    decode=DecodeConfig(image_size=32, resize="shortest"),
    fit=FitConfig(num_gaussians=BUDGETS[-1], nested=",".join(map(str, BUDGETS)), steps=2),
    pack=PackConfig(codec="balanced"),
    backend="cpu",
)


def make_source(src: Path) -> None:
    """A tar for each shard: pictures with captions, the first one's is hostile."""
    for number, name in enumerate(SHARDS):
        members = []
        for row in range(ROWS):
            image = (
                encode(photo(48, 40, 10 * number + row), "PNG") if row != BROKEN else b"no image"
            )
            caption = HOSTILE if row == 0 else f"a {name} photograph, number {row}"
            members += [(f"{name}{row}.png", image), (f"{name}{row}.txt", caption.encode())]
        write_tar(src / f"{name}.tar", members)


def convert(src: Path, dst: Path, config: ConvertConfig = CONFIG) -> None:
    """As the job does it, without Ray."""
    dst.mkdir()
    refs = list_shards(f"{src}/*.tar")
    for ref in refs:
        convert_shard(ref, config, str(dst), select_backend("cpu"))
    plan = make_plan(refs, read_markers(str(dst)), config, str)
    write_plan(str(dst), planned(refs, plan, config))


def ask(view: View, path: str) -> Any:
    """What is answered: JSON, or the bytes of a picture."""
    kind, status, body = answer(view, path)
    assert status == 200, body
    return body if kind == "image/png" else json.loads(body)


def refusal(view: View, path: str) -> tuple[int, str]:
    """HTTP status and error of what is not answered."""
    _, status, body = answer(view, path)
    assert status != 200
    return status, json.loads(body)["error"]


def pixels_of(png: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)))


@contextmanager
def serving(view: View) -> Iterator[int]:
    """The port at which `view` is served."""
    with open_server(view, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
