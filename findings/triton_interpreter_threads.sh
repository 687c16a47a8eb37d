#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) is for one thread of a process: the number of the program
# that runs, and its patches of triton.language, are kept once for all. Two threads that launch kernels
# at the same time read each other's tl.program_id, and write elements of other programs without a word;
# the first to end takes the patches away under the other, which then raises "Did you forget to add
# @triton.jit".
#
# Seen 2026-11-30 with triton 3.7.1 and 3.6.0, numpy 2.3.5, torch 2.13.0 (CPU), Python 3.11; of two threads:
#   one: "wrong: 1% of the elements" (0.1 to 1 %), no error
#   the other: InterpreterError("ValueError('Did you forget to add @triton.jit ? (`_semantic` argument ...")
# Exits with 1 if none of five tries gave wrong elements without an error, or if one thread alone did.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
cat > "$folder/doubled.py" <<'PY'
import sys
import threading

import torch, triton, triton.language as tl


@triton.jit
def doubled(x, out):
    i = tl.program_id(0)
    tl.store(out + i, 2 * tl.load(x + i))


def work(found):
    x = torch.arange(4000.0)
    out = torch.full_like(x, -1)
    try:
        doubled[(len(x),)](x, out)
    except Exception as error:
        found.append(f"raised {error!r:.90}")
    else:
        wrong = (out != 2 * x).float().mean().item()
        found.append(f"wrong: {wrong:.1%} of the elements, no error" if wrong else "right")


sys.setswitchinterval(1e-4)  # threads take turns more often, as on a busy machine
for count in (1, 2, 2, 2, 2, 2):
    found = []
    threads = [threading.Thread(target=work, args=(found,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{count} thread(s):", *found, sep="\n    ")
    if count == 1:
        assert found == ["right"]
    elif any("wrong" in text for text in found):
        sys.exit(0)
sys.exit("two threads did not disturb each other: this has changed")
PY
for version in 3.7.1 3.6.0; do
  $pip torch==2.13.0 numpy==2.3.5 triton==$version
  echo "triton $version"
  TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/doubled.py"
done
