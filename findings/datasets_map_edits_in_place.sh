#!/usr/bin/env bash
# Hugging Face datasets 5.2.0: an image that was opened from a file is stored as the file's path, whatever was
# done to it since. So what a function does in place to row["image"] (thumbnail, paste, putpixel, draw) is lost for
# a dataset of files (imagefolder, a column of paths), without a word, and kept for the same pictures out of
# Parquet. Methods that return an image (resize, crop, convert) are kept, and so is image.copy() edited in place.
#
# Seen 2026-11-30 with pillow 13.0.0, Python 3.11, row["image"].thumbnail((8, 8)) on 48 x 32 pixels:
#   from a path: (48, 32)    from bytes: (8, 5)    Dataset.from_dict({"image": [the image]}): (48, 32)
#   resize((8, 5)), or thumbnail of a copy, from a path: (8, 5)
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 pillow==13.0.0 numpy==2.4.6
cat > "$folder/edits.py" <<'PY'
import sys

import datasets
from PIL import Image

datasets.disable_progress_bars()
path = sys.argv[1]
Image.new("RGB", (48, 32), "red").save(path)
features = datasets.Features({"image": datasets.Image()})
as_path = datasets.Dataset.from_dict({"image": [path]}, features=features)
with open(path, "rb") as file:
    as_bytes = datasets.Dataset.from_dict({"image": [{"bytes": file.read(), "path": None}]}, features=features)


def thumbnail(row):
    row["image"].thumbnail((8, 8))
    assert row["image"].size == (8, 5)
    return row


def copied(row):
    return thumbnail({"image": row["image"].copy()})


def resized(row):
    return {"image": row["image"].resize((8, 5))}


image = Image.open(path)
image.thumbnail((8, 8))
for name, rows, size in (
    ("thumbnail, from a path", as_path.map(thumbnail), (48, 32)),
    ("thumbnail, from bytes", as_bytes.map(thumbnail), (8, 5)),
    ("thumbnail, from_dict", datasets.Dataset.from_dict({"image": [image]}, features=features), (48, 32)),
    ("thumbnail of a copy, from a path", as_path.map(copied), (8, 5)),
    ("resize, from a path", as_path.map(resized), (8, 5)),
):
    print(f"{name}: {rows[0]['image'].size}")
    assert rows[0]["image"].size == size
PY
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/edits.py" "$folder/red.png"
