#!/usr/bin/env bash
# The sum over the pixels of an image, x.sum((1, 2, 3)), has other bits for an image alone than for the same
# image in a batch, on a CPU with two threads or more, from 32,768 values on: only a single output is added
# up in parts. So what is packed, hashed or compared bit by bit depends on the batch's last, smaller part.
# With one thread, or below that size, the bits are the same. x.expand(2, ...) gives a lone image the
# batch's bits.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU build), Python 3.11:
#   1 thread: same bits at 104 px and 105 px; 2 threads: same at 104 px (32,448 values), others at 105 px (33,075)
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/alone.py" <<'PY'
import torch


def sums(x):
    return x.sum((1, 2, 3))


for threads, size, expected in ((1, 104, True), (1, 105, True), (2, 104, True), (2, 105, False)):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    pairs = [torch.rand(2, 3, size, size) for _ in range(20)]
    same = all(torch.equal(sums(x)[:1], sums(x[:1])) for x in pairs)
    doubled = all(torch.equal(sums(x)[:1], sums(x[:1].expand(2, -1, -1, -1))[:1]) for x in pairs)
    print(f"{threads} thread(s), {size} px, {3 * size * size} values: same bits alone: {same}")
    assert same == expected
    assert doubled
PY
"$folder/venv/bin/python" "$folder/alone.py"
