"""Waiting for a place: order, bounds, deadlines, pings; with a real llama-server that has one slot."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import USER, Gateway, Response, eventually, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("one"),
        MODEL_PATH=str(slow_model),
        CTX="16384",
        PARALLEL="1",
        MAX_QUEUE_SIZE="3",
        MAX_QUEUED_BYTES="5000",
        SSE_PING_SECONDS="0.4",
        QUEUE_TIMEOUT_SECONDS="20",
    ) as gateway:
        yield gateway


@contextlib.contextmanager
def connection(gateway: Gateway, **fields: object) -> Iterator[http.client.HTTPConnection]:
    """A connection on which a chat request has been sent."""
    client = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    body = {"messages": [{"role": "user", "content": "tell me"}]} | fields
    headers = {"Authorization": f"Bearer {USER}", "Content-Type": "application/json"}
    client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    with contextlib.closing(client):
        yield client


@contextlib.contextmanager
def taken(gateway: Gateway) -> Iterator[None]:
    """The only place is taken for as long as the block runs."""
    with connection(gateway, stream=True, max_tokens=10_000) as client, client.getresponse() as response:
        response.readline()
        yield
    eventually(lambda: queue(gateway) == (0, 0))


def queue(gateway: Gateway) -> tuple[int, int]:
    summary = gateway.get("/v1/queue/stats").json()["summary"]
    return summary["total_processing"], summary["total_queued"]


def until_waiting(gateway: Gateway, count: int) -> None:
    eventually(lambda: queue(gateway) == (1, count))


def refusal(response: Response) -> tuple[int, str]:
    assert int(response.headers["retry-after"]) in range(1, 61)
    return response.status, response.json()["error"]["code"]


def test_a_full_queue_refuses_at_once(one_slot: Gateway) -> None:
    with taken(one_slot), contextlib.ExitStack() as waiting:
        for number in range(3):
            waiting.enter_context(connection(one_slot, max_tokens=1))
            until_waiting(one_slot, number + 1)
        begun = time.monotonic()
        assert refusal(one_slot.chat()) == (503, "queue_full")
        assert time.monotonic() - begun < 1
    assert one_slot.chat().status == 200


def test_the_bodies_of_those_who_wait_are_bounded(one_slot: Gateway) -> None:
    with taken(one_slot):
        assert refusal(one_slot.chat("x" * 5000)) == (503, "queue_full")
        with connection(one_slot, max_tokens=1):
            eventually(lambda: queue(one_slot) == (1, 1))


def test_a_client_may_bound_its_own_wait(one_slot: Gateway) -> None:
    with taken(one_slot):
        begun = time.monotonic()
        assert refusal(one_slot.chat(headers={"X-Request-Timeout": "0.3"})) == (503, "queue_timeout")
        assert 0.2 < time.monotonic() - begun < 3


def test_first_come_first_served(one_slot: Gateway) -> None:
    served: list[int] = []

    def ask(number: int) -> None:
        assert one_slot.chat(max_tokens=2).status == 200
        served.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    with taken(one_slot):
        for number, thread in enumerate(threads):
            thread.start()
            until_waiting(one_slot, number + 1)
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2]


def test_a_waiting_stream_gets_pings_and_then_its_answer(one_slot: Gateway) -> None:
    with contextlib.ExitStack() as place:
        place.enter_context(taken(one_slot))
        with connection(one_slot, stream=True, max_tokens=3) as client, client.getresponse() as response:
            assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream")
            assert response.readline() == b": ping\n"
            assert response.readline() == b"\n"
            leaving = threading.Thread(target=place.pop_all().close)
            leaving.start()
            rest = response.read()
        leaving.join()
    assert rest.endswith(b"data: [DONE]\n\n")
    events = [event for event in rest.split(b"\n\n") if event and not event.startswith(b":")]
    assert all(event.startswith(b"data: ") for event in events)


def test_a_stream_that_waited_in_vain_gets_an_error_frame_and_is_cut(one_slot: Gateway) -> None:
    client = http.client.HTTPConnection("127.0.0.1", one_slot.port, timeout=30)
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 3}
    headers = {"Authorization": f"Bearer {USER}", "X-Request-Timeout": "1.5", "Content-Type": "application/json"}
    with taken(one_slot), contextlib.closing(client):
        client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        with client.getresponse() as response:
            assert response.status == 200
            received = b""
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                while part := response.read1():
                    received += part
    assert received.startswith(b": ping\n\n")
    last = received.strip().rpartition(b"\n\n")[2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "queue_timeout"


def test_several_answers_take_several_places(tmp_path: Path, slow_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(slow_model), PARALLEL="2") as gateway:
        with connection(gateway, n=2, stream=True, max_tokens=2000) as client, client.getresponse() as response:
            response.readline()
            assert queue(gateway) == (2, 0)
            with connection(gateway, max_tokens=1):
                eventually(lambda: queue(gateway) == (2, 1))
        eventually(lambda: queue(gateway) == (0, 0))
        assert gateway.get("/metrics", key=None).status == 200
