"""A real Prometheus scrapes a real run: no query of the dashboard is empty, and alerts come."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import nats
import pytest
import yaml

from tests.house import ADMIN, USER, Gateway, eventually, free_port
from tests.monitoring.test_files import DASHBOARD, FOLDER, RULES, panels
from tests.nats_kit import NatsServer, running_nats
from tests.real.herd import ask, herd, make_models, rows
from tests.redis_kit import RedisServer, running_redis

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

SCRAPER = "sk-scraper-0123456789abcdefghijABCDEF"
LIMITED = "sk-limited-0123456789abcdefghijABCDEF"
STRANGER = "sk-stranger-0123456789abcdefghijABCDE"
UP = 'up{job="corral"}'


@dataclass
class Prometheus:
    port: int

    def get(self, path: str, **query: str) -> Any:
        """`data` of an answer of its API."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=5) as reply:
            return json.loads(reply.read())["data"]

    def scraped(self) -> bool:
        return any(target["health"] == "up" for target in self.get("targets")["activeTargets"])

    def values(self, expression: str, since: float) -> list[float]:
        """Of all its series, each second since then."""
        found = self.get("query_range", query=expression, start=str(since), end=str(time.time()), step="1")
        return [float(value) for series in found["result"] for _, value in series["values"]]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with running_nats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer, queue: NatsServer) -> Iterator[Gateway]:
    """Two models, of which one may be loaded; everything that has a metric is switched on."""
    folder = tmp_path_factory.mktemp("watched")
    models = folder / "models"
    models.mkdir()
    keys = [
        f"admin:{ADMIN} scope=infer,admin",
        f"user:{USER}",
        f"limited:{LIMITED}:1",
        f"scraper:{SCRAPER} scope=metrics",
    ]
    (folder / "api_keys.txt").write_text("".join(f"{key}\n" for key in keys))
    more = {
        "REDIS_URL": redis.url,
        "NATS_URL": queue.url,
        "CACHE_ENABLED": "true",
        "METRICS_AUTH_ENABLED": "true",
        "MAX_QUEUE_SIZE": "1",
        "PARALLEL": "1",
        "CTX": "4096",
    }
    named = {name: {"model_path": str(models / f"{name}.gguf")} for name in make_models(models, 2)}
    with herd(folder, named, {"max_concurrent_models": 1}, **more) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, watched: Gateway) -> Iterator[Prometheus]:
    """With the configuration of deploy/monitoring, but for the target, the times and the key."""
    folder = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(folder / "rules.yml")]
    (job,) = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{watched.port}"]}]
    job["authorization"] = {"credentials_file": str(folder / "metrics.key")}
    (folder / "metrics.key").write_text(SCRAPER)
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule.pop("for", None)  # nobody waits a minute here
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    server = Prometheus(free_port())
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{server.port}", "--log.level=error"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        eventually(server.scraped, 15)
        yield server
    finally:
        process.terminate()
        process.wait(10)


def busy(gateway: Gateway) -> None:
    """One round of everything that a gateway may go through."""
    for model in ("m0", "m1"):  # the second one evicts the first
        ask(gateway, model, stream=True, max_tokens=20)
    for _ in range(2):  # the second answer comes from the cache
        assert ask(gateway, "m1", text="again").status == 200
    assert gateway.chat(key=STRANGER).status == 401
    assert 429 in {gateway.chat(key=LIMITED, model="m1").status for _ in range(2)}
    crowd = [threading.Thread(target=lambda: gateway.chat(model="m1", max_tokens=1000, stream=True)) for _ in range(4)]
    for one in crowd:  # one runs, one waits, two find no place
        one.start()
    for one in crowd:
        one.join()


def crash(gateway: Gateway, model: str) -> None:
    ask(gateway, model)
    pid = rows(gateway)[model]["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: rows(gateway)[model]["state"] != "ready")
    assert ask(gateway, model, text="after the crash").status == 200


async def send_job(queue: NatsServer, model: str) -> None:
    client = await nats.connect(queue.url)
    await client.jetstream().publish(
        f"inference.request.{model}", json.dumps({"input": "hi", "max_tokens": 4}).encode()
    )
    await client.close()


def test_no_query_is_empty_and_alerts_come(
    watched: Gateway, redis: RedisServer, queue: NatsServer, prometheus: Prometheus
) -> None:
    since = time.time()
    asyncio.run(send_job(queue, "m0"))
    busy(watched)
    crash(watched, "m1")
    eventually(lambda: len(prometheus.values("gateway_auth_failures_total", since)) >= 2)
    redis.kill()
    for _ in range(2):
        busy(watched)
        seen = len(prometheus.values(UP, since))
        eventually(lambda seen=seen: len(prometheus.values(UP, since)) >= seen + 2)  # type: ignore[misc]

    def pending() -> set[str]:
        return {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}

    eventually(lambda: {"CorralQueueRejecting", "CorralRedisDegraded"} <= pending())
    empty = []
    for panel in panels():
        for target in panel["targets"]:
            expression = concrete(target["expr"])
            if not any(map(math.isfinite, prometheus.values(expression, since))):
                empty.append(f"{panel['title']}: {expression}")
    assert not empty
    for variable in DASHBOARD["templating"]["list"][1:]:
        metric, label = variable["definition"].removeprefix("label_values(").rstrip(")").split(", ")
        assert prometheus.get(f"label/{label}/values", **{"match[]": metric}), variable["name"]
    for note in DASHBOARD["annotations"]["list"]:
        prometheus.values(concrete(note["expr"]), since)  # it may be empty, but is understood


def concrete(expression: str) -> str:
    """As Grafana sends it with all of the gateways and models chosen."""
    values = {"$instance": ".*", "$model": ".*", "$__rate_interval": "5s"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression
