#!/usr/bin/env bash
# Ray's workers run at nice 15 above the driver, tasks and actors alike, and so does what they start (ffmpeg, the workers
# of a DataLoader); the raylet and the driver stay at 0. Linux gives nice 15 a weight of 36 against 1024: beside any busy
# process at nice 0 on the same core a job gets 3 % of it. It looks as if Ray scaled badly on a shared machine, and a
# speed measured in a worker while something else runs is not that of the code. RAY_worker_niceness=0 in the environment
# of ray.init or `ray start`, or in the env_vars of a runtime_env, takes it away.
#
# Seen 2026-11-30 with ray 2.60.0, Python 3.11, on Linux:
#   driver 0, task 15, a process it starts 15, actor 15    with RAY_worker_niceness=0: 0, 0, 0, 0    in env_vars: 0
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
cat > "$folder/niceness.py" <<'PY'
import os
import subprocess
import sys

import ray

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@ray.remote
def task():
    return os.nice(0), int(subprocess.check_output(["nice"]))


@ray.remote
class Actor:
    def niceness(self):
        return os.nice(0)


own = os.nice(0)
above = [n - own for n in (*ray.get(task.remote()), ray.get(Actor.remote().niceness.remote()))]
print(f"above the driver: task, what it starts, actor: {above}")
assert above == [int(sys.argv[1])] * 3, above
if sys.argv[1] == "15":
    environment = {"env_vars": {"RAY_worker_niceness": "0"}}
    assert ray.get(task.options(runtime_env=environment).remote()) == (own, own)
    print("as nice as the driver with RAY_worker_niceness=0 in env_vars")
PY
unset RAY_worker_niceness
"$folder/venv/bin/python" "$folder/niceness.py" 15
RAY_worker_niceness=0 "$folder/venv/bin/python" "$folder/niceness.py" 0
