"""Launching kernels from several threads: one launch at a time.

Triton's launches are not safe against each other. The first of a variant loads its machine code
and lets go of Python's lock before it is marked as loaded (3.6 and 3.7, compiler.py,
CompiledKernel._init_handles), so that another thread can launch nothing; its interpreter keeps the
number of the running program once for all threads. A launch takes some 20 us, with Python's lock
held, so waiting for another thread's costs nothing that was not spent.
"""

from __future__ import annotations

import threading
from typing import Any

import triton

WARP = {"num_warps": 1, "enable_fp_fusion": True}
"""Launch options of kernels whose programs are one warp: a warp never waits for another one. Fused
multiply-add is asked for by name, since Triton's default is about to change."""

SIZES = [
    *("n", "groups", "count", "columns", "tiles", "coarse_columns", "coarse_tiles"),
    *("height", "width", "whole_height", "stride", "phase"),
]
"""Arguments for whose values no kernel is compiled anew. Triton makes variants for 1 and for
multiples of 16: ten for another number of Gaussians or another picture, 0.4 to 1.6 s each."""

jit: Any = triton.jit
"""For functions that kernels call, of which its published type says that they never return."""

_ONE_AT_A_TIME = threading.Lock()


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """`programs` programs of a `triton.jit` kernel; 0 launch nothing."""
    if programs:
        with _ONE_AT_A_TIME:
            kernel[(programs,)](*arguments, **options)


def cdiv(number: int, size: int) -> int:
    """How many blocks of `size` hold `number`."""
    return -(-number // size)
