"""Clients that take their answers slowly, or not at all any more."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.books_kit import rows
from tests.house import USER, Gateway, eventually, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


def asked(gateway: Gateway, tokens: int, *, stream: bool) -> socket.socket:
    """A connection that takes little at a time, with a request for some megabytes."""
    about = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    body = json.dumps(about | {"max_tokens": tokens, "stream": stream}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", gateway.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USER}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def processing(gateway: Gateway) -> int:
    return int(gateway.get("/v1/queue/stats").json()["summary"]["total_processing"])


def end_when_made(gateway: Gateway) -> None:
    eventually(lambda: gateway.get("/v1/queue/stats").json()["summary"]["total_processed"] == 1, 30)
    gateway.process.send_signal(signal.SIGTERM)


def test_one_that_takes_nothing_any_more_loses_its_place(tmp_path: Path, chat_model: Path) -> None:
    """Its socket is open, and it would keep the only place from all others for as long as it likes."""
    variables = {"MODEL_PATH": str(chat_model), "PARALLEL": "1", "CTX": "16384", "REQUEST_TIMEOUT": "1"}
    with running_gateway(tmp_path, variables) as gateway:
        with asked(gateway, 6000, stream=True):
            eventually(lambda: processing(gateway) == 1)
            assert gateway.chat().status == 200
        assert gateway.stop() == 0
    assert rows(tmp_path / "data" / "corral.sqlite", "SELECT status FROM requests ORDER BY id") == [(499,), (200,)]


def test_an_answer_that_is_still_being_taken_is_no_finished_one(tmp_path: Path, chat_model: Path) -> None:
    """SIGTERM lets it come to its end, although llama-server has no more to do with it."""
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), CTX="8192") as gateway:
        with asked(gateway, 2500, stream=False) as connection:
            ending = threading.Thread(target=end_when_made, args=(gateway,))
            ending.start()
            received = b""
            while part := connection.recv(65536):
                received += part
                time.sleep(len(part) / 2e6)
            ending.join()
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length is not None and len(body) == int(length[1]) > 2_000_000
        assert gateway.process.wait(20) == 0
