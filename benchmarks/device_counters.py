"""The part `counters` of `benchmarks.device_check`: what the hardware counted of the large kernels,
by NVIDIA's ncu, which runs `--counted` of the same script."""

from __future__ import annotations

import csv
import io
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.device_kernels import half_fitted, repeated
from benchmarks.device_record import Size, Tell, pictures
from benchmarks.device_tiles import kernels_on
from benchmarks.gpu_fit import fill, wait
from splatshard.pipeline.kernels import triton_backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.kernels.tile_step import TileStep
from splatshard.schemas.config import FitConfig

METRICS = {  # ncu's name -> ours
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue",
    "smsp__inst_executed_pipe_xu.sum": "special functions",
    "l1tex__t_sector_hit_rate.pct": "L1 hits",
    "lts__t_sector_hit_rate.pct": "L2 hits",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "launch__registers_per_thread": "registers",
    "gpu__time_duration.sum": "time",
}
UNITS = {
    "instructions": "M per image",
    "special functions": "M per image",
    "registers": "a thread",
    "time": "ns",
}


def counters(size: Size, tell: Tell) -> None:
    """Instructions, issue and caches (which ncu empties before each kernel) of forward, backward
    and lists, read from the hardware."""
    places = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    ncu = shutil.which("ncu") or (str(places[-1]) if places else None)
    if ncu is None:
        tell("ncu", 0, "found", note="not installed")
        return
    kernels = "regex:forward_kernel|backward_kernel|_list_kernel|fit_tiles"
    command = f"{ncu} --clock-control none --csv --page raw --print-units base".split()
    command += ["--profile-from-start", "off", "--metrics", ",".join(METRICS), "-k", kernels]
    command += [sys.executable, "-m", "benchmarks.device_check", "--counted"]
    command += ["--toy"] if size.toy else []
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or not lines:
        raise RuntimeError(
            f"ncu ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}"
        )
    found: dict[str, dict[str, list[float]]] = {}
    for row in list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]:  # the first holds units
        kernel = row["Kernel Name"].split("(")[0].removesuffix("_kernel").strip("_")
        for metric, name in METRICS.items():
            found.setdefault(kernel, {}).setdefault(name, []).append(number(row.get(metric)))
    for kernel, figures in found.items():
        for name, values in figures.items():
            label, unit = f"{kernel} {name}", UNITS.get(name, "%")
            if unit == "M per image":  # the lists' kernel runs twice
                label += f", N={size.gaussians[0]}"
                tell(label, sum(values) / 1e6 / size.batch, unit)
            else:
                tell(label, values[-1], unit, all=values)


def number(text: str | None) -> float:
    """Of a cell of ncu's table; NaN for what a device does not count."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return math.nan


def counted(size: Size) -> None:
    """What ncu looks at: a step in the middle of a fit, at all rows, by Triton's kernels with lists
    and order made anew, and on tensor cores."""
    backend = select_backend("triton")
    images = pictures(size).to(backend.device)
    config = FitConfig(num_gaussians=size.gaussians[0], steps=size.steps)
    splats = repeated(half_fitted(images, config, backend), size.batch)
    moments = tuple(splats.means.new_zeros(*splats.mask.shape, 8) for _ in range(2))
    target = fill(images, size.batch)
    steps = (
        triton_backend.FusedStep(target, config, 1),
        TileStep(target, config, 1, kernels_on(backend.device)),
    )
    profiler = torch.cuda.profiler if backend.device.type == "cuda" else None
    wait(backend.device)
    if profiler:
        profiler.start()
    for step in steps:
        step.step(splats, moments, 0, True, 0.8, 1e-6, 0.9)
    wait(backend.device)
    if profiler:
        profiler.stop()
