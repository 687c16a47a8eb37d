"""Compile every Triton kernel for sm_90 (H100, H200), which needs no device, and print a line for
each: instructions of the machine code and of its loop, registers per thread, stack (spills) and
shared memory in bytes.

    python -m tests.compile_kernels

Exits with 1 where a loop is not as long as LOOPS says for this version of Triton: the docstrings'
counts, and benchmarks/gpu_counts.py, stand on them. And where a kernel would be compiled anew for
another value of an integer.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from splatshard.pipeline.kernels import triton_blur, triton_kernels, triton_lists, triton_voronoi

LISTS = {"RATIO": triton_lists.RATIO, "CAPACITY": triton_lists.CAPACITY, "COARSE_CAPACITY": 512}
TILED = {"TILE": triton_lists.TILE, **LISTS}
WINDOW = {"SHARED": triton_kernels.SHARED, "PIXELS": triton_kernels.PIXELS}
CELL = {"SHARED": triton_voronoi.SHARED, "PIXELS": triton_voronoi.PIXELS}
BLOCK = {"BLOCK": triton_lists.BLOCK}
KERNELS = {  # kernel, compile-time constants, warps
    "lists, fine": (triton_lists._list_kernel, {"SIDE": 8, **LISTS, **BLOCK}, 1),
    "lists, coarse": (triton_lists._list_kernel, {"SIDE": 32, **LISTS, "RATIO": 0, **BLOCK}, 1),
    **{
        f"forward, {what}": (
            triton_kernels.forward_kernel,
            {**TILED, "GROUP": triton_kernels.GROUP, "RESIDUAL": what == "residual"},
            1,
        )
        for what in ("image", "residual")
    },
    **{
        f"backward, {what}": (
            triton_kernels.backward_kernel,
            {**WINDOW, "WHITENED": what == "whitened"},
            1,
        )
        for what in ("plain", "whitened")
    },
    **{
        f"adam, {what}": (
            triton_kernels.adam_kernel,
            {"BLOCK": triton_kernels.ADAM_BLOCK, "WHITENED": what == "whitened"},
            4,
        )
        for what in ("plain", "whitened")
    },
    "loss": (triton_kernels.loss_kernel, {"BLOCK": 128}, 1),
    "owner": (triton_voronoi.owner_kernel, {**TILED, "GROUP": triton_voronoi.GROUP}, 1),
    "centroid": (triton_voronoi.centroid_kernel, CELL, 1),
    "blur": (triton_blur.blur_kernel, {"BLOCK": triton_blur.BLOCK}, triton_blur.WARPS),
}
LOOPS = {  # instructions of one round, with the versions of Triton that the tests compile with
    "3.7.1": {
        "lists, fine": 330,
        "lists, coarse": 301,
        "forward, image": 948,
        "forward, residual": 949,
        "backward, plain": 56,
        "backward, whitened": 56,
        "adam, plain": 0,
        "adam, whitened": 0,
        "loss": 87,
        "owner": 957,
        "centroid": 184,
        "blur": 136,
    },
    "3.6.0": {
        "lists, fine": 413,
        "lists, coarse": 301,
        "forward, image": 949,
        "forward, residual": 948,
        "backward, plain": 56,
        "backward, whitened": 56,
        "adam, plain": 0,
        "adam, whitened": 0,
        "loss": 87,
        "owner": 957,
        "centroid": 181,
        "blur": 134,
    },
}
TYPES = {
    "*fp32": "means cholesky colors target out squares field gradient moment1 moment2 loss reach "
    "rho moved image blurred",
    "*u16": "fine coarse lists",
    "*i32": "fine_counts coarse_counts counts owner order",
    "*i1": "mask",
    "fp32": "cutoff grow pad scale keep1 keep2 correction2 rate_means rate_shape rate_colors "
    "l1_colors falloff grow_y pad_y squeeze shift low_x high_x low_y high_y largest",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel needs: instructions in all and in one round of its
    longest loop (0 without one), registers per thread, bytes of stack and shared memory."""

    instructions: int
    loop: int
    registers: int
    stack: int
    shared: int

    def __str__(self) -> str:
        return (
            f"instructions {self.instructions} loop {self.loop} registers {self.registers} "
            f"stack {self.stack} shared {self.shared}"
        )


def compiled(kernel, constants: dict, warps: int) -> bytes:
    """The kernel for sm_90."""
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
    ).asm["cubin"]


@cache
def code(name: str) -> Code:
    """Of one of KERNELS."""
    return inspected(compiled(*KERNELS[name]))


def inspected(cubin: bytes) -> Code:
    """Read off the machine code by NVIDIA's disassemblers, which Triton's wheel holds."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        text = tool(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    labels: dict[str, int] = {}
    count = loop = 0
    for line in text.splitlines():
        if found := re.match(r"(\.L_\w+):", line.strip()):
            labels[found[1]] = count
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", found[1])
            if jump and jump[1] in labels and "EXIT" not in found[1]:
                begin = labels[jump[1]]
                if begin < count - 1:  # a program ends in a jump to itself
                    loop = max(loop, count - begin)
    registers, stack, shared = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", used).groups()
    return Code(count, loop, int(registers), int(stack), int(shared))


def tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    print(f"Triton {triton.__version__}")
    wrong = []
    expected = LOOPS.get(triton.__version__, {})
    for name in KERNELS:
        found = code(name)
        print(f"{name:20} {found}")
        if expected and found.loop != expected[name]:
            wrong.append(f"{name}: a loop of {found.loop} instructions, LOOPS has {expected[name]}")
    for name, (kernel, *_) in KERNELS.items():
        specialized = [p.name for p in kernel.params if TYPE_OF.get(p.name, "i32") == "i32"]
        sizes = {p.name for p in kernel.params if p.do_not_specialize or p.is_constexpr}
        if left := set(specialized) - sizes:
            wrong.append(f"{name}: compiled anew for other values of {sorted(left)}")
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
