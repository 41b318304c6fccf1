"""README.md and .env.example say what the code says; what they tell people to run, runs."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import errors
from gateway.app import TABLE
from gateway.cli import make_parser
from gateway.environment import load_settings
from gateway.errors import CorralError
from gateway.metrics import Metrics
from gateway.settings import variables
from scripts import docs
from tests.house import ROOT, USER, Gateway

README = docs.README.read_text()
ROW = re.compile(r"^\| (?!---)(.*) \|$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORDS = CODE.findall(BLOCK.sub("", README))  # what the text itself marks as code


def section(title: str) -> str:
    """What stands under a heading of the second level, or of the third."""
    level, _, _ = title.partition(" ")
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^#{{2,{len(level)}}} |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    for row in ROW.findall(text):
        yield [cell.strip() for cell in row.split(" | ")]


# --- variables


def test_nothing_that_is_generated_is_out_of_date() -> None:
    stale = [path.name for path, text in docs.wanted().items() if path.read_text() != text]
    assert not stale, "run: .venv/bin/python -m scripts.docs"


def test_the_table_has_every_variable_with_its_default_in_order() -> None:
    told = [cells[:2] for cells in rows(section("## Variables")) if cells[0] != "variable"]
    assert [name.strip("`") for name, _ in told] == [var.name for var in variables()]
    for (name, default), var in zip(told, variables(), strict=True):
        assert default.replace("`", "") == var.shown_default, name


def test_sections_begin_with_variables_that_exist() -> None:
    names = [var.name for var in variables()]
    assert [name for name in names if name in docs.SECTIONS] == list(docs.SECTIONS)
    assert [title for title, _ in docs.sections()] == list(docs.SECTIONS.values())


def test_every_variable_in_the_text_exists() -> None:
    known = {name for var in variables() for name in (var.name, *var.aliases, *var.deprecated)}
    words = {name for code in WORDS for name in re.findall(r"\b([A-Z]+_[A-Z_0-9]+)\b", code)}
    assert words - known == set()


def test_the_example_changes_nothing_and_leaves_nothing_out(tmp_path: Path) -> None:
    lines = docs.EXAMPLE.read_text().splitlines()
    settings = [line.removeprefix("#") for line in lines if re.match(r"#[A-Z]", line)]
    assert [line.partition("=")[0] for line in settings] == [var.name for var in variables()]
    assert all(line.startswith("#") for line in lines if line), "all of it is commented out"
    (tmp_path / "all").write_text("\n".join(settings))
    assert load_settings({}, tmp_path / "all") == load_settings({}, None)


def test_planned_is_what_no_code_reads() -> None:
    planned = docs.planned()
    assert not planned & {
        "PORT",
        "CTX",
        "QUEUE_TIMEOUT_SECONDS",
        "MAX_REQUESTS_PER_MINUTE",
        "DEBUG_SHELL",
        "HEALTH_MODE",
    }
    for cells in rows(section("## Variables")):
        assert cells[2].startswith("*planned:*") is (cells[0].strip("`") in planned)


# --- endpoints and errors


def endpoints(title: str) -> set[tuple[str, str]]:
    """(method, path) of each row; a method counts for all the paths behind it."""
    found = set()
    for cells in rows(section(title)):
        if cells[0] == "endpoint":
            continue
        method = ""
        for code in CODE.findall(cells[0]):
            first, _, rest = code.rpartition(" ")
            method = first or method
            assert (method, rest) not in found, f"{code} stands there twice"
            found.add((method, rest))
    return found


def test_the_endpoints_are_those_of_the_table() -> None:
    told: dict[str, set[tuple[str, str]]] = {}
    for title in re.findall(r"^### (.*)$", section("## Endpoints"), re.MULTILINE):
        scope = re.search(r"Scope `(\w+)`", title)
        told.setdefault(scope[1] if scope else "", set()).update(endpoints(f"### {title}"))
    real: dict[str, set[tuple[str, str]]] = {}
    for method, path, _, needed in TABLE:
        # metrics is asked for only with METRICS_AUTH_ENABLED
        real.setdefault(needed if needed in ("infer", "admin") else "", set()).add((method, path))
    assert told == real


@functools.cache
def raised() -> set[tuple[int, str]]:
    """Status and code of every error that some code makes, or names as the one to be made."""
    made: set[tuple[int, str]] = set()
    for path in (ROOT / "gateway").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named: list[ast.expr | None] = []
            if isinstance(node, ast.Call):
                named = [node.func]
            elif isinstance(node, ast.arguments):
                named = [*node.defaults, *node.kw_defaults]
            for each in named:
                kind = getattr(errors, each.id, None) if isinstance(each, ast.Name) else None
                if isinstance(kind, type) and issubclass(kind, CorralError):
                    made.add((kind.status, kind.code))
    return made


def test_the_codes_are_those_that_the_code_can_raise() -> None:
    told = [(int(cells[0]), cells[1].strip("`")) for cells in rows(section("## Errors")) if cells[0].isdigit()]
    assert len(set(told)) == len(told)
    assert set(told) == raised()
    assert [status for status, _ in told] == sorted(status for status, _ in told)


def test_every_code_has_its_line_in_the_guide_to_trouble() -> None:
    text = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text()
    told = [(int(cells[0]), cells[1].strip("`")) for cells in rows(text) if cells[0].isdigit()]
    assert len(set(told)) == len(told)
    assert set(told) == raised()


def test_the_metrics_exist() -> None:
    metrics = Metrics()
    labels: dict[str, tuple[str, ...]] = {}
    for registry in (metrics.registry, metrics.key_registry):
        for family in registry.collect():
            labels[f"{family.name}_total" if family.type == "counter" else family.name] = ()
    for name, about in re.findall(r"`(gateway_\w+)(?:\{([\w,]+)\})?`", README):
        assert name in labels, name
        collector = next(
            item for item in vars(metrics).values() if f"{getattr(item, '_name', '')}" in (name, name[: -len("_total")])
        )
        assert not about or tuple(about.split(",")) == collector._labelnames, name


# --- commands, links, names


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(README) if found == language]


def commands() -> Iterator[list[str]]:
    """Every `corral …` in a block, without what the shell does to it."""
    for line in "\n".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["docker", "exec"]:
            words = words[3:]
        if "corral" not in words or words[0] == "docker":
            continue
        words = words[words.index("corral") + 1 :]
        yield words[: next((at for at, word in enumerate(words) if word[0] in "<>|&;"), len(words))]


def test_every_command_is_one() -> None:
    found = list(commands())
    assert {tuple(words[:2]) for words in found} >= {
        *(("keys", command) for command in ("generate", "list", "rotate", "remove", "check")),
        ("serve",),
    }
    for words in found:
        make_parser().parse_args(words)


@pytest.mark.parametrize("command", sorted({code for code in WORDS if code.startswith("corral ")}))
def test_commands_in_the_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They may leave something out, but what they name exists."""
    try:
        make_parser().parse_args(shlex.split(command)[1:])
    except SystemExit:
        assert "are required" in capsys.readouterr().err, command


