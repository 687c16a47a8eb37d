#!/usr/bin/env bash
# Pillow 13.0.0 reads a BMP of 4 or 8 bits per pixel whose palette is black and white, in that order, as if it
# had 1 bit per pixel: another picture, without a word. Masks and scans are such files, and Pillow writes them
# itself. White and black, three colours, or a white of 254 are read right. By Microsoft's description of
# BITMAPINFOHEADER, biBitCount alone says how many bits a pixel has; biClrUsed only shortens the palette.
#
# Seen 2026-11-30, Python 3.11, a mask of 8 x 2 pixels, saved by Pillow as 8 bits:
#   Pillow 13.0.0: 0 0 0 0 0 0 0 0, mode "1"    OpenCV 5.0.0, and the file's own bytes: 0 255 255 0 255 0 0 255
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > "$folder/mask.py" <<'PY'
import io
import struct

import cv2
import numpy as np
from PIL import Image

MASK = bytes([0, 1, 1, 0, 1, 0, 0, 1])
for palette, mode in (((0, 255), "1"), ((255, 0), "P"), ((0, 254), "P"), ((0, 255, 128), "P")):
    image = Image.frombytes("P", (8, 2), MASK * 2)
    image.putpalette([channel for grey in palette for channel in (grey,) * 3])
    file = io.BytesIO()
    image.save(file, "BMP")
    (offset,) = struct.unpack_from("<I", file.getvalue(), 10)
    assert file.getvalue()[28] == 8 and file.getvalue()[offset : offset + 8] == MASK

    right = [[palette[i] for i in MASK]] * 2
    assert cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_GRAYSCALE).tolist() == right
    found = Image.open(file)
    print(f"palette {palette}: {found.mode}, {np.asarray(found.convert('L'))[0]}")
    assert found.mode == mode
    assert (np.asarray(found.convert("L")).tolist() == right) == (mode == "P")
PY
"$folder/venv/bin/python" "$folder/mask.py"
