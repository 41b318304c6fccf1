"""A herd whose configuration changes under it, whose models never get ready, and which ends at a bad moment."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fake_llama import install
from tests.house import ADMIN, FAKE_LLAMA, Gateway, Response, alive, eventually, free_port, llama_server
from tests.real.herd import CHAT, ask, children, herd, make_models, rows, stage, states, text_of, until, write_models
from tests.real.wire import Wire, chat, request, wire

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("herd")
    make_models(folder, 3)
    return folder


def post(gateway: Gateway, path: str, **body: Any) -> Response:
    return gateway.request("POST", path, body, key=ADMIN)


def reload(gateway: Gateway) -> Any:
    return post(gateway, "/reload").json()


def fake(folder: Path, commands: str = "") -> dict[str, Any]:
    """A model that the fake serves."""
    model = folder / "x.gguf"
    model.write_bytes(b"not looked at")
    return {"model_path": str(model), "env": {"FAKE_LLAMA": commands}}


def real(folder: Path, number: int, **more: Any) -> dict[str, Any]:
    return {"model_path": str(folder / f"m{number}.gguf")} | more


@contextlib.contextmanager
def streaming(gateway: Gateway, model: str, tokens: int = 60) -> Iterator[Wire]:
    """A stream of a second and more, whose first bytes have come."""
    with wire(gateway) as client:
        turns = [{"role": "user", "content": f"{{{{fake: tokens={tokens} interval=0.02}}}}"}]
        client.send(request("POST", CHAT, chat(messages=turns, model=model, stream=True, max_tokens=tokens)))
        client.first_bytes()
        yield client


# --- never ready


@pytest.fixture(scope="module")
def stuck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    tmp_path = tmp_path_factory.mktemp("stuck")
    models = {"never": fake(tmp_path, "load=never"), "good": fake(tmp_path), "bad": fake(tmp_path, "exit=1")}
    with herd(tmp_path, models, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
        yield gateway


def test_one_that_is_never_ready_bothers_nobody(stuck: Gateway) -> None:
    post(stuck, "/v1/models/load", model="never")
    until(stuck, "never", "loading")
    for _ in range(20):
        assert ask(stuck, "good").status == 200
    assert post(stuck, "/v1/models/eject", model="good").status == 200
    assert ask(stuck, "good").status == 200, "nor does it hold up a load"
    reply = ask(stuck, "never", headers={"X-Request-Timeout": "0.3"})
    assert (reply.status, reply.json()["error"]["code"]) == (503, "model_loading")


@pytest.mark.parametrize("force", [False, True])
def test_a_load_that_nobody_waits_for_ends_when_it_is_ejected(stuck: Gateway, force: bool) -> None:
    post(stuck, "/v1/models/load", model="never")
    pid = until(stuck, "never", "loading")["pid"]
    assert post(stuck, "/v1/models/eject", model="never", force=force).status == 200
    assert states(stuck)["never"] == "off" and not alive(pid)
    assert rows(stuck)["never"]["pid"] is rows(stuck)["never"]["port"] is None


def test_a_load_that_somebody_waits_for_is_ejected_when_they_have_left(stuck: Gateway) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, stuck, "never", headers={"X-Request-Timeout": "1"})
        pid = until(stuck, "never", "loading")["pid"]
        assert post(stuck, "/v1/models/eject", model="never").status == 200
        assert not alive(pid) and states(stuck)["never"] == "off"
        assert waiting.result().status == 503


def test_by_force_it_ends_at_once_and_who_waits_goes_on_with_the_next_load(stuck: Gateway) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, stuck, "never", headers={"X-Request-Timeout": "2"})
        pid = until(stuck, "never", "loading")["pid"]
        assert post(stuck, "/v1/models/eject", model="never", force=True).status == 200
        assert not alive(pid)
        again = eventually(lambda: (row := rows(stuck)["never"])["pid"] not in (None, pid) and row)
        assert again["state"] == "loading" and not waiting.done()
        assert waiting.result().json()["error"]["code"] == "model_loading"
    post(stuck, "/v1/models/eject", model="never", force=True)


def test_one_that_waits_for_its_next_try_is_ejected_for_good(stuck: Gateway) -> None:
    post(stuck, "/v1/models/load", model="bad")
    until(stuck, "bad", "crashed")
    assert post(stuck, "/v1/models/eject", model="bad").status == 200
    assert states(stuck)["bad"] == "off"
    before = stuck.stderr.count("model.loading bad")
    assert ask(stuck, "good").status == 200
    time.sleep(0.8)  # the wait is 0.5 s: nothing tells that nothing happens
    assert states(stuck)["bad"] == "off" and stuck.stderr.count("model.loading bad") == before


def test_what_has_failed_is_tried_again_after_a_reset_and_after_a_change(tmp_path: Path) -> None:
    models = {"x": fake(tmp_path, "exit=1"), "y": fake(tmp_path)}
    with herd(tmp_path, models, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
        assert ask(gateway, "x").json()["error"]["code"] == "model_failed"
        assert states(gateway)["x"] == "failed"
        assert post(gateway, "/v1/models/x/reset").json()["status"] == "off"
        assert ask(gateway, "x").json()["error"]["code"] == "model_failed"
        write_models(tmp_path, {"x": fake(tmp_path), "y": fake(tmp_path)})
        assert reload(gateway)["models"]["changed"] == ["x"]
        assert states(gateway)["x"] == "off"
        assert ask(gateway, "x").status == 200


# --- another configuration


def test_a_model_that_is_changed_while_it_streams(tmp_path: Path) -> None:
    with herd(tmp_path, {"x": fake(tmp_path)}, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
        with streaming(gateway, "x") as client:
            first = rows(gateway)["x"]["pid"]
            write_models(tmp_path, {"x": fake(tmp_path, "say=new")})
            assert reload(gateway)["models"]["changed"] == ["x"]
            assert rows(gateway)["x"]["pid"] == first
            assert client.answer().whole, "what runs comes to its end"
        eventually(lambda: (row := rows(gateway)["x"])["state"] == "ready" and row["pid"] != first)
        assert not alive(first)
        assert text_of(ask(gateway, "x")).startswith("new ")


def test_one_that_is_changed_while_it_loads_starts_anew(tmp_path: Path) -> None:
    with herd(tmp_path, {"x": fake(tmp_path, "load=never")}, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, gateway, "x", headers={"X-Request-Timeout": "0.5"})
            first = until(gateway, "x", "loading")["pid"]
            write_models(tmp_path, {"x": fake(tmp_path, "say=new")})
            assert reload(gateway)["models"]["changed"] == ["x"]
            assert asked.result().status == 503
        post(gateway, "/v1/models/eject", model="x", force=True)
        assert not alive(first)
        assert text_of(ask(gateway, "x")).startswith("new ")


def test_one_that_comes_back_while_it_drains_has_never_been_away(tmp_path: Path) -> None:
    both = {"x": fake(tmp_path), "y": fake(tmp_path)}
    with herd(tmp_path, both, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
        with streaming(gateway, "x") as client:
            pid = rows(gateway)["x"]["pid"]
            for _ in range(3):
                write_models(tmp_path, {"y": both["y"]})
                assert reload(gateway)["models"]["removed"] == ["x"]
                assert ask(gateway, "x").status == 404
                write_models(tmp_path, both)
                assert reload(gateway)["models"]["added"] == []
                assert ask(gateway, "x").status == 200
            assert client.answer().whole
        assert ask(gateway, "x").status == 200 and rows(gateway)["x"]["pid"] == pid
        write_models(tmp_path, {"y": both["y"]})
        reload(gateway)
        eventually(lambda: "x" not in rows(gateway))
        assert not alive(pid)


def test_one_that_comes_back_while_its_process_ends(tmp_path: Path, folder: Path) -> None:
    slow_end = f"""
