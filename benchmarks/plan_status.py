"""Planning and status of many shards: wall time and peak memory of the processes.

    python -m benchmarks.plan_status [--shards 10000 100000]

Sources and data files are empty files of the right size, markers are real; all on a local disk,
with and without the run-level manifest that stands for the markers. `plan` is what a conversion
does before it starts Ray: list SRC, read DST, plan, write `_plan.json`. `convert` is the whole
command where everything is done already. Memory is the largest resident set of the process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks.record import save
from splatshard.jobs.destination.manifest import Catalog
from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import write_plan
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.config import ConvertConfig, identities
from splatshard.schemas.manifest import MANIFEST_FILE
from splatshard.schemas.shard import ShardManifest, ShardRef, to_json

SAMPLES = 10_000
CONFIG = ConvertConfig()

PLAN = """
import sys
from splatshard.jobs.destination.plan_file import write_plan
from splatshard.jobs.destination.plan import make_plan, planned, refuse_stale
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.config import ConvertConfig
src, dst = sys.argv[1:]
config = ConvertConfig()
refs = list_shards(src)
markers = read_markers(dst)
plan = make_plan(refs, markers, config, lambda ref: "")
refuse_stale(plan, markers, dst)
write_plan(dst, planned(refs, plan, config))
print(len(plan.done), len(plan.work))
"""


@dataclasses.dataclass(frozen=True)
class Args:
    shards: tuple[int, ...] = (10_000, 100_000)
    repeats: int = 3
    """Runs of each command; the fastest counts."""


def sources(folder: Path, number: int) -> str:
    """`number` empty tars of 300 MB and their brace pattern."""
    folder.mkdir()
    for i in range(number):
        with (folder / f"{i:08d}.tar").open("wb") as tar:
            tar.truncate(300_000_000 + i)
    return f"{folder}/{{{0:08d}..{number - 1:08d}}}.tar"


def manifest_of(ref: ShardRef, inputs: dict[str, Any], fingerprint: str) -> ShardManifest:
    """The marker of a shard of SAMPLES photographs."""
    spread = [40 + (i * 37) % 300 for i in range(42)]
    spread[0] += SAMPLES - 10 - sum(spread)
    content = hashlib.sha256(ref.name.encode()).hexdigest()
    return ShardManifest(
        name=ref.name,
        data_file=f"{ref.name}-{fingerprint[:8]}.parquet",
        size_bytes=60_000_000,
        sha256=content,
        format="parquet",
        samples=SAMPLES,
        counts={"ok": SAMPLES - 10, "corrupt_image": 6, "animated_image": 4},
        statistics={
            "payload_bytes": (SAMPLES - 10) * 6400,
            "psnr_mean": 27.0 + int(content[:8], 16) / 2**32,
            "psnr_min": 17.000152587890625,
            "psnr_max": 37.99853515625,
            "num_gaussians_mean": 400.0,
            "psnr_histogram_from": 17.0,
            "psnr_histogram": " ".join(map(str, spread)),
        },
        fingerprint=fingerprint,
        inputs=inputs,
        source_url=ref.urls[0],
        source_sha256=content,
    )


def destination(folder: Path, src: str) -> list[ShardManifest]:
    """A finished DST, but for the run-level manifest."""
    folder.mkdir()
    refs = list_shards(src)
    write_plan(str(folder), planned(refs, make_plan(refs, {}, CONFIG, str), CONFIG))
    identity = identities(CONFIG)
    manifests = [manifest_of(ref, *identity(ref)) for ref in refs]
    for manifest in manifests:
        (folder / f"{manifest.name}.json").write_text(to_json(manifest))
        with (folder / manifest.data_file).open("wb") as data:
            data.truncate(manifest.size_bytes)
    return manifests


def resident_peak_bytes(pid: int) -> int:
    """VmHWM; the peak that wait4 tells would be this process's own, inherited."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return max((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), default=0)


def measure(name: str, command: list[str], number: int, repeats: int) -> dict[str, Any]:
    """Wall time and peak resident set of `command`, the fastest of `repeats` runs."""
    runs: list[tuple[float, float, int]] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        peak_bytes, ended, status, usage = 0, 0, 0, None
        while not ended:
            peak_bytes = max(peak_bytes, resident_peak_bytes(process.pid))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            time.sleep(0 if ended else 0.01)
        assert usage is not None
        wall_s, cpu_s = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
        runs.append((wall_s, cpu_s, peak_bytes))
        if status:
            raise SystemExit(f"{name} failed: {' '.join(command)}")
    wall_s, cpu_s, _ = min(runs)
    peak_bytes = max(peak for *_, peak in runs)
    print(
        f"{number:>7,} shards  {name:24} {wall_s:6.2f} s ({cpu_s:.2f} s CPU)  "
        f"{peak_bytes / 1e6:4.0f} MB",
        flush=True,
    )
    return {
        "shards": number,
        "what": name,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "all_wall_s": [wall for wall, *_ in runs],
        "peak_bytes": peak_bytes,
    }


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rows: list[dict[str, Any]] = []
    for number in args.shards:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            src, new, dst = sources(folder / "in", number), str(folder / "new"), folder / "out"
            manifests = destination(dst, src)
            (folder / "new").mkdir()

            def add(what: str, *command: str, n: int = number) -> None:
                rows.append(measure(what, list(command), n, args.repeats))

            add("plan, new destination", "-c", PLAN, src, new)
            add("plan, markers alone", "-c", PLAN, src, str(dst))
            add("status, markers alone", "-m", "jobs.status", str(dst))
            Catalog(str(dst), manifests).write()
            size = (dst / MANIFEST_FILE).stat().st_size
            add("plan", "-c", PLAN, src, str(dst))
            add("status", "-m", "jobs.status", str(dst))
            add("convert, all done", "-m", "jobs.convert", src, str(dst))
            rows[-1]["manifest_bytes"] = size
    save("plan_status", rows)


if __name__ == "__main__":
    main()
