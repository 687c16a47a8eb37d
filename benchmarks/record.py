"""What every benchmark shares: machine and versions beside the numbers, images, the JSON file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splatshard.pipeline.source.decode import decode
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.schemas.config import DecodeConfig

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SPLATSHARD_DATA", ROOT.parent / "shared" / "data"))
PACKAGES = ("torch", "triton", "numba", "llvmlite", "numpy", "pillow", "pyarrow", "ray")


def machine() -> dict[str, Any]:
    """CPU model, cores, operating system, package versions (None: not installed) and commit."""
    model = platform.processor()
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
            elif line.startswith("flags"):
                flags = "AVX-512" if "avx512f" in line else "AVX2" if "avx2" in line else "SSE"
    return {
        "cpu": f"{model} {flags}".strip(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Where this is a copy without its repository: SPLATSHARD_COMMIT, or None; None without git."""
    if not (ROOT / ".git").exists():  # git would look for one further up
        return os.environ.get("SPLATSHARD_COMMIT")
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def save(name: str, results: Any) -> Path:
    """Write `benchmarks/results/{name}.json` with the machine and the command; prints where."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    command = " ".join(["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]])
    record = {"command": command, "machine": machine(), "results": results}
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{record['machine']['cpu']}, {record['machine']['cores']} cores\nwritten: {path}")
    return path


def sample_images(count: int, shard: int = 0, size: int = 224) -> torch.Tensor:
    """The first `count` photographs of a datacomp-sample shard, decoded as a conversion does.

    float32 [count, 3, size, size], 0 to 1.
    """
    (ref,) = list_shards(str(DATA / f"datacomp-sample/shards/{shard:08d}.tar"), limit=count)
    config = DecodeConfig(image_size=size)
    pixels = [decode(s.image, s.image_name, config).pixels for s in read(ref, hashlib.sha256())]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div(255).contiguous()
