"""Jobs that do not come to the spine: their record, and how they are counted."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.errors import BadRequest
from gateway.metrics import Metrics
from gateway.pipeline.account import Accounts, Record
from gateway.workers.nats.job import route_of
from gateway.workers.refusals import Refused, note


@pytest.mark.parametrize(
    ("job", "path", "request_id"),
    [
        (Refused("runpod", "job-1", "runpod", "/v1/embeddings"), "/v1/embeddings", "job-1"),
        (Refused("nats", "a b", "nats", "", "tiny", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"), "unknown", "req_"),
    ],
)
def test_it_is_recorded_and_counted(job: Refused, path: str, request_id: str) -> None:
    metrics = Metrics()
    accounts = Accounts(metrics, time.monotonic)
    records: list[Record] = []
    accounts.listen(records.append)
    runtime: Any = SimpleNamespace(metrics=metrics, accounts=accounts)
    note(runtime, job, BadRequest("input is 'a secret': must be something else"))
    (record,) = records
    assert (record.route, record.model, record.key_id, record.transport) == (
        job.route,
        job.model,
        job.key_id,
        job.transport,
    )
    assert (record.status, record.error, record.method) == (400, "invalid_request", "POST")
    assert record.request_id.startswith(request_id)
    if job.traceparent is not None:
        assert record.trace_id == "a" * 32
    assert {labels: count.value for labels, count in metrics.requests.series.items()} == {
        (path, "POST", "400", job.model): 1
    }


@pytest.mark.parametrize(
    ("data", "route"),
    [
        (b"{", ""),
        (b"[]", ""),
        (b"\xff", ""),
        (b"{}", ""),
        (b'{"params": 3}', ""),
        (b'{"input": 5}', "/v1/completions"),
        (b'{"messages": null, "prompt": 5}', "/v1/completions"),
        (b'{"messages": 5}', "/v1/chat/completions"),
    ],
)
def test_the_route_of_a_wrong_job(data: bytes, route: str) -> None:
    assert route_of(data) == route
