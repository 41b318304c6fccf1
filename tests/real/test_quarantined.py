"""A request under which llama-server dies twice is refused, through the whole gateway; those beside it are answered.

A stand-in for llama-server plays it, for the real one is not known to die under anything that gets past the shield.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fake_llama import install
from tests.house import Gateway, Response, eventually, running_gateway
from tests.real.test_errors import check

pytestmark = [pytest.mark.real, pytest.mark.timeout(40)]

DEADLY = "{{fake: exit_at=0}}"
SLOWLY_DEADLY = "{{fake: prefill=0.3 exit_at=0}}"


@pytest.fixture
def mortal(tmp_path: Path, chat_model: Path) -> Iterator[Gateway]:
    fake = install(tmp_path)
    with running_gateway(tmp_path / "run", MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=str(fake)) as gateway:
        yield gateway


def ask(gateway: Gateway, prompt: str) -> Response:
    """A stream: nothing of it has gone out when the stand-in dies before its first token."""
    return gateway.request("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 3, "stream": True})


def restarts(gateway: Gateway) -> float:
    text = gateway.get("/metrics", key=None).body.decode()
    found = [line for line in text.splitlines() if line.startswith("gateway_model_restarts_total{")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


def seen(gateway: Gateway) -> list[dict[str, Any]]:
    """The POSTs that the present stand-in has got."""
    with urllib.request.urlopen(f"http://127.0.0.1:{gateway.environment['PORT_BACKEND']}/fake", timeout=5) as reply:
        requests: list[dict[str, Any]] = json.load(reply)["requests"]
    return [request for request in requests if request["method"] == "POST"]


def convicted(reply: Response) -> None:
    check(reply, 502, "backend_error")
    assert reply.headers["x-should-retry"] == "false"


def test_a_request_that_kills_is_tried_twice_and_then_refused(mortal: Gateway) -> None:
    first = mortal.model()["pid"]
    convicted(ask(mortal, DEADLY))
    eventually(lambda: mortal.model()["state"] == "ready" and mortal.model()["pid"] != first)
    assert restarts(mortal) == 2
    after = mortal.model()["pid"]
    for _ in range(3):
        convicted(ask(mortal, DEADLY))
    assert mortal.model()["pid"] == after
    assert seen(mortal) == [], "it is refused without asking"
    assert ask(mortal, "another").status == 200
    assert restarts(mortal) == 2


def test_those_that_ran_beside_it_are_answered(mortal: Gateway) -> None:
    prompts = [SLOWLY_DEADLY, *(f"{{{{fake: prefill=0.5}}}} innocent {number}" for number in range(3))]
    with ThreadPoolExecutor(len(prompts)) as pool:
        deadly, *innocent = pool.map(lambda prompt: ask(mortal, prompt), prompts)
    convicted(deadly)
    for reply in innocent:
        assert reply.status == 200, reply.body
        assert reply.body.rstrip().endswith(b"data: [DONE]")
    eventually(lambda: mortal.model()["state"] == "ready")
    died = restarts(mortal)
    for prompt in prompts[1:]:
        assert ask(mortal, prompt).status == 200, "none of them stays under suspicion"
    convicted(ask(mortal, SLOWLY_DEADLY))
    assert restarts(mortal) == died
    assert "Traceback" not in mortal.stderr
