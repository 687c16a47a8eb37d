#!/usr/bin/env bash
# ray.init(include_dashboard=False) starts the process of the dashboard all the same, without its pages, for the usage
# statistics; also where those are off (RAY_USAGE_STATS_ENABLED=0), and with plain `ray` instead of ray[default].
# ray.init waits until it has told its address, and only then starts the rest of the node: the option saves neither that
# second, nor the 115 MB, nor a port, since with ray[default] it listens on one, drawn by chance, on every interface.
# Remedy for many short programs: one `ray start --head`, and address="auto".
#
# Seen 2026-11-30 with ray[default] 2.60.0, Python 3.11, on Linux:
#   dashboard_url: ''    dashboard.py --modules-to-load=UsageStatsHead --disable-frontend: 115 MB,
#   listens on 0.0.0.0; the next process is started 0.8 s later
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "ray[default]==2.60.0" psutil==7.2.2
cat > "$folder/processes.py" <<'PY'
import psutil
import ray

context = ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def started(script):
    (process,) = (p for p in psutil.Process().children() if any(word.endswith(script) for word in p.cmdline()))
    return process


dashboard, following = started("/ray/dashboard/dashboard.py"), started("/ray/_private/log_monitor.py")
options = [word for word in dashboard.cmdline() if word.startswith(("--modules", "--disable"))]
addresses = [c.laddr.ip for c in dashboard.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
print(f"dashboard_url: {context.dashboard_url!r}, dashboard.py {' '.join(options)}: {dashboard.memory_info().rss >> 20} MB,")
print(f"listens on {addresses}; the next process started {following.create_time() - dashboard.create_time():.1f} s later")
assert context.dashboard_url == ""
assert options == ["--modules-to-load=UsageStatsHead", "--disable-frontend"]
assert addresses in (["0.0.0.0"], ["::"])
PY
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/processes.py"
