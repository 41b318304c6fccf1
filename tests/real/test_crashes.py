"""Processes that die: llama-server under a stream, the gateway over its llama-server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.books_kit import rows
from tests.house import ADMIN, USER, Gateway, alive, eventually, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


@contextlib.contextmanager
def stream(gateway: Gateway, text: str = "tell me", tokens: int = 10_000) -> Iterator[http.client.HTTPConnection]:
    """A connection on which a streaming request has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=40)
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True}
    headers = {"Authorization": f"Bearer {USER}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    with contextlib.closing(connection):
        yield connection


@contextlib.contextmanager
def running_stream(gateway: Gateway, tokens: int = 10_000) -> Iterator[http.client.HTTPResponse]:
    """The response of a stream whose first bytes have come."""
    with stream(gateway, tokens=tokens) as connection, connection.getresponse() as response:
        assert response.status == 200
        response.readline()
        yield response


def read_to_the_end(response: http.client.HTTPResponse) -> tuple[bytes, bool]:
    """What came, and whether it ended as HTTP wants."""
    received = b""
    try:
        while part := response.read1():
            received += part
    except (http.client.IncompleteRead, ConnectionError):
        return received, False
    return received, True


def test_llama_server_killed_in_the_middle_of_a_stream(tmp_path: Path, slow_model: Path) -> None:
    """An error frame and a cut; then everything goes on, with a new process."""
    with running_gateway(tmp_path, MODEL_PATH=str(slow_model), CTX="16384") as gateway:
        first = gateway.model()["pid"]
        with running_stream(gateway) as response:
            os.kill(first, signal.SIGKILL)
            received, clean = read_to_the_end(response)
        assert not clean
        last = received.strip().rpartition(b"\n\n")[2]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "backend_error"
        assert b"[DONE]" not in received
        assert gateway.chat().status == 200
        assert gateway.model()["pid"] != first
        eventually(lambda: "model.crashed" in gateway.stderr)
        text = gateway.get("/metrics", key=None).body.decode()
        assert 'gateway_model_restarts_total{model="slow"} 1.0' in text


def test_a_request_whose_server_died_before_the_first_byte_is_tried_once_more(tmp_path: Path, slow_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(slow_model), EXTRA_ARGS="-b 32") as gateway:
        first = gateway.model()["pid"]
        with stream(gateway, "word " * 200, tokens=4) as connection:
            eventually(lambda: gateway.slots_busy() == 1)
            os.kill(first, signal.SIGKILL)
            received, clean = read_to_the_end(connection.getresponse())
        assert clean and received.endswith(b"data: [DONE]\n\n"), received[-300:]
        assert gateway.model()["pid"] != first


def test_a_whole_answer_whose_server_died_is_tried_once_more(tmp_path: Path, slow_model: Path) -> None:
    """Its client has seen nothing of it; what was written down is that of the second try alone."""
    variables = {"MODEL_PATH": str(slow_model), "AUDIT_CONTENT": "full"}
    with running_gateway(tmp_path, variables) as gateway, ThreadPoolExecutor(1) as pool:
        first = gateway.model()["pid"]
        asked = pool.submit(gateway.chat, "tell me", max_tokens=300, temperature=0)
        eventually(lambda: decoded(gateway) > 20)
        os.kill(first, signal.SIGKILL)
        reply = asked.result()
        assert reply.status == 200 and reply.json()["usage"]["completion_tokens"] == 300
        assert gateway.model()["pid"] != first
        assert gateway.stop() == 0
    answer = reply.json()["choices"][0]["message"]["content"]
    ((tokens, response),) = rows(tmp_path / "data" / "corral.sqlite", "SELECT tokens_out, response FROM requests")
    assert tokens == 300 and response == answer


def decoded(gateway: Gateway) -> int:
    slots = gateway.get(f"/upstream/{gateway.model()['model_id']}/slots", key=ADMIN).json()
    return max(slot["next_token"][0]["n_decoded"] if slot["is_processing"] else 0 for slot in slots)


def test_no_llama_server_outlives_a_killed_gateway(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
        child = gateway.model()["pid"]
        gateway.process.kill()
        begun = time.monotonic()
        eventually(lambda: not alive(child), 5)
        assert time.monotonic() - begun < 2


def test_single_model_state_goes_back_to_loading_and_to_failed_when_retries_are_used_up(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    with running_gateway(tmp_path / "run", ready=False, MODEL_PATH=str(broken)) as gateway:
        health = eventually(
            lambda: (reply := gateway.get("/health", key=None)).json()["state"] == "failed" and reply, 30
        )
        assert health.status == 503
        assert "broken" in health.json()["detail"]
        refused = gateway.chat()
        assert (refused.status, refused.json()["error"]["code"]) == (503, "model_failed")
        assert refused.headers["retry-after"]


def listens(gateway: Gateway) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", gateway.port)) == 0


class TestShutdown:
    def test_running_streams_finish_and_new_requests_are_told(self, tmp_path: Path, slow_model: Path) -> None:
        with running_gateway(tmp_path, MODEL_PATH=str(slow_model), CTX="16384") as gateway:
            child = gateway.model()["pid"]
            with running_stream(gateway, tokens=400) as response:
                gateway.process.send_signal(signal.SIGTERM)
                refused = eventually(lambda: (reply := gateway.chat()).status == 503 and reply)
                assert refused.json()["error"]["code"] == "shutting_down"
                assert refused.headers["retry-after"]
                assert gateway.get("/readyz", key=None).status == 503
                received, clean = read_to_the_end(response)
            assert clean and received.endswith(b"data: [DONE]\n\n")
            assert gateway.process.wait(20) == 0
            assert not alive(child)
            assert "model.crashed" not in gateway.stderr

    def test_the_grace_is_bounded_and_the_client_is_told(self, tmp_path: Path, slow_model: Path) -> None:
        with running_gateway(
            tmp_path, MODEL_PATH=str(slow_model), CTX="16384", SHUTDOWN_GRACE_SECONDS="0.5"
        ) as gateway:
            child = gateway.model()["pid"]
            with running_stream(gateway) as response:
                begun = time.monotonic()
                gateway.process.send_signal(signal.SIGTERM)
                received, clean = read_to_the_end(response)
            assert not clean
            assert b'"code":"shutting_down"' in received[-400:]
            assert gateway.process.wait(20) == 0
            assert time.monotonic() - begun < 14, "the grace, 10 s until llama-server gets SIGKILL, and a moment"
            recorded = rows(tmp_path / "data" / "corral.sqlite", "SELECT status, error FROM requests")
            assert recorded == [(503, "shutting_down")], "the client did not leave"
            assert not alive(child)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_ends_it_at_once(self, tmp_path: Path, slow_model: Path, number: signal.Signals) -> None:
        with running_gateway(tmp_path, MODEL_PATH=str(slow_model), CTX="16384") as gateway:
            child = gateway.model()["pid"]
            with running_stream(gateway):
                gateway.process.send_signal(number)
                eventually(lambda: gateway.get("/readyz", key=None).status == 503)
                begun = time.monotonic()
                gateway.process.send_signal(number)
                assert gateway.process.wait(10) == 0
            assert time.monotonic() - begun < 3
            assert not alive(child)
            assert "model.crashed" not in gateway.stderr

    def test_a_second_signal_when_only_llama_server_is_waited_for(self, tmp_path: Path, chat_model: Path) -> None:
        with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
            child = gateway.model()["pid"]
            os.kill(child, signal.SIGSTOP)  # it will not heed SIGTERM
            gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: "server.draining" in gateway.stderr and not listens(gateway))
            begun = time.monotonic()
            gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait(10) == 0
            assert time.monotonic() - begun < 3
            assert not alive(child)

    def test_while_the_model_loads(self, tmp_path: Path, slow_model: Path) -> None:
        with running_gateway(tmp_path, ready=False, MODEL_PATH=str(slow_model)) as gateway:
            eventually(lambda: gateway.get("/healthz", key=None).status == 200)
            child = gateway.get("/status", key=ADMIN).json()["instances"][0]["pid"]
            assert gateway.stop() == 0
            assert child is None or not alive(child)
