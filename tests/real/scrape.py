"""What /metrics says, as a client reads it: every sample by its name and labels, parsed strictly."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.house import ADMIN, Gateway


class Scrape:
    def __init__(self, gateway: Gateway) -> None:
        reply = gateway.get("/metrics", key=ADMIN)
        assert reply.status == 200, reply.body
        self.text = reply.body.decode()
        self.families: list[Metric] = list(text_string_to_metric_families(self.text))

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name that have these labels."""
        return sum(
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def values(self, label: str) -> set[str]:
        """Every value that a label has anywhere."""
        samples = (sample for family in self.families for sample in family.samples)
        return {sample.labels[label] for sample in samples if label in sample.labels}


class Growth:
    """How much counters have grown since it was made."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._before = gateway, Scrape(gateway)

    def of(self, name: str, **labels: str) -> float:
        return Scrape(self._gateway).total(name, **labels) - self._before.total(name, **labels)
