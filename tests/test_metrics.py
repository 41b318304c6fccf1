"""The gateway's own metrics, their JSON view, and llama-servers' metrics merged into one text."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway import __version__
from gateway.metrics import Metrics, merge

# CONTRACT, section 7: name as it stands in the text, and its labels.
CONTRACT = {
    "requests_total": {"path", "method", "status", "model"},
    "requests_active": set(),
    "request_duration_seconds": {"path"},
    "time_to_first_token_seconds": {"model"},
    "time_per_output_token_seconds": {"model"},
    "tokens_total": {"direction", "model"},
    "queue_depth": {"model"},
    "queue_wait_seconds": {"model"},
    "queue_rejections_total": {"reason"},
    "rate_limited_total": {"reason"},
    "auth_failures_total": set(),
    "model_state": {"model", "state"},
    "model_load_seconds": {"model"},
    "model_evictions_total": {"reason"},
    "model_restarts_total": {"model"},
    "model_vram_bytes": {"model"},
    "vram_budget_bytes": set(),
    "vram_used_bytes": set(),
    "cache_requests_total": {"result"},
    "bytes_sent_total": set(),
    "event_loop_lag_seconds": set(),
    "uptime_seconds": set(),
    "build_info": {"version"},
}
BY_KEY = {"key_requests_total": {"key"}, "key_tokens_total": {"key", "direction"}}


def parsed(text: str) -> Iterable[Metric]:
    """By Prometheus' own parser."""
    return text_string_to_metric_families(text)


def labels_of(metrics: Metrics) -> dict[str, set[str]]:
    found = {}
    for registry in (metrics.registry, metrics.key_registry):
        for collector in list(registry._collector_to_names):
            (family,) = collector.collect()
            end = "_total" if family.type == "counter" else ""
            found[family.name.removeprefix("gateway_") + end] = set(getattr(collector, "_labelnames", ()))
    return found


def test_the_names_and_labels_are_the_contracts() -> None:
    metrics = Metrics()
    found = labels_of(metrics)
    assert {name: found.get(name) for name in CONTRACT | BY_KEY} == CONTRACT | BY_KEY
    assert not [name for name, labels in found.items() if "key" in labels and name not in BY_KEY]
    families = {family.name: family for family in parsed(metrics.render(with_keys=True).decode())}
    for name in CONTRACT | BY_KEY:
        assert families["gateway_" + name.removesuffix("_total")].documentation
    assert families["gateway_build_info"].samples[0].labels == {"version": __version__}


def test_key_ids_appear_only_where_the_endpoint_needs_a_key() -> None:
    metrics = Metrics()
    metrics.key_requests.labels("bob").inc()
    metrics.key_tokens.labels("bob", "in").inc(3)
    assert b"bob" not in metrics.render(with_keys=False)
    assert b'gateway_key_tokens_total{direction="in",key="bob"} 3.0\n' in metrics.render(with_keys=True)


def test_a_request_is_one_series_however_often_it_comes() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.count_request("/v1/models", "GET", 200, "")
    metrics.count_request('/x"\n', "GET", 404, "m")
    (family,) = (
        found for found in parsed(metrics.render(with_keys=False).decode()) if found.name == "gateway_requests"
    )
    totals = {tuple(sample.labels.values()): sample.value for sample in family.samples if "total" in sample.name}
    assert sorted(totals.values()) == [1, 3]
    assert {sample.labels["path"] for sample in family.samples} == {"/v1/models", '/x"\n'}


def test_two_sets_of_metrics_do_not_share_anything() -> None:
    one, other = Metrics(), Metrics()
    one.count_request("/x", "GET", 200, "")
    assert one.as_json()["gateway"]["requests_total"] == 1
    assert other.as_json()["gateway"]["requests_total"] == 0


