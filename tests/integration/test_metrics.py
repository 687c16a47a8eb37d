"""A conversion seen from outside: Prometheus, the dashboard, `_progress.json`, JSON logs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs.driver.prometheus import Metrics, advertised
from splatshard.jobs.driver.stats import Snapshot
from tests.integration.running import LONG, converting, start, tars, wait_until
from tests.make import datacomp_sample, write_tar

pytestmark = pytest.mark.integration

DASHBOARD = Path(__file__).resolve().parents[2] / "jobs" / "driver" / "dashboard.json"


@dataclass(frozen=True)
class Prometheus:
    """A server, asked over HTTP."""

    address: str

    def ask(self, path: str, **parameters: object) -> Any:
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/-/ready", timeout=30).status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def series(self, expression: str, since: float) -> list[dict[str, Any]]:
        """All series of the expression from `since` (s since 1970) until now."""
        span = {"start": since, "end": time.time(), "step": 1}
        return self.ask("query_range", query=expression, **span)["result"]

    def last(self, expression: str, since: float, tag: str = "dst") -> dict[str, float]:
        """The last value of each series, by its tag."""
        found = self.series(expression, since)
        return {s["metric"].get(tag, ""): float(s["values"][-1][1]) for s in found}


@pytest.fixture
def prometheus(free_ray: None, tmp_path: Path) -> Iterator[Prometheus]:
    """Scrapes the shared Ray, which it finds through the file that a job would write."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (apt install prometheus)")
    session = tmp_path / "ray" / "session"
    session.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        "  - job_name: ray\n"
        "    file_sd_configs:\n"
        f'      - files: ["{session.parent}/prom_metrics_*.json"]\n'
    )
    with advertised(str(session)), (tmp_path / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'prometheus'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            found = Prometheus(f"http://{address}")
            wait_until(found.ready, "prometheus answers")
            yield found
        finally:
            server.terminate()
            server.wait(30)
    assert not list(session.parent.glob("*.json"))


def damaged_tars(folder: Path) -> str:
    """Six shards of two samples; one image of the first is cut."""
    source = tars(folder, shards=6, samples=2)
    members = [m for number in range(2) for m in datacomp_sample(number)]
    name, image = members[0]
    write_tar(folder / "00000000.tar", [(name, image[: len(image) // 2]), *members[1:]])
    return source


def test_prometheus_sees_what_the_job_did(prometheus: Prometheus, tmp_path: Path) -> None:
    """A job joins a cluster and loses a worker; every query of the dashboard has an answer."""
    import ray

    since = time.time()
    src, dst = damaged_tars(tmp_path / "in"), tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            [
                *(sys.executable, "-m", "jobs", "convert", str(src), str(dst)),
                *(*LONG, "--steps=600", "--log-format=json"),
            ],
            env={**os.environ, "RAY_ADDRESS": address},
            stdout=log,
            stderr=log,
        )
    wait_until(lambda: list(dst.glob("[!_]*.json")), "a shard is done")
    victim = wait_until(lambda: converting(os.getpid()), "a worker converts")[0]
    os.kill(victim, signal.SIGKILL)
    assert job.wait(180) == 0, (tmp_path / "log").read_text()
    run = json.loads((dst / "_run.json").read_text())
    assert (run["images_converted"], run["skipped"]) == (12, {"corrupt_image": 1})
    assert run["retries"]

    check_numbers(prometheus, dst, run, since)
    check_dashboard(prometheus, dst, since)
    check_progress_file(dst, run)
    check_log(tmp_path / "log", run)


def check_numbers(prometheus: Prometheus, dst: Path, run: dict[str, Any], since: float) -> None:
    """Prometheus ends with the numbers of `_run.json`."""

    def last(metric: str, tag: str = "dst") -> dict[str, float]:
        return prometheus.last(f'ray_splatshard_{metric}{{dst="{dst}"}}', since, tag)

    ours = str(dst)
    images = run["images_converted"]
    wait_until(lambda: last("images_total") == {ours: images}, "Prometheus has the last numbers")
    stored = pytest.approx(run["ok"] * run["bytes_per_image"])
    assert last("payload_bytes_total") == {ours: stored}
    assert last("samples_skipped_total", "status") == run["skipped"]
    assert last("retries_total", "kind") == run["retries"]
    shards = {"done": 6, "failed": 0, "in_work": 0, "pending": 0}
    assert last("shards", "state") == shards
    assert last("psnr_db") == {ours: pytest.approx(run["psnr_mean"])}
    queues = {"fit": 2, "pack": 0}

    def told() -> bool:
        Metrics(f"{dst}-queues").publish(Snapshot(queued=queues))  # again: Ray may drop the first
        return prometheus.last("ray_splatshard_queue_depth", since, "stage") == queues

    wait_until(told, "Prometheus has the queues")
    assert last("workers")[ours] >= 1
    assert 0 < last("stage_busy_share", "stage")["fit"] <= 1


def check_dashboard(prometheus: Prometheus, dst: Path, since: float) -> None:
    """Every query has data, but for the node's GPUs where there are none."""
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [t for panel in dashboard["panels"] for t in panel.get("targets", [])]
    assert len(targets) > 20
    for target in targets:
        expression = target["expr"].replace("$dst", f"{dst}.*").replace("$__rate_interval", "1m")
        if "gpus" not in expression:
            wait_until(lambda e=expression: prometheus.series(e, since), f"data for {expression}")
        else:
            prometheus.series(expression, since)
    variable = next(v for v in dashboard["templating"]["list"] if v["name"] == "dst")
    assert variable["query"]["query"] == "label_values(ray_splatshard_shards, dst)"
    selection = {"match[]": "ray_splatshard_shards", "start": since, "end": time.time()}
    assert str(dst) in prometheus.ask("label/dst/values", **selection)


def check_progress_file(dst: Path, run: dict[str, Any]) -> None:
    found = json.loads((dst / "_progress.json").read_text())
    assert (found["state"], found["shards_done"], found["images"]) == ("done", 6, 12)
    assert found["retries"] == run["retries"]
    assert found["psnr_mean"] == pytest.approx(run["psnr_mean"])


def check_log(log: Path, run: dict[str, Any]) -> None:
    """All lines are JSON; what went wrong is told with shard and uid."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    skipped = next(e for e in events if e["event"] == "sample_skipped")
    assert (skipped["shard"], skipped["status"]) == ("00000000", "corrupt_image")
    assert skipped["uid"] == f"{0:032x}"
    retries = [e for e in events if e["event"] == "retry"]
    assert {e["kind"] for e in retries} == set(run["retries"])
    assert sum(e["event"] == "shard_done" for e in events) == 6
    assert events[-1]["message"].startswith("next: splatshard verify")


@pytest.mark.ray
def test_an_embedded_ray_can_be_scraped_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's own Ray tells Prometheus its port, and exports while the job runs."""
    src, dst = tars(tmp_path / "in", shards=40, samples=4), tmp_path / "out"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets: short paths
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
        job = start(src, dst, *LONG, "--steps=600", log=tmp_path / "log")
        try:
            path = wait_until(lambda: list(Path(folder).glob("ray/prom_metrics_*.json")), "ports")[
                0
            ]
            (target,) = json.loads(path.read_text())[0]["targets"]

            def exported() -> bool:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                    return f'dst="{dst}"' in answer.read().decode()

            wait_until(exported, "metrics of the job")
            assert json.loads((dst / "_progress.json").read_text())["state"] == "running"
        finally:
            job.send_signal(signal.SIGTERM)
            code = job.wait(60)
        assert code == 143, (tmp_path / "log").read_text()
        assert not path.exists()
    assert json.loads((dst / "_progress.json").read_text())["state"] == "interrupted"
