"""RunPod's worker with its own SDK and the real llama-server: on a stand-in for the platform."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import eventually, running_gateway
from tests.runpod_kit import API_KEY, LONG, MESSAGES, Platform, Worker, openai_job, running_worker

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform().serving() as running:
        yield running


@pytest.fixture(scope="module")
def worker(platform: Platform, tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("worker")
    variables = platform.variables() | {"MODEL_PATH": str(slow_model), "PARALLEL": "2"}
    with running_worker(folder, **variables, LOG_LEVEL="debug") as running:
        eventually(lambda: platform.keys)
        yield running


def recorded(folder: Path, request_id: str) -> dict[str, Any]:
    """The request's record, as soon as it is written."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'corral.sqlite'}?mode=ro", uri=True)) as base:
        base.row_factory = sqlite3.Row
        asked = "select * from requests where request_id = ?"
        return dict(eventually(lambda: base.execute(asked, (request_id,)).fetchone() or False))


def test_a_whole_answer_is_the_routes_own(platform: Platform, worker: Worker) -> None:
    (output,) = platform.result(platform.put("whole", openai_job()))["output"]
    assert output["object"] == "chat.completion" and output["usage"]["completion_tokens"] == 6
    assert platform.keys == {API_KEY}


def test_a_stream_comes_as_the_routes_own_lines(platform: Platform, worker: Worker) -> None:
    done = platform.result(platform.put("stream", openai_job(stream=True)))
    lines = "".join(platform.streamed["stream"])
    assert done["output"] == platform.streamed["stream"], "/runsync and /status have the whole of it"
    events = [line.removeprefix("data: ") for line in lines.split("\n\n") if line]
    assert events[-1] == "[DONE]" and len(events) >= 8
    (whole,) = platform.result(platform.put("the-same", openai_job()))["output"]
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "given",
    [
        {"messages": MESSAGES, "params": {"max_tokens": 5}},
        {"messages": MESSAGES, "sampling_params": {"max_tokens": 5, "repetition_penalty": 1.1}},
        {"input": "hi", "params": {"max_tokens": 5}},
        {"prompt": "hi", "sampling_params": {"max_tokens": 5}, "apply_chat_template": True},
    ],
)
def test_plain_jobs(platform: Platform, worker: Worker, given: dict[str, Any]) -> None:
    job_id = platform.put(f"plain-{len(platform.done)}", given)
    (output,) = platform.result(job_id)["output"]
    assert output["req_id"] == job_id and output["tokens_out"] == 5 and output["ms"] > 0
    assert output["choices"][0]["tokens"] == [output["text"]] and output["text"]
    assert output["usage"] == {"input": output["tokens_in"], "output": 5}
    streamed = platform.put(f"{job_id}-stream", given | {"stream": True})
    *parts, last = platform.result(streamed)["output"]
    assert "".join(part["token"] for part in parts) == last["text"]
    assert sum(len(part["choices"][0]["tokens"]) for part in parts) == 5


def test_a_prompt_in_vllms_form_is_continued_as_it_stands(platform: Platform, worker: Worker) -> None:
    raw = platform.result(platform.put("raw", {"prompt": "hi", "sampling_params": {"max_tokens": 2}}))
    templated = platform.result(platform.put("templated", {"prompt": "hi", "params": {"max_tokens": 2}}))
    assert raw["output"][0]["tokens_in"] < templated["output"][0]["tokens_in"]


def test_what_goes_wrong_fails_the_job_with_the_errors_fields(platform: Platform, worker: Worker) -> None:
    chat = "/v1/chat/completions"
    for number, (given, code, route) in enumerate(
        [
            ({}, "invalid_request", ""),
            ({"openai_route": "/v1/files", "openai_input": {}}, "not_found", ""),
            ({"openai_route": chat, "openai_input": 5}, "invalid_request", chat),
            ({"input": 5}, "invalid_request", "/v1/completions"),
            (openai_job(max_tokens=-5), "invalid_request", chat),
            (openai_job(messages=[{"role": "user", "content": "word " * 9000}]), "context_length_exceeded", chat),
            (openai_job(stream=True, messages="hello"), "invalid_request", chat),
        ]
    ):
        done = platform.result(platform.put(f"wrong-{number}", given))
        assert set(done) == {"error"}, done
        assert json.loads(done["error"])["code"] == code
        record = recorded(worker.data_dir, f"wrong-{number}")
        about = (record["error"], record["transport"], record["key_id"], record["route"])
        assert about == (code, "runpod", "runpod", route)


