"""What a conversion compiles on a CPU, compiled while Ray starts: once, on several cores.

numba compiles a kernel when it is first called, and each worker would do that by itself, one kernel
after another. Here a process for each part goes through a small picture and leaves what it compiled
in numba's cache, from which the workers load it; they wait until the last of these processes has
ended. One that fails is no harm: then workers compile.

Each part leaves a marker, so that later jobs start none. It names the files in numba's cache and
goes by the kernels' sources, numba and the choices that decide what is compiled. Neither torch nor
numba is imported here: a driver needs neither.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from splatshard.pipeline.kernels.compiled import KERNELS, load_compiler, private_folder
from splatshard.pipeline.storage.lock import lock
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.plain import from_dict, to_dict
from splatshard.schemas.splats import PLANAR

if TYPE_CHECKING:
    from torch import Tensor

    from splatshard.pipeline.kernels.backend import Backend
    from splatshard.pipeline.splats import Splats

LOCK = "compiling.lock"
SIDE = 32
"""Pixels of the picture that is fitted; its size decides nothing that is compiled."""


@contextmanager
def compiled_ahead(config: ConvertConfig) -> Iterator[None]:
    """Compile what `config` needs while the block runs, where that is still to be done."""
    folder = private_folder() if config.backend in ("auto", "cpu") else None
    process = None if folder is None or is_compiled(config, folder) else started(config, folder)
    try:
        yield
    finally:
        if process:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def await_compiled() -> None:
    """Returns once nobody compiles ahead on this machine, for this user."""
    folder = private_folder()
    if folder and (folder / LOCK).exists():
        with open(folder / LOCK, "ab") as file:
            lock(file.fileno(), wait=True)


def is_compiled(config: ConvertConfig, folder: Path) -> bool:
    """Whether all parts have left their markers in `folder`, and what these name is there."""
    try:
        markers = [json.loads(path.read_bytes()) for path in markers_of(config, folder).values()]
    except (OSError, ValueError):
        return False
    return all(Path(name).exists() for marker in markers for name in marker)


def markers_of(config: ConvertConfig, folder: Path) -> dict[str, Path]:
    """The marker of each part."""
    here = Path(__file__).parent
    sources = [path for part in ("kernels", "codec") for path in sorted(here.glob(f"{part}/*.py"))]
    own = {name: value for name, value in os.environ.items() if name.startswith("NUMBA_")}
    own.pop("NUMBA_NUM_THREADS", None)  # workers have another
    fit = config.fit
    decides = (
        [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources],
        (sys.version, version("numba"), sorted(own.items())),
        (config.backend, config.pack.codec, fit.init, bool(fit.nested)),
    )
    digest = sha256(repr(decides).encode()).hexdigest()[:16]
    return {part: folder / f"{part}-{digest}.json" for part in PARTS}


def started(config: ConvertConfig, folder: Path) -> subprocess.Popen[bytes] | None:
    """A process whose children compile; all of them hold the lock. None where another job's do."""
    with open(folder / LOCK, "ab") as file:
        try:
            lock(file.fileno(), wait=False)
        except BlockingIOError:
            return None
        return subprocess.Popen(
            [sys.executable, "-c", call(config, markers_of(config, folder))],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[file.fileno()], start_new_session=True,
        )  # fmt: skip


def call(config: ConvertConfig, markers: dict[str, Path]) -> str:
    """Python for a process that finds the same modules as this one."""
    names = {part: str(marker) for part, marker in markers.items()}
    return (
        f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as ahead; "
        f"ahead.compile_parts({json.dumps(to_dict(config))!r}, {names!r})"
    )


def compile_parts(config: str, markers: dict[str, str]) -> None:
    """Compile the parts for the configuration `config` (JSON), each in a process of its own, which
    leaves its marker. They are forks, since importing takes as long as some kernels."""
    gc.disable()  # a fifth of the time; these processes are short
    import torch

    from splatshard.pipeline.kernels.select import select_backend

    torch.set_num_threads(1)
    wanted = from_dict(ConvertConfig, json.loads(config))
    backend = select_backend(wanted.backend)
    own = backend.device.type == "cpu"
    if own:
        load_compiler()
    for part, marker in markers.items():
        if os.fork() == 0:
            try:
                if own:
                    PARTS[part](wanted, backend)
                leave(Path(marker))
            finally:
                os._exit(0)


def leave(marker: Path) -> None:
    """Write a marker, of the kernels that this process called."""
    folders = {Path(kernel.stats.cache_path) for kernel in KERNELS if kernel.signatures}
    files = sorted(str(path) for folder in folders for path in folder.glob("*.nbi"))
    unfinished = Path(f"{marker}.{os.getpid()}")
    unfinished.write_text(json.dumps(files))
    unfinished.replace(marker)


def fit_one(config: ConvertConfig, backend: Backend) -> None:
    from splatshard.pipeline.fitting.recipe import fit_and_prune

    fit = config.fit.sized(SIDE, SIDE)
    if fit.max_gaussians:  # one round of growing calls all that more of them would
        most = min(fit.max_gaussians, fit.num_gaussians + 1)
        fit = replace(fit, target_psnr=99.0, max_gaussians=most)
    fit_and_prune(picture(fit.num_gaussians)[0], replace(config, fit=fit), backend)


def weigh_one(config: ConvertConfig, backend: Backend) -> None:
    """What packing asks of a picture."""
    target, splats = picture(9)
    if backend.squared_errors:
        backend.squared_errors(splats, target, None, config.fit.cutoff)
    if backend.color_change and config.pack.codec in PLANAR:
        backend.color_change(splats, target, config.fit.cutoff)


def encode_one(config: ConvertConfig, backend: Backend) -> None:
    from splatshard.pipeline.codec import planes
    from splatshard.pipeline.codec.pack import Payload, pack_fp16, unpack
    from splatshard.pipeline.codec.quantise import on_grid

    target, splats = picture(9)
    payloads: list[Payload] = []
    if config.pack.codec in PLANAR:
        step = target.new_ones(1).double()
        payloads += planes.encode(on_grid(splats, splats, step, target))
    else:
        payloads += pack_fp16(splats, SIDE, SIDE)
    unpack([{"": payload} for payload in payloads], SIDE, SIDE, config.pack.codec)


def picture(n: int) -> tuple[Tensor, Splats]:
    """An image [1, 3, H, W] with a slope, and splats [1, N] on its diagonal."""
    import torch

    from splatshard.pipeline.splats import Splats

    target = torch.linspace(0, 1, 3 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE)
    means = torch.linspace(0, SIDE, n)[None, :, None].repeat(1, 1, 2)
    cholesky = torch.tensor([3.0, 0.0, 3.0]).repeat(1, n, 1)
    mask = torch.ones(1, n, dtype=torch.bool)
    return target, Splats(means, cholesky, torch.full((1, n, 3), 0.1), mask)


PARTS = {"fit": fit_one, "weigh": weigh_one, "encode": encode_one}
"""About as long as one another."""
