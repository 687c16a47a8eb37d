#!/usr/bin/env bash
# numba compiles the error message of a shape mismatch into every a[:] = b between arrays: str, repr, hasattr and the
# joining of strings, up to 37 functions beside one's own, though the message is never shown. It costs 1 to 2 s for each
# number of dimensions in every process that compiles, often more than the whole kernel. A loop over the elements
# compiles nothing beside itself, nor does a[:] = 0.
#
# Seen 2026-11-30 with numba 0.68.1, Python 3.11, functions compiled through the listener of numba:compile:
#   a loop: 1 (0.1 s)    a[:] = 0: 1    a[:] = b: 38 (1.6 s)    then a[:, :] = b: 8 (1.4 s)    then a[:, :, :] = b: 2 (0.7 s)
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numba==0.68.1 numpy==2.4.6
cat > "$folder/compiled.py" <<'PY'
import time

import numpy as np
from numba import njit
from numba.core import event


class Compiled(event.Listener):
    def __init__(self):
        self.names = []

    def on_start(self, event):
        self.names.append(event.data["dispatcher"].py_func.__qualname__)

    def on_end(self, event):
        pass


@njit
def first(a, b):
    return a.size + b.size


@njit
def loop(a, b):
    for i in range(len(a)):
        a[i] = b[i]


@njit
def number(a, b):
    a[:] = 0


@njit
def slice_1(a, b):
    a[:] = b


@njit
def slice_2(a, b):
    a[:, :] = b


@njit
def slice_3(a, b):
    a[:, :, :] = b


first(np.zeros(3), np.ones(3))  # what the first compilation of a process loads
message = "ol_raise_with_shape_context_cpu.<locals>.impl"
for kernel, dimensions, least, with_message in (
    (loop, 1, 1, False),
    (number, 1, 1, False),
    (slice_1, 1, 20, True),
    (slice_2, 2, 2, True),
    (slice_3, 3, 2, True),
):
    a, b = np.zeros((3,) * dimensions), np.ones((3,) * dimensions)
    compiled = Compiled()
    start = time.perf_counter()
    with event.install_listener("numba:compile", compiled):
        kernel(a, b)
    seconds = time.perf_counter() - start
    assert kernel is number or (a == b).all()
    print(f"{kernel.__name__}: {len(compiled.names)} compiled in {seconds:.1f} s; the message among them: {message in compiled.names}")
    assert (message in compiled.names) == with_message
    assert len(compiled.names) >= least if with_message else len(compiled.names) == least
PY
"$folder/venv/bin/python" "$folder/compiled.py"
