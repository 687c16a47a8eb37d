#!/usr/bin/env bash
# Hugging Face datasets 5.2.0, load_dataset("imagefolder"): a class folder whose name is, or has as a word, train,
# test, dev, eval or validation is taken for a split, and all other classes are dropped without a word, with the labels.
# "train" is a class of CIFAR-100, COCO and PASCAL VOC. A metadata.csv with a caption for some of the pictures
# drops the rest, and the labels of all. data_files={"train": "FOLDER/**"} with drop_labels=False keeps the classes.
#
# Seen 2026-11-30 with pillow 13.0.0, Python 3.11, two pictures in each class:
#   bus, car: 4 rows   bus, train: 2 rows, no label   bus, test-tube: 2 rows in a split "test", no label
#   bus, car and a metadata.csv of 1 caption: 1 row, no label   bus, trains: 4 rows
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 pillow==13.0.0 numpy==2.4.6
cat > "$folder/classes.py" <<'PY'
import sys
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()


def pictures(*classes):
    folder = Path(sys.argv[1], "-".join(classes))
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.new("RGB", (4, 4)).save(folder / name / f"{i}.png")
    return folder


def found(folder, **options):
    splits = datasets.load_dataset("imagefolder", **options or {"data_dir": str(folder)})
    ((split, rows),) = splits.items()
    label = rows.features.get("label")
    result = split, len(rows), label and label.names
    print(f"{folder.name}: {result}")
    return result


assert found(pictures("bus", "car")) == ("train", 4, ["bus", "car"])
assert found(pictures("bus", "trains")) == ("train", 4, ["bus", "trains"])
assert found(pictures("bus", "train")) == ("train", 2, None)
assert found(pictures("bus", "test-tube")) == ("test", 2, None)
folder = pictures("bus", "train")
whole = found(folder, data_files={"train": f"{folder}/**"}, drop_labels=False)
assert whole == ("train", 4, ["bus", "train"])

folder = pictures("bus", "car")
(folder / "metadata.csv").write_text("file_name,text\nbus/0.png,a red bus\n")
assert found(folder) == ("train", 1, None)
PY
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/classes.py" "$folder/pictures"
