"""The connection itself: ids, keep-alive, pipelining, HTTP/1.0, and requests without a body of an answer."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.house import USER, Gateway, eventually
from tests.real.wire import Answer, chat, request, wire

pytestmark = pytest.mark.real

CHAT = "/v1/chat/completions"
SHORT, LONG = 8, 80  # passed through; assembled from a stream
MINTED = re.compile(r"req_[0-9a-f]{24}")


def text(answer: Answer) -> str:
    """What a whole chat or a streamed one says."""
    assert answer.status == 200, answer.body
    assert answer.whole
    if answer.headers["content-type"].startswith("application/json"):
        return str(answer.json()["choices"][0]["message"]["content"])
    *events, last = answer.events
    assert last == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)


# --- x-request-id


@pytest.mark.parametrize("given", ["abc-123", "A.b_c:d/e+f=", "x" * 128])
def test_a_sane_request_id_is_kept(gateway: Gateway, given: str) -> None:
    asked = {"x-request-id": given}
    assert gateway.get("/healthz", headers=asked).headers["x-request-id"] == given
    assert gateway.chat(headers=asked).headers["x-request-id"] == given
    assert gateway.chat(headers=asked, max_tokens=LONG).headers["x-request-id"] == given
    assert gateway.chat(headers=asked, stream=True).headers["x-request-id"] == given
    assert gateway.chat(headers=asked, key=None).headers["x-request-id"] == given
    assert gateway.chat(headers=asked, n=0).headers["x-request-id"] == given
    assert gateway.get("/nothing", headers=asked).headers["x-request-id"] == given
    eventually(lambda: f"request_id={given} " in gateway.stderr)


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "naïve", "<script>", "a\tb", 'a"b'])
def test_another_one_is_replaced(gateway: Gateway, given: str) -> None:
    with wire(gateway) as client:
        client.send(request("GET", "/healthz", headers={"x-request-id": given}))
        assert MINTED.fullmatch(client.answer("GET").headers["x-request-id"])


def test_each_request_has_an_id_of_its_own(gateway: Gateway) -> None:
    replies = [gateway.chat(), gateway.chat(stream=True), gateway.chat(key=None), gateway.get("/nothing")]
    with wire(gateway) as client:
        client.send(b"nonsense\r\n\r\n")
        ids = [reply.headers["x-request-id"] for reply in replies] + [client.answer().headers["x-request-id"]]
    assert all(MINTED.fullmatch(each) for each in ids)
    assert len(set(ids)) == len(ids)


# --- several requests on one connection


def test_keep_alive(gateway: Gateway) -> None:
    """One connection for everything: whole, assembled and streamed answers, and errors of all kinds between them."""
    seed: dict[str, Any] = {"temperature": 0}
    with wire(gateway) as client:
        for _ in range(2):
            said = []
            for how in (chat(**seed), chat(max_tokens=LONG, **seed), chat(stream=True, **seed)):
                client.send(request("POST", CHAT, how))
                said.append(text(client.answer()))
            assert said[0] == said[2]
            assert said[1].startswith(said[0])
            for asked, status in (
                (request("POST", CHAT, chat(n=0)), 400),
                (request("POST", CHAT, chat(messages=[{"role": "user", "content": "x" * 5000}], stream=True)), 400),
                (request("POST", CHAT, chat(), key=None), 401),
                (request("POST", "/nothing", chat()), 404),
                (request("PUT", CHAT, chat()), 405),
                (request("POST", CHAT, chat(), headers={"Content-Type": "text/plain"}), 415),
                (request("POST", "/v1/embeddings", {"input": "a"}), 501),
            ):
                client.send(asked)
                assert client.answer().status == status
            client.send(request("HEAD", "/v1/models"))
            head = client.answer("HEAD")
            client.send(request("GET", "/v1/models"))
            got = client.answer("GET")
            assert head.status == got.status == 200
            assert int(head.headers["content-length"]) == len(got.body)
            client.send(request("OPTIONS", "*"))
            assert client.answer("OPTIONS").status == 204


def test_a_client_may_ask_for_the_end_of_the_connection(gateway: Gateway) -> None:
    for body in (chat(), chat(max_tokens=LONG), chat(stream=True)):
        with wire(gateway) as client:
            client.send(request("POST", CHAT, body, headers={"Connection": "close"}))
            answer = client.answer()
            assert text(answer)
            assert answer.headers["connection"] == "close"
            assert client.ended
    with wire(gateway) as client:
        client.send(request("GET", "/healthz", headers={"Connection": "close"}))
        assert client.answer("GET").headers["connection"] == "close"
        assert client.ended


def test_pipelined_requests_are_answered_in_their_order(gateway: Gateway) -> None:
    bodies = [chat(temperature=0, max_tokens=length, stream=stream) for length in (8, 80) for stream in (False, True)]
    alone = []
    for body in bodies:
        with wire(gateway) as client:
            client.send(request("POST", CHAT, body))
            alone.append(text(client.answer()))
    with wire(gateway) as client:
        client.send(
            *(request("POST", CHAT, body, headers={"x-request-id": f"r{n}"}) for n, body in enumerate(bodies)),
            request("GET", "/healthz", headers={"x-request-id": "health"}),
            request("POST", "/nothing", chat(), headers={"x-request-id": "nothing"}),
            request("POST", CHAT, bodies[0], headers={"x-request-id": "again"}),
        )
        for number, expected in enumerate(alone):
            answer = client.answer()
            assert answer.headers["x-request-id"] == f"r{number}"
            assert text(answer) == expected
        assert (client.answer("GET").headers["x-request-id"], client.answer().status) == ("health", 404)
        answer = client.answer()
        assert (answer.headers["x-request-id"], text(answer)) == ("again", alone[0])


def test_a_request_may_come_in_pieces(gateway: Gateway) -> None:
    sent = request("POST", CHAT, chat())
    with wire(gateway) as client:
        for at in range(0, len(sent), 40):
            client.send(sent[at : at + 40])
        assert text(client.answer())


def test_an_offer_to_upgrade_is_declined(gateway: Gateway) -> None:
    """Java's HttpClient makes one with every request."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    with wire(gateway) as client:
        for _ in range(2):
            client.send(request("POST", CHAT, chat(), headers=offer))
            assert text(client.answer())
            client.send(request("GET", "/v1/models", headers=offer))
            assert client.answer("GET").status == 200


