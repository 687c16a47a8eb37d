#!/usr/bin/env bash
# pytest-xdist 3.8.0 with pytest 9.2.0: --dist loadgroup ignores @pytest.mark.xdist_group without a word. Tests of
# one group, which share a server or a device, run in several processes at once. With pytest 8.4.2 they stay
# together, and their names end in @GROUP. --dist loadfile keeps what is in one file together with both.
#
# Seen 2026-11-30, Python 3.11, six tests of one group, -n 2:
#   pytest 9.2.0, loadgroup: 2 processes    pytest 8.4.2, loadgroup: 1 process
#   pytest 9.2.0, loadfile:  1 process
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/test_groups.py" <<'PY'
import os
import time
from pathlib import Path

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(6))
def test_same(i):
    time.sleep(0.2)
    Path(__file__).with_name(f"ran-{i}").write_text(os.environ["PYTEST_XDIST_WORKER"])
PY
processes() {
  rm -f "$folder"/ran-*
  (cd "$folder" && venv/bin/python -m pytest -q -n 2 --dist "$1" -p no:cacheprovider test_groups.py > out.txt)
  for file in "$folder"/ran-*; do cat "$file"; echo; done | sort -u | wc -l
}
expect() {
  found=$(processes "$2")
  echo "$1, $2: $found process(es)"
  [ "$found" = "$3" ] || { echo "expected: $3"; exit 1; }
}
install() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check pytest=="$1" pytest-xdist==3.8.0; }
install 9.2.0
expect "pytest 9.2.0" loadgroup 2
expect "pytest 9.2.0" loadfile 1
install 8.4.2
expect "pytest 8.4.2" loadgroup 1
