"""From typing the command to the first converted image, beside an older build's.

    git worktree add ../base 931aac8
    python -m benchmarks.start --base ../base

There are two tars of eight photographs for each worker (of datacomp-sample's shard 1), so that all
have work; the first image is there when the first shard is. Cold: numba's cache is empty, as after
the installation; warm: the run before has filled it. Builds take turns; figures are the least and
the median of `rounds`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from benchmarks.record import DATA, ROOT, save

PHOTOGRAPHS = 8


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


def first_image_s(build: Path, source: Path, workers: int, cache: Path, folder: Path) -> float:
    """Seconds until the first shard of a conversion by the checkout `build` is there."""
    dst = Path(tempfile.mkdtemp(dir=folder)) / "dst"
    command = [sys.executable, "-m", "jobs.convert", str(source), str(dst)]
    own = {"PYTHONPATH": str(build), "NUMBA_CACHE_DIR": str(cache), "TMPDIR": str(cache)}
    begin = time.perf_counter()
    job = subprocess.Popen(
        [*command, "--workers", str(workers)], cwd=build, env=os.environ | own,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    found = None
    while job.poll() is None:
        if found is None and any(dst.glob("*.parquet")):
            found = time.perf_counter() - begin
        time.sleep(0.01)
    assert job.returncode == 0, f"{build}: exit {job.returncode}"
    assert found is not None
    return found


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    builds = {"base": args.base.resolve(), "this": ROOT}
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in builds} for kind in ("warm", "cold")
    }
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write_source(source, 2 * args.workers)
        for round_ in range(args.rounds):
            for name in sorted(builds, reverse=round_ % 2 == 1):
                cache = Path(tempfile.mkdtemp(dir=folder))
                for kind in ("cold", "warm"):
                    found = first_image_s(builds[name], source, args.workers, cache, Path(folder))
                    seconds[kind][name].append(found)
                    print(f"{kind} {name}: {found:.2f} s", flush=True)
    commit = subprocess.run(
        ["git", "describe", "--always"], cwd=builds["base"], capture_output=True, text=True
    ).stdout.strip()
    summary = {
        kind: {
            name: {"least_s": min(own), "median_s": median(own), "all_s": own}
            for name, own in found.items()
        }
        for kind, found in seconds.items()
    }
    save("start", {"base_commit": commit, "workers": args.workers, **summary})


if __name__ == "__main__":
    main()
