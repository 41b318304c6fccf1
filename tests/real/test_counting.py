"""Long prompts are counted by the model's own tokenizer before they wait for anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.house import ADMIN, USER, Gateway, eventually, running_gateway
from tests.real.scrape import Growth
from tests.real.wire import request, wire

pytestmark = pytest.mark.real

METERED = "sk-metered-0123456789abcdefghijABCDEFGHIJ"
CTX = 4096


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("counting")
    keys = [f"admin:{ADMIN}:0 scope=admin", f"user:{USER}:0", f"metered:{METERED}:0 tpm=30000"]
    (folder / "api_keys.txt").write_text("\n".join(keys) + "\n")
    with running_gateway(folder, MODEL_PATH=str(slow_model), PARALLEL="1", CTX=str(CTX)) as running:
        yield running


def test_what_cannot_fit_is_told_before_it_waits(gateway: Gateway) -> None:
    """The only place is taken for long, and still the answer comes at once; it costs no request."""
    busy = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 3000, "stream": True}
    growth = Growth(gateway)
    with wire(gateway) as other:
        other.send(request("POST", "/v1/chat/completions", busy))
        other.first_bytes()
        for stream in (False, True):
            answer = gateway.chat("x" * 20_000, stream=stream, key=METERED, seconds=5)
            assert answer.status == 400
            error = answer.json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert "20001 tokens" in error["message"] or "20000 tokens" in error["message"]
        assert growth.of("gateway_queue_wait_seconds_count") == 1, "only the one that runs had a place"
        raw = gateway.request("POST", "/completion", {"prompt": "x" * 300_000}, seconds=5)
        assert (raw.status, raw.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "at least" in raw.json()["error"]["message"]


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path, chat_model: Path) -> None:
    """Of this model's a byte makes one; an estimate reckons with a fourth of that."""
    (tmp_path / "api_keys.txt").write_text(f"metered:{METERED}:0 tpm=10000\n")
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), PARALLEL="1", CTX="32768") as roomy:
        answer = roomy.chat("x" * 17_000, max_tokens=1, key=METERED)
    assert (answer.status, answer.json()["error"]["code"]) == (429, "tokens_exceeded")
    told = re.search(r"may use (\d+) tokens", answer.json()["error"]["message"])
    assert told is not None
    assert abs(int(told[1]) - 17_000) < 50


def test_many_long_ones_at_once(gateway: Gateway) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: gateway.chat("x" * 50_000), range(16)))
    assert {answer.status for answer in answers} == {400}
    eventually(lambda: gateway.slots_busy() == 0)


def test_a_server_that_shifts_is_left_to_decide(tmp_path: Path, chat_model: Path) -> None:
    models = {"tiny": {"model_path": str(chat_model), "flags": ["--ctx-size", "4096", "--context-shift"]}}
    (tmp_path / "config.json").write_text(json.dumps({"models": models}))
    with running_gateway(tmp_path, CONFIG_PATH=str(tmp_path / "config.json")) as shifting:
        direct = shifting.request("POST", "/completion", {"prompt": "x" * 20_000, "n_predict": 1})
        assert "about" not in direct.body.decode()
