"""What `benchmarks.device_check` should find on an H200, written down before any run on a GPU.

PREDICTIONS: name of a figure -> the range it should lie in, and why. Names are those that the
parts tell. A figure outside of its range was not understood: find out why before the next change.
benchmarks/notes/gpu_fit.md holds the same as a table, whose last column the first run fills
(`python -m benchmarks.device_check --table`; a test compares the two).

Times of kernels follow from the instructions that benchmarks/gpu_counts.py counts, at 85 % to 45 %
of an H200's issue slots; [E] marks what is estimated in another way.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOTS_PER_S = 132 * 4 * 1.98e9
"""Warp instructions per second that the schedulers of an H200 can issue."""
ISSUE = 0.65
"""Share of them that a kernel without waits is taken to use; assumed, not measured."""
ISSUE_RANGE = (0.45, 0.85)

MILLIONS = {  # warp instructions per image (of lists: both levels once), gpu_counts.json
    400: {"forward": 1.00, "backward": 1.16, "backward, as given": 2.50, "lists": 0.46},
    1600: {"forward": 1.20, "backward": 1.20, "backward, as given": 2.25, "lists": 0.63},
    4900: {"forward": 1.56, "backward": 1.50, "backward, as given": 2.32, "lists": 1.24},
}


STEPS = {  # million warp instructions per image of a whole step on the recipe's rows
    400: {"step on tensor cores": 0.253, "step of Triton": 0.72},
    1600: {"step on tensor cores": 0.472, "step of Triton": 1.05},
    4900: {"step on tensor cores": 0.976, "step of Triton": 2.06},
}
"""Those on tensor cores: tile_counts.json. Triton's: MILLIONS over the stride [E]."""


@dataclass(frozen=True)
class Prediction:
    """A figure should lie in low..high; `unit` as the part tells it."""

    low: float
    high: float
    unit: str
    why: str

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def counted(millions: float, what: str) -> Prediction:
    """Microseconds of so many warp instructions."""
    low, high = (millions * 1e12 / (share * SLOTS_PER_S) for share in reversed(ISSUE_RANGE))
    return Prediction(round(low, 2), round(high, 2), "us per image", f"{millions} M {what}")


def kernels() -> dict[str, Prediction]:
    found: dict[str, Prediction] = {}
    for n, millions in MILLIONS.items():
        for name, count in millions.items():
            found[f"{name}, N={n}"] = counted(count, "warp instructions")
        traffic = n * 224 / 4.2e6  # us at 4.2 TB/s: 8 floats read 5 times, written 3 times less one
        found[f"adam, N={n}"] = Prediction(
            round(traffic, 2), round(3 * traffic + 0.02, 2), "us per image", "224 bytes a Gaussian"
        )
    found |= {
        "backward 4 x 32, N=400": counted(1.10, "warp instructions, 128 registers"),
        "backward 4 x 32, N=4900": counted(1.56, "warp instructions, 128 registers"),
        "backward 1 x 32, N=400": counted(1.18, "warp instructions; needs no order [E]"),
        "backward 1 x 32, N=4900": counted(2.75, "warp instructions; needs no order [E]"),
        "order, N=400": Prediction(0.05, 0.6, "us per image", "a sort of 400, every 8 steps [E]"),
        "order, N=4900": Prediction(0.3, 5, "us per image", "a sort of 4900, every 8 steps [E]"),
        "start, N=400": Prediction(
            25, 60, "us per image", "20 M instructions, 170 launches of torch, 25 MB [E]"
        ),
        "relocation, N=400": Prediction(4, 10, "us per image", "a rendering, a blur, pooling [E]"),
        "colours, N=400": Prediction(
            10, 26, "us per image", "four passes forward and backward, lists and orders [E]"
        ),
        "blur, 3 planes": Prediction(0.4, 1.5, "us per image", "2.4 MB at 4.2 TB/s [E]"),
        "topk, N=400": Prediction(0.2, 3, "us per image", "140 of 50,176, some passes [E]"),
    }
    # the lists' loop is a quarter longer with Triton 3.6 than with 3.7.1, with which it was counted
    for n, millions in MILLIONS.items():
        low = counted(millions["lists"], "").low
        high = counted(1.25 * millions["lists"], "").high
        why = f"{millions['lists']} M warp instructions, with Triton 3.6 a quarter more"
        found[f"lists, N={n}"] = Prediction(low, high, "us per image", why)
    for n, millions in STEPS.items():
        for name, count in millions.items():
            estimated = " [E]" if "Triton" in name else ""
            found[f"{name}, N={n}"] = counted(count, f"warp instructions{estimated}")
    return found


