#!/usr/bin/env bash
# A TIFF whose PhotometricInterpretation says white-is-zero is a negative of its numbers: TIFF 6.0, section 8,
# "0 is imaged as white", whatever the bits per sample. Pillow 13.0.0 and OpenCV 5.0.0 invert 8 bits, but
# give 16 bits as they are, so the same picture is a negative at one depth; in big-endian order Pillow cannot
# open the 16 bits at all. tifffile never inverts (its imread gives the file's numbers, as it says). Who reads
# scans of both depths looks at tag 262 (im.tag_v2[262]) and inverts 16 bits himself.
#
# Seen 2026-11-30, Python 3.11, pixels from white to black, as Pillow, OpenCV and tifffile give them:
#   8 bits:  255 155 0      255 155 0      0 100 255
#   16 bits: 0 25700 65535  0 25700 65535  0 25700 65535
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  pillow==13.0.0 tifffile==2026.3.3 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > "$folder/white.py" <<'PY'
import io

import cv2
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError


def written(stored, order="<"):
    file = io.BytesIO()
    tifffile.imwrite(file, stored, photometric="miniswhite", byteorder=order)
    return file


for stored, imaged in ((np.uint8([[0, 100, 255]]), [255, 155, 0]), (np.uint16([[0, 25700, 65535]]), [0, 25700, 65535])):
    file = written(stored)
    for name, found in (
        ("Pillow", np.asarray(Image.open(file))),
        ("OpenCV", cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED)),
    ):
        print(f"{8 * stored.itemsize} bits, {name}: {found[0]}")
        assert found.dtype == stored.dtype and found[0].tolist() == imaged
    assert (tifffile.imread(io.BytesIO(file.getvalue())) == stored).all()

assert np.asarray(Image.open(written(np.uint8([[0, 100]]), ">"))).tolist() == [[255, 155]]
try:
    Image.open(written(np.uint16([[0, 25700]]), ">"))
except UnidentifiedImageError:
    print("16 bits, big-endian, Pillow: UnidentifiedImageError")
else:
    raise AssertionError("Pillow opens it")
PY
"$folder/venv/bin/python" "$folder/white.py"
