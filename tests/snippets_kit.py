"""The fenced blocks of the guides, and what is known of commands that a test cannot run: containers, clusters, root."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from gateway.cli import make_parser
from gateway.settings import variables
from tests.house import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HERE_DOCUMENT = re.compile(r"<<'?(\w+)'?(.*?\n).*?^\1$", re.MULTILINE | re.DOTALL)
_NAMES = {name for var in variables() for name in (var.name, *var.aliases, *var.deprecated)}


@dataclass(frozen=True)
class Block:
    page: Path
    number: int  # among those of the page that have a language
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.number}"

    @property
    def is_shell(self) -> bool:
        return self.language in ("sh", "bash")


def blocks() -> list[Block]:
    """A block without a language is what a program says, and is not looked at."""
    found = []
    for page in PAGES:
        named = [(language, text) for language, text in _BLOCK.findall(page.read_text()) if language]
        found += [Block(page, number, language, text) for number, (language, text) in enumerate(named)]
    return found


# --- shell

Words = list[str]


def commands(block: Block) -> Iterator[Words]:
    """Each command's words, without variables before it and redirections behind it; `sudo` is passed over."""
    text = _HERE_DOCUMENT.sub(r"\2", block.text).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        command: Words = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|"):
                if command:
                    yield command
                command = []
            elif command or not (word == "sudo" or re.fullmatch(r"[A-Za-z_]\w*=.*", word, re.DOTALL)):
                command.append(word)


def programs(block: Block) -> set[str]:
    return {words[0] for words in commands(block)}


# Programs whose blocks are run as they stand, before a real gateway.
RUN = {"corral", "curl", "cat", "export", "grep", "promtool", "python3", "test"}


def _docker(words: Words) -> None:
    """The files, services and profiles that it names exist, and what goes to the image is a command line of Corral."""
    if words[1] == "compose":
        _compose(words[2:])
    elif words[1] == "build":
        file = words[words.index("-f") + 1] if "-f" in words else "Dockerfile"
        text = (ROOT / file).read_text()
        for at in (number for number, word in enumerate(words) if word == "--build-arg"):
            assert re.search(rf"^ARG {words[at + 1].partition('=')[0]}\b", text, re.MULTILINE)
    elif words[1] in ("run", "exec"):
        for at in (number for number, word in enumerate(words) if word == "-e"):
            assert words[at + 1].partition("=")[0] in _NAMES
        command = words[len(words) - words[::-1].index("corral") :] if "corral" in words else []
        if words[1] == "exec" or "--rm" in words:
            corral(["corral", *command])
    else:
        assert words[1:] in (["logs", "corral"], ["stop", "corral"]), words


def _compose(words: Words) -> None:
    file = words[words.index("-f") + 1] if "-f" in words else "docker-compose.yml"
    services = yaml.safe_load((ROOT / file).read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
    assert not set(words[words.index("--profile") + 1 :][:1] if "--profile" in words else ()) - profiles
    if "exec" in words:
        assert words[words.index("exec") + 1] in services
        corral(words[words.index("exec") + 2 :])


def _kubectl(words: Words) -> None:
    manifest = (ROOT / "deploy" / "kubernetes" / "corral.yaml").read_text()
    for word in words:
        if word.endswith((".yaml", ".yml")):
            assert (ROOT / word).is_file()
        if "/" in word and word.partition("/")[0] in ("deployment", "service"):
            kind, _, name = word.partition("/")
            assert re.search(rf"kind: {kind}\nmetadata:\n  name: {name}$", manifest, re.MULTILINE | re.IGNORECASE)
        if word.startswith("--from-literal="):
            assert f"key: {word.split('=')[1]}" in manifest


def _gcloud(words: Words) -> None:
    assert words[:3] == ["gcloud", "run", "deploy"]
    for flag in ("--set-env-vars", "--set-secrets"):
        for setting in words[words.index(flag) + 1].split(","):
            assert setting.partition("=")[0] in _NAMES


def _install(words: Words) -> None:
    """What is installed exists: in the repository, in its clone, or as the model that stands for any."""
    sources = [word.removeprefix("/opt/corral/") for word in words[1:-1] if re.search(r"\.\w+$|\.env", word)]
    for source in sources:
        assert source == "qwen.gguf" or (ROOT / source).exists(), source


def _unit(words: Words) -> None:
    unit = words[words.index("-u") + 1] if "-u" in words else words[-1]
    assert unit == "daemon-reload" or (ROOT / "deploy" / "systemd" / f"{unit}.service").is_file()


def _nats(words: Words) -> None:
    code = "".join(path.read_text() for path in (ROOT / "gateway" / "workers").rglob("*.py"))
    for word in words:
        if word.isupper():
            assert f'"{word}"' in code, word


def _pip(words: Words) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for word in words[2:]:
        extra = re.fullmatch(r"corral\[(\w+)\]", word)
        assert extra is None or re.search(rf"^{extra[1]} = \[", project, re.MULTILINE)


def corral(words: Words) -> None:
    """It is a command line of Corral, perhaps behind `env` or with a path."""
    named = [number for number, word in enumerate(words) if word.rpartition("/")[2] == "corral"]
    at = named[0] if named[0] == 0 else named[-1]
    arguments = [word for word in words[at + 1 :] if word not in ("-", "<", ">")]
    try:
        make_parser().parse_known_args(arguments)
    except SystemExit as end:
        assert end.code == 0, words


def _script(words: Words) -> None:
    assert (ROOT / words[0]).stat().st_mode & 0o111, words[0]


def _anything(words: Words) -> None:
    """The machine's own."""


# Programs that need a container engine, a cluster, root or a network: their words are looked at. A program in neither
# table makes the test fail: decide what becomes of it.
LOOKED_AT: dict[str, Callable[[Words], None]] = {
    "docker": _docker,
    "kubectl": _kubectl,
    "gcloud": _gcloud,
    "install": _install,
    "systemctl": _unit,
    "journalctl": _unit,
    "nats": _nats,
    "nats-server": _nats,
    "pip": _pip,
    "-u": corral,  # of `sudo -u`
    "/opt/corral/.venv/bin/pip": _anything,
    "./scripts/run": _script,
    "./scripts/test": _script,
    "./entrypoint.sh": _script,
    **dict.fromkeys(("chown", "cp", "git", "mkdir", "useradd", "usermod"), _anything),
}
ELSEWHERE = re.compile(r"https://|localhost:9000")  # an address that no test can ask


def is_run(block: Block) -> bool:
    """Whether it is run as it stands; False where its commands are looked at."""
    unknown = programs(block) - RUN - LOOKED_AT.keys()
    assert not unknown, f"{block}: is {unknown} to be run, or to be looked at?"
    waits = any(
        words[:2] in (["corral", "serve"], ["corral", "worker"], ["corral", "chat"]) for words in commands(block)
    )
    return programs(block) <= RUN and not waits and not ELSEWHERE.search(block.text)


def look_at(block: Block) -> None:
    for words in commands(block):
        check = corral if words[0] == "corral" else LOOKED_AT.get(words[0], _anything)
        check(words)
