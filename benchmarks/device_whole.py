"""The parts of `benchmarks.device_check` about everything around a fit.

machine    versions, driver, clocks
tests      pytest on the files with tests for a GPU
convert    a tar to shards on two threads, without Ray, two codecs: rate, stages, device load
reader     shards to the device
training   a classifier in bf16: small, then of ViT-B's width on a token per Gaussian
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.device_kernels import smi
from benchmarks.device_record import Size, Tell
from benchmarks.gpu_fit import wait
from benchmarks.pictures import write_tar
from benchmarks.record import ROOT, machine
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.train.loop import train
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig, PackConfig
from splatshard.schemas.model import EncoderConfig, ModelConfig, ResamplerConfig, StemConfig
from splatshard.schemas.train import DataConfig, LogConfig, OptimConfig, TrainConfig

CLASSES = 10


def about(size: Size, tell: Tell) -> None:
    """What this was run on."""
    found = machine()
    if select_backend("triton").device.type == "cuda":
        assert torch.ones(2, device="cuda").sum() == 2
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    for name in ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"):
        found[name] = next(iter(smi(name)), None)
    tell.write({"part": "machine", "name": "machine", "machine": found})
    print(f"{'machine':10} {found['gpu'] or found['cpu']}, {found['versions']}", flush=True)


def tests(size: Size, tell: Tell) -> None:
    """The tests that make test-gpu runs, on as many processes as help."""
    files = [str(path.relative_to(ROOT)) for path in gpu_test_files()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings="]  # those of other versions say nothing about kernels
    if size.toy:
        files = ["tests/unit/test_kernels.py"]
        command += ["-k", "triton and nothing_to_draw"]
    else:
        command += ["-m", "gpu"]
    if importlib.util.find_spec("xdist") and not size.toy:
        command += ["-n", "8"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    tell("tests failed or broken", len(failed), "tests", last=lines[-1], failed=failed[:40])
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: " + "\n".join(lines[-30:]))


def gpu_test_files() -> list[Path]:
    """Files of unit tests of which some are for a GPU."""
    files = sorted((ROOT / "tests" / "unit").glob("test_*.py"))
    return [path for path in files if "pytest.mark.gpu" in path.read_text()]


def convert(size: Size, tell: Tell, work: Path) -> None:
    """`convert_shard` on two threads, as a worker has, of copies of one tar."""
    for codec in ("fp16", "balanced"):
        if not size.toy:  # so that nothing compiles while it is timed
            converted(size, work, work / f"warm-{codec}", codec, 20, StageTimer(), copies=2)
        timer, load = StageTimer(), DeviceLoad()
        with load:
            begin = time.perf_counter()
            images = converted(size, work, work / f"splats-{codec}", codec, size.steps, timer)
            passed = time.perf_counter() - begin
        busy = {name: s / passed for name, s in timer.stage_stats().busy_s.items()}
        tell(f"conversion, {codec}", images / passed, "images/s", images=images, busy=busy)
        if load.mean is not None:
            tell(f"device load, {codec}", load.mean, "%")


def converted(
    size: Size, work: Path, dst: Path, codec: str, steps: int, timer: StageTimer, copies: int = 0
) -> int:
    """Shards of `copies` of the tar in `dst`; how many images they have."""
    tar = work / "images.tar"
    if not tar.exists():
        write_tar(tar, size.tar_images, size.tar_side, CLASSES)
    dst.mkdir(parents=True, exist_ok=True)
    (source,) = list_shards(str(tar))
    n = size.gaussians[0]
    config = ConvertConfig(
        decode=DecodeConfig(image_size=size.image),
        fit=FitConfig(num_gaussians=n, steps=steps),
        pack=PackConfig(codec=codec),
        backend="auto",
    )
    backend = select_backend("triton")

    def one(number: int) -> int:
        ref = replace(source, name=f"{number:05d}")
        manifest = convert_shard(ref, config, str(dst), backend, timer=timer)
        return manifest.counts.get("ok", 0)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(one, range(copies or size.tar_copies)))
    if sum(done) < len(done) * size.tar_images:
        raise RuntimeError(f"{len(done) * size.tar_images - sum(done)} images were not converted")
    return sum(done)


class DeviceLoad:
    """Mean load of the device in the block, in %, as nvidia-smi samples it."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._done = threading.Event()

    @property
    def mean(self) -> float | None:
        return sum(self.samples) / len(self.samples) if self.samples else None

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.samples += smi("utilization.gpu")


def shards_of(size: Size, work: Path) -> str:
    """A folder of shards to read: those of the conversion, or new ones of few steps."""
    dst = work / "splats-balanced"
    if not any(dst.glob("*.json")):
        converted(size, work, dst, "balanced", min(10, size.steps), StageTimer(), copies=4)
    return str(dst)


def reader(size: Size, tell: Tell, work: Path) -> None:
    """A long epoch of batches to the device, pinned, by reading processes."""
    device = select_backend("triton").device
    workers = size.reader_workers
    source = {shards_of(size, work): 1.0}  # a mixture of one: its epochs may be of any length
    dataset = SplatDataset(
        source,
        batch_size=size.train_batch,
        epoch_samples=size.read_samples,
        lanes=max(1, workers),
    )
    more = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda", **more
    )
    warm = size.read_samples // 10  # processes start, and files are opened
    samples, counted, begin = 0, 0, 0.0
    for batch in loader:
        samples += len(batch.to(device, non_blocking=True))
        if samples >= warm and not begin:
            wait(device)
            begin, counted = time.perf_counter(), samples
    wait(device)
    rate = (samples - counted) / (time.perf_counter() - begin)
    tell("reader to the device", rate, "samples/s", samples=samples, workers=workers)


def training(size: Size, tell: Tell, work: Path) -> None:
    """The product's loop on shards: ms per step, and the share that waits for data."""
    src = shards_of(size, work)
    n = size.gaussians[0]
    small = EncoderConfig(
        width=min(192, size.width), layers=min(4, size.layers), heads=min(3, size.heads),
        tokens=9 if size.toy else 98, resampler=ResamplerConfig(heads=min(3, size.heads)),
        stem=StemConfig(hidden=size.width),
    )  # fmt: skip
    large = EncoderConfig(
        width=size.width, layers=size.layers, heads=size.heads, tokens=n, resampler=None,
        stem=StemConfig(hidden=size.width),
    )  # fmt: skip
    names = ("small classifier, bf16", f"ViT-B width, {n} tokens, bf16")
    for name, encoder, steps in zip(names, (small, large), size.train_steps, strict=True):
        config = TrainConfig(
            stage="classify",
            model=ModelConfig(encoder=encoder, num_classes=CLASSES),
            data=DataConfig(
                src=src, batch_size=size.train_batch, workers=0 if size.toy else 4, lanes=4
            ),
            optim=OptimConfig(steps=steps, lr=1e-3, warmup_steps=1),
            precision="bf16",
            log=LogConfig(every=max(1, steps // 2)),
            dst=str(work / name.replace(" ", "-").replace(",", "")),
        )
        record = train(config).record  # of the second half, which compiles nothing
        ms = 1e3 * size.train_batch / record["images_per_s"]
        more = {"images_per_s": record["images_per_s"], "loss": record["loss"]}
        tell(name, ms, "ms per step", batch=size.train_batch, **more)
        short = name.split(",")[0]
        tell(f"{short}, waiting", record["data_wait_share"], "share of the time")
        tell(f"{short}, peak memory", record["memory_bytes"] / 1e9, "GB")
