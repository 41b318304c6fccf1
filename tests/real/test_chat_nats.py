"""`corral chat` by NATS: a real nats-server, a gateway that works for it, the real llama-server."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from gateway.cli import main
from tests.house import ADMIN, Gateway, eventually, running_gateway
from tests.nats_kit import NatsServer, running_nats
from tests.terminal import CTRL_C, CTRL_D, terminal

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with running_nats(tmp_path_factory.mktemp("nats")) as running:
        yield running


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, server: NatsServer, slow_model: Path) -> Iterator[Gateway]:
    variables = {"MODEL_PATH": str(slow_model), "NATS_URL": server.url, "PARALLEL": "1"}
    with running_gateway(tmp_path_factory.mktemp("house"), variables) as gateway:
        yield gateway


def chat(server: NatsServer, *argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"TERM": "dumb", "HOME": str(server.folder)}, clear=True),
        mock.patch.object(sys, "stdin", io.StringIO()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(["chat", "--nats", server.url, *argv])
    return code, out.getvalue(), err.getvalue()


def test_the_answer_is_the_one_of_http(house: Gateway, server: NatsServer) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
    wanted = house.request("POST", "/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    options = ("--input", "hi", "--max-tokens", "6", "--temperature", "0")
    for whom in (("--model", "slow"), ("--subject", "inference.request.slow")):
        assert chat(server, *whom, *options) == (0, f"{wanted}\n", "")


@pytest.mark.parametrize(
    ("argv", "about"),
    [
        (["--subject", "elsewhere.slow"], "no queue takes elsewhere.slow"),
        (["--model", "slow", "--max-tokens", "3", "--grammar", "root ::= ("], "grammar"),
        (["--model", "nobody", "--timeout", "0.3"], "no answer for 0.3 s: does a worker serve that model?"),
    ],
)
def test_what_goes_wrong(house: Gateway, server: NatsServer, argv: list[str], about: str) -> None:
    code, out, err = chat(server, *argv, "--input", "hi")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("corral chat: ") and about in err


def test_ctrl_c_stops_the_answer_at_the_worker(house: Gateway, server: NatsServer) -> None:
    assert chat(server, "--model", "slow", "--input", "hi", "--max-tokens", "1")[0] == 0
    with terminal(server.folder, "chat", "--nats", server.url, "--model", "slow", "--max-tokens", "3000") as person:
        person.expect("> ")
        person.line("a long one")
        person.expect("a long one\n")
        person.expect(" ")
        assert busy(house) == 1
        person.type(CTRL_C)
        person.expect("(stopped)")
        eventually(lambda: busy(house) == 0, 5)
        person.expect("> ")
        person.line("/model other")
        person.expect("(the next answers are of other")
        person.line("/model")
        person.expect("other\n")
        person.expect("> ")
        person.type(CTRL_D)
        assert person.ends() == 0
        assert "Traceback" not in person.shown


def busy(house: Gateway) -> int:
    return sum(slot["is_processing"] for slot in house.get("/upstream/slow/slots", key=ADMIN).json())
