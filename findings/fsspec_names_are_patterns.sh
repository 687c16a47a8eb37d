#!/usr/bin/env bash
# fsspec 2026.9.0 takes the name of one file for a pattern in rm, cat, get and copy, although exists, info, cat_file
# and open take it as it is. rm("a[1].tar") removes a1.tar and leaves a[1].tar, and what ls gave is not what
# cat of it reads. Brackets are common in names that browsers and cameras make. cat_file, get_file, cp_file and
# rm_file take names; LocalFileSystem.rm and mv do too, so tests on a local folder do not show it.
#
# Seen 2026-11-30, Python 3.11, files a[1].tar and a1.tar, fsspec.filesystem("memory"):
#   exists, cat_file: a[1].tar    cat, copy, rm: a1.tar    local: cat reads a1.tar, rm removes a[1].tar
# s3fs 2026.9.0 does as memory does. Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fsspec==2026.9.0
cat > "$folder/names.py" <<'PY'
import sys

import fsspec


def names(fs, folder):
    return {path.rsplit("/", 1)[1] for path in fs.ls(folder, detail=False)}


for protocol, folder, removed in (("memory", "/tars", "a1.tar"), ("file", sys.argv[1], "a[1].tar")):
    fs = fsspec.filesystem(protocol)
    fs.makedirs(folder)
    name = f"{folder}/a[1].tar"
    fs.pipe_file(name, b"brackets")
    fs.pipe_file(f"{folder}/a1.tar", b"none")

    assert fs.exists(name) and fs.info(name)["size"] == len(b"brackets")
    assert fs.cat_file(name) == fs.open(name).read() == b"brackets"
    print(f"{protocol}: cat reads {fs.cat(name)}")
    assert fs.cat(name) == fs.cat(fs.ls(folder, detail=False)) == {f"{folder}/a1.tar": b"none"}

    fs.rm(name)
    left = names(fs, folder)
    print(f"{protocol}: rm leaves {left}")
    assert left == {"a1.tar", "a[1].tar"} - {removed}

fs = fsspec.filesystem("memory")
fs.pipe_file("/copies/a[1].tar", b"brackets")
fs.pipe_file("/copies/a1.tar", b"none")
fs.copy("/copies/a[1].tar", "/copied/")
assert names(fs, "/copied") == {"a1.tar"}
fs.rm_file("/copies/a[1].tar")
assert names(fs, "/copies") == {"a1.tar"}
PY
"$folder/venv/bin/python" "$folder/names.py" "$folder/tars"
