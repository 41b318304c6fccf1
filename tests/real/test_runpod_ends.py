"""Beginnings and ends of RunPod's worker: signals, models that cannot be loaded, the entrypoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests import fake_llama
from tests.house import ROOT, eventually, free_port
from tests.runpod_kit import LONG, MESSAGES, Platform, environment, openai_job, running_worker

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]


def test_sigterm_lets_running_jobs_finish_and_takes_no_more(tmp_path: Path, slow_model: Path) -> None:
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
            told = eventually(lambda: alone.progress.get("early") or False)
    assert all(one["model"] == "b" for one in told) and "loading" in {one["state"] for one in told}


def test_an_answer_that_breaks_off_fails_the_job(tmp_path: Path, chat_model: Path) -> None:
    broken = fake_llama.install(tmp_path)
    with Platform().serving() as alone:
        variables = alone.variables() | {"MODEL_PATH": str(chat_model), "LLAMA_SERVER_PATH": str(broken)}
        with running_worker(tmp_path / "w", **variables):
            for number, command in enumerate(("error=2", "cut=2", "end=2")):
                said = [{"role": "user", "content": f"{{{{fake: {command}}}}}"}]
                for stream in (True, False):
                    alone.put(f"{number}-{stream}", openai_job(stream, messages=said, max_tokens=40))
            told = {
                job_id: alone.result(job_id, 20) for job_id in (f"{n}-{s}" for n in range(3) for s in (True, False))
            }
    assert {job_id: json.loads(done["error"])["code"] for job_id, done in told.items()} == {
        job_id: "backend_error" for job_id in told
    }


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
