#!/usr/bin/env bash
# A mask, an array of bool, that tifffile saves is inverted for whoever reads it with anything else: tifffile
# writes bool with PhotometricInterpretation 0, white-is-zero, and leaves the bits as they are, so True is black.
# tifffile itself ignores the tag and gives the mask back, and reads masks of Pillow (tag 1) right as well, so a
# round trip shows nothing. Giving photometric="minisblack" helps.
#
# Seen 2026-11-30, Python 3.11, tifffile 2026.3.3, Pillow 13.0.0, OpenCV 5.0.0, the mask [True False True True]:
#   written by tifffile:  tifffile [1 0 1 1]  Pillow [0 1 0 0]  OpenCV [0 1 0 0]
#   written by Pillow:    tifffile [1 0 1 1]  Pillow [1 0 1 1]  OpenCV [1 0 1 1]
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  pillow==13.0.0 tifffile==2026.3.3 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > "$folder/mask.py" <<'PY'
import io

import cv2
import numpy as np
import tifffile
from PIL import Image

mask = np.array([[True, False, True, True]])


def seen(file):
    data = file.getvalue()
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return {
        "tifffile": tifffile.imread(io.BytesIO(data)).astype(int).ravel().tolist(),
        "Pillow": np.asarray(Image.open(io.BytesIO(data))).astype(int).ravel().tolist(),
        "OpenCV": (decoded > 0).astype(int).ravel().tolist(),
    }


def by_tifffile(**options):
    file = io.BytesIO()
    tifffile.imwrite(file, mask, **options)
    return seen(file)


file = io.BytesIO()
Image.fromarray(mask).save(file, "TIFF")
same, inverted = [1, 0, 1, 1], [0, 1, 0, 0]
for name, found, others in (
    ("tifffile", by_tifffile(), inverted),
    ("tifffile, minisblack", by_tifffile(photometric="minisblack"), same),
    ("Pillow", seen(file), same),
):
    print(f"written by {name}: {found}")
    assert found == {"tifffile": same, "Pillow": others, "OpenCV": others}
PY
"$folder/venv/bin/python" "$folder/mask.py"
