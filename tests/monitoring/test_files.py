"""What is in deploy/monitoring: valid, complete, and of metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.metrics import Metrics
from gateway.settings import Settings
from tests.house import ROOT

FOLDER = ROOT / "deploy" / "monitoring"
RULES = FOLDER / "prometheus" / "corral.rules.yml"
UNIT_TESTS = ROOT / "tests" / "monitoring" / "rules.test.yml"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "corral.json").read_text())
# llama-server's own, with a label added
THEIRS = {"prompt_tokens_total", "tokens_predicted_total", "requests_processing", "requests_deferred"}
UNUSED = {"gateway_build_info", "gateway_records_skipped"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load(RULES)["groups"] for rule in group["rules"]]


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])
    yield from (note["expr"] for note in DASHBOARD["annotations"]["list"])
    yield from (rule["expr"] for rule in alerts())


def families() -> dict[str, set[str]]:
    """Every name that a sample of ours may have, with its labels."""
    metrics = Metrics()
    found: dict[str, set[str]] = {}
    for collector in vars(metrics).values():
        name = getattr(collector, "_name", "")
        labels = set(getattr(collector, "_labelnames", ()))
        for suffix in ("", "_total", "_bucket", "_sum", "_count"):
            found[name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    for family in metrics.registry.collect():
        found.setdefault(family.name, set())
    return found


@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "--lint-fatal", str(RULES)),
        ("check", "config", "--lint-fatal", str(FOLDER / "prometheus" / "prometheus.yml")),
        ("test", "rules", str(UNIT_TESTS)),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool_has_nothing_to_say(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways_and_explained() -> None:
    names = [rule["alert"] for rule in alerts()]
    tried = [
        (one["alertname"], bool(one["exp_alerts"]))
        for test in load(UNIT_TESTS)["tests"]
        for one in test["alert_rule_test"]
    ]
    guide = (ROOT / "docs" / "MONITORING.md").read_text()
    assert len(set(names)) == len(names)
    for name in names:
        assert (name, True) in tried and (name, False) in tried, name
        assert f"`{name}`" in guide, name


def test_metrics_and_labels_exist() -> None:
    ours = families()
    seen = set()
    for expression in expressions():
        for name in re.findall(r"\bllamacpp:(\w+)", expression):
            assert name in THEIRS
        for name, selector in re.findall(r"\b(gateway_\w+)(?:{([^}]*)})?", expression):
            assert name in ours, name
            labels = set(re.findall(r"(\w+)\s*[=!]", selector))
            assert labels <= ours[name] | {"job", "instance"}, (name, labels)
            seen.add(name)
        by = {label for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(", ")}
        known = set().union(*(ours[name] for name in re.findall(r"\bgateway_\w+", expression)), {"job", "instance"})
        assert "llamacpp:" in expression or by <= known, expression
    used = {re.sub("_(total|bucket)$", "", name) for name in seen}
    there = {name for name in ours if not re.search("_(total|bucket|sum|count)$", name) and name}
    assert there - used == UNUSED


def test_the_dashboard_fits_together() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([*panels(), *DASHBOARD["annotations"]["list"]])))
    assert used - {"__rate_interval"} == variables
    sources = load(FOLDER / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert DASHBOARD["templating"]["list"][0]["current"]["value"] == sources[0]["uid"]


def test_compose_and_provisioning_name_what_is_there() -> None:
    compose = load(FOLDER / "docker-compose.yml")
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "for this machine alone"
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (FOLDER / source).is_dir() if source.startswith(".") else source in compose["volumes"]
    places = dict(volume.split(":")[1::-1] for volume in compose["services"]["grafana"]["volumes"])
    (provider,) = load(FOLDER / "grafana" / "provisioning" / "dashboards" / "corral.yml")["providers"]
    assert list((FOLDER / places[provider["options"]["path"]]).glob("*.json"))
    (job,) = load(FOLDER / "prometheus" / "prometheus.yml")["scrape_configs"]
    assert job["job_name"] == "corral" and 'job="corral"' in RULES.read_text()
    assert job["static_configs"][0]["targets"] == [f"host.docker.internal:{Settings.port}"]
