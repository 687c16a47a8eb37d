#!/usr/bin/env bash
# Triton 3.6.0 (the one that torch 2.11 pins): with NumPy 2.4 or newer, its interpreter
# (TRITON_INTERPRET=1) cannot run a loop whose bound was loaded from memory, or any other place where
# a tensor becomes a Python integer. Triton names no range for NumPy, so pip installs the pair.
#
# Seen 2026-11-30, Python 3.11, torch 2.13.0 (CPU):
#   triton 3.6.0, numpy 2.4.6   InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')
#   triton 3.6.0, numpy 2.3.5   6.0, with a DeprecationWarning of NumPy: an error where warnings are errors
#   triton 3.7.1, numpy 2.4.6   6.0
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
cat > "$folder/total.py" <<'PY'
import torch, triton, triton.language as tl


@triton.jit
def total(x, count, out):
    sum = 0.0
    for i in range(0, tl.load(count)):
        sum += tl.load(x + i)
    tl.store(out, sum)


out = torch.zeros(1)
total[(1,)](torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3], dtype=torch.int32), out)
print(out.item())
PY
run() { TRITON_INTERPRET=1 "$folder/venv/bin/python" "$@" "$folder/total.py" 2>&1 | tail -n 1; }
expect() { printf '%s: %s\n' "$1" "$2"; [[ $2 == *"$3"* ]] || { echo "expected: $3"; exit 1; }; }

$pip torch==2.13.0 triton==3.6.0 numpy==2.4.6
expect "triton 3.6.0, numpy 2.4.6" "$(run)" "only 0-dimensional arrays can be converted to Python scalars"
$pip numpy==2.3.5
expect "triton 3.6.0, numpy 2.3.5" "$(run)" "6.0"
expect "the same, warnings are errors" "$(run -W error::DeprecationWarning)" "Conversion of an array with ndim > 0 to a scalar is deprecated"
$pip triton==3.7.1 numpy==2.4.6
expect "triton 3.7.1, numpy 2.4.6" "$(run)" "6.0"
