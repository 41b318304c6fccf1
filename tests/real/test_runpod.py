"""RunPod's worker with its own SDK and the real llama-server: on a stand-in for the platform, and by its test API."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fake_llama
from tests.house import ROOT, eventually, free_port, running_gateway
from tests.runpod_kit import API_KEY, Platform, Worker, environment, running_worker

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]

MESSAGES = [{"role": "user", "content": "hi"}]
LONG = {"messages": MESSAGES, "params": {"max_tokens": 4000}, "stream": True}


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


def openai_job(stream: bool = False, **fields: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "stream": stream} | fields
    return {"openai_route": "/v1/chat/completions", "openai_input": body}


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
    for number, (given, code) in enumerate(
        [
            ({}, "invalid_request"),
            ({"openai_route": "/v1/files", "openai_input": {}}, "not_found"),
            (openai_job(max_tokens=-5), "invalid_request"),
            (openai_job(messages=[{"role": "user", "content": "word " * 9000}]), "context_length_exceeded"),
            (openai_job(stream=True, messages="hello"), "invalid_request"),
        ]
    ):
        done = platform.result(platform.put(f"wrong-{number}", given))
        assert set(done) == {"error"}, done
        assert json.loads(done["error"])["code"] == code


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


@pytest.mark.parametrize("held", [False, True], ids=["streaming", "while RunPod takes a part"])
def test_a_job_that_is_stopped_frees_its_slot(platform: Platform, worker: Worker, held: bool) -> None:
    job_id = f"stopped-{held}"
    if held:
        platform.hold.clear()
    try:
        platform.put(job_id, LONG)
        eventually(lambda: platform.streamed.get(job_id))
        assert running(worker) == 1
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


def test_sigterm_lets_running_jobs_finish_and_takes_no_more(
    platform: Platform, tmp_path: Path, slow_model: Path
) -> None:
    with Platform().serving() as alone:
        with running_worker(tmp_path, **alone.variables(), MODEL_PATH=str(slow_model), PARALLEL="1") as worker:
            alone.put("last", LONG | {"params": {"max_tokens": 150}})
            eventually(lambda: alone.streamed.get("last"), 20)
            worker.process.terminate()
            eventually(lambda: worker.state().get("status") == "draining")
            alone.put("too-late", LONG)
            assert worker.process.wait(15) == 0
        assert alone.done["last"]["output"][-1]["tokens_out"] == 150
        assert "too-late" not in alone.taken


def test_what_the_grace_cuts_is_told_runpod(tmp_path: Path, slow_model: Path) -> None:
    with Platform().serving() as alone:
        variables = alone.variables() | {"MODEL_PATH": str(slow_model), "SHUTDOWN_GRACE_SECONDS": "0.3"}
        with running_worker(tmp_path, **variables) as worker:
            alone.put("cut", LONG)
            alone.put("cut-whole", LONG | {"stream": False})
            eventually(lambda: alone.streamed.get("cut") and "cut-whole" in alone.taken, 20)
            assert worker.stop() == 0
        for job_id in ("cut", "cut-whole"):
            assert json.loads(alone.done[job_id]["error"])["code"] == "shutting_down"


def test_a_worker_that_can_load_nothing_ends_and_takes_no_job(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with Platform().serving() as alone:
        with running_worker(tmp_path / "w", **alone.variables(), MODEL_PATH=str(broken)) as worker:
            assert worker.process.wait(20) == 1
        assert alone.taken == []
        assert "no jobs are taken any more" in worker.stderr


def test_a_client_is_told_what_its_job_waits_for(tmp_path: Path, chat_model: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in ("a", "b"):  # of several, each is loaded when it is asked for
        shutil.copy(chat_model, models / f"{name}.gguf")
    slow_to_load = fake_llama.install(tmp_path, "load=2.5")
    with Platform().serving() as alone:
        variables = alone.variables() | {"MODELS_DIR": str(models), "LLAMA_SERVER_PATH": str(slow_to_load)}
        with running_worker(tmp_path / "w", **variables):
            alone.put("early", {"messages": MESSAGES, "model": "b", "params": {"max_tokens": 3}})
            assert alone.result("early", 20)["output"][0]["text"]
            told = eventually(lambda: alone.progress.get("early"))
    assert all(one["model"] == "b" for one in told) and "loading" in {one["state"] for one in told}


def test_a_runpod_that_is_away_is_asked_again(platform: Platform, worker: Worker) -> None:
    platform.away = True
    eventually(lambda: "RunPod does not answer" in worker.stderr, 5)
    job_id = platform.put("patient", openai_job())
    platform.away = False
    assert platform.result(job_id)["output"]


def test_a_second_signal_ends_it_at_once(tmp_path: Path, slow_model: Path) -> None:
    with Platform().serving() as alone:
        with running_worker(tmp_path, **alone.variables(), MODEL_PATH=str(slow_model)) as worker:
            alone.put("long", LONG)
            eventually(lambda: alone.streamed.get("long"), 20)
            worker.process.terminate()
            eventually(lambda: worker.state().get("status") == "draining")
            assert worker.stop() == 0


def test_the_entrypoint_runs_it_and_the_health_port_tells_its_state(tmp_path: Path, slow_model: Path) -> None:
    port = free_port()
    with Platform().serving() as alone:
        variables = alone.variables() | {"MODEL_PATH": str(slow_model), "WORKER_MODE": "runpod", "PORT": str(port)}
        around = {name: value for name, value in environment(tmp_path, variables).items() if name != "STATE_FILE"}
        with (tmp_path / "output").open("wb") as output:
            command = [str(ROOT / "entrypoint.sh")]
            process = subprocess.Popen(command, cwd=tmp_path, env=around, stdout=output, stderr=output)
        try:
            told = [eventually(lambda: ping(port))]
            alone.put("through", openai_job())
            assert alone.result("through", 20)["output"]
            told.append(ping(port))
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()
    assert told == [204, 200]


def ping(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as reply:
        return int(reply.status)


# --- the SDK's test API, and one job by the command line


def post(url: str, body: Any = None) -> Any:
    data = json.dumps(body).encode() if body is not None else b""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)


def test_the_sdks_own_test_api(tmp_path: Path, chat_model: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    api = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))
    with running_worker(tmp_path, *api, MODEL_PATH=str(chat_model)) as worker:

        def up() -> bool:
            assert worker.process.poll() is None, worker.stderr
            with urllib.request.urlopen(url + "/openapi.json", timeout=5) as reply:
                return bool(reply.status == 200)

        eventually(up, 20)
        done = post(f"{url}/runsync", {"input": openai_job()})
        assert done["status"] == "COMPLETED" and done["output"][0]["object"] == "chat.completion"
        accepted = post(f"{url}/run", {"input": openai_job(stream=True)})
        parts = post(f"{url}/stream/{accepted['id']}")["stream"]
        lines = "".join(part["output"] for part in parts)
        assert lines.count("data: ") >= 8 and lines.endswith("data: [DONE]\n\n")
        accepted = post(f"{url}/run", {"input": {"input": "hi", "params": {"max_tokens": 3}}})
        assert post(f"{url}/status/{accepted['id']}")["output"][0]["tokens_out"] == 3
        assert worker.stop() == 0


def run_once(tmp_path: Path, model: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    around = environment(tmp_path, {"MODEL_PATH": str(model)} | more)
    command = [sys.executable, "-m", "gateway", "worker", "runpod", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=around, capture_output=True, text=True, timeout=15)


def test_one_job_by_the_command_line(tmp_path: Path, chat_model: Path) -> None:
    done = run_once(tmp_path, chat_model, "--test_input", '{"input": {"input": "hi", "params": {"max_tokens": 3}}}')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"][0]["tokens_out"] == 3
    wrong = run_once(tmp_path, chat_model, "--test_input", '{"input": {}}')
    assert wrong.returncode == 1 and "nothing to answer" in json.loads(wrong.stdout)["error"]
    (tmp_path / "test_input.json").write_text(
        '{"id": "from-file", "input": {"input": "hi", "params": {"max_tokens": 2}}}'
    )
    done = run_once(tmp_path, chat_model)
    assert json.loads(done.stdout)["output"][0]["req_id"] == "from-file"


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ([], 1, "corral: RUNPOD_WEBHOOK_GET_JOB is not set: "),
        (["--test_input", "hello"], 2, "corral worker runpod: argument --test_input: must be a job, "),
        (
            ["--rp_serve_api", "--rp_api_port", "99999"],
            2,
            "corral worker runpod: argument --rp_api_port: must be a port",
        ),
        (
            ["--rp_serve_api", "--rp_api_host", "203.0.113.1"],
            1,
            "corral: --rp_api_host 203.0.113.1 --rp_api_port 8000: ",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, chat_model: Path, arguments: list[str], code: int, line: str
) -> None:
    done = run_once(tmp_path, chat_model, *arguments)
    assert done.returncode == code, done.stderr
    told = [row for row in done.stderr.splitlines() if row.startswith("corral")]
    assert len(told) == 1 and told[0].startswith(line), done.stderr


def test_a_missing_sdk_is_told_with_the_mend(tmp_path: Path, chat_model: Path) -> None:
    script = "import sys; sys.modules['runpod'] = None\nfrom gateway.cli import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "worker", "runpod", "--rp_serve_api"],
        cwd=tmp_path,
        env=environment(tmp_path, {"MODEL_PATH": str(chat_model)}),
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("corral: the runpod SDK is not installed: pip install 'corral[runpod]'")
    assert len(done.stderr.splitlines()) == 1
