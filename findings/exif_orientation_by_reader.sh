#!/usr/bin/env bash
# Whether a photograph stands upright depends on the reader and on the format: the EXIF orientation is applied by
# Hugging Face datasets, by OpenCV but for AVIF and IMREAD_UNCHANGED, by Pillow for TIFF alone, and by webdataset
# and imageio not at all (webdataset goes by Pillow for TIFF, and leaves .avif as bytes without a word). So a model
# trained through one reader sees other pictures through the next, and boxes made with one do not fit. With Pillow,
# ImageOps.exif_transpose does it for every format.
#
# Seen 2026-11-30, Python 3.11, with the versions below; 48 x 32 pixels, orientation 6, which is shown as 32 x 48:
#             Pillow   OpenCV   UNCHANGED  imageio  datasets  webdataset
#   jpg png   as is    upright  as is      as is    upright   as is
#   webp      as is    upright  as is      as is    upright   as is
#   tiff      upright                      as is    upright   upright
#   avif      as is    as is    as is      as is    upright   -
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 \
  webdataset==1.0.2 imageio==2.38.1 opencv-python-headless==5.0.0.93 pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cat > "$folder/upright.py" <<'PY'
import sys
import tarfile

import cv2
import datasets
import imageio.v3 as iio
import numpy as np
import webdataset
from PIL import Image, ImageOps

UPRIGHT, AS_IS, NO = "upright", "as is", "-"
folder = sys.argv[1]


def from_tar(path, ending):
    with tarfile.open(f"{folder}/a.tar", "w") as tar:
        tar.add(path, f"a.{ending}")
    (sample,) = webdataset.WebDataset(f"{folder}/a.tar", shardshuffle=False).decode("pil")
    return sample[ending]


def stands(image):
    if image is None or isinstance(image, bytes):
        return NO
    return {(48, 32): UPRIGHT, (32, 48): AS_IS}[np.asarray(image).shape[:2]]


for ending, expected in (
    ("jpg", (AS_IS, UPRIGHT, AS_IS, AS_IS, UPRIGHT, AS_IS)),
    ("png", (AS_IS, UPRIGHT, AS_IS, AS_IS, UPRIGHT, AS_IS)),
    ("webp", (AS_IS, UPRIGHT, AS_IS, AS_IS, UPRIGHT, AS_IS)),
    ("avif", (AS_IS, AS_IS, AS_IS, AS_IS, UPRIGHT, NO)),
    ("tiff", (UPRIGHT, None, None, AS_IS, UPRIGHT, UPRIGHT)),
):
    path = f"{folder}/a.{ending}"
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (48, 32), "red").save(path, exif=exif)
    assert stands(ImageOps.exif_transpose(Image.open(path))) == UPRIGHT
    rows = datasets.Dataset.from_dict({"image": [path]}).cast_column("image", datasets.Image())
    reads = [lambda: Image.open(path), lambda: cv2.imread(path), lambda: cv2.imread(path, cv2.IMREAD_UNCHANGED)]
    reads += [lambda: iio.imread(path), lambda: rows[0]["image"], lambda: from_tar(path, ending)]
    found = tuple(wanted and stands(read()) for read, wanted in zip(reads, expected, strict=True))
    print(ending, found)
    assert found == expected
PY
mkdir "$folder/images"
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/upright.py" "$folder/images"
