"""CUDA C++ without a toolkit and without a device: what NVRTC makes of tile_step.cu, and what the
driver is asked, by a made-up one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from splatshard.pipeline.kernels import cuda, tile_step
from splatshard.pipeline.kernels.tile_step import HEADER, KERNELS, SOURCE, TileStep
from splatshard.schemas.config import FitConfig
from splatshard.schemas.errors import BackendError
from tests.emulator import Emulator, library
from tests.unit.test_kernels import make_splats, to_float32

COUNTS = {"13.0": (228, 64)}
"""Instructions for 16 Gaussians at 64 px on sm_90, drawn and on the way back, by version of NVRTC:
benchmarks/notes/gpu_fit.md stands on them."""


@pytest.fixture
def compiler() -> None:
    try:
        cuda.nvrtc()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=["sm_80", "sm_90", "sm_100"])
def test_the_kernels_compile_without_a_device_and_spill_nothing(
    capability: tuple[int, int],
) -> None:
    pytest.importorskip("triton", reason="its wheel holds the disassemblers")
    from tests.compile_tiles import inspected, instructions, machine_code, parts

    if 10 * capability[0] not in cuda.architectures():
        pytest.skip(f"NVRTC {cuda.nvrtc_version()} does not know it")
    usage, lines = inspected(machine_code(capability))
    assert set(usage) == set(lines) == set(KERNELS)
    for used in usage.values():
        assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert usage["fit_tiles"]["REG"] <= 96  # 20 warps in a processor's registers
    assert usage["fit_tiles"]["SHARED"] <= 45_000  # and in its memory
    code = instructions(lines["fit_tiles"])

    def count(name: str) -> int:
        return sum(f" {name}" in f" {line}" for line in code)

    assert count("HMMA.16816.F32") == 4 + 8  # colours; moments and the colours' gradient
    assert count("HMMA.1688.F16") == 8  # slopes
    assert count("MUFU.EX2") == 2 * 32  # weights, drawn on the way and, where not kept, back
    assert count("MOVM.16.MT88") == 16 + 8
    assert count("RED") == 8
    expected = COUNTS.get(".".join(map(str, cuda.nvrtc_version())))
    if capability == (9, 0) and expected:
        found = parts(lines["fit_tiles"])
        assert (found.block, found.block_back) == expected


@pytest.mark.usefixtures("compiler")
def test_machine_code_is_kept_by_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    source, header = tmp_path / "one.cu", tmp_path / "two.cuh"
    source.write_text('#include <two.cuh>\nextern "C" __global__ void f(int* x) { *x = TWO; }\n')
    header.write_text("#define TWO 2\n")
    made = []

    def counted(*arguments):
        made.append(arguments)
        return compiled_code(*arguments)

    compiled_code = cuda.compiled_code
    monkeypatch.setattr(cuda, "compiled_code", counted)
    first = cuda.machine_code(source, [header], "sm_80")
    assert first[:4] == b"\x7fELF"
    assert cuda.machine_code(source, [header], "sm_80") == first
    assert len(made) == 1
    assert b".version" in cuda.machine_code(source, [header], "compute_80")
    header.write_text("#define TWO 3\n")
    assert cuda.machine_code(source, [header], "sm_80") != first
    assert len(made) == 3
    assert len(list((tmp_path / "kept").iterdir())) == 3
    header.write_text("#define TWO nothing\n")
    with pytest.raises(BackendError, match=r'one.cu for sm_80: .*"nothing" is undefined'):
        cuda.machine_code(source, [header], "sm_80")


@pytest.mark.usefixtures("compiler")
def test_an_unknown_device_gets_ptx_for_the_newest_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "architectures", lambda: [80, 90])
    assert [cuda.architecture(c) for c in ((8, 0), (8, 6), (9, 0), (12, 0))] == [
        "sm_80", "compute_80", "sm_90", "compute_90"
    ]  # fmt: skip
    with pytest.raises(BackendError, match=r"knows \[80, 90\], not compute capability 7.5"):
        cuda.architecture((7, 5))


def test_without_a_compiler_or_a_driver_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda, "nvrtc_folders", list)
    monkeypatch.setattr(ctypes, "CDLL", nothing)
    with pytest.raises(BackendError, match=r"no NVRTC: none of libnvrtc\.so\..*: install nvidia-"):
        cuda.nvrtc.__wrapped__()
    with pytest.raises(BackendError, match=r"no CUDA driver: libcuda.so.1: cannot open"):
        cuda.driver.__wrapped__()


def test_kernels_are_launched_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's context, which is put back; on its stream; with arguments that arrive whole."""
    made_up = library()
    monkeypatch.setattr(cuda, "driver", lambda: made_up)
    monkeypatch.setattr(cuda, "current_stream", lambda device: 74 + device.index)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    device = torch.device("cuda:3")
    launch = cuda.load(b"machine code for it", KERNELS, torch.device("cuda"))
    splats, target = to_float32(make_splats(2, 20, 14, 21)), torch.rand(2, 3, 14, 21)
    found = []
    before = made_up.driver_launches()
    for run in (launch, Emulator().launch):
        moved = splats.map(torch.clone)
        moments = tuple(torch.zeros(2, 20, 8) for _ in range(2))
        step = TileStep(target, FitConfig(num_gaussians=20), 2, run)
        found.append(step.step(moved, moments, 1, True, 0.5, 0.1, 0.5).means)
    assert torch.equal(*found)
    assert not torch.equal(found[0], splats.means)
    assert made_up.driver_launches() - before == 3
    assert {made_up.driver_stream(i % 8) for i in range(before, before + 3)} == {77}
    with pytest.raises(
        BackendError, match=r"cuModuleLoadData: device kernel image is invalid \(200\)"
    ):
        cuda.load(b"something else", KERNELS, device)
    with pytest.raises(BackendError, match=r"cuModuleGetFunction: another error \(500\)"):
        cuda.load(b"machine code", ["no_such_kernel"], device)
    with pytest.raises(BackendError, match=r"cuDeviceGet: another error \(101\)"):
        cuda.load(b"machine code", KERNELS, torch.device("cuda:1"))
    assert made_up.driver_depth() == 0


def test_an_old_device_is_refused_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BackendError, match=r"compute capability 7.5, at least 8.0 needed"):
        tile_step.load(torch.device("cuda:0"))


def test_the_sources_are_part_of_the_package() -> None:
    assert SOURCE.exists()
    assert HEADER.exists()
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    assert '"splatshard.pipeline.kernels" = ["*.cu", "*.cuh"]' in project.read_text()
