"""The dashboard shows the metrics that runs have, and all of them. That they arrive at a scraper: tests/ray/test_training.py."""

from __future__ import annotations

import json
import re
import time
from itertools import combinations
from pathlib import Path

from raytune_llm.runs import ray_metrics
from raytune_llm.runs.ray_metrics import GAUGES, PREFIX, RayMetrics

DASHBOARD = json.loads((Path(__file__).parents[3] / "cluster" / "grafana" / "training.json").read_text())


def test_the_dashboard_shows_every_metric_and_no_other():
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r"\bray_\w+", text)}
    assert asked == {f"ray_{PREFIX}{name}" for name in GAUGES}
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$(\w+)", json.dumps(DASHBOARD))) == variables
    [run] = [variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run"]
    assert set(re.findall(r"\bray_\w+", run["query"]["query"])) <= asked


def test_panels_of_the_dashboard_have_ids_of_their_own_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


def test_a_value_is_set_again_until_a_newer_one_comes_or_the_run_ends(monkeypatch):
    monkeypatch.setattr(ray_metrics, "SET_AGAIN_S", 0.02)
    metrics = RayMetrics("mine")
    values: list[float] = []
    monkeypatch.setattr(metrics._gauges["workers"], "set", lambda value, tags: values.append(value))
    for value in (2.0, 3.0):
        metrics.measured("workers", value)
        until = time.monotonic() + 20
        while values.count(value) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    metrics.close()
    metrics._thread.join()
    assert values == sorted(values) and values.count(2.0) >= 3 <= values.count(3.0)


def test_a_run_may_have_a_name_in_any_script():
    metrics = RayMetrics("прогон-ö 1%")
    metrics.measured("step", 1.0)
    metrics.close()
    assert metrics._tags == {"run": "%D0%BF%D1%80%D0%BE%D0%B3%D0%BE%D0%BD-%C3%B6 1%"}