# --- framing


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_framing_of_whole_answers(gateway: Gateway, length: int) -> None:
    with wire(gateway) as client:
        client.send(request("POST", CHAT, chat(max_tokens=length)))
        answer = client.answer()
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert "transfer-encoding" not in answer.headers
    assert "connection" not in answer.headers


def test_framing_of_a_stream(gateway: Gateway) -> None:
    with wire(gateway) as client:
        client.send(request("POST", CHAT, chat(stream=True)))
        answer = client.answer()
    assert answer.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in answer.headers
    assert "connection" not in answer.headers
    assert answer.whole


@pytest.mark.parametrize("connection", [{}, {"Connection": "keep-alive"}])
@pytest.mark.parametrize("body", [chat(), chat(max_tokens=LONG), chat(stream=True)], ids=["short", "long", "stream"])
def test_http_1_0(gateway: Gateway, body: dict[str, object], connection: dict[str, str]) -> None:
    with wire(gateway) as client:
        client.send(request("POST", CHAT, body, version="1.0", headers=connection))
        answer = client.answer()
        assert text(answer)
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        if body["stream"]:
            assert answer.body.startswith(b"data: ")
        assert client.ended


def test_http_1_0_errors_and_what_is_answered_here(gateway: Gateway) -> None:
    for asked, status in (
        (request("GET", "/healthz", key=None, version="1.0"), 200),
        (request("GET", "/v1/models", version="1.0"), 200),
        (request("POST", CHAT, chat(n=0), version="1.0"), 400),
        (request("POST", CHAT, chat(), key=None, version="1.0"), 401),
    ):
        with wire(gateway) as client:
            client.send(asked)
            answer = client.answer()
            assert (answer.status, answer.whole) == (status, True)
            assert "transfer-encoding" not in answer.headers
            assert client.ended


def test_http_1_0_needs_no_host(gateway: Gateway) -> None:
    with wire(gateway) as client:
        client.send(f"GET /v1/models HTTP/1.0\r\nAuthorization: Bearer {USER}\r\n\r\n".encode())
        assert client.answer("GET").status == 200


# --- OPTIONS


@pytest.mark.parametrize("target", ["*", "/", CHAT, "/nothing", "/v1/models/tiny"])
def test_options_need_no_key(gateway: Gateway, target: str) -> None:
    with wire(gateway) as client:
        client.send(request("OPTIONS", target, key=None))
        answer = client.answer("OPTIONS")
        assert answer.status == 204
        assert answer.headers["x-request-id"]
        assert "content-length" not in answer.headers
        assert not [name for name in answer.headers if name.startswith("access-control")]
        client.send(request("GET", "/healthz"))
        assert client.answer("GET").body == b"ok"
