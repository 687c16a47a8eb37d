#!/usr/bin/env bash
# Pillow 13.0.0 overlooks the transparent value (tRNS) of grey PNGs of 2 and 4 bits and of RGB PNGs of 16 bits:
# it brings the pixels to 8 bits and compares them with the value as the file has it. convert("RGBA") is then
# opaque everywhere, without a word; black or any other background that was to be see-through gets into the
# picture. The PNG specification, third edition, 11.3.1.1 tRNS: the sample values of the image's own bit depth
# are compared, so 2-bit pixels of value 1 are transparent where tRNS says 1. Only the value 0 happens to be right.
#
# Seen 2026-11-30, Python 3.11, one pixel of the transparent value beside one that is not; alpha by pypng: 0 255
#   pillow 13.0.0, grey of 1, 8 and 16 bits, RGB of 8: 0 255; grey of 2 and 4 bits, RGB of 16: 255 255
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 pypng==0.20220715.0
cat > "$folder/transparency.py" <<'PY'
import io

import png
from PIL import Image

for grey, bits, seen in (
    (True, 1, True),
    (True, 2, False),
    (True, 4, False),
    (True, 8, True),
    (True, 16, True),
    (False, 8, True),
    (False, 16, False),
):
    transparent, other = (1,) * (1 if grey else 3), (0,) * (1 if grey else 3)
    file = io.BytesIO()
    writer = png.Writer(2, 1, greyscale=grey, bitdepth=bits, transparent=transparent[0] if grey else transparent)
    writer.write(file, [transparent + other])
    _, _, rows, _ = png.Reader(bytes=file.getvalue()).asRGBA()
    assert [alpha > 0 for alpha in next(iter(rows))[3::4]] == [False, True]
    alpha = list(Image.open(file).convert("RGBA").getchannel("A").tobytes())
    print(f"{'grey' if grey else 'RGB'}, {bits} bits: alpha {alpha}")
    assert alpha == ([0, 255] if seen else [255, 255])
PY
"$folder/venv/bin/python" "$folder/transparency.py"
