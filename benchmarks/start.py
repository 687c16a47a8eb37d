"""From typing the command to the first converted image, beside an older build's.

    git worktree add ../base 931aac8
    python -m benchmarks.start --base ../base

There are two tars of eight photographs for each worker (of datacomp-sample's shard 1), so that all
have work; the first image is there when the first shard is. Cold: numba's cache is empty, as after
the installation; warm: the run before has filled it. Builds take turns; figures are medians of
`rounds`. CPU seconds tell more where other work runs beside it.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from benchmarks.record import DATA, ROOT, save

PHOTOGRAPHS = 8
Found = dict[str, float]


@dataclass(frozen=True)
class Args:
    base: Path
    """A checkout of the older build."""
    workers: int = 2
    rounds: int = 3


def write_source(folder: Path, tars: int) -> None:
    """The first photographs of a shard, PHOTOGRAPHS to a tar, with the other members of their
    keys."""
    folder.mkdir()
    with tarfile.open(DATA / "datacomp-sample" / "shards" / "00000001.tar") as shard:
        members = shard.getmembers()
        keys = list(dict.fromkeys(member.name.partition(".")[0] for member in members))
        for number in range(tars):
            own = set(keys[PHOTOGRAPHS * number :][:PHOTOGRAPHS])
            with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
                for member in members:
                    if member.name.partition(".")[0] in own:
                        file = shard.extractfile(member)
                        assert file
                        tar.addfile(member, io.BytesIO(file.read()))


def cpu_s(mark: bytes) -> dict[int, float]:
    """CPU seconds of each process with `mark` in its environment."""
    found = {}
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and mark in (process / "environ").read_bytes():
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                found[int(process.name)] = ticks / os.sysconf("SC_CLK_TCK")
    return found


def first_image(build: Path, source: Path, workers: int, cache: Path, folder: Path) -> Found:
    """Seconds until the first shard of a conversion by the checkout `build` is there, and those of
    CPU time that all of its processes took."""
    dst = Path(tempfile.mkdtemp(dir=folder)) / "dst"
    command = [sys.executable, "-m", "jobs.convert", str(source), str(dst)]
    own = {"PYTHONPATH": str(build), "NUMBA_CACHE_DIR": str(cache), "TMPDIR": str(cache)}
    own["SPLATSHARD_START"] = str(dst)
    begin = time.perf_counter()
    job = subprocess.Popen(
        [*command, "--workers", str(workers)], cwd=build, env=os.environ | own,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    found, cpu = None, dict[int, float]()
    while job.poll() is None:
        if found is None:
            cpu |= cpu_s(str(dst).encode())
            if any(dst.glob("*.parquet")):
                found = {"wall_s": time.perf_counter() - begin, "cpu_s": sum(cpu.values())}
        time.sleep(0.05)
    assert job.returncode == 0, f"{build}: exit {job.returncode}"
    assert found is not None
    return found


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    builds = {"base": args.base.resolve(), "this": ROOT}
    runs: dict[str, dict[str, list[Found]]] = {
        kind: {name: [] for name in builds} for kind in ("warm", "cold")
    }
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write_source(source, 2 * args.workers)
        for round_ in range(args.rounds):
            for name in sorted(builds, reverse=round_ % 2 == 1):
                cache = Path(tempfile.mkdtemp(dir=folder))
                for kind in ("cold", "warm"):
                    found = first_image(builds[name], source, args.workers, cache, Path(folder))
                    runs[kind][name].append(found)
                    print(f"{kind} {name}: {found}", flush=True)
    commit = subprocess.run(
        ["git", "describe", "--always"], cwd=builds["base"], capture_output=True, text=True
    ).stdout.strip()
    summary = {
        kind: {
            name: {k: median(run[k] for run in own) for k in own[0]} | {"rounds": own}
            for name, own in found.items()
        }
        for kind, found in runs.items()
    }
    save("start", {"base_commit": commit, "workers": args.workers, **summary})


if __name__ == "__main__":
    main()
