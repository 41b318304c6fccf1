"""What an operator sees: metrics that Prometheus can read and that cannot grow without bounds, logs without secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import __version__
from tests.house import ADMIN, USER, Gateway, eventually, running_gateway
from tests.real.scrape import Growth, Scrape
from tests.real.wire import request, wire

pytestmark = pytest.mark.real

CHAT = "/v1/chat/completions"
# CONTRACT 7, but for what stands on counters by key
PROMISED = """
requests_total requests_active request_duration_seconds time_to_first_token_seconds time_per_output_token_seconds
tokens_total queue_depth queue_wait_seconds queue_rejections_total rate_limited_total auth_failures_total model_state
model_load_seconds model_evictions_total model_restarts_total model_vram_bytes vram_budget_bytes vram_used_bytes
cache_requests_total bytes_sent_total event_loop_lag_seconds uptime_seconds build_info
""".split()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("ops"), MODEL_PATH=str(chat_model)) as running:
        yield running


# --- metrics


def test_every_promised_metric_is_there_from_the_start(gateway: Gateway) -> None:
    text = Scrape(gateway).text
    for name in PROMISED:
        assert f"# HELP gateway_{name} " in text, name
        assert f"# TYPE gateway_{name} " in text, name


def test_prometheus_can_read_it(gateway: Gateway) -> None:
    gateway.chat()
    gateway.chat(stream=True, max_tokens=40)
    reply = gateway.get("/metrics", key=None)
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert reply.body.endswith(b"\n")
    scrape = Scrape(gateway)
    names = [family.name for family in scrape.families]
    assert len(set(names)) == len(names), "a family stands in one block"
    seen = set()
    for family in scrape.families:
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        for sample in family.samples:
            each = (sample.name, tuple(sorted(sample.labels.items())))
            assert each not in seen, each
            seen.add(each)
            assert re.fullmatch(r"[a-z_:][a-z0-9_:]*", sample.name)
            if family.type == "counter" and family.name.startswith("gateway_"):
                assert sample.name.endswith(("_total", "_created"))
                assert sample.value >= 0


def test_histograms_add_up(gateway: Gateway) -> None:
    gateway.chat(stream=True, max_tokens=20)
    scrape = Scrape(gateway)
    histograms = [family for family in scrape.families if family.type == "histogram" and family.samples]
    assert {"gateway_request_duration_seconds", "gateway_time_to_first_token_seconds"} <= {h.name for h in histograms}
    for family in histograms:
        series: dict[str, list[tuple[float, float]]] = {}
        counts: dict[str, float] = {}
        for sample in family.samples:
            labels = str(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
            if sample.name.endswith("_bucket"):
                series.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_count"):
                counts[labels] = sample.value
        for labels, buckets in series.items():
            assert buckets == sorted(buckets)
            assert [value for _, value in buckets] == sorted(value for _, value in buckets)
            assert buckets[-1] == (float("inf"), counts[labels])


def test_what_a_request_leaves_behind(gateway: Gateway) -> None:
    growth = Growth(gateway)
    whole, streamed = gateway.chat(), gateway.chat(stream=True)
    here = {"path": CHAT, "method": "POST", "status": "200", "model": "tiny"}
    assert growth.of("gateway_requests_total", **here) == 2
    assert growth.of("gateway_request_duration_seconds_count", path=CHAT) == 2
    assert growth.of("gateway_queue_wait_seconds_count", model="tiny") == 2
    assert growth.of("gateway_bytes_sent_total") == len(whole.body) + len(streamed.body)
    assert growth.of("gateway_time_to_first_token_seconds_count") == 1, "only a stream shows its first token"
    assert growth.of("gateway_auth_failures_total") == 0
    scrape = Scrape(gateway)
    assert scrape.total("gateway_queue_depth", model="tiny") == 0
    assert scrape.total("gateway_requests_active") == 0


def test_refusals_are_counted(gateway: Gateway) -> None:
    growth = Growth(gateway)
    gateway.chat(key=None)
    gateway.chat(key=USER + "x")
    gateway.chat(n=0)
    gateway.chat(temperature="hot")
    assert growth.of("gateway_auth_failures_total") == 2
    assert growth.of("gateway_requests_total", path=CHAT, status="401", model="") == 2
    assert growth.of("gateway_requests_total", path=CHAT, status="400", model="") == 1
    assert growth.of("gateway_requests_total", path=CHAT, status="400", model="tiny") == 1


def test_clients_cannot_make_series(gateway: Gateway) -> None:
    def strange(number: int) -> None:
        gateway.get(f"/v1/models/xyz{number}")
        gateway.get(f"/v1/models/xyz{number}/status")
        gateway.get(f"/upstream/tiny/xyz{number}", key=ADMIN)
        gateway.get(f"/xyz{number}/a/b?c=xyz{number}")
        gateway.request("DELETE", f"/xyz{number}")
        gateway.chat(model=f"xyz{number}")
        gateway.chat(key=f"xyz{number}")
        with wire(gateway) as client:
            client.send(request(("PROPFIND", "SEARCH", "PURGE")[number % 3], "/nothing"))
            assert client.answer().status == 404

    strange(0)
    Scrape(gateway)  # which is counted when it is over
    before = Scrape(gateway)
    for number in range(1, 5):
        strange(number)
    after = Scrape(gateway)
    assert "xyz" not in after.text
    assert after.text.count("\n") == before.text.count("\n")
    templates = {
        "unknown",
        "/v1/models/{model}",
        "/v1/models/{model}/status",
        "/upstream/{model}/{what}",
        CHAT,
        "/metrics",
    }
    assert templates <= after.values("path")
    assert after.values("model") <= {"tiny", ""}
    assert after.values("method") <= {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "other"}
    assert "other" in after.values("method")
    assert not after.values("key")


def test_the_model_in_metrics(gateway: Gateway) -> None:
    scrape = Scrape(gateway)
    assert scrape.total("gateway_model_state", model="tiny", state="ready") == 1
    assert scrape.total("gateway_model_state", model="tiny") == 1, "it is in one state only"
    assert scrape.total("gateway_model_load_seconds_count", model="tiny") == 1
    assert 0 < scrape.total("gateway_model_load_seconds_sum", model="tiny") < 20
    assert scrape.total("gateway_build_info", version=__version__) == 1
    assert scrape.total("gateway_uptime_seconds") > 0
    assert eventually(lambda: Scrape(gateway).total("gateway_event_loop_lag_seconds_count"))


def test_llama_servers_own_metrics_bear_the_models_name(gateway: Gateway) -> None:
    growth = Growth(gateway)
    gateway.chat("a new prompt", max_tokens=50)
    assert growth.of("llamacpp:tokens_predicted_total", model="tiny") == 50
    assert growth.of("llamacpp:prompt_tokens_total", model="tiny") > 0
    theirs = [family for family in Scrape(gateway).families if family.name.startswith("llamacpp:")]
    assert len(theirs) > 5
    assert all(sample.labels == {"model": "tiny"} for family in theirs for sample in family.samples)


def test_json(gateway: Gateway) -> None:
    gateway.chat()
    gateway.chat(n=0)
    growth = Growth(gateway)
    reply = gateway.get("/metrics", key=None, headers={"Accept": "application/json"})
    assert reply.headers["content-type"].startswith("application/json")
    told = reply.json()["gateway"]
    assert {
        *("requests_total", "requests_success", "requests_error", "requests_active", "bytes_sent", "queue_depth"),
        *("queue_rejections", "queue_wait_seconds_total", "uptime_seconds"),
    } <= told.keys()
    assert told["requests_success"] + told["requests_error"] == told["requests_total"]
    assert told["requests_error"] > 0
    assert told["queue_wait_seconds_total"] >= 0
    gateway.chat(max_tokens=20)
    again = gateway.get("/metrics", headers={"Accept": "application/json"}).json()["gateway"]
    assert again["tokens_out"] - told["tokens_out"] == growth.of("gateway_tokens_total", direction="out") == 20
    assert again["bytes_sent"] > told["bytes_sent"]
    assert again["uptime_seconds"] > told["uptime_seconds"]


def test_a_scrape_does_not_wake_a_sleeping_model(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), IDLE_TIMEOUT_SECONDS="0.2") as gateway:
        eventually(lambda: gateway.model()["state"] == "off")
        assert gateway.get("/readyz", key=None).status == 200, "an idle unload keeps ready"
        assert "llamacpp:" not in Scrape(gateway).text
        assert gateway.get("/upstream/tiny/slots", key=ADMIN).status == 404
        assert gateway.model()["state"] == "off"
        assert Scrape(gateway).total("gateway_model_evictions_total", reason="idle") == 1
        assert gateway.chat().status == 200
        assert Scrape(gateway).total("gateway_model_load_seconds_count") == 2


# --- logs


def test_a_request_in_the_log(gateway: Gateway) -> None:
    gateway.chat(headers={"x-request-id": "in-the-log"})
    gateway.chat(headers={"x-request-id": "refused"}, key=ADMIN, temperature="hot")

    def line(request_id: str) -> str:
        return eventually(lambda: next((x for x in gateway.stderr.split("\n") if f"request_id={request_id} " in x), ""))

    told = line("in-the-log")
    assert f"POST {CHAT} 200" in told
    assert "+8 " in told, "tokens"
    assert "key_id=user model=tiny" in told
    assert "400" in line("refused")
    assert "invalid_request" in line("refused")
    assert "key_id=admin" in line("refused")


def test_log_lines_as_json(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), LOG_FORMAT="json") as gateway:
        gateway.chat(headers={"x-request-id": "in-the-log"})
        rows = eventually(
            lambda: [row for row in map(json.loads, gateway.stderr.splitlines()) if row["request_id"] == "in-the-log"]
        )
    (row,) = rows
    assert {"time", "level", "request_id", "key_id", "model", "message"} <= row.keys()
    assert (row["key_id"], row["model"], row["level"]) == ("user", "tiny", "info")


def test_no_secret_is_told(gateway: Gateway) -> None:
    """The keys of clients, llama-server's own key, prompts and answers: in no log, no error, no state."""
    prompt = "xylophone quartz zebra"
    wrong = "sk-wrong-0123456789abcdefghijABCDEFGHIJ"
    answer = gateway.chat(prompt, max_tokens=40).json()["choices"][0]["message"]["content"]
    told = [
        gateway.chat(prompt, temperature="hot").body,
        gateway.chat(prompt, key=wrong).body,
        gateway.chat(prompt, n=0).body,
        gateway.chat(prompt, key=None, headers={"x-api-key": wrong}).body,
        gateway.get(f"/nothing?key={USER}").body,
        *(
            gateway.get(path, key=ADMIN).body
            for path in ("/health", "/metrics", "/status", "/v1/models/status", "/v1/models", "/upstream/tiny/props")
        ),
    ]
    with wire(gateway) as client:
        client.send(request("GET", "/", headers={"X-Long": USER * 300}))
        told.append(client.answer().body)
    process = Path(f"/proc/{gateway.model()['pid']}")
    environment = dict(pair.split("=", 1) for pair in process.joinpath("environ").read_text().split("\0") if pair)
    own = environment["LLAMA_API_KEY"]
    assert len(own) >= 32
    told.append(process.joinpath("cmdline").read_bytes())
    files = [path for path in gateway.data_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    eventually(lambda: ("not_found" in told[4].decode() and " 401" in gateway.stderr) or True)
    told += [path.read_bytes() for path in [*files, gateway.folder / "stderr", gateway.folder / "stdout"]]
    for number, text in enumerate(told):
        for secret in (USER, ADMIN, wrong, own, prompt, answer):
            assert secret.encode() not in text, (number, secret)
