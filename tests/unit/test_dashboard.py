"""The Grafana dashboard and docs/observing.md against the metrics there are."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

from splatshard.jobs.driver.prometheus import COUNTERS, GAUGES, TAGS
from splatshard.jobs.driver.stats import Snapshot

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "jobs" / "driver" / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [t["expr"] for panel in PANELS for t in panel.get("targets", [])]


def test_every_metric_has_a_panel_and_every_panel_a_metric() -> None:
    asked = {name for e in EXPRESSIONS for name in re.findall(r"\bray_(splatshard_\w+)", e)}
    assert asked == {*COUNTERS, *GAUGES}
    assert all("ray_splatshard_" in e or "ray_node_" in e for e in EXPRESSIONS)


def test_expressions_use_the_tags_there_are() -> None:
    for expression in EXPRESSIONS:
        for name, labels in re.findall(r"ray_(splatshard_\w+)\{([^}]*)\}", expression):
            used = set(re.findall(r"(\w+)=", labels))
            assert "dst" in used, expression
            assert used <= {"dst", TAGS.get(name)}, expression


def test_panels_fill_the_grid_without_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in PANELS]
    assert all(p["x"] >= 0 and p["x"] + p["w"] <= 24 for p in places)
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart or below, (a, b)


def test_panels_read_from_the_chosen_prometheus() -> None:
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    sources = [variables["dst"]["datasource"]]
    for panel in PANELS:
        if panel["type"] != "row":
            sources += [panel["datasource"], *(t["datasource"] for t in panel["targets"])]
    assert all(s == {"type": "prometheus", "uid": "${datasource}"} for s in sources)


def test_the_page_names_every_metric_and_every_key() -> None:
    page = (ROOT / "docs" / "observing.md").read_text()
    named = set(re.findall(r"\| `ray_(\w+)` \|", page))
    assert named == {*COUNTERS, *GAUGES}
    keys = {field.name for field in dataclasses.fields(Snapshot)}
    assert not keys - set(re.findall(r"`(\w+)`", page))
