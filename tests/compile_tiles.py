"""The machine code of tile_step.cu, which NVRTC makes without a device, counted.

    python -m tests.compile_tiles

A line for each kernel and architecture: registers per thread, bytes of stack and shared memory;
then the parts of fit_tiles for sm_90, on which benchmarks/tile_counts.py stands. They count both
sides of a branch, but for the weights of a block, which are drawn once or twice.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict, dataclass
from functools import cache

import triton

from splatshard.pipeline.kernels import cuda
from splatshard.pipeline.kernels.tile_step import HEADER, SOURCE
from tests.compile_kernels import tool


@dataclass(frozen=True)
class Parts:
    """Warp instructions of fit_tiles: `tile` once; `chunk` for the bits of 1,024 Gaussians and
    `bit` for each of the most in one word, where a list is filled; `group` for 32 Gaussians and
    `block` for 16 of them, drawn; `group_back`, `block_back` the same on the way back; `four_back`
    for 4 Gaussians to be added up, `draw_again` for a block whose weights were not kept."""

    tile: int
    chunk: int
    bit: int
    group: int
    block: int
    group_back: int
    four_back: int
    block_back: int
    draw_again: int


@cache
def machine_code(capability: tuple[int, int]) -> bytes:
    headers = {HEADER: HEADER.read_bytes()}
    target = cuda.architecture(capability)
    return cuda.compiled_code(SOURCE.name, SOURCE.read_bytes(), headers, target)


def inspected(code: bytes) -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    """By kernel: what it uses, and its lines of machine code with labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        used = tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        text = tool(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    usage = {
        kernel: {
            key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
        }
        for kernel, line in re.findall(r"Function (\w+):\s+(.*)", used)
    }
    lines: dict[str, list[str]] = {}
    kept: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"\s*\.text\.(\w+):", line):
            kept = lines.setdefault(found[1], [])
        elif found := re.match(r"\s*(\.L_\w+:)|\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            kept.append(found[1] or found[2])
    return usage, lines


def instructions(lines: list[str]) -> list[str]:
    return [line for line in lines if line[0] != "." and not line.startswith("NOP")]


def jumps(lines: list[str]) -> list[tuple[int, int]]:
    """(from, to) of each, by number of instruction."""
    labels: dict[str, int] = {}
    found: list[tuple[int, str]] = []
    count = 0
    for line in lines:
        if line[0] == ".":
            labels[line[:-1]] = count
            continue
        if (jump := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) is not None:
            found.append((count, jump[1]))
        count += 1
    return [(at, labels[label]) for at, label in found]


def loops(lines: list[str]) -> list[tuple[int, int]]:
    """First and last instruction of each loop, by its beginning; a program ends in none."""
    return sorted((to, at) for at, to in jumps(lines) if to < at)


def parts(lines: list[str]) -> Parts:
    """Of fit_tiles: both passes are a loop over lists, of a loop that fills one, with a loop over
    bits, and one over groups, with a loop over blocks."""
    found = loops(lines)
    assert len(found) == 10, found
    sizes = [last - first + 1 for first, last in found]
    draw, fill, bits, groups, blocks, back, _, _, groups_back, blocks_back = sizes
    first, last = found[-1]
    inside = [(at, to) for at, to in jumps(lines) if first <= at < to <= last]
    again = max(to - at - 1 for at, to in inside)
    whole = found[-2]
    stops = [at for at, to in jumps(lines) if last < at < to <= whole[1]]
    four = stops[-1] - stops[-2]
    return Parts(
        tile=len(instructions(lines))
        - draw
        - back
        + (draw - fill - groups)
        + (back - groups_back - fill),
        chunk=fill - bits,
        bit=bits,
        group=groups - blocks,
        block=blocks,
        group_back=groups_back - blocks_back - 8 * four,
        four_back=four,
        block_back=blocks_back - again,
        draw_again=again,
    )


def main() -> None:
    for capability in ((8, 0), (9, 0), (10, 0)):
        usage, lines = inspected(machine_code(capability))
        for kernel, used in usage.items():
            count = len(instructions(lines[kernel]))
            print(cuda.architecture(capability), kernel, f"instructions {count}", used)
        if capability == (9, 0):
            print(asdict(parts(lines["fit_tiles"])))
            print("list_gaussians", loops(lines["list_gaussians"]))


if __name__ == "__main__":
    main()
