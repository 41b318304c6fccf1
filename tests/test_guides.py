"""What the guides name is there: variables, metrics, error codes, routes, commands, keys of the models file."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.app import TABLE
from gateway.cli import make_parser
from gateway.models.configured import translate
from gateway.settings import variables
from tests.house import ROOT, running_gateway
from tests.monitoring.test_files import families
from tests.test_docs import raised

GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("KEYS", "LIMITS", "MONITORING", "SYSTEMD", "TROUBLESHOOTING")]
UPGRADING = ROOT / "docs" / "UPGRADING.md"
NAMES = {name for var in variables() for name in (var.name, *var.aliases, *var.deprecated)}
# Of Grafana, of shells, of systemd, and the placeholders of commands; not ours.
FOREIGN = {
    "GRAFANA_PASSWORD",
    "POST",
    "DONE",
    "ADMIN_KEY",
    "KEY",
    "NAME",
    "ID",
    "URL",
    "REPOSITORY",
    "SIGHUP",
    "SIGKILL",
    "PATH",
    "HUP",
}
CODE = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def words(text: str) -> list[str]:
    """What the text itself marks as code."""
    return CODE.findall(BLOCK.sub("", text))


def new_names() -> str:
    """The page on upgrading without what was: only the last cell of each row, and what is no row."""
    lines = UPGRADING.read_text().splitlines()
    return "\n".join(line.rpartition(" | ")[2] if line.startswith("| ") else line for line in lines)


TEXTS = [*((guide.stem, guide.read_text()) for guide in GUIDES), ("UPGRADING", new_names())]
each_text = pytest.mark.parametrize("text", [text for _, text in TEXTS], ids=[name for name, _ in TEXTS])


@each_text
def test_variables_exist(text: str) -> None:
    named = {name for code in words(text) for name in re.findall(r"(?<![\w./$-])[A-Z][A-Z_0-9]{2,}(?![\w/.(])", code)}
    upgrading = {"INFERENCE", "GATEWAY_PORT"}  # a stream; a deprecated name
    assert named - NAMES - FOREIGN - upgrading == set()


@each_text
def test_metrics_exist(text: str) -> None:
    known = families()
    for name, about in re.findall(r"\b(gateway_\w+)(?:\{([\w,]+)\})?", text):
        assert name in known or f"{name}_bucket" in known, name
        assert not about or set(about.split(",")) <= known[name], (name, about)


@each_text
def test_codes_exist(text: str) -> None:
    for status, code in re.findall(r"\b(\d{3}) `(\w+)`", text):
        assert (int(status), code) in raised()


@each_text
def test_routes_exist(text: str) -> None:
    paths = {re.sub(r"\{\w+\}", "{}", path) for _, path, _, _ in TABLE} | {"/", "/status", "/ping"}
    starts = ("/v1/", "/grammars", "/metrics", "/infer", "/logs", "/reload", "/health", "/swagger/")
    for code in words(text):
        for path in re.findall(r"(?:^|\s)(/[\w./{}…-]+)", code):
            if path.startswith(starts):
                stem = re.sub(r"\{\w+\}", "{}", path).removesuffix("…")
                assert any(one == stem or ("…" in path and one.startswith(stem)) for one in paths), path


def commands(text: str) -> Iterator[list[str]]:
    yield from (shlex.split(code)[1:] for code in words(text) if code.startswith("corral "))


@each_text
def test_commands_exist(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They may leave something out, but what they name exists."""
    for command in commands(text):
        try:
            make_parser().parse_args(command)
        except SystemExit:
            assert "are required" in capsys.readouterr().err, command


def test_every_key_that_is_translated_or_gone_is_told() -> None:
    text = UPGRADING.read_text()
    keys = {path.partition(".")[2] for path in translate._GONE} - {"rate_limit_set_into_turn_off", "cache_prefix"}
    for key in {*keys, *translate.PARAMS} - {"batch_override", "queue_ttl_sec", "queue_prefix", "enable_redis_queue"}:
        assert re.search(rf"\b{key}\b", text), key
    for prefix in translate._GONE_PREFIXES:
        assert f"{prefix.partition('.')[2]}*" in text


def test_old_metrics_are_of_the_systems_that_had_them() -> None:
    rows = [line.split(" | ")[0] for line in UPGRADING.read_text().splitlines() if line.startswith("| `")]
    old = {name for row in rows for name in re.findall(r"`((?:router|modeld)_\w+)", row)}
    assert len([name for name in old if name.startswith("router_")]) > 25
    assert len([name for name in old if name.startswith("modeld_")]) == 4


# --- what stops a start

START = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text().partition("## The start stops\n")[2].partition("\n## ")[0]
LINES = [code for row in START.splitlines() if row.startswith("| `") for code in CODE.findall(row.split(" | ")[0])]


def told(problem: str) -> list[str]:
    """The lines of the guide that fit; `…` stands for anything, NAME for any variable."""
    patterns = {line: ".*".join(re.escape(part.strip()) for part in line.split("…")) for line in LINES}
    return [line for line, pattern in patterns.items() if re.search(pattern.replace("NAME=", "[A-Z_]+="), problem)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"LLAMA_SERVER_PATH": "", "PATH": "/nowhere"},
        {"LLAMA_SERVER_PATH": "/nowhere/llama-server"},
        {"MODEL_PATH": ""},
        {"MODEL_PATH": "", "MODEL_NAME": "qwen"},
        {"MODEL_PATH": "/nowhere/qwen.gguf"},
        {"CTX": "many"},
        {"CONFIG_PATH": "models.yaml"},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_the_guide_knows_the_line(tmp_path: Path, chat_model: Path, wrong: dict[str, str]) -> None:
    (tmp_path / "models.yaml").write_text("models: {qwen: {model_path: qwen.gguf, flagz: []}}\n")
    program = tmp_path / "llama-server"
    program.touch(0o755)
    usual = {"PYTHONPATH": str(ROOT), "DATA_DIR": str(tmp_path), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    usual |= {"LLAMA_SERVER_PATH": str(program), "MODEL_PATH": str(chat_model)}
    if "CONFIG_PATH" in wrong:
        del usual["MODEL_PATH"]
    command = [sys.executable, "-m", "gateway", "config", "check"]
    done = subprocess.run(command, cwd=tmp_path, env=usual | wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    problems = [line for line in done.stderr.splitlines() if line]
    assert problems and all(told(line) for line in problems), done.stderr


@pytest.mark.real
@pytest.mark.parametrize("wrong", [{"REDIS_URL": "localhost"}, {"NATS_URL": "http://localhost"}, {}], ids=str)
def test_the_guide_knows_what_ends_a_start(tmp_path: Path, chat_model: Path, wrong: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        variables = wrong or {"PORT": str(taken.getsockname()[1])}
        with running_gateway(tmp_path, variables, MODEL_PATH=str(chat_model), ready=False) as gateway:
            assert gateway.process.wait(9) == 1, gateway.stderr
            assert any(told(line) for line in gateway.stderr.splitlines() if next(iter(variables)) in line)
