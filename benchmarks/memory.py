"""What a worker's memory does over one long shard, and over one with large members.

    python -m benchmarks.memory [--samples 40000] [--rows 1000000]

    long     tiny images, hardly fitted
    rows     many more samples, whose images are empty, so that nothing is fitted
    large    samples with a large further member each

What is measured is reading, writing and keeping account. Each case is a process of its own that
converts one tar; its resident set is looked at after every batch. `start_mb` is the largest after
the first WARM_UP samples, `growth_mb` by how much it is exceeded later, reading back included;
`later_half_mb` by how much the largest of the later half of the samples exceeds that of the
earlier. Neither images nor splats grow with a shard, so their size does not matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from benchmarks.record import save
from splatshard.pipeline.source.tar import forget_headers

WARM_UP = 30_000
"""Samples; all code has run by then, and one row group was written."""

POINTS = 50
"""Of each curve that is kept."""


@dataclass(frozen=True)
class Args:
    samples: int = 40_000
    rows: int = 1_000_000
    large: int = 30
    member_mb: int = 64
    convert: tuple[str, int] | None = None
    """Only convert this tar, with so many samples to warm up: what the cases are made of."""


def long_tar(path: Path, samples: int, empty: bool) -> None:
    """DataComp's layout: a picture, a caption and a kilobyte of JSON of each, so that a row group
    is full after some 27,000 samples."""
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 60).convert("RGB").save(buffer, "JPEG")
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            noise = hashlib.shake_256(b"%d" % i).hexdigest(450)
            text = json.dumps({"uid": f"{i:032x}", "url": f"https://example.org/{noise}.jpg"})
            image = b"" if empty else buffer.getvalue()
            members = {"jpg": image, "txt": b"a noise", "json": text.encode()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:012d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            forget_headers(tar)


def large_tar(path: Path, samples: int, member_bytes: int) -> None:
    """Samples with a further member of so many zeros, which take no room on the disk."""
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 60).convert("RGB").save(buffer, "JPEG")
    with path.open("wb") as file:
        for i in range(samples):
            for extension, data in {"jpg": buffer.getvalue(), "npy": None}.items():
                info = tarfile.TarInfo(f"{i:012d}.{extension}")
                info.size = member_bytes if data is None else len(data)
                file.write(info.tobuf(tarfile.PAX_FORMAT))
                file.write(data or b"")
                file.truncate(file.tell() + (info.size if data is None else 0))
                file.seek(0, os.SEEK_END)
                file.truncate(-(-file.tell() // 512) * 512)
                file.seek(0, os.SEEK_END)
        file.truncate(file.tell() + 20 * 512)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def convert(tar: str, warm_up: int) -> dict[str, Any]:
    """Convert `tar` here, as a worker does."""
    import torch

    from splatshard.pipeline.convert import convert_shard
    from splatshard.pipeline.kernels.select import select_backend
    from splatshard.pipeline.source.listing import list_shards
    from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig

    torch.set_num_threads(1)
    config = ConvertConfig(
        decode=DecodeConfig(image_size=16), fit=FitConfig(num_gaussians=4, steps=1)
    )
    seen: list[tuple[int, float]] = []

    def look(rows: list[dict[str, Any]]) -> None:
        seen.append(((seen[-1][0] if seen else 0) + len(rows), resident_mb()))

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as dst:
        (ref,) = list_shards(tar)
        manifest = convert_shard(ref, config, dst, select_backend("cpu"), look)
        seen.append((manifest.samples, resident_mb()))  # read back and committed
    start = max(mb for samples, mb in seen if samples <= warm_up)
    peak = max(mb for _, mb in seen)
    half = max(mb for samples, mb in seen if samples <= max(warm_up, manifest.samples // 2))
    later = max(mb for _, mb in seen[:-1])  # before it is read back
    hwm = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return {
        "samples": manifest.samples,
        "ok": manifest.counts.get("ok", 0),
        "seconds": round(time.monotonic() - begin, 1),
        "start_mb": round(start),
        "growth_mb": round(peak - start, 1),
        "later_half_mb": round(later - half, 1),
        "highest_mb": round(int(hwm.split()[1]) * 1024 / 1e6),
        "curve": [(n, round(mb, 1)) for n, mb in seen[:: max(1, len(seen) // POINTS)]],
    }


def case(tar: Path, warm_up: int) -> dict[str, Any]:
    """`convert` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--convert", str(tar), str(warm_up)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    shown = {name: value for name, value in found.items() if name != "curve"}
    print(f"{tar.stem}: {shown}", flush=True)
    return found


def main(args: Args) -> None:
    if args.convert:
        print(json.dumps(convert(*args.convert)))
        return
    with tempfile.TemporaryDirectory() as folder:
        long, rows, large = (Path(folder, f"{name}.tar") for name in ("long", "rows", "large"))
        long_tar(long, args.samples, empty=False)
        long_tar(rows, args.rows, empty=True)
        large_tar(large, args.large, args.member_mb << 20)
        results = {
            "long": case(long, WARM_UP) | {"warm_up": WARM_UP},
            "rows": case(rows, WARM_UP) | {"warm_up": WARM_UP},
            "large": case(large, args.large) | {"member_mb": args.member_mb},
        }
    save("memory", results)


if __name__ == "__main__":
    main(tyro.cli(Args))
