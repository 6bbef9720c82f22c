"""The dashboard asks for metrics that exist, and the files point at each other."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from sglang_vericache.prometheus import METRICS

MONITORING = Path(__file__).resolve().parents[2] / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/vericache.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SAMPLES = {
    metric.full_name + suffix
    for metric in METRICS
    for suffix in (("_sum", "_count", "_bucket") if metric.kind == "histogram" else ("",))
}


@pytest.mark.parametrize("query", QUERIES)
def test_query(query):
    """Catches a panel that stays empty: a metric or label that was renamed, an open bracket."""
    names = re.findall(r"sglang:[a-z_]+", query)
    assert names and set(names) <= SAMPLES | {"sglang:spec_accept_length"}
    for opened, closed in ("()", "[]", "{}"):
        assert query.count(opened) == query.count(closed)
    labels = set(re.findall(r"by \(([a-z]+)\)", query)) - {"le", "instance"}
    assert labels <= {metric.label for metric in METRICS}


def test_the_picture_asks_the_same():
    """Catches a variable that only Grafana would know how to fill in."""
    spec = importlib.util.spec_from_file_location("picture", MONITORING / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    for query in QUERIES:
        assert "$" in query and "$" not in picture.filled(query)
    scrape = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["global"]
    # Grafana's $__rate_interval is four scrapes.
    assert picture.RATE_INTERVAL == f"{4 * int(scrape['scrape_interval'].rstrip('s'))}s"


def test_every_metric_is_shown():
    """Catches a metric that nobody would ever look at."""
    shown = set(re.findall(r"sglang:[a-z_]+", " ".join(QUERIES)))
    for metric in METRICS:
        assert any(name.startswith(metric.full_name) for name in shown), metric.name


def test_dashboard_is_complete():
    """Catches panels that share an id or lie on each other, and a panel nobody can read."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places) and max(x for x, _ in places) < 24
    assert all(panel["title"] and panel["description"] for panel in panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)\}?", json.dumps(DASHBOARD["panels"])))
    assert used <= variables


def test_compose_mounts_what_is_there():
    """Catches a container that starts with an empty folder in place of a renamed file."""
    services = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    assert services.keys() == {"prometheus", "grafana"}
    for service in services.values():
        assert ":latest" not in service["image"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (MONITORING / source).exists(), source
    scraped = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["127.0.0.1:30000"]
    source = yaml.safe_load((MONITORING / "grafana/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["uid"] == DASHBOARD["templating"]["list"][0]["current"]["value"]
