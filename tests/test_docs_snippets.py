"""Every command and snippet of README.md and docs/: run before a real gateway where that can be, else looked at."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from gateway.http.openapi.document import document
from gateway.models.configured.file import read_models_file
from gateway.settings import variables
from tests.house import ADMIN, ROOT, USER, Gateway, running_gateway
from tests.nats_kit import running_nats
from tests.snippets_kit import PAGES, Block, blocks, is_run, look_at

BLOCKS = blocks()
SHELL = [block for block in BLOCKS if block.is_shell]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def test_every_language_has_its_test() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "bash", "python", "yaml", "json", "ini", "dockerfile"}
    assert len(SHELL) > 20


# --- shell


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_it_is_shell(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [block for block in SHELL if not is_run(block)], ids=str)
def test_what_cannot_be_run_here_names_what_there_is(block: Block) -> None:
    look_at(block)


def test_a_new_program_is_in_no_class() -> None:
    with pytest.raises(AssertionError, match="helm"):
        is_run(Block(ROOT / "README.md", 0, "sh", "helm install corral\n"))


@dataclass
class Sandbox:
    """A folder as a reader has it: the repository's files, keys, a running gateway with its health port, NATS."""

    gateway: Gateway
    folder: Path
    nats: str

    def adapted(self, text: str) -> str:
        """With this gateway's ports, and a key where a placeholder stands."""
        places = {
            "127.0.0.1:8000": f"127.0.0.1:{self.gateway.port}",
            "127.0.0.1:8001": f"127.0.0.1:{self.gateway.environment['PORT_HEALTH']}",
            "nats://127.0.0.1:4222": self.nats,
            "sk-…": ADMIN,
        }
        for name, value in places.items():
            text = text.replace(name, value)
        return text

    def run(self, command: list[str]) -> None:
        environment = {
            **self.gateway.environment,
            "HOME": str(self.folder),
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
            "DATA_DIR": str(self.folder / "data"),
            "CORRAL_URL": self.gateway.url,
            "CORRAL_API_KEY": ADMIN,
            "KEY": USER,
            "ADMIN_KEY": ADMIN,
        }
        del environment["AUTH_KEYS_FILE"]  # the pages' own keys are not the gateway's
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("reader")
    (folder / ".cache" / "data").mkdir(parents=True)
    (folder / ".cache" / "data" / "demo.key").write_text(f"{USER}\n")
    (folder / ".curlrc").write_text("fail\n")  # so that an error of the gateway is one of the command
    for name in (".venv", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    model = folder / "qwen2.5-7b.gguf"
    model.symlink_to(chat_model)
    with (
        running_nats(tmp_path_factory.mktemp("nats")) as nats,
        running_gateway(
            tmp_path_factory.mktemp("gateway"), MODEL_PATH=str(model), NATS_URL=nats.url, entrypoint=True
        ) as running,
    ):
        yield Sandbox(running, folder, nats.url)


@pytest.mark.real
@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.page == page and is_run(b) for b in SHELL)], ids=lambda page: page.stem
)
def test_commands_of_a_page_run_one_after_the_other(sandbox: Sandbox, page: Path) -> None:
    for block in SHELL:
        if block.page == page and is_run(block):
            sandbox.run(["bash", "-euo", "pipefail", "-c", sandbox.adapted(block.text)])


# --- programs and files


@pytest.mark.real
@pytest.mark.timeout(60)
@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python(sandbox: Sandbox, block: Block) -> None:
    sandbox.run([sys.executable, "-c", sandbox.adapted(block.text)])


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml(tmp_path: Path, block: Block) -> None:
    """A models file, a part of one, or a configuration of Prometheus."""
    found = yaml.safe_load(block.text)
    file = tmp_path / "block.yaml"
    file.write_text(block.text)
    if "scrape_configs" in found:
        if "rule_files" in found:
            (tmp_path / "corral.rules.yml").symlink_to(ROOT / "deploy/monitoring/prometheus/corral.rules.yml")
        (tmp_path / "metrics.key").touch()
        done = subprocess.run(["promtool", "check", "config", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    if "prompt_template" in found:
        file.write_text(yaml.safe_dump({"models": {"any": {"model_path": "any.gguf"} | found}}))
    assert set(yaml.safe_load(file.read_text())) <= {"api", "system", "models", "redis", "rate_limit"}, "in no class"
    assert not read_models_file(file).problems


def values(text: str) -> Iterator[Any]:
    """One JSON value, or one a line."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text.rstrip()):
        value, at = decoder.raw_decode(text, at)
        yield value
        at = len(text) - len(text[at:].lstrip())


# What a JSON value of the pages is, by the first of its keys.
SHAPES = {"error": "Error", "since": "TelemetrySummary", "req_id": "PlainAnswer"}


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json(block: Block) -> None:
    components = document()["components"]
    for value in values(block.text):
        first = next(iter(value))
        if first == "input":  # a job of RunPod's
            assert isinstance(value["input"], dict)
            continue
        assert first in SHAPES, "in no class"
        jsonschema_rs.validate({"$ref": f"#/components/schemas/{SHAPES[first]}", "components": components}, value)


@pytest.mark.parametrize("block", of("ini"), ids=str)
def test_settings_for_a_service(block: Block) -> None:
    names = re.findall(r"^(\w+)=", block.text, re.MULTILINE)
    assert names and set(names) <= {var.name for var in variables()}


@pytest.mark.parametrize("block", of("dockerfile"), ids=str)
def test_dockerfile(block: Block) -> None:
    lines = block.text.splitlines()
    assert lines[0] == "FROM corral" and all(line.split()[0] in ("FROM", "USER", "COPY", "ENV") for line in lines)


# --- pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\[[^]]*\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        if re.match(r"https?://", target):
            continue
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_every_page_is_linked_from_the_readme() -> None:
    readme = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this machine has no systemd")
@pytest.mark.parametrize("unit", sorted((ROOT / "deploy" / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_the_unit(unit: Path, tmp_path: Path) -> None:
    """systemd reads it without a complaint; the one about the program is not about the unit."""
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/corral/entrypoint.sh", str(ROOT / "entrypoint.sh")))
    text = copy.read_text()
    assert f"ExecStart={ROOT}/entrypoint.sh" in text
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not complaints
