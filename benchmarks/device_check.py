"""One command for the minutes in which a GPU is at hand: right or wrong first, then how fast.

    python -m benchmarks.device_check --out OUT              # all parts, at most 14 minutes
    python -m benchmarks.device_check --out OUT --part check kernels
    python -m benchmarks.device_check --toy                  # on a CPU, in Triton's interpreter
    python -m benchmarks.device_check --table [OUT/device_check.jsonl]

Made for a bare machine: torch, Triton, numba, numpy, pyarrow, pillow, fsspec, pytest and
transformers, this checkout, and nothing else; pictures are made (pictures.py). Nothing is changed
on the device.

Every part is a process of its own with a time limit. One that fails, hangs or poisons its CUDA
context does not stop the next, and what it had found by then is kept: figures are added to
OUT/device_check.jsonl as they come, each beside what device_predictions.py says.
OUT/device_check.json is the whole with the machine, to be committed under benchmarks/results;
OUT/device_check.md the table for benchmarks/notes/gpu_fit.md. Exit code 1 if a part failed.

Parts run in the order of LIMITS_S. For two calls: `--part` with the first six, then with the
others and the same OUT, to which figures are added. The convert part leaves its shards to those
after it, in --work. The limits of either half are 7 minutes together; half of that is expected.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.device_predictions import PREDICTIONS, Prediction

LIMITS_S = {
    "machine": 60,
    "check": 90,
    "ceilings": 30,
    "kernels": 80,
    "fit": 45,
    "tests": 110,
    "counters": 60,
    "fits": 110,
    "convert": 100,
    "reader": 40,
    "training": 80,
}
"""The parts, in order, and how many seconds each may take."""
GRACE_S = 3
PRELOADED = ("benchmarks.device_counters", "benchmarks.device_whole")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.table is not None:
        print(table(read(Path(args.table)) if args.table else []))
        return 0
    if args.toy:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    if args.counted:
        count_one(args.toy)
        return 0
    out = Path(args.out or tempfile.mkdtemp(prefix="device_check-"))
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "device_check.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(args.work or folder)
        work.mkdir(parents=True, exist_ok=True)
        failed = run(args.part or list(LIMITS_S), lines, work, args.toy)
    finish(out, read(lines), args.toy)
    print(f"\nwritten: {lines}, .json and .md; " + (f"FAILED: {failed}" if failed else "all ran"))
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="everything at toy size, on the CPU")
    parser.add_argument("--out", help="folder for the results; a new one below /tmp if left out")
    parser.add_argument("--work", help="folder for shards and checkpoints; deleted if left out")
    parser.add_argument("--part", nargs="+", choices=LIMITS_S, help="these parts only")
    parser.add_argument("--table", nargs="?", const="", help="print the table of predictions")
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_part(part: str, lines: Path, work: Path, toy: bool) -> None:
    """The whole of one part."""
    from benchmarks import device_counters, device_kernels, device_whole
    from benchmarks.device_record import TOY, Size, Tell

    size = TOY if toy else Size()
    tell = Tell(lines, part, toy)
    kernels = {
        "check": device_kernels.check,
        "ceilings": device_kernels.ceilings,
        "kernels": device_kernels.kernels,
        "fit": device_kernels.one_fit,
        "counters": device_counters.counters,
        "fits": device_kernels.fits,
        "machine": device_whole.about,
        "tests": device_whole.tests,
    }
    whole = {
        "convert": device_whole.convert,
        "reader": device_whole.reader,
        "training": device_whole.training,
    }
    if part in kernels:
        kernels[part](size, tell)
    else:
        whole[part](size, tell, work)


def alone(
    target: Callable[[str, Path, Path, bool], None], part: str, lines: Path, work: Path, toy: bool
) -> None:
    """`target` in a process that leads a group of its own; what it raises goes into the record."""
    os.setsid()
    try:
        target(part, lines, work, toy)
    except BaseException as error:
        text = traceback.format_exc()
        add(lines, {"part": part, "name": "error", "error": repr(error), "traceback": text[-4000:]})
        print(text, file=sys.stderr, flush=True)
        sys.exit(1)


def run(
    parts: Sequence[str],
    lines: Path,
    work: Path,
    toy: bool,
    limits_s: dict[str, float] = LIMITS_S,
    target: Callable[[str, Path, Path, bool], None] = run_part,
) -> list[str]:
    """The names of the parts that failed."""
    # torch is imported once, not by every part; it must not touch CUDA before a part is forked off
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    failed: list[str] = []
    for part in [name for name in limits_s if name in parts]:
        if spoilt(lines):  # something did touch it
            context = multiprocessing.get_context("spawn")
        begin = time.monotonic()
        process = context.Process(target=alone, args=(target, part, lines, work, toy))
        process.start()
        process.join(limits_s[part])
        status = "ok" if process.exitcode == 0 else f"exit code {process.exitcode}"
        if process.is_alive():
            status = f"stopped after {limits_s[part]:g} s"
            stop(process)
        took = time.monotonic() - begin
        add(lines, {"part": part, "name": "end", "status": status, "took_s": round(took, 1)})
        print(f"{part:10} {status}, {took:.1f} s", flush=True)
        if status != "ok":
            failed.append(part)
    return failed


def spoilt(lines: Path) -> bool:
    """Whether a part could not use CUDA for having been forked off after its start."""
    errors = [record["error"] for record in read(lines) if "error" in record]
    return any("forked subprocess" in error for error in errors)


def stop(process: Any) -> None:
    """Kill the part and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it does not lead its group yet
        process.kill()
    process.join(GRACE_S)


def count_one(toy: bool) -> None:
    """What ncu looks at."""
    from benchmarks.device_counters import counted
    from benchmarks.device_record import TOY, Size

    counted(TOY if toy else Size())


def add(lines: Path, record: dict[str, Any]) -> None:
    with lines.open("a") as file:
        file.write(json.dumps(record | {"at": round(time.time(), 2)}) + "\n")


def read(lines: Path) -> list[dict[str, Any]]:
    """The records of a run, or of several one after another."""
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def finish(out: Path, records: list[dict[str, Any]], toy: bool) -> None:
    """The whole in one file, and the table."""
    machine = next((r["machine"] for r in records if r["name"] == "machine"), None)
    command = "python -m benchmarks.device_check " + " ".join(sys.argv[1:])
    whole = {"command": command, "machine": machine, "results": {"toy": toy, "records": records}}
    (out / "device_check.json").write_text(json.dumps(whole, indent=2) + "\n")
    (out / "device_check.md").write_text(table([] if toy else records) + "\n")


def table(records: list[dict[str, Any]]) -> str:
    """Predictions and outcomes as Markdown; of a figure that was told twice the last one counts."""
    found = {record["name"]: record["value"] for record in records if "value" in record}
    rows = ["| figure | predicted | why | outcome |", "|---|---|---|---|"]
    for name, prediction in PREDICTIONS.items():
        rows.append(f"| {name} | {span(prediction)} | {prediction.why} | {outcome(found, name)} |")
    return "\n".join(rows)


def span(prediction: Prediction) -> str:
    low, high = f"{prediction.low:,g}", f"{prediction.high:,g}"
    return f"{low if low == high else f'{low} to {high}'} {prediction.unit}"


def outcome(found: dict[str, Any], name: str) -> str:
    if name not in found:
        return ""
    value = found[name]
    if value is None:
        return "**not finite**"
    return f"{value:,.4g}" if PREDICTIONS[name].holds(value) else f"**{value:,.4g}**"


if __name__ == "__main__":
    sys.exit(main())
