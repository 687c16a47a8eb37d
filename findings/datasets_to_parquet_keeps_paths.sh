#!/usr/bin/env bash
# Hugging Face datasets 5.2.0: Dataset.to_parquet of images that are files (imagefolder, a column of paths) writes no
# image: the Parquet file has the absolute paths of this machine and null for the bytes, and reads well until it is
# moved or the files are gone. save_to_disk, of the same dataset, copies the images in. A map that touches the
# image does not help, the path stays. rows.with_format("arrow").map(embed_table_storage, batched=True) with
# datasets.table.embed_table_storage puts the files' bytes into the column.
#
# Seen 2026-11-30 with pyarrow 26.0.1, Python 3.11, one PNG of a folder:
#   to_parquet: {"bytes": null, "path": "/.../a.png"}    save_to_disk, and embedded: the bytes of the file, "a.png"
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 pillow==13.0.0 numpy==2.4.6
cat > "$folder/paths.py" <<'PY'
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from PIL import Image

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
picture = folder / "pictures" / "a.png"
picture.parent.mkdir(parents=True)
Image.new("RGB", (8, 8), "red").save(picture)
png = picture.read_bytes()
rows = datasets.load_dataset("imagefolder", data_dir=str(picture.parent), split="train")


def in_parquet(rows):
    rows.to_parquet(folder / "a.parquet")
    (row,) = pq.read_table(folder / "a.parquet").to_pylist()
    print({name: value and value[:20] for name, value in row["image"].items()})
    return row["image"]


by_path = {"bytes": None, "path": str(picture)}
assert in_parquet(rows) == by_path
assert in_parquet(rows.map(lambda row: {"width": row["image"].width})) == by_path
embedded = rows.with_format("arrow").map(embed_table_storage, batched=True)
assert in_parquet(embedded) == {"bytes": png, "path": "a.png"}

rows.save_to_disk(folder / "disk")
found = datasets.load_from_disk(folder / "disk").cast_column("image", datasets.Image(decode=False))
assert found[0]["image"] == {"bytes": png, "path": "a.png"}

rows.to_parquet(folder / "a.parquet")
picture.unlink()
again = datasets.load_dataset("parquet", data_files=str(folder / "a.parquet"), split="train")
try:
    again[0]
except FileNotFoundError:
    print("the file gone: FileNotFoundError")
else:
    raise AssertionError("the image is in the Parquet file")
PY
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/paths.py" "$folder/made"
