"""What is made of a request when it is over: its times, its line in the log, its text; and who is still running."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.metrics import Metrics
from gateway.pipeline.account import Accounts, KeepingMeter, Meter, Record, Trickle
from gateway.pipeline.call import Call, Route
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.loglines import FullLine, Line, parameters, wishes
from gateway.stores.keys.file import Key
from gateway.stores.records.audit import Detail
from tests.books_kit import record
from tests.hot_path_kit import client, house, request
from tests.house import USER

ROUTE = Route("/v1/chat/completions", "/v1/chat/completions", Dialect.CHAT)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def raw(**fields: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}


def call(**about: Any) -> Call:
    fields = about.pop("fields", {})
    made = Call(ROUTE, Key("ada"), "ada", "req_1", f"00-{'a' * 32}-{'b' * 16}-01", 100.0, None, fields, 10)
    for name, value in about.items():
        setattr(made, name, value)
    return made


# Times


@pytest.mark.parametrize(
    ("steps", "queue_ms", "load_ms", "model_ms"),
    [
        ("read", 0, 0, 0),  # refused before it had to wait
        ("read wait", 1000, 0, 0),  # in vain for a place
        ("read wait place load", 1000, 2000, 0),  # in vain for the model
        ("read wait place load loaded serve", 1000, 2000, 4000),
        ("read wait place serve", 1000, 0, 4000),  # its client left in the prefill
    ],
)
def test_where_the_time_went(steps: str, queue_ms: float, load_ms: float, model_ms: float) -> None:
    clock, job = Clock(), call()
    accounts = Accounts(Metrics(), clock)
    meter = accounts.meter(1)
    kept: Record = accounts.open(job, meter)
    for step in steps.split():
        if step == "read":
            clock.now += 0.5
        elif step == "wait":
            kept.asked_at = clock.now
            clock.now += 1
        elif step == "place":
            accounts.placed(kept, 1.0)
        elif step == "load":
            clock.now += 2
        elif step == "loaded":
            kept.load_ms = 2000
        else:
            clock.now += 4
            accounts.measure(kept, job, meter, streamed=True)
    accounts.close(kept, job, meter, streamed=True)
    assert (kept.queue_ms, kept.load_ms, kept.model_ms) == pytest.approx((queue_ms, load_ms, model_ms))
    assert kept.duration_ms == pytest.approx(500 + queue_ms + load_ms + model_ms)
    assert kept.ttft_ms is None


def test_who_is_running() -> None:
    accounts, job = Accounts(Metrics(), Clock()), call()
    meters = [accounts.meter(1) for _ in range(3)]
    records = [accounts.open(job, meter) for meter in meters]
    assert [meter for _, meter in accounts.running.values()] == meters
    accounts.close(records[1], job, meters[1], streamed=False)
    assert [found for found, _ in accounts.running.values()] == [records[0], records[2]]


# Texts


@pytest.mark.parametrize(("keep", "cache"), [(True, None), (True, "miss"), (False, None), (False, "hit")])
def test_what_goes_with_a_record(keep: bool, cache: str | None) -> None:
    accounts, job = Accounts(Metrics(), Clock()), call(fields=raw(messages=[], temperature=1))
    accounts.keep_texts = keep
    plain, full = list[Record](), list[tuple[Record, Detail]]()
    accounts.listen(plain.append, lambda record, detail: full.append((record, detail)))
    meter = accounts.meter(1)
    assert isinstance(meter, KeepingMeter) is keep
    kept = accounts.open(job, meter)
    meter.see(b'{"choices":[{"message":{"content":"yes"}}]}')
    kept.cache = cache
    accounts.close(kept, job, meter, streamed=False)
    if not keep and cache is None:
        assert (plain, full) == ([kept], [])
        return
    ((told, detail),) = full
    assert (plain, told, detail.cache) == ([], kept, cache)
    texts = [said and said.said() for said in (detail.prompt, detail.response)]
    assert texts == ([b"[]", b"yes"] if keep else [None, None])


def test_a_meter_that_keeps_counts_like_any_other() -> None:
    clock = Clock()
    keeping, plain = KeepingMeter(clock), Meter(clock)
    for _ in range(3000):
        for meter in (keeping, plain):
            meter.see(b'data: {"n":1}\n\n')
    for name in ("size", "frames", "head", "tail", "first_at"):
        assert getattr(keeping, name) == getattr(plain, name)


# The log


@pytest.mark.parametrize(
    ("level", "infer", "failed", "line", "full"),
    [
        (None, False, False, True, False),
        (None, True, False, True, True),
        ("off", False, True, False, False),
        ("off", True, True, False, False),
        ("error", False, False, False, False),
        ("error", True, False, False, False),
        ("error", False, True, True, False),
        ("error", True, True, True, True),
        ("info", False, False, True, False),
        ("info", True, False, True, True),
        ("debug", False, False, True, True),
        ("debug", True, True, True, True),
    ],
)
def test_how_much_is_logged(level: str | None, infer: bool, failed: bool, line: bool, full: bool) -> None:
    assert wishes(level, infer, failed) == (line, full)


@pytest.mark.parametrize(
    ("about", "shown"),
    [
        ({}, [Line]),
        ({"log": "off"}, []),
        ({"log": "error"}, []),
        ({"log": "debug"}, [FullLine]),
        ({"log_infer": True}, [FullLine]),
    ],
)
def test_a_request_says_how_much(about: dict[str, Any], shown: list[type], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    accounts, job = Accounts(Metrics(), Clock()), call(**about)
    accounts.close(accounts.open(job), job, accounts.meter(1), streamed=False)
    assert [type(line) for line in caplog.records] == shown


def test_a_quiet_log_still_has_what_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    caplog.handler.setLevel(logging.NOTSET)
    accounts = Accounts(Metrics(), Clock())
    for job in (call(), call(log="info"), call(log="debug")):
        accounts.close(accounts.open(job), job, accounts.meter(1), streamed=False)
    assert [type(line) for line in caplog.records] == [Line, FullLine]


def test_parameters_hold_no_prompt() -> None:
    fields = raw(
        temperature=0.5,
        stop=["x" * 300],
        seed=7,
        messages=[{"content": "a secret plan"}],
        prompt="a secret plan",
        grammar='root ::= "a secret plan"',
        metadata={"note": "a secret plan"},
    )
    told = msgspec.json.decode(parameters(fields))
    assert told.keys() == {"temperature", "seed", "stop"}
    assert (told["temperature"], told["seed"], len(told["stop"])) == (0.5, 7, 201)
    line = FullLine(record(ttft_ms=None), 0.0, fields).getMessage()
    assert "secret" not in line and '"temperature":0.5' in line and "first token none" in line
    assert "a secret plan" in FullLine(record(), 0.0, fields, with_prompt=True).getMessage()


# Strangers


async def test_a_flood_of_strangers_is_not_written_down(tmp_path: Path) -> None:
    async with house(tmp_path) as (runtime, port):
        runtime.accounts.strangers = Trickle(2, 0.0)
        seen = list[Record]()
        runtime.accounts.listen(seen.append)
        one = await client(port)
        for key in ("x", "x", "x", USER):
            one.transport.write(request(b"{", "x-api-key: other").replace(USER.encode(), key.encode()))
        await one.until(b"HTTP/1.1 4", 4)
        assert [(found.key_id, found.status) for found in seen] == [("", 401), ("", 401), ("user", 400)]
        assert runtime.metrics.records_skipped.labels().value == 1
        one.transport.close()


@pytest.mark.parametrize(
    ("times", "passed"),
    [
        ([1] * 5, [True, True, True, False, False]),
        ([1, 1, 1, 1, 1.4, 1.5, 1.6], [True, True, True, False, False, True, False]),
        ([1, 1, 1, 100, 100, 100, 100], [True, True, True, True, True, True, False]),
        ([5, 4, 3, 2], [True, True, True, False]),  # a clock that goes back gives nothing
    ],
)
def test_a_trickle(times: list[float], passed: list[bool]) -> None:
    trickle = Trickle(3, 2.0)
    assert [trickle.admitted(now) for now in times] == passed
