"""RunPod's worker without the platform: the SDK's own test API, one job by the command line, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.house import eventually, free_port
from tests.runpod_kit import environment, openai_job, running_worker

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]


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
    ("line", "code"),
    [
        (" models=other-*", "model_not_allowed"),
        (" scope=metrics", "insufficient_scope"),
        (" budget=5/day", "insufficient_quota"),
        (":10:2020-01-01T00:00:00Z", "expired_api_key"),
    ],
)
def test_a_key_of_that_name_limits_jobs(tmp_path: Path, chat_model: Path, line: str, code: str) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"runpod:sk-runpod-0123456789abcdefghij{line}\n")
    keys.chmod(0o600)
    job = json.dumps({"input": {"input": "hi", "params": {"max_tokens": 30}}})
    done = run_once(tmp_path, chat_model, "--test_input", job, AUTH_KEYS_FILE=str(keys))
    assert done.returncode == 1, done.stdout
    assert json.loads(json.loads(done.stdout)["error"])["code"] == code


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
