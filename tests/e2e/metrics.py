"""Reading a server's metrics endpoint."""

from __future__ import annotations

from collections import defaultdict

import requests
from prometheus_client.parser import text_string_to_metric_families


class Samples:
    """One scrape: values by name and by one label, summed over the others."""

    def __init__(self, url: str) -> None:
        # As Prometheus asks for it, but in the older of its formats.
        response = requests.get(url + "/metrics", headers={"Accept": "text/plain"}, timeout=60)
        response.raise_for_status()
        self.labels: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                self.labels[sample.name].append((sample.labels, sample.value))

    def __contains__(self, name: str) -> bool:
        return name in self.labels

    def value(self, name: str) -> float:
        return sum(value for _, value in self.labels.get(name, ()))

    def by(self, name: str, label: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for labels, value in self.labels.get(name, ()):
            found[labels[label]] += value
        return dict(found)
