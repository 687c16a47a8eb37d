#!/usr/bin/env bash
# Pillow 13.0.0 swaps the bytes of a compressed big-endian grey TIFF of floats or signed integers twice, without
# a word: libtiff hands them over in the machine's order, and Pillow takes them for the file's. Scanned
# heights, depths and microscopes' pictures come out as noise or as nearly zero. The same file without
# compression or in little-endian order is right, and so is all of it in tifffile and OpenCV. TIFF 6.0, section 2:
# the header's "MM" is the order of the numbers in the whole file.
#
# Seen 2026-11-30 with pillow 13.0.0, Python 3.11, on a little-endian machine; right values are 10, 19, 28, ...:
#   float32, big-endian, deflated: 1.16e-41, 5.46e-41    int32: 167772160, 318767104    int16: 2560, 4864
#   uint16, big-endian, deflated, and the three in any other way: right
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  pillow==13.0.0 tifffile==2026.3.3 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > "$folder/order.py" <<'PY'
import io

import cv2
import numpy as np
import tifffile
from PIL import Image

for kind in ("uint16", "int16", "int32", "float32"):
    right = (np.arange(12) * 9 + 10).reshape(3, 4).astype(kind)
    for order in "<>":
        for compression in (None, "zlib"):
            file = io.BytesIO()
            tifffile.imwrite(file, right, byteorder=order, compression=compression)
            assert (tifffile.imread(io.BytesIO(file.getvalue())) == right).all()
            assert (cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED) == right).all()
            found = np.asarray(Image.open(file))
            print(f"{kind}, {order}, {compression}: {found.ravel()[:2]}")
            swapped = order == ">" and compression == "zlib" and kind != "uint16"
            assert (found == (right.byteswap() if swapped else right)).all()
PY
"$folder/venv/bin/python" "$folder/order.py"
