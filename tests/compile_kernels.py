"""Compile every Triton kernel for sm_90 (H100, H200), which needs no device, and print a line for
each: registers per thread, stack (spills) and shared memory in bytes.

    python -m tests.compile_kernels
"""

from __future__ import annotations

import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.kernels import triton_blur, triton_kernels, triton_lists, triton_voronoi

LISTS = {"RATIO": triton_lists.RATIO, "CAPACITY": triton_lists.CAPACITY, "COARSE_CAPACITY": 512}
TILED = {"TILE": triton_lists.TILE, **LISTS}
WINDOW = {"SHARED": triton_kernels.SHARED, "PIXELS": triton_kernels.PIXELS}
BLOCK = {"BLOCK": triton_lists.BLOCK}
KERNELS = [  # kernel, compile-time constants, warps
    (triton_lists._list_kernel, {"SIDE": 8, **LISTS, **BLOCK}, 1),
    (triton_lists._list_kernel, {"SIDE": 32, **LISTS, "RATIO": 0, **BLOCK}, 1),
    *(
        (triton_kernels.forward_kernel,
         {**TILED, "GROUP": triton_kernels.GROUP, "RESIDUAL": residual}, 1)
        for residual in (False, True)
    ),
    *((triton_kernels.backward_kernel, {**WINDOW, "WHITENED": w}, 1) for w in (False, True)),
    *((triton_kernels.adam_kernel, {"BLOCK": 128, "WHITENED": w}, 4) for w in (False, True)),
    (triton_kernels.loss_kernel, {"BLOCK": 128}, 1),
    (triton_voronoi.owner_kernel, {**TILED, "GROUP": triton_voronoi.GROUP}, 1),
    (triton_voronoi.centroid_kernel, WINDOW, 1),
    (triton_blur.blur_kernel, {"BLOCK": triton_blur.BLOCK}, triton_blur.WARPS),
]  # fmt: skip
TYPES = {
    "*fp32": "means cholesky colors target out squares field gradient moment1 moment2 loss reach "
    "rho moved image blurred",
    "*u16": "fine coarse lists",
    "*i32": "fine_counts coarse_counts counts owner",
    "*i1": "mask",
    "fp32": "cutoff grow pad scale keep1 keep2 correction2 rate_means rate_shape rate_colors "
    "l1_colors falloff",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}


def compiled(kernel, constants: dict, warps: int, ones: tuple[str, ...] = ()):
    """The kernel for sm_90; the integer arguments `ones` are 1, which Triton compiles in."""
    constants = constants | dict.fromkeys(ones, 1)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else TYPE_OF.get(n, "i32") for n in names}
    places = {(names.index(n),): value for n, value in constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    return triton.compile(
        ASTSource(kernel, signature, constexprs=places, attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


def resources(code: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, shared = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text).groups()
    return f"registers {registers} stack {stack} shared {shared}"


def main() -> None:
    for kernel, constants, warps in KERNELS:
        print(
            kernel.__name__, constants, resources(compiled(kernel, constants, warps).asm["cubin"])
        )
    one = compiled(triton_kernels.backward_kernel, {**WINDOW, "WHITENED": True}, 1, ("n", "groups"))
    print("backward_kernel, one Gaussian", resources(one.asm["cubin"]))


if __name__ == "__main__":
    main()
