"""Models that cannot be loaded as things lie: they have failed from the start, and can be used when that is mended."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fake_llama import install
from tests.house import ADMIN, Gateway, eventually, free_port, running_gateway
from tests.real.herd import ask, herd, make_models, states, write_models

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


def post(gateway: Gateway, path: str) -> Any:
    return gateway.request("POST", path, {}, key=ADMIN).json()


def reason(gateway: Gateway, model: str) -> str:
    return str(gateway.get("/v1/models/failed").json()["failed"][model]["error_message"])


def fake(folder: Path, name: str) -> dict[str, Any]:
    """A model that the fake serves, whose file may not be there."""
    return {"model_path": str(folder / f"{name}.gguf")}


@pytest.fixture
def late(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.gguf").write_bytes(b"not looked at")
    models = {name: fake(tmp_path, name) for name in ("there", "late")}
    return models | {"folder": {"model_path": str(tmp_path / "empty")}}


def test_it_has_failed_before_anybody_asks_for_it(tmp_path: Path, late: dict[str, Any]) -> None:
    far = {"far": {"url": f"http://127.0.0.1:{free_port()}", "api_key_env": "KEY_OF_FAR"}}
    server = str(install(tmp_path))
    with herd(tmp_path, late | far, {"preload_models": ["late", "there"]}, LLAMA_SERVER_PATH=server) as gateway:
        assert states(gateway) == {"there": "ready", "late": "failed", "folder": "failed", "far": "failed"}
        assert reason(gateway, "late") == f"model_path {tmp_path}/late.gguf: no such file"
        assert reason(gateway, "folder").endswith("the folder must hold exactly one model; it holds: none")
        assert reason(gateway, "far") == "api_key_env KEY_OF_FAR: that variable is not set"
        assert ask(gateway, "late").json()["error"]["code"] == "model_failed"


def test_a_reset_looks_again(tmp_path: Path, late: dict[str, Any]) -> None:
    port = free_port()
    far = {"far": {"url": f"http://127.0.0.1:{port}", "api_key_env": "KEY_OF_FAR"}}
    with herd(tmp_path, late | far, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
        for model in ("late", "folder", "far"):
            post(gateway, f"/v1/models/{model}/reset")
            assert ask(gateway, model).json()["error"]["code"] == "model_failed", "nothing was mended"
        shutil.copy(tmp_path / "there.gguf", tmp_path / "empty" / "x.gguf")
        (tmp_path / ".env").write_text("KEY_OF_FAR=0123456789abcdef\n")
        assert ask(gateway, "folder").json()["error"]["code"] == "model_failed", "nobody has said that it is mended"
        for model in ("folder", "far"):
            post(gateway, f"/v1/models/{model}/reset")
        assert ask(gateway, "folder").status == 200
        eventually(lambda: states(gateway)["far"] == "loading")  # nobody listens at that port


def test_a_file_that_has_come_is_used_by_the_next_request(tmp_path: Path, late: dict[str, Any]) -> None:
    with herd(tmp_path, late, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
        shutil.copy(tmp_path / "there.gguf", tmp_path / "late.gguf")
        assert ask(gateway, "late").status == 200


def test_a_reload_looks_again_both_ways(tmp_path: Path, late: dict[str, Any]) -> None:
    with herd(tmp_path, late, LLAMA_SERVER_PATH=str(install(tmp_path))) as gateway:
        (tmp_path / "there.gguf").rename(tmp_path / "late.gguf")
        assert post(gateway, "/reload")["models"]["changed"] == ["there", "late"]
        eventually(lambda: states(gateway) == {"there": "failed", "late": "off", "folder": "failed"})


def test_what_a_reload_brings_is_preloaded_where_all_that_fits_is(tmp_path: Path) -> None:
    ids = make_models(tmp_path, 4)
    models = {name: {"model_path": str(tmp_path / f"{name}.gguf")} for name in ids}
    system = {"preload_models": ["*"], "max_concurrent_models": 2}
    with herd(tmp_path, {"m0": models["m0"]} | {"lost": fake(tmp_path, "lost")}, system) as gateway:
        assert states(gateway) == {"m0": "ready", "lost": "failed"}
        write_models(tmp_path, models, system)
        post(gateway, "/reload")
        eventually(lambda: states(gateway) == {"m0": "ready", "m1": "ready", "m2": "off", "m3": "off"})


def test_one_model_that_cannot_fit_is_refused_as_such(tmp_path: Path, chat_model: Path) -> None:
    about = {"MODEL_PATH": str(chat_model), "VRAM_BUDGET_MB": "8", "VRAM_MARGIN_MB": "0"}
    with running_gateway(tmp_path, about, ready=False) as gateway:
        eventually(lambda: gateway.get("/health", key=None).json()["state"] == "failed")
        refused = gateway.chat()
        assert (refused.status, refused.json()["error"]["code"]) == (503, "insufficient_memory")
        assert " of the 8 MiB that models may use" in refused.json()["error"]["message"]


def test_a_reload_without_the_key_file_changes_nothing(tmp_path: Path, chat_model: Path) -> None:
    key, port = tmp_path / "key", free_port()
    (tmp_path / "run").mkdir()
    config = tmp_path / "run" / ".env"
    config.write_text(f"MODEL_PATH={chat_model}\n")
    models = {"unused": {"model_path": str(chat_model)}}
    with herd(tmp_path / "run", models, LLAMA_API_KEY_FILE=str(key)) as gateway:
        config.write_text(f"LLAMA_URL=http://127.0.0.1:{port}\n")
        answer = post(gateway, "/reload")
        assert answer["models"]["problems"] == [f"LLAMA_API_KEY_FILE='{key}': No such file or directory"]
        assert gateway.chat().status == 200
        key.write_text("0123456789abcdef\n")
        assert post(gateway, "/reload")["models"]["added"] == ["default"]
