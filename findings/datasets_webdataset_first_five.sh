#!/usr/bin/env bash
# Hugging Face datasets 5.2.0, load_dataset("webdataset"): the first five samples say what all have. Where they have
# a whole number in their JSON, as a score of 1 or 0 may be written, later fractions lose what is behind the
# point. JSON fields and members that come later are dropped. All of it without a word, streamed or not. Only null
# in the first five and a number later is an error. features=... of one's own keeps the fractions.
#
# Seen 2026-11-30 with pyarrow 26.0.1, Python 3.11, eight samples of which the last has {"score": 0.75, "late": 1}
# and a .txt: {"score": 0}, no "late", no "txt"; streamed too. With "score" as float32: 0.75
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cat > "$folder/first_five.py" <<'PY'
import io
import sys
import tarfile

import datasets
from datasets.exceptions import DatasetGenerationError

datasets.disable_progress_bars()
tar = sys.argv[1]


def write(score, members):
    with tarfile.open(tar, "w") as file:
        for i in range(8):
            last = members if i == 7 else {}
            for ending, data in ({"json": b'{"score": %s}' % score} | last).items():
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


def last_row(**options):
    rows = list(datasets.load_dataset("webdataset", data_files=[tar], split="train", **options))
    assert len(rows) == 8
    return {name: value for name, value in rows[-1].items() if not name.startswith("__")}


write(b"1", {"json": b'{"score": 0.75, "late": 1}', "txt": b"a cat"})
for streaming in (False, True):
    print(f"streaming {streaming}: {last_row(streaming=streaming)}")
    assert last_row(streaming=streaming) == {"json": {"score": 0}}

text, number = datasets.Value("string"), datasets.Value("float32")
features = datasets.Features({"json": {"score": number}, "txt": text, "__key__": text, "__url__": text})
assert last_row(features=features) == {"json": {"score": 0.75}, "txt": "a cat"}

write(b"null", {"json": b'{"score": 0.75}'})
try:
    last_row()
except DatasetGenerationError as error:
    print(f"null in the first five: {error.__cause__}")
else:
    raise AssertionError("no error")
PY
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/first_five.py" "$folder/a.tar"
