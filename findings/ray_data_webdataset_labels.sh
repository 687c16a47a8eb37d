#!/usr/bin/env bash
# Ray Data 2.60.0, read_webdataset: beside a sample without a .cls all labels of that block become floats, through pandas:
# class 7 is 7.0, and an id beyond 2^53 another number, without a word. A missing member of bytes may be NaN, which
# is true where a condition asks whether the sample has one. Blocks in which every sample is labelled have integers,
# so the type depends on the data. decoder=None gives the labels as they are, bytes.
#
# Seen 2026-11-30 with pyarrow 26.0.1, pandas 3.1.1, Python 3.11: 9007199254740993 as 9007199254740992.0
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'ray[data]==2.60.0' webdataset==1.0.2 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6 aiohttp==3.14.5
cat > "$folder/labels.py" <<'PY'
import io
import math
import sys
import tarfile

import ray

tar = sys.argv[1]
BIG = 2**53 + 1


def read(*samples, **options):
    with tarfile.open(tar, "w") as file:
        for i, members in enumerate(samples):
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    rows = ray.data.read_webdataset(tar, **options).take_all()
    print([{name: value for name, value in row.items() if not name.startswith("__")} for row in rows])
    return rows


ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
big = {"cls": str(BIG).encode(), "mask": b"\xff", "txt": b"a cat"}
first, second = read(big, {"cls": b"7", "mask": b"\xfe", "txt": b"a dog"})
assert (first["cls"], second["cls"]) == (BIG, 7) and isinstance(second["cls"], int)

first, second, third = read(big, {"cls": b"7"}, {"txt": b"a dog"})
assert (first["cls"], second["cls"], third["cls"]) == (float(2**53), 7.0, None)
assert isinstance(second["cls"], float) and int(first["cls"]) != BIG
assert math.isnan(second["mask"]) and second["txt"] is None

first, second, third = read(big, {"cls": b"7"}, {"txt": b"a dog"}, decoder=None)
assert (first["cls"], second["cls"]) == (str(BIG).encode(), b"7")
PY
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/labels.py" "$folder/a.tar"
