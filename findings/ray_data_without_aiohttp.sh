#!/usr/bin/env bash
# Ray Data 2.60.0 without aiohttp, which ray[data] does not bring along, fails by chance where it reads several files:
# "cannot import name 'HTTPFileSystem'". Its threads ask at once whether a path is a web address, by importing fsspec's HTTP,
# and take ModuleNotFoundError alone for "no"; a thread that comes while another's import is failing gets an
# ImportError instead. pip install aiohttp helps, and so does reading one file.
#
# Seen 2026-11-30 with fsspec 2026.9.0, pyarrow 26.0.1, Python 3.11: read_parquet of two files failed in 3 of 12 reads on two
# busy cores; the question itself, asked by 8 threads at once 2,000 times, in a tenth of 16,000 answers.
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'ray[data]==2.60.0' pyarrow==26.0.1 fsspec==2026.9.0 numpy==2.4.6
cat > "$folder/threads.py" <<'PY'
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from pyarrow.fs import LocalFileSystem
from ray.data.datasource.path_util import _is_http_filesystem

assert importlib.util.find_spec("aiohttp") is None
barrier = Barrier(8)
local = LocalFileSystem()


def ask():
    barrier.wait()
    try:
        return _is_http_filesystem(local)
    except ImportError as error:
        return str(error).partition(" (")[0]


assert _is_http_filesystem(local) is False  # one thread
with ThreadPoolExecutor(8) as threads:
    answers = [answer for _ in range(2000) for answer in threads.map(lambda _: ask(), range(8))]
errors = [answer for answer in answers if answer]
print(f"{len(errors)} of {len(answers)}: {set(errors)}")
assert set(errors) == {"cannot import name 'HTTPFileSystem' from 'fsspec.implementations.http'"}
PY
"$folder/venv/bin/python" "$folder/threads.py"
