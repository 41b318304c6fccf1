"""RunPod's jobs meet limits and the response cache, as requests do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.house import eventually
from tests.real.test_runpod import recorded
from tests.runpod_kit import MESSAGES, Platform, openai_job, running_worker

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]


def test_a_limit_that_is_reached_fails_the_job(tmp_path: Path, chat_model: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("runpod:sk-runpod-0123456789abcdefghij:2\n")
    keys.chmod(0o600)
    about = {"MODEL_PATH": str(chat_model), "AUTH_KEYS_FILE": str(keys)}
    with (
        Platform().serving() as platform,
        running_worker(tmp_path / "worker", **platform.variables(), **about) as worker,
    ):
        eventually(lambda: platform.keys, 20)
        for number in range(2):
            assert "output" in platform.result(platform.put(f"within-{number}", openai_job()))
        for number, job in enumerate((openai_job(), openai_job(stream=True), {"input": "hi"})):
            done = platform.result(platform.put(f"over-{number}", job))
            assert set(done) == {"error"} and json.loads(done["error"])["code"] == "rate_limit_exceeded"
        row = recorded(worker.data_dir, "over-0")
        assert (row["status"], row["key_id"], row["route"]) == (429, "runpod", "/v1/chat/completions")


PLAIN = {"messages": MESSAGES, "params": {"max_tokens": 6, "temperature": 0}}


@pytest.fixture(scope="module")
def caching(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Any:
    folder = tmp_path_factory.mktemp("caching")
    with Platform().serving() as platform:
        about = platform.variables() | {"MODEL_PATH": str(chat_model), "CACHE_ENABLED": "true"}
        with running_worker(folder, **about) as worker:
            eventually(lambda: platform.keys, 20)
            yield platform, worker


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["plain", "openai"])
def test_the_second_job_is_a_hit(caching: Any, form: str, stream: bool) -> None:
    platform, worker = caching
    job = PLAIN | {"stream": stream} if form == "plain" else openai_job(stream=stream, seed=1)
    names = [f"{form}-{stream}-{number}" for number in range(2)]
    first, again = [platform.result(platform.put(name, job))["output"] for name in names]
    assert text_of(first) == text_of(again) != ""
    rows = [recorded(worker.data_dir, name) for name in names]
    assert [(row["cache"], row["tokens_out"], row["transport"]) for row in rows] == [
        ("miss", 6, "runpod"),
        ("hit", 0, "runpod"),
    ]
    if form == "plain":
        assert [output[-1]["tokens_out"] for output in (first, again)] == [6, 6]
        assert [output[-1]["req_id"] for output in (first, again)] == names


def text_of(output: list[Any]) -> str:
    """Of either form, streamed or whole."""
    if isinstance(output[0], str):
        lines = [line.removeprefix("data: ") for line in "".join(output).split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1])
    last = output[-1]
    return str(last["text"] if "text" in last else last["choices"][0]["message"]["content"])
