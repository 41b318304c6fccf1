"""What is written for those who run the image: Dockerfiles, Compose, Kubernetes, and the guides to them."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import __version__
from gateway.cli import make_parser
from gateway.models.process import KILL_AFTER_SECONDS
from gateway.settings import Settings, variables
from tests.house import ROOT

DOCKERFILES = [ROOT / "Dockerfile", ROOT / "Dockerfile.cpu"]
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("DOCKER", "RUNPOD", "VAST", "CLOUD_RUN", "KUBERNETES")]
NAMES = {name for var in variables() for name in (var.name, *var.aliases)}
# Of Docker, of the platforms, and of shells; not ours.
FOREIGN = {"BASE", "BUILD_PACKAGES", "VERSION", "REVISION", "CREATED", "SOURCE", "PATH", "HEALTHCHECK", "FROM", "USER"}
FOREIGN |= {"EXTRAS"}
FOREIGN |= {"RUNPOD_API_KEY", "ENDPOINT_ID", "POD_ID", "VAST_TCP_PORT_8000", "PWD", "COPY", "IMAGE", "BUCKET", "Q4_K_M"}


def instructions(path: Path) -> list[str]:
    """Without comments, each on one line."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
    return [re.sub(r"\s+", " ", line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


# --- Dockerfiles


def test_the_two_dockerfiles_differ_in_base_and_two_variables() -> None:
    cuda, cpu = (instructions(path) for path in DOCKERFILES)
    assert [line for line in cuda if line not in cpu] == ["ARG BASE=ghcr.io/ggml-org/llama.cpp:server-cuda"]
    assert [line for line in cpu if line not in cuda] == [
        "ARG BASE=ghcr.io/ggml-org/llama.cpp:server",
        "ENV NGL=0 CTX=4096",
    ]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_builder_understands_them(path: Path) -> None:
    """buildah of Debian 12 knows neither a syntax line nor here-documents."""
    text = path.read_text()
    assert "syntax=" not in text and "<<" not in text
    assert f"ARG VERSION={__version__}" in instructions(path)


def test_the_version_is_the_packages() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_only_what_is_copied_goes_to_the_builder() -> None:
    """So that no key, model or .env can get into a layer."""
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignore[0] == "*" and ignore[-1] == "**/__pycache__"
    let_in = {line.removeprefix("!") for line in ignore[1:-1]}
    copied = [line.split()[1:-1] for line in instructions(DOCKERFILES[0]) if re.match(r"COPY (?!--from)", line)]
    assert let_in == {name for names in copied for name in names}
    assert all((ROOT / name).exists() for name in let_in)


# --- Compose and Kubernetes


def test_compose() -> None:
    compose = load("docker-compose.yml")
    services = compose["services"]
    assert set(services) == {"inference-gpu", "inference-cpu"}
    checks = [line for line in instructions(DOCKERFILES[0]) if line.startswith("HEALTHCHECK")]
    for name, service in services.items():
        assert service["profiles"] == [name.removeprefix("inference-")]
        assert service["stop_grace_period"] == "45s"
        assert service["env_file"] == [{"path": ".env", "required": False}]
        assert {volume.split(":")[0] for volume in service["volumes"]} == {*compose["volumes"], "./models"}
        check = service["healthcheck"]
        options = " ".join(f"--{key.replace('_', '-')}={value}" for key, value in check.items() if key != "test")
        test = ", ".join(f'"{word}"' for word in check["test"][1:])
        assert checks == [f"HEALTHCHECK {options} CMD [{test}]"]
    assert services["inference-gpu"]["build"] == "." and services["inference-gpu"]["deploy"]
    assert services["inference-cpu"]["build"]["dockerfile"] == "Dockerfile.cpu"
    inserted = re.findall(r"\$\{(\w+):-(\w+)\}", (ROOT / "docker-compose.yml").read_text())
    assert set(inserted) == {("PORT", str(Settings.port))}


def grace(spec: Any) -> float:
    """Seconds that a pod needs at most from the wish to end it until the last process is gone."""
    waits = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1]
    return float(waits) + Settings.shutdown_grace_seconds + KILL_AFTER_SECONDS


def test_kubernetes() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "corral.yaml").read_text()))
    found = {document["kind"]: document for document in documents}
    deployment = found["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == deployment["selector"]["matchLabels"]
    assert {item["name"] for item in container["env"]} <= NAMES
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": Settings.port, "health": Settings.port_health}
    assert found["Service"]["spec"]["ports"][0]["targetPort"] in ports
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["port"] for name, probe in probes.items()} == dict.fromkeys(probes, "health")
    # 204 is a success to Kubernetes: whether requests can come, only /health says
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ping",
        "readiness": "/health",
        "liveness": "/ping",
    }
    assert pod["terminationGracePeriodSeconds"] == 45 >= grace(pod)
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume]
    assert claims == [found["PersistentVolumeClaim"]["metadata"]["name"]]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/tmp"}


# --- guides

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_variables_in_a_guide_exist(guide: Path) -> None:
    text = guide.read_text()
    code = [*re.findall(r"`([^`\n]+)`", text), *(block for _, block in BLOCK.findall(text))]
    named = {name for part in code for name in re.findall(r"(?<![\w./-])[A-Z][A-Z_0-9]{2,}(?![\w/.])", part)}
    assert named & NAMES
    assert named - NAMES - FOREIGN == set()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_links_in_a_guide_lead_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", guide.read_text()):
        name, _, anchor = target.partition("#")
        page = guide.parent / name if name else guide
        assert page.exists(), target
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


def command_lines() -> Iterator[list[str]]:
    """What `docker run IMAGE …` and `… corral corral …` hand to the command line."""
    for guide in GUIDES:
        text = guide.read_text().replace("\\\n", " ")
        lines = [line for language, block in BLOCK.findall(text) if language == "sh" for line in block.splitlines()]
        lines += re.findall(r"`(kubectl exec [^`]+)`", text)
        for line in lines:
            words = shlex.split(line, comments=True)
            if "exec" in words[:5] and "corral" in words:
                yield words[len(words) - words[::-1].index("corral") :]
            elif words[:3] == ["docker", "run", "--rm"]:
                yield words[words.index("corral") + 1 :]


def test_commands_in_the_guides_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(command_lines())
    assert len(found) >= 5
    for words in found:
        try:
            make_parser().parse_args(words)
        except SystemExit as end:
            assert end.code == 0, (words, capsys.readouterr().err)