def test_the_models_are_listed(platform: Platform, worker: Worker) -> None:
    (output,) = platform.result(platform.put("models", {"openai_route": "/v1/models", "openai_input": None}))["output"]
    assert [(row["id"], row["status"]) for row in output["data"]] == [("slow", "ready")]


def test_as_many_jobs_at_once_as_there_are_places(platform: Platform, worker: Worker) -> None:
    for number in range(6):
        platform.put(f"many-{number}", openai_job(max_tokens=60))
    for number in range(6):
        assert "output" in platform.result(f"many-{number}")
    assert platform.most_at_once == 2


def running(worker: Worker) -> int:
    """Of llama-server itself: its slots at work. The worker has no door, so its child is asked by what /proc tells."""
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
    for child in children:
        entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        key = next((entry[14:].decode() for entry in entries if entry.startswith(b"LLAMA_API_KEY=")), None)
        if key is not None:
            argv = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            port = argv[argv.index("--port") + 1]
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/slots", headers={"Authorization": f"Bearer {key}"})
            with urllib.request.urlopen(asked, timeout=5) as reply:
                return sum(slot["is_processing"] for slot in json.load(reply))
    raise AssertionError("no llama-server")


@pytest.mark.parametrize("how", ["streaming", "whole", "while RunPod takes a part"])
def test_a_job_that_is_stopped_frees_its_slot(platform: Platform, worker: Worker, how: str) -> None:
    job_id = f"stopped-{how.split()[0]}"
    if how.startswith("while"):
        platform.hold.clear()
    try:
        platform.put(job_id, LONG | {"stream": how != "whole"})
        eventually(lambda: running(worker) == 1)
        eventually(lambda: how == "whole" or platform.streamed.get(job_id))
        platform.stops.put(job_id)
        eventually(lambda: running(worker) == 0, 5)
    finally:
        platform.hold.set()
    assert job_id not in platform.done
    assert recorded(worker.data_dir, job_id)["status"] == 499


def test_heartbeats_tell_which_jobs_run(platform: Platform, worker: Worker) -> None:
    platform.put("heard", LONG)
    eventually(lambda: any(ping.get("job_id") == ["heard"] for ping in platform.pings))
    platform.stops.put("heard")
    eventually(lambda: running(worker) == 0, 5)


def test_no_log_has_prompts_answers_or_keys(platform: Platform, worker: Worker) -> None:
    secret = "the quick brown fox"
    platform.result(platform.put("quiet", openai_job(messages=[{"role": "user", "content": secret}])))
    eventually(lambda: "request_id=quiet" in worker.stderr)
    said = worker.stderr + worker.stdout
    assert secret not in said and API_KEY not in said and "chat.completion" not in said


def test_its_records_are_those_of_http_in_everything_but_the_transport(
    platform: Platform, worker: Worker, slow_model: Path, tmp_path: Path
) -> None:
    platform.result(platform.put("twin", openai_job()))
    mine = recorded(worker.data_dir, "twin")
    with running_gateway(tmp_path, MODEL_PATH=str(slow_model), PARALLEL="2") as gateway:
        body = openai_job()["openai_input"]
        gateway.request("POST", "/v1/chat/completions", body, headers={"x-request-id": "twin"})
        other = recorded(gateway.data_dir, "twin")
    assert (mine["transport"], mine["key_id"]) == ("runpod", "runpod")
    differ = {name for name in mine if mine[name] != other[name]}
    measured = {"id", "ts", "trace_id", "queue_ms", "load_ms", "ttft_ms", "duration_ms", "tokens_cached"}
    assert differ <= measured | {"key_id", "transport"}


def test_a_runpod_that_is_away_is_asked_again(platform: Platform, worker: Worker) -> None:
    platform.away = True
    eventually(lambda: "RunPod does not answer" in worker.stderr, 5)
    job_id = platform.put("patient", openai_job())
    platform.away = False
    assert platform.result(job_id)["output"]
