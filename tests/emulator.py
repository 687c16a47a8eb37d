"""The kernels of tile_step.cu on a CPU, over an emulated warp, compiled by the machine's C++."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT / "tests" / "emulated", ROOT / "pipeline" / "kernels")
LANES = np.arange(32, dtype=np.int32)


@cache
def library(*options: str) -> ctypes.CDLL:
    """Compiled once for all processes of a test run; skips where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++")
    source = FOLDERS[0] / "tile_step.cpp"
    flags = ["-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    flags += ["-Wno-unknown-pragmas", *options]
    read = [source, FOLDERS[0] / "warp.cuh", FOLDERS[1] / "tile_step.cu"]
    text = b"".join(file.read_bytes() for file in read) + repr((compiler, flags)).encode()
    name = f"splatshard-tile-{os.getuid()}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    place = Path(tempfile.gettempdir(), name)
    if not place.exists() or place.stat().st_uid != os.getuid():
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, name)
            includes = [f"-I{folder}" for folder in FOLDERS]
            subprocess.run([compiler, *flags, *includes, str(source), "-o", str(built)], check=True)
            shutil.copy(built, f"{place}.{os.getpid()}")
            os.replace(f"{place}.{os.getpid()}", place)
    found = ctypes.CDLL(str(place))
    found.launch.restype = found.one.restype = ctypes.c_char_p
    return found


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Emulator:
    """`launch` as `tile_step.Launch`. `seed`: blocks in an order at random instead of their own;
    `lanes`: in which order lanes run between two meetings."""

    def __init__(self, seed: int | None = None, lanes: np.ndarray = LANES, *options: str) -> None:
        self.random = None if seed is None else np.random.default_rng(seed)
        self.lanes = lanes.astype(np.int32)
        self.library = library(*options)

    def launch(self, kernel: str, blocks: int, threads: int, step: ctypes.Structure) -> None:
        order = np.arange(blocks, dtype=np.int32)
        if self.random is not None:
            self.random.shuffle(order)
        error = self.library.launch(
            kernel.encode(), ctypes.byref(step), blocks, pointer(order), threads,
            pointer(self.lanes),
        )  # fmt: skip
        if error:
            raise RuntimeError(f"{kernel}: {error.decode()}")


def one(function: int, words: np.ndarray) -> np.ndarray:
    """A function of a warp (see tile_step.cpp) for uint32 [32, 6]; uint32 [32, 4]."""
    found = np.zeros((32, 4), np.uint32)
    words = np.ascontiguousarray(words, np.uint32)
    error = library().one(function, pointer(words), pointer(found), pointer(LANES))
    if error:
        raise RuntimeError(error.decode())
    return found