def test_every_script_is_there() -> None:
    named = set(re.findall(r"(?<![\w/])\./([\w./]+)", "\n".join([*blocks("sh"), *WORDS])))
    assert {"scripts/run", "scripts/test", "scripts/check", "entrypoint.sh"} <= named
    for name in named:
        assert (ROOT / name).stat().st_mode & 0o111, name


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs/ARCHITECTURE.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    text = path.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\[[^]]*\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not re.match(r"https?://", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


REGISTRY = re.compile(
    r"[\w.-]*\b(?:pypi|pythonhosted|debian|ubuntu|npmjs|crates|rubygems|archlinux|alpinelinux|fedoraproject)\.(?:org|io|com|net)\b"
)


def test_no_file_names_a_registry_or_a_mirror() -> None:
    """Packages come from wherever the machine's own package managers are told to look."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert ROOT / "README.md" in files
    found = [(path.name, match[0]) for path in files if (match := REGISTRY.search(path.read_text(errors="replace")))]
    assert not found


def test_the_entrypoint_can_be_read_at_a_glance() -> None:
    assert len((ROOT / "entrypoint.sh").read_text().splitlines()) < 120


# --- what people paste


@pytest.fixture(scope="module")
def folder(gateway: Gateway) -> Path:
    """A place where the key lies as after `./scripts/run`."""
    data = gateway.folder / ".cache" / "data"
    data.mkdir(parents=True)
    (data / "demo.key").write_text(f"{USER}\n")
    return gateway.folder


def pasted(gateway: Gateway, text: str) -> str:
    assert "127.0.0.1:8000/" in text
    return text.replace("127.0.0.1:8000/", f"127.0.0.1:{gateway.port}/")


@pytest.mark.real
@pytest.mark.parametrize("number", [0, 1])
def test_curl(gateway: Gateway, folder: Path, number: int) -> None:
    command = [text for text in blocks("sh") if text.startswith("curl ")][number]
    command = pasted(gateway, command.replace("curl ", "curl -sS --fail ", 1))
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ('"finish_reason":"length"' in done.stdout) and (done.stdout.endswith("data: [DONE]\n\n") is bool(number))


@pytest.mark.real
def test_openai_python(gateway: Gateway, folder: Path) -> None:
    (snippet,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", pasted(gateway, snippet)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 20
