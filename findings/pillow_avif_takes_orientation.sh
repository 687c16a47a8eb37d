#!/usr/bin/env bash
# Pillow 13.0.0: save(..., "AVIF", exif=exif) takes the orientation out of the caller's Exif object. AVIF has a place of its
# own for it, so the AVIF file is right; but every file that is saved with the same object afterwards lies on its
# side, and where it is the source's own, exif=image.getexif(), ImageOps.exif_transpose(image) does nothing any more.
# JPEG, PNG, WebP and TIFF leave the object alone. exif=exif.tobytes() is safe.
#
# Seen 2026-11-30, Python 3.11, 48 x 32 pixels with orientation 6; after a save with exif=image.getexif():
#   JPEG, PNG, WebP, TIFF: orientation 6, exif_transpose gives (32, 48)    AVIF: None, (48, 32)
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
cat > "$folder/orientation.py" <<'PY'
import io

from PIL import Image, ImageOps

ORIENTATION = 0x112
exif = Image.Exif()
exif[ORIENTATION] = 6
source = io.BytesIO()
Image.new("RGB", (48, 32), "red").save(source, "JPEG", exif=exif)


def after(kind, as_bytes=False):
    """The orientation that the source still has, and its size upright."""
    image = Image.open(source)
    own, file = image.getexif(), io.BytesIO()
    image.save(file, kind, exif=own.tobytes() if as_bytes else own)
    upright = ImageOps.exif_transpose(Image.open(file))
    assert upright.size == (32, 48)
    found = own.get(ORIENTATION), ImageOps.exif_transpose(image).size
    print(f"{kind}: {found}")
    return found


for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
    assert after(kind) == (6, (32, 48))
assert after("AVIF") == (None, (48, 32))
assert after("AVIF", as_bytes=True) == (6, (32, 48))

exif = Image.Exif()
exif[ORIENTATION] = 6
for kind in ("WEBP", "AVIF", "WEBP"):
    file = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(file, kind, exif=exif)
    print(f"one object, {kind}: {Image.open(file).getexif().get(ORIENTATION)}")
assert Image.open(file).getexif().get(ORIENTATION) is None
PY
"$folder/venv/bin/python" "$folder/orientation.py"
