"""CUDA C++ on a user's machine without a toolkit: compiled by NVRTC, which torch's builds for CUDA
bring along, and run through the driver; both by ctypes.

Machine code is kept where numba keeps its own (compiled.py), by what it was made of: the sources,
the architecture and the compiler. A device that is newer than the compiler gets PTX for the newest
architecture that it knows, which the driver translates.

NVRTC opens a second library by its bare name, and that of CUDA 13's wheel does not find it beside
itself: it is loaded first.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from splatshard.pipeline.kernels.compiled import cache_folder
from splatshard.schemas.errors import BackendError

OPTIONS = ("--std=c++17",)

Launch = Callable[[str, int, int, ctypes.Structure], None]
"""(kernel, blocks, threads of each, the kernel's only argument), on torch's current stream."""


def nvrtc_folders() -> list[Path]:
    """Where the wheels of NVIDIA have NVRTC, one folder for CUDA 13 and another one for 12; then
    where a toolkit has it."""
    spec = find_spec("nvidia")
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    wheels = [place / inner / "lib" for place in places for inner in ("cu13", "cuda_nvrtc")]
    return [*wheels, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64")]


@cache
def nvrtc() -> Any:
    """The compiler: that of torch's CUDA, else any. Raises BackendError where there is none."""
    if not sys.platform.startswith("linux"):
        raise BackendError("no NVRTC: only looked for on Linux")
    major = (torch.version.cuda or "").partition(".")[0]
    names = [f"libnvrtc.so.{number}" for number in dict.fromkeys((major, "13", "12")) if number]
    for name in names:
        for folder in nvrtc_folders():
            if (folder / name).exists():
                for other in sorted(folder.glob("libnvrtc-builtins.so*")):
                    ctypes.CDLL(str(other))
                return ctypes.CDLL(str(folder / name))
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise BackendError(f"no NVRTC: none of {', '.join(names)}: install nvidia-cuda-nvrtc")


def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compile_call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def architectures() -> list[int]:
    """Those that the compiler knows: 90 is compute capability 9.0."""
    count = ctypes.c_int()
    _compile_call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _compile_call("nvrtcGetSupportedArchs", known)
    return sorted(known)


def architecture(capability: tuple[int, int]) -> str:
    """sm_90 for (9, 0) where the compiler knows it, else compute_N for the newest that it knows."""
    wanted = 10 * capability[0] + capability[1]
    known = architectures()
    if wanted in known:
        return f"sm_{wanted}"
    older = [one for one in known if one < wanted]
    if not older:
        raise BackendError(f"NVRTC knows {known}, not compute capability {wanted / 10}")
    return f"compute_{older[-1]}"


def machine_code(source: Path, headers: Sequence[Path], target: str) -> bytes:
    """A cubin for `sm_N`, PTX for `compute_N`; from the cache where it is there."""
    text = source.read_bytes()
    included = [header.read_bytes() for header in headers]
    made_of = repr((nvrtc_version(), OPTIONS, text, included)).encode()
    name = f"{source.stem}-{target}-{hashlib.sha256(made_of).hexdigest()[:32]}"
    folder = cache_folder(source)
    if folder and (folder / name).exists():
        return (folder / name).read_bytes()
    code = compiled_code(source.name, text, dict(zip(headers, included, strict=True)), target)
    if folder:
        with suppress(OSError):
            unfinished = folder / f"{name}.{os.getpid()}-{threading.get_ident()}"
            unfinished.write_bytes(code)
            unfinished.replace(folder / name)
    return code


def compiled_code(name: str, text: bytes, headers: dict[Path, bytes], target: str) -> bytes:
    """What NVRTC makes of a source; BackendError with its words where it makes nothing."""
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*headers.values())
    names = (ctypes.c_char_p * len(headers))(*(path.name.encode() for path in headers))
    _compile_call(
        "nvrtcCreateProgram",
        ctypes.byref(program), text, name.encode(), len(headers), texts, names,
    )  # fmt: skip
    try:
        options = [option.encode() for option in (f"--gpu-architecture={target}", *OPTIONS)]
        listed = (ctypes.c_char_p * len(options))(*options)
        failed = nvrtc().nvrtcCompileProgram(program, len(options), listed)
        if failed:
            log = _text(program, "ProgramLog").decode(errors="replace")
            raise BackendError(f"NVRTC cannot compile {name} for {target}: {' '.join(log.split())}")
        return _text(program, "CUBIN" if target.startswith("sm_") else "PTX")
    finally:
        _compile_call("nvrtcDestroyProgram", ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _compile_call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _compile_call(f"nvrtcGet{what}", program, text)
    return text.raw


def _compile_call(name: str, *arguments: Any) -> None:
    function = getattr(nvrtc(), name)
    if error := function(*arguments):
        words = nvrtc().nvrtcGetErrorString
        words.restype = ctypes.c_char_p
        raise BackendError(f"{name}: {words(error).decode()}")


@cache
def driver() -> Any:
    """libcuda. Raises BackendError where there is no driver."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"no CUDA driver: {error}") from error


def _call(name: str, *arguments: Any) -> None:
    if error := getattr(driver(), name)(*arguments):
        words = ctypes.c_char_p()
        driver().cuGetErrorString(error, ctypes.byref(words))
        raise BackendError(f"{name}: {(words.value or b'?').decode()} ({error})")


def current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def load(code: bytes, kernels: Sequence[str], device: torch.device) -> Launch:
    """The kernels of a cubin or PTX on `device`, in the context that torch uses."""
    number, context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    index = torch.cuda.current_device() if device.index is None else device.index
    device = torch.device("cuda", index)
    _call("cuInit", 0)
    _call("cuDeviceGet", ctypes.byref(number), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    functions = {name: ctypes.c_void_p() for name in kernels}
    _call("cuCtxPushCurrent_v2", context)
    try:
        _call("cuModuleLoadData", ctypes.byref(module), code)
        for name, function in functions.items():
            _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    one = ctypes.c_uint(1)

    def launch(kernel: str, blocks: int, threads: int, argument: ctypes.Structure) -> None:
        stream = ctypes.c_void_p(current_stream(device))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _call("cuCtxPushCurrent_v2", context)
        try:
            _call(
                "cuLaunchKernel", functions[kernel],
                ctypes.c_uint(blocks), one, one, ctypes.c_uint(threads), one, one,
                ctypes.c_uint(0), stream, arguments, None,
            )  # fmt: skip
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    return launch