if [ "$model" = x ] && [ -z "$glance" ]; then
  trap 'wait $child; sleep 1; exit 0' TERM
  {llama_server()} "$@" & child=$!
  wait $child
fi"""
    staged = stage(tmp_path, llama_server(), slow_end)
    both = {"x": real(folder, 0), "y": real(folder, 1)}
    with herd(tmp_path, both, LLAMA_SERVER_PATH=str(staged.path)) as gateway:
        assert ask(gateway, "x").status == 200
        pid = rows(gateway)["x"]["pid"]
        write_models(tmp_path, {"y": both["y"]})
        reload(gateway)
        write_models(tmp_path, both)
        assert reload(gateway)["models"]["added"] == ["x"]
        assert ask(gateway, "x").status == ask(gateway, "y").status == 200
        assert rows(gateway)["x"]["pid"] != pid and not alive(pid)
        assert gateway.get("/v1/queue/stats").json()["per_model"].keys() == {"x", "y"}
        assert "Traceback" not in gateway.stderr


def test_from_one_model_to_several_and_back(tmp_path: Path, folder: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(folder / "m0.gguf", models)
    with herd(tmp_path, models) as gateway:
        assert ask(gateway, "anything").status == 200, "a single model has every name"
        pid = rows(gateway)["m0"]["pid"]
        shutil.copy(folder / "m1.gguf", models)
        assert reload(gateway)["models"]["added"] == ["m1"]
        assert ask(gateway, "anything").status == 404
        assert ask(gateway, "m0").status == ask(gateway, "m1").status == 200
        assert rows(gateway)["m0"]["pid"] == pid
        post(gateway, "/v1/models/eject", model="m0")
        assert gateway.get("/readyz", key=None).status == 200
        (models / "m0.gguf").unlink()
        assert reload(gateway)["models"]["removed"] == ["m0"]
        assert ask(gateway, "anything").json()["model"] == "m1"
        eventually(lambda: states(gateway) == {"m1": "ready"})
        assert gateway.get("/health", key=None).json()["status"] == "ok"
        assert "Traceback" not in gateway.stderr


@contextlib.contextmanager
def foreign(folder: Path, say: str) -> Iterator[str]:
    """The address of a llama-server that is not the gateway's."""
    port = free_port()
    command = [str(FAKE_LLAMA), "--port", str(port), "--alias", "x"]
    process = subprocess.Popen(command, env={"PATH": "/usr/bin:/bin", "FAKE_LLAMA": f"say={say}"}, stderr=-3)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_a_model_that_moves_to_another_machine_and_back(tmp_path: Path) -> None:
    def said(gateway: Gateway) -> str:
        return text_of(ask(gateway, "x")).split()[0]

    with foreign(tmp_path, "first") as first, foreign(tmp_path, "second") as second:
        models = {"x": fake(tmp_path, "say=here"), "y": fake(tmp_path)}
        with herd(tmp_path, models, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
            assert said(gateway) == "here"
            pid = rows(gateway)["x"]["pid"]
            for url, word in ((first, "first"), (second, "second")):
                write_models(tmp_path, {"x": {"url": url}, "y": models["y"]})
                assert reload(gateway)["models"]["changed"] == ["x"]
                eventually(lambda word=word: said(gateway) == word)  # type: ignore[misc]
            eventually(lambda: not alive(pid))
            eventually(lambda: gateway.get("/vram", key=ADMIN).json()["used_est_mb"] == 0)
            write_models(tmp_path, models)
            assert reload(gateway)["models"]["changed"] == ["x"]
            eventually(lambda: said(gateway) == "here")
            assert "Traceback" not in gateway.stderr


def test_what_a_reload_cannot_change_is_told(tmp_path: Path, folder: Path) -> None:
    models = {"x": real(folder, 0)}
    with herd(tmp_path, models) as gateway:
        assert reload(gateway)["restart_needed"] == []
        (tmp_path / ".env").write_text("MAX_QUEUE_SIZE=5\nAPI_KEY=sk-secret-0123456789abcdef\nDEFAULT_MODEL=x\n")
        write_models(tmp_path, models | {"y": real(folder, 1)}, {"vram_budget_mb": 5000})
        report = reload(gateway)
        assert report["models"]["added"] == ["y"]
        assert sorted(report["restart_needed"]) == ["API_KEY", "MAX_QUEUE_SIZE", "VRAM_BUDGET_MB"]
        eventually(lambda: "need a restart: " in gateway.stderr)
        assert "sk-secret" not in json.dumps(report) + gateway.stderr
        assert gateway.chat().json()["model"] == "x", "the default model is in force at once"


def test_many_reloads_at_once(tmp_path: Path, folder: Path) -> None:
    one, two = {"a": real(folder, 0)}, {"a": real(folder, 0), "b": real(folder, 1)}
    with herd(tmp_path, one) as gateway, ThreadPoolExecutor(4) as pool:
        assert ask(gateway, "a").status == 200
        pid = rows(gateway)["a"]["pid"]
        answers = []
        for number in range(12):
            write_models(tmp_path, two if number % 2 else one)
            gateway.process.send_signal(signal.SIGHUP)
            gateway.process.send_signal(signal.SIGHUP)
            answers.append(pool.submit(reload, gateway))
        write_models(tmp_path, two)
        assert reload(gateway)["models"]["problems"] == []
        assert all(answer.result() for answer in answers)
        assert ask(gateway, "b").status == 200, "the last one has the last word"
        assert rows(gateway)["a"]["pid"] == pid
        eventually(lambda: rows(gateway).keys() == {"a", "b"})
        assert "Traceback" not in gateway.stderr


# --- keys


def test_commands_of_a_key_that_may_use_some_models_alone(tmp_path: Path, folder: Path) -> None:
    some = "sk-some-0123456789abcdefghijABCDEFGHIJ"
    keys = tmp_path / "api_keys.txt"
    keys.write_text(f"admin:{ADMIN} scope=infer,admin\nsome:{some} scope=infer,admin models=a\n")
    keys.chmod(0o600)
    with herd(tmp_path, {"a": real(folder, 0), "b": real(folder, 1)}) as gateway:
        for path in ("/v1/plan", "/v1/models/load", "/v1/models/eject"):
            refused = gateway.request("POST", path, {"model": "b"}, key=some)
            assert (refused.status, refused.json()["error"]["code"]) == (404, "model_not_found"), path
            assert "'b'" in refused.json()["error"]["message"] and "there are: a" in refused.json()["error"]["message"]
            assert gateway.request("POST", path, {"model": "a"}, key=some).status in (200, 202), path
        assert gateway.request("POST", "/v1/models/b/reset", key=some).status == 404
        assert states(gateway)["b"] == "off"
        ask(gateway, "b", key=ADMIN)
        assert [row["id"] for row in gateway.get("/vram", key=some).json()["models"]] == ["a"]
        assert gateway.get("/upstream/b/props", key=ADMIN).status == 200
        foreign = gateway.get("/upstream/b/props", key=some)
        assert foreign.status == 404 and foreign.json()["error"]["message"].endswith("there are: a")


def test_a_plan_names_no_model_that_the_key_may_not_use(tmp_path: Path, folder: Path) -> None:
    some = "sk-some-0123456789abcdefghijABCDEFGHIJ"
    keys = tmp_path / "api_keys.txt"
    keys.write_text(f"admin:{ADMIN} scope=infer,admin\nsome:{some} scope=infer,admin models=a\n")
    keys.chmod(0o600)
    models = {"a": real(folder, 0), "secret": real(folder, 1, pinned=True), "gone": {"model_path": "gone.gguf"}}
    with herd(tmp_path, models, {"max_concurrent_models": 1}) as gateway:

        def plan(model: str, key: str) -> dict[str, Any]:
            found: dict[str, Any] = gateway.request("POST", "/v1/plan", {"model": model}, key=key).json()
            return found

        ask(gateway, "secret", key=ADMIN)
        reason = "a cannot be loaded: max_concurrent_models is 1, and secret cannot go"
        told = plan("a", ADMIN)
        assert (told["fits"], told["blocked_by"], told["reason"]) == (False, ["secret"], reason)
        told = plan("a", some)
        assert (told["fits"], told["blocked_by"]) == (False, [])
        assert told["reason"] == reason.replace("secret", "another model")
        told = plan("gone", ADMIN)
        assert (told["fits"], told["evict"], told["blocked_by"]) == (False, [], [])
        assert "gone.gguf" in told["reason"]
        assert ask(gateway, "gone", key=ADMIN).status == 503
        ejected = gateway.request("POST", "/v1/models/eject", {"model": "gone"}, key=ADMIN)
        assert (ejected.status, ejected.json()["status"]) == (200, states(gateway)["gone"]) == (200, "failed")


# --- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["waits", "loads"])
def test_the_end_leaves_no_process(tmp_path: Path, when: str, number: signal.Signals) -> None:
    models = {"x": fake(tmp_path), "never": fake(tmp_path, "load=never")}
    system = {"max_concurrent_models": 1 if when == "waits" else 2}
    with (
        herd(
            tmp_path, models, system, LLAMA_SERVER_PATH=str(install(tmp_path)), SHUTDOWN_GRACE_SECONDS="0.3"
        ) as gateway,
        ThreadPoolExecutor(1) as pool,
        streaming(gateway, "x", tokens=400),
    ):
        asked = pool.submit(ask, gateway, "never")
        looks: dict[str, Callable[[], bool]] = {
            "waits": lambda: "until x is idle" in str(gateway.get("/vram", key=ADMIN).json()["models"]),
            "loads": lambda: states(gateway)["never"] == "loading",
        }
        eventually(looks[when])
        family = children(gateway)
        assert len(family) == (1 if when == "waits" else 2)
        begun = time.monotonic()
        assert gateway.stop(number) == 0
        assert time.monotonic() - begun < 5
        assert asked.result().json()["error"]["code"] == "shutting_down"
        assert not any(alive(pid) for pid in family)
        assert "Traceback" not in gateway.stderr
