#!/usr/bin/env bash
# The wheel in an empty environment of each PYTHON given, away from the checkout: imports, one
# picture, a conversion, its shards read. Not part of the tests: an environment takes up to 6 GB.
#
#   tests/wheel_smoke.sh python3.11 python3.12 python3.13
set -euo pipefail
unset PYTHONPATH  # its packages would count as installed
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for python in "${@:-python3}"; do
  venv=$scratch/venv
  rm -rf "$venv" "$scratch/here"
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet build
  mkdir "$scratch/source"
  git -C "$root" ls-files -z | tar -C "$root" --null -T - -c | tar -C "$scratch/source" -x
  "$venv/bin/python" -m build --wheel --outdir "$scratch" "$scratch/source" >"$scratch/log" 2>&1 \
    || { cat "$scratch/log"; exit 1; }
  rm -rf "$scratch/source" "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet -c "$root/constraints.txt" "$scratch"/splatshard-*.whl
  mkdir "$scratch/here" && cd "$scratch/here"
  "$venv/bin/splatshard" --version
  "$venv/bin/python" - <<'EOF'
import numpy as np
from PIL import Image

import splatshard

y, x = np.mgrid[:48, :64] / 64
picture = np.stack([x, y, np.sin(9 * x * y) ** 2], -1)
splats = splatshard.fit(picture, num_gaussians=60)
assert splats.psnr(picture) > 30, splats.psnr(picture)
splats.save("a.safetensors")
assert splatshard.load("a.safetensors").psnr(picture) == splats.psnr(picture)
for i in range(3):
    Image.fromarray((255 * np.roll(picture, 9 * i, 1)).astype(np.uint8)).save(f"{i}.png")
EOF
  "$venv/bin/splatshard" convert '*.png' out --num-gaussians 50 --image-size 48 --workers 1
  "$venv/bin/splatshard" verify out
  "$venv/bin/python" - <<'EOF'
import sys

import splatshard

(batch,) = splatshard.open("out", batch_size=3, shuffle=False)
assert batch.keys == ["0", "1", "2"] and batch.splats.means.shape == (3, 50, 2)
table = splatshard.SplatTable("out")
assert table["1"]["key"] == "1"

from splatshard.jobs.pages import view_server
from splatshard.jobs.pages.view_data import View

view = View("out")
for path in (*view_server.FILES, "/api/overview", "/image/original?shard=_&row=1"):
    name = path.replace("_", next(iter(view.shards)), 1) if "shard=" in path else path
    kind, status, body = view_server.answer(view, name)
    assert status == 200 and body, (path, body)
print(f"Python {sys.version.split()[0]}: the wheel works")
EOF
  cd "$scratch"
done
