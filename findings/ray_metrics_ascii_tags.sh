#!/usr/bin/env bash
# Ray's metrics (ray.util.metrics) take ASCII alone as the value of a tag: any other letter is a UnicodeEncodeError
# where the metric is set, in the middle of a job, and so is a folder for its files (_temp_dir, TMPDIR) with such a
# name. A path of somebody called Jürgen is enough. Remedy: value.encode("ascii", "backslashreplace").decode().
#
# Seen 2026-11-30, Python 3.11: 'ascii' codec can't encode character '\xfc'
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
cat > "$folder/tags.py" <<'PY'
import ray
from ray.util.metrics import Gauge

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
gauge = Gauge("shards", tag_keys=("dst",))
path = "/home/jürgen/splats"
gauge.set(1, tags={"dst": path.encode("ascii", "backslashreplace").decode()})
try:
    gauge.set(1, tags={"dst": path})
except UnicodeEncodeError as e:
    print(e)
else:
    raise SystemExit("tags may have any letter now")
PY
"$folder/venv/bin/python" "$folder/tags.py"
