#!/usr/bin/env bash
# Hugging Face datasets 5.2.0: a Dataset.map whose function only looks at row["image"] saves every picture anew.
# JPEG files become JPEG files of Pillow's quality 75 without their EXIF data; nothing is said. What only copies
# (filter, a map that leaves the image alone) keeps the bytes.
# ds.cast_column("image", Image(decode=False)) before the map keeps them too.
#
# Seen 2026-11-30 with pillow 13.0.0, Python 3.11, a JPEG of quality 95 with a date in its EXIF data:
#   row["image"].width, and row["image"] handed on: other bytes, fewer, no EXIF, another picture
#   filter by row["image"].width, a map of row["key"], a map with decode=False: the bytes of the file
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 pillow==13.0.0 numpy==2.4.6
cat > "$folder/maps.py" <<'PY'
import io

import datasets
import numpy as np
from PIL import Image

DATE = 0x9003
datasets.disable_progress_bars()
pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
exif = Image.Exif()
exif.get_ifd(0x8769)[DATE] = "2026:11:30 12:00:00"
file = io.BytesIO()
Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
jpeg = file.getvalue()

features = datasets.Features({"key": datasets.Value("string"), "image": datasets.Image()})
rows = datasets.Dataset.from_dict({"key": ["a"], "image": [{"bytes": jpeg, "path": None}]}, features=features)
bare = rows.cast_column("image", datasets.Image(decode=False))
for name, mapped, kept in (
    ("map, the image's width", rows.map(lambda row: {"width": row["image"].width}), False),
    ("map, the image handed on", rows.map(lambda row: {"image": row["image"]}), False),
    ("filter by the image's width", rows.filter(lambda row: row["image"].width > 0), True),
    ("map of the key", rows.map(lambda row: {"length": len(row["key"])}), True),
    ("map, decode=False", bare.map(lambda row: {"bytes": len(row["image"]["bytes"])}), True),
):
    found = mapped.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    image = Image.open(io.BytesIO(found))
    print(f"{name}: {len(jpeg)} -> {len(found)} bytes, EXIF date: {image.getexif().get_ifd(0x8769).get(DATE)}")
    assert image.format == "JPEG" and (found == jpeg) == kept
    if not kept:
        anew = io.BytesIO()
        Image.open(io.BytesIO(jpeg)).save(anew, "JPEG", quality=75)
        assert found == anew.getvalue()
        assert not image.getexif()
PY
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/maps.py"