def test_the_json_view() -> None:
    metrics = Metrics()
    for status, count in ((200, 3), (304, 1), (400, 1), (429, 2), (499, 1), (502, 1)):
        for _ in range(count):
            metrics.count_request("/v1/chat/completions", "POST", status, "m")
    metrics.active.inc(2)
    metrics.bytes_sent.inc(1234)
    metrics.queue_depth.labels("a").set(3)
    metrics.queue_depth.labels("b").set_function(lambda: 4)
    metrics.queue_rejections.labels("full").inc(2)
    metrics.queue_rejections.labels("timeout").inc()
    for seconds in (0.5, 1.25):
        metrics.queue_wait.labels("a").observe(seconds)
    metrics.rate_limited.labels("requests").inc()
    metrics.auth_failures.inc(5)
    for direction, count in (("in", 10), ("out", 20), ("cached", 7)):
        metrics.tokens.labels(direction, "a").inc(count)
        metrics.tokens.labels(direction, "b").inc(count)
    shown = metrics.as_json()["gateway"]
    assert 0 <= shown.pop("uptime_seconds") < 10
    assert shown == {
        "requests_total": 9,
        "requests_success": 4,
        "requests_error": 5,
        "requests_active": 2,
        "bytes_sent": 1234,
        "queue_depth": 7,
        "queue_rejections": 3,
        "queue_wait_seconds_total": 1.75,
        "rate_limited": 1,
        "auth_failures": 5,
        "tokens_in": 20,
        "tokens_out": 40,
    }


# --- merging what llama-servers tell

ONE = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 12
# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
"""


def test_one_model() -> None:
    assert merge({"a": ONE}) == ONE.replace(" 12\n", '{model="a"} 12\n').replace(" 1\n", '{model="a"} 1\n')
    assert merge({}) == merge({"a": ""}) == ""


def test_several_models_have_each_family_in_one_block_with_one_help() -> None:
    other = ONE.replace("Number of", "The number of").replace(" 12\n", " 5\n") + "llamacpp:new_one 3.5e-05\n"
    assert merge({"a": ONE, "b": other.replace("\n", "\r\n")}).splitlines() == [
        "# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.",
        "# TYPE llamacpp:prompt_tokens_total counter",
        'llamacpp:prompt_tokens_total{model="a"} 12',
        'llamacpp:prompt_tokens_total{model="b"} 5',
        "# HELP llamacpp:requests_processing Number of requests processing.",
        "# TYPE llamacpp:requests_processing gauge",
        'llamacpp:requests_processing{model="a"} 1',
        'llamacpp:requests_processing{model="b"} 1',
        'llamacpp:new_one{model="b"} 3.5e-05',
    ]


@pytest.mark.parametrize(
    ("sample", "merged"),
    [
        ("x 1", 'x{model="m"} 1'),
        ("x{} 1", 'x{model="m"} 1'),
        ('x{a="b"} 1', 'x{a="b",model="m"} 1'),
        ('x{a="b",} 1 1700000000000', 'x{a="b",model="m"} 1 1700000000000'),
        ('x{a="}",b="\\"}"} +Inf', 'x{a="}",b="\\"}",model="m"} +Inf'),
        ("x NaN", 'x{model="m"} NaN'),
        ("# EOF", None),
        ("", None),
        ("not a sample", None),
        ("x 1 y", None),
        ("x", None),
        ("<html>", None),
        ('x{a="unclosed} 1', None),
        ("x{a=1", None),
    ],
)
def test_samples(sample: str, merged: str | None) -> None:
    assert merge({"m": sample}) == (f"{merged}\n" if merged else "")


@given(st.dictionaries(st.text(max_size=8), st.integers(0, 9), max_size=4))
def test_whatever_a_model_is_called_the_text_stays_valid(models: dict[str, int]) -> None:
    merged = merge({model: ONE.replace("12", str(count)) for model, count in models.items()})
    found = {
        sample.labels["model"]: sample.value
        for family in parsed(merged)
        for sample in family.samples
        if sample.name == "llamacpp:prompt_tokens_total"
    }
    assert found == models
