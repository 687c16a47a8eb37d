#!/usr/bin/env bash
# wids 0.1.11 reads tars without their pax headers, in which Python's tarfile, by default, keeps names beyond ASCII: each
# such letter is "?" in __key__. Keys of as many letters become the same, which loses samples: of three the last is an
# IndexError. So it is with tars of webdataset's own TarWriter, which webdataset 1.0.2 itself reads with their names.
# A tar written with format=tarfile.GNU_FORMAT or USTAR_FORMAT is right in both. wids copies each tar to
# /tmp/_wids_cache, by its path: what is written there later is not looked at (WIDS_CACHE names another folder).
#
# Seen 2026-11-30 with torch 2.14.1, Python 3.11, keys 写真, 東京 and cafe: ??, ??, IndexError
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  wids==0.1.11 webdataset==1.0.2 torch==2.14.1 numpy==2.4.6 pillow==13.0.0
cat > "$folder/names.py" <<'PY'
import io
import sys
import tarfile

import webdataset
import wids

KEYS = ["写真", "東京", "cafe"]


def write(tar, **options):
    with tarfile.open(tar, "w", **options) as file:
        for key in KEYS:
            for ending in ("txt", "cls"):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = 1
                file.addfile(member, io.BytesIO(b"1"))
    return tar


def write_by_webdataset(tar):
    with webdataset.TarWriter(tar) as file:
        for key in KEYS:
            file.write({"__key__": key, "txt": "1", "cls": 1})
    return tar


def keys(tar):
    """Of wids, with the error in place of what it does not find."""
    assert [sample["__key__"] for sample in webdataset.WebDataset(tar, shardshuffle=False)] == KEYS
    dataset = wids.ShardListDataset([{"url": tar, "nsamples": 3}])
    found = []
    for i in range(3):
        try:
            found.append(dataset[i]["__key__"])
        except IndexError:
            found.append("IndexError")
    print(f"{tar}: {found}")
    return found


folder = sys.argv[1]
assert keys(write(f"{folder}/default.tar")) == ["??", "??", "IndexError"]
assert keys(write_by_webdataset(f"{folder}/webdataset.tar")) == ["??", "??", "IndexError"]
assert keys(write(f"{folder}/gnu.tar", format=tarfile.GNU_FORMAT)) == KEYS
assert keys(write(f"{folder}/ustar.tar", format=tarfile.USTAR_FORMAT)) == KEYS
PY
WIDS_CACHE="$folder/cache" "$folder/venv/bin/python" -W ignore "$folder/names.py" "$folder"
