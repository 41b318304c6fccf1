"""No secret shows anywhere: process list, logs, output, health, status, metrics, error messages, DEBUG_SHELL."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.house import ADMIN, USER, Gateway, eventually, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

ENV_KEY = "sk-env-SECRET0123456789abcdefghijklmnop"
WRONG_KEY = "sk-wrong-SECRET9876543210abcdefghijklmno"
URL_PASSWORD = "SECRETpasswordOfAnUrl"


def boot_key(pid: int) -> str:
    """The key that the gateway made for this llama-server, where only root and its owner can read it."""
    for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if item.startswith(b"LLAMA_API_KEY="):
            return item.partition(b"=")[2].decode()
    raise AssertionError("llama-server got no key")


def everything_shown(gateway: Gateway) -> dict[str, str]:
    shown = {"stdout": gateway.stdout, "stderr": gateway.stderr}
    for path in (gateway.data_dir / "logs").rglob("*"):
        if path.is_file():
            shown[path.name] = path.read_text(errors="replace")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            shown[str(path)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    for route in ("/health", "/metrics", "/status", "/v1/models", "/v1/models/status", "/upstream/tiny/props"):
        shown[route] = gateway.get(route, key=ADMIN).body.decode()
    shown["refused"] = str(gateway.get("/v1/models", key=WRONG_KEY))
    shown["refused post"] = str(gateway.chat(key=WRONG_KEY))
    shown["bad body"] = str(gateway.request("POST", "/v1/chat/completions", f"{{{USER}".encode()))
    shown["unknown"] = str(gateway.get(f"/nowhere?key={WRONG_KEY}"))
    return shown


def test_nothing_shows_a_secret(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(
        tmp_path, entrypoint=True, MODEL_PATH=str(chat_model), API_KEY=ENV_KEY, LOG_LEVEL="debug"
    ) as gateway:
        secret = boot_key(gateway.model()["pid"])
        assert len(secret) >= 32
        assert gateway.chat(key=ENV_KEY).status == 200
        assert gateway.chat(headers={"X-Log-Level": "debug"}).status == 200
        with (gateway.folder / "api_keys.txt").open("a") as keys:
            keys.write(f"bad id:{WRONG_KEY}\nshort:x\n")
        eventually(lambda: "api_keys.txt" in gateway.stderr)  # the bad lines are reported
        for where, text in everything_shown(gateway).items():
            for name, value in {
                "boot key": secret,
                "API_KEY": ENV_KEY,
                "a key of the file": USER,
                "the admin's": ADMIN,
                "a wrong one": WRONG_KEY,
            }.items():
                if where in ("bad body", "unknown") and name in ("a key of the file", "a wrong one"):
                    continue  # the client's own words, to the client itself
                assert value not in text, f"{name} shows in {where}"


def test_debug_shell_masks(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(
        tmp_path,
        entrypoint=True,
        ready=False,
        DEBUG_SHELL="true",
        MODEL_PATH=str(chat_model),
        API_KEY=ENV_KEY,
        HF_TOKEN="hf_SECRET0123456789",
        REDIS_URL=f"redis://user:{URL_PASSWORD}@127.0.0.1:1/0",
        MY_PASSWORD=URL_PASSWORD,
    ) as gateway:
        shown = eventually(lambda: "DEBUG_SHELL" in gateway.stderr and gateway.stdout + gateway.stderr)
        assert "API_KEY=***" in shown
        assert "MODEL_PATH=" in shown
        assert "SECRET" not in shown
        assert subprocess.run(["pgrep", "-P", str(gateway.process.pid), "-f", "gateway"], check=False).returncode == 1
        assert gateway.stop() == 0