PREDICTIONS: dict[str, Prediction] = {
    "equal bits": Prediction(1, 1, "share of checks", "nothing is atomic"),
    "written": Prediction(1, 1, "share of checks", "no output keeps what was in its memory"),
    "error over float32's own": Prediction(
        0, 4, "ratio", "the same formulas in another order; pixels on the rim fall to either side"
    ),
    "fused step against torch": Prediction(0, 1e-4, "relative", "as in the interpreter"),
    "tiles are used": Prediction(1, 1, "1 is yes", "NVRTC is part of torch's CUDA"),
    "tiles: error": Prediction(
        2e-4, 4e-3, "of the gradient", "halves; 0.0006 to 0.0024 over the emulated warp"
    ),
    "tiles: equal bits": Prediction(1, 1, "share of checks", "sums across tiles are integers"),
    "Lloyd step against numba": Prediction(0, 1e-3, "px", "as in the interpreter"),
    "fp32 product": Prediction(48, 62, "TFLOP/s", "data sheet 67; without TF32"),
    "bf16 product": Prediction(650, 850, "TFLOP/s", "data sheet 989; power binds"),
    "copy": Prediction(4.0, 4.5, "TB/s", "data sheet 4.8"),
    "clock under load": Prediction(1600, 1980, "MHz", "of fp32 products"),
    **kernels(),
    "images/s, N=400, batch 512": Prediction(
        5500, 11000, "images/s", "56 us of steps on a row in 4 and 62 of the rest, at 65 %"
    ),
    "images/s, N=400, batch 1024": Prediction(5500, 11000, "images/s", "as batch 512 [E]"),
    "images/s, Triton's step, N=400, batch 512": Prediction(
        3200, 6000, "images/s", "158 us of steps on a row in 4 and 62 of the rest, at 65 %"
    ),
    "peak memory, N=400, batch 512": Prediction(
        2, 6.4, "GB", "at most 240 bytes a pixel and 1 kB a Gaussian (pipeline/runtime/batching.py)"
    ),
    "time in steps": Prediction(0.3, 0.7, "share of the device's", "56 of 118 us"),
    "device idle in a fit": Prediction(0, 0.1, "share of the time", "four launches a step [E]"),
    "forward instructions, N=400": Prediction(
        0.85, 1.3, "M per image", "1.00 on photographs; made pictures differ by 15 %"
    ),
    "backward instructions, N=400": Prediction(
        0.95, 1.5, "M per image", "1.16 on photographs; made pictures differ by 15 %"
    ),
    "forward issue": Prediction(45, 85, "% of slots", "12 warps, 64 evaluations each [E]"),
    "backward issue": Prediction(
        35, 80, "% of slots", "special functions: 4 of 57, at a quarter of the rate [E]"
    ),
    "fit_tiles instructions, N=400": Prediction(
        0.6, 1.1, "M per image", "0.82 on photographs, all rows; made pictures differ"
    ),
    "fit_tiles issue": Prediction(
        40, 80, "% of slots", "24 warps; exp2 keeps its unit for a third of the time [E]"
    ),
    "images/s, N=400, batch 64": Prediction(
        3000, 8500, "images/s", "a step takes the host 20 to 30 us, the device 24 [E]"
    ),
    "images/s, N=1600, batch 64": Prediction(2500, 6500, "images/s", "launches show [E]"),
    "images/s, N=4900, batch 64": Prediction(1600, 3800, "images/s", "launches show [E]"),
    "images/s, N=1600, batch 1024": Prediction(3600, 7200, "images/s", "104 + 80 us"),
    "images/s, N=4900, batch 1024": Prediction(2000, 4000, "images/s", "215 + 115 us"),
    "images/s, N=400, batch 1": Prediction(
        40, 160, "images/s", "launches bind: 4 a step, 20 to 30 us, and the start's 170 [E]"
    ),
    "published loop, N=400, batch 64": Prediction(
        130, 320, "images/s", "3,000 steps of 1.25 us, where launches show (its authors: 139)"
    ),
    "PSNR, N=400": Prediction(27.41, 27.53, "dB", "27.47 on the CPU, of the same pictures"),
    "PSNR, N=1600": Prediction(34.82, 34.94, "dB", "34.88 on the CPU, of the same pictures"),
    "PSNR, N=4900": Prediction(40.41, 40.53, "dB", "40.47 on the CPU, of the same pictures"),
    "above the published loop, N=400": Prediction(0.55, 0.75, "dB", "0.65 on the CPU"),
    "above the published loop, N=1600": Prediction(2.15, 2.5, "dB", "2.34 on the CPU"),
    "above the published loop, N=4900": Prediction(5.2, 5.7, "dB", "5.47 on the CPU"),
    "conversion, fp16": Prediction(
        900, 2200, "images/s", "Python's lock: 0.36 ms of decoding, 0.15 of reading and stacking"
    ),
    "conversion, balanced": Prediction(350, 700, "images/s", "packing: 3 ms of Python an image"),
    "device load, fp16": Prediction(40, 100, "%", "the device waits for decoding [E]"),
    "device load, balanced": Prediction(15, 60, "%", "the device waits for packing [E]"),
    "reader to the device": Prediction(
        60_000, 300_000, "samples/s", "8 processes of 49,600 each, less what they hand over [E]"
    ),
    "small classifier, bf16": Prediction(8, 45, "ms per step", "launches bind [E]"),
    "ViT-B width, 400 tokens, bf16": Prediction(
        140, 300, "ms per step", "58 TFLOP at 200 to 400 TFLOP/s [E]"
    ),
    "small classifier, waiting": Prediction(
        0, 0.3, "share of the time", "4 processes read ahead of some 10,000 samples/s [E]"
    ),
    "ViT-B width, waiting": Prediction(0, 0.05, "share of the time", "4 processes read ahead [E]"),
}
