"""llama-server's command line and environment: tables."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.environment import child_environment
from gateway.models.command import (
    HINTS,
    INHERITED,
    INHERITED_PREFIXES,
    OPTIONAL,
    Launch,
    build_argv,
    build_environment,
    check_env,
    check_extra_args,
    check_flags,
    flag_value,
    refused_flag,
)
from gateway.models.configured.template import PromptTemplate
from gateway.models.spec import ModelSpec
from tests.house import llama_server

SPEC = ModelSpec(id="qwen")
MODEL = Path("/m/qwen-q4.gguf")
LAUNCH = Launch(
    binary=Path("/app/llama-server"),
    port=8080,
    ctx_total=12288,
    parallel=3,
    ngl=99,
    threads=0,
    cache_ram_mb=1024,
    extra_args="",
    api_key="secret-of-this-start",
)
BASE = (
    "/app/llama-server -m /m/qwen-q4.gguf --alias qwen --host 127.0.0.1 --port 8080 -c 12288 -np 3 -ngl 99 "
    "--no-kv-unified --fit off --no-webui --metrics --slots --jinja --cache-ram 1024"
)


def argv(**changes: object) -> str:
    return " ".join(build_argv(SPEC, MODEL, replace(LAUNCH, **changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, BASE),
        ({"threads": 2}, f"{BASE} -t 2"),
        ({"ctx_total": 100, "parallel": 1}, BASE.replace("12288 -np 3", "100 -np 1")),
        ({"ctx_total": 0, "parallel": 0}, BASE.replace(" -c 12288 -np 3", "")),
        ({"ngl": 0, "port": 1, "cache_ram_mb": 0}, BASE.replace("99", "0").replace("8080", "1").replace("1024", "0")),
        ({"extra_args": "-fa on --lora '/a b/c'"}, f"{BASE} -fa on --lora /a b/c"),
        ({"without": frozenset({"--fit"})}, BASE.replace(" --fit off", "")),
        ({"without": frozenset({"--cache-ram"})}, BASE.replace(" --cache-ram 1024", "")),
        ({"without": frozenset({"--jinja", "--metrics"})}, BASE.replace(" --metrics", "").replace(" --jinja", "")),
        # what the operator asks for stays, also where it is one of the optional flags
        ({"without": frozenset({"--jinja"}), "extra_args": "--jinja"}, BASE.replace(" --jinja", "") + " --jinja"),
    ],
)
def test_the_command_line(changes: dict[str, object], line: str) -> None:
    assert argv(**changes) == line


def test_a_projector_is_passed_and_an_argument_with_spaces_stays_one() -> None:
    spec = ModelSpec(id="my model", mmproj=Path("/m/mmproj f16.gguf"))
    words = build_argv(spec, Path("/m/a b.gguf"), replace(LAUNCH, extra_args='--chat-template "{{ x }}"'))
    assert words[1:5] == ["-m", "/m/a b.gguf", "--alias", "my model"]
    assert words[words.index("--mmproj") + 1] == "/m/mmproj f16.gguf"
    assert words[-2:] == ["--chat-template", "{{ x }}"]


FORBIDDEN = (
    "--host --port --reuse-port --api-key --api-key-file -m --model -mu --model-url -hf -hfr --hf-repo -hff --hf-file "
    "-dr --docker-repo -a --alias -c --ctx-size -np --parallel --models-dir --models-max --models-preset "
    "--ssl-key-file --ssl-cert-file --api-prefix --path --webui --ui --webui-mcp-proxy --ui-mcp-proxy --props --tools "
    "--tools-runtime -ag --agent --mcp-servers-config --mcp-servers-json --kv-unified -kvu --log-file --log-disable "
    "-v --verbose --log-verbose --log-prompts-dir"
).split()


@pytest.mark.parametrize("flag", FORBIDDEN)
def test_what_would_break_the_shield_is_refused_however_it_is_written(flag: str) -> None:
    spellings = {flag, f"{flag}=x", f'"{flag}"', f"-fa on {flag} x"}
    if flag.startswith("--"):
        spellings |= {
            flag.replace("-", "_").replace("__", "--", 1),
            flag.replace("-", "_").replace("__", "--", 1) + "=x",
        }
    for text in spellings:
        problems = check_extra_args(text)
        assert len(problems) == 1 and problems[0].startswith("EXTRA_ARGS has -") and ": " in problems[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-fa on",
        "--lora /a/b.gguf --temp 0.5",
        "-ub 512 -b 2048",
        "--pooling mean",
        "-ctk q8_0",
        "--no-mmap",
        "-lv 4",
    ],
)
def test_other_arguments_are_the_operators_own_matter(text: str) -> None:
    assert check_extra_args(text) == []


@pytest.mark.parametrize(
    "words", ["-lv 5", "--verbosity 9999", "--log-verbosity=6", "--log_verbosity -1", "-lv 3 -lv 5"]
)
def test_llama_server_is_not_made_to_write_prompts_into_its_log(words: str) -> None:
    (problem,) = check_extra_args(words)
    assert problem.startswith("EXTRA_ARGS has -lv ") and "must be 0 to 4" in problem
    assert check_flags(words.split()) == [problem.removeprefix("EXTRA_ARGS has ")]


def test_every_forbidden_argument_is_told_of() -> None:
    assert len(check_extra_args("--host 0.0.0.0 -fa on --api_key=x -c 5")) == 3


@pytest.mark.real
def test_the_names_are_those_of_the_real_llama_server(tmp_path: Path) -> None:
    """And it does take an underscore for a hyphen, which is why we must."""
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(llama_server())))
    flags = {word for word in BASE.split() if word.startswith("-")} | set(OPTIONAL) - set(HINTS) | {"-t", "--mmproj"}
    assert flags <= known
    assert set(FORBIDDEN) - known <= {"--webui-mcp-proxy"}  # not every build has all of them
    command = [str(llama_server()), "--api_key", "x", "-m", str(tmp_path / "none.gguf")]
    assert b"invalid argument" not in subprocess.run(command, capture_output=True, check=False).stderr


def help_of(binary: Path) -> str:
    return subprocess.run([binary, "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("lines", "without", "flag"),
    [
        (["error: invalid argument: --fit"], set(), "--fit"),
        (["build 1", "error: unknown argument: --cache-ram", "usage: …"], set(), "--cache-ram"),
        (["error: invalid argument: --no-kv-unified\n"], {"--fit"}, "--no-kv-unified"),
        (["error: invalid argument: --fit"], {"--fit"}, None),  # it cannot be ours: we left it out already
        (["error: invalid argument: --my-own"], set(), None),
        (["error: invalid argument: -c"], set(), None),
        (["error: invalid argument: --fitting"], set(), None),
        (["usage: --fit [on|off]", "error loading model"], set(), None),
        ([], set(), None),
    ],
)
def test_the_optional_flag_that_a_build_refuses_is_found(lines: list[str], without: set[str], flag: str | None) -> None:
    assert refused_flag(lines, replace(LAUNCH, without=frozenset(without))) == flag


@pytest.mark.parametrize("flag", [flag for flag in OPTIONAL if flag not in HINTS])
def test_every_optional_flag_can_be_left_out(flag: str) -> None:
    whole, shorter = argv().split(), argv(without=frozenset({flag})).split()
    assert flag in whole and flag not in shorter
    assert len(whole) - len(shorter) == (2 if flag in ("--fit", "--cache-ram") else 1)  # its value goes with it
    assert refused_flag([f"error: invalid argument: {flag}"], LAUNCH) == flag


def test_the_key_goes_by_environment_and_nothing_else_of_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "LLAMA_ARG_HOST": "0.0.0.0",
        "LLAMA_API_KEY": "of somebody else",
        "AIP_HTTP_PORT": "1",
        "API_KEY": "of the gateway",
        "REDIS_URL": "redis://:password@x",
        "CUDA_VISIBLE_DEVICES": "1",
        "HF_HOME": "/hf",
        "GGML_CUDA_X": "1",
        "https_proxy": "http://proxy",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment = build_environment(SPEC, child_environment(INHERITED, INHERITED_PREFIXES), LAUNCH)
    assert environment["LLAMA_API_KEY"] == LAUNCH.api_key
    assert not {"LLAMA_ARG_HOST", "AIP_HTTP_PORT", "API_KEY", "REDIS_URL"} & environment.keys()
    assert {"PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "GGML_CUDA_X", "https_proxy"} <= environment.keys()
    assert LAUNCH.api_key not in argv()


def test_a_models_own_flags_come_last_and_its_environment_wins() -> None:
    spec = replace(SPEC, flags=("-c", "8192", "-ngl", "5"), env=(("CUDA_VISIBLE_DEVICES", "3"),))
    assert build_argv(spec, MODEL, LAUNCH)[-4:] == ["-c", "8192", "-ngl", "5"]
    environment = build_environment(spec, {"CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin"}, LAUNCH)
    assert environment["CUDA_VISIBLE_DEVICES"] == "3" and environment["PATH"] == "/bin"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_chat_template_is_passed_on() -> None:
    file = replace(SPEC, chat_template_file=Path("/t.jinja"))
    assert "--chat-template-file /t.jinja" in " ".join(build_argv(file, MODEL, LAUNCH))
    pieces = replace(SPEC, prompt_template=PromptTemplate(user_prefix="U: "))
    line = build_argv(pieces, MODEL, LAUNCH)
    assert "U: " in line[line.index("--chat-template") + 1]


def test_what_a_model_may_not_say() -> None:
    assert check_flags(["-c", "8192", "--parallel", "4", "--mlock"]) == []
    assert [line.partition(":")[0] for line in check_flags(["--host", "0.0.0.0", "--api_key=x", "-v"])] == [
        "--host",
        "--api_key=x",
        "-v",
    ]
    assert check_env(["CUDA_VISIBLE_DEVICES"]) == [] and len(check_env(["LLAMA_ARG_HOST", "llama_api_key"])) == 2


@pytest.mark.parametrize(
    ("flags", "value"),
    [([], None), (["-c", "5"], "5"), (["--ctx-size=6"], "6"), (["-c", "5", "--ctx_size", "7"], "7"), (["-c"], None)],
)
def test_a_flags_value(flags: list[str], value: str | None) -> None:
    assert flag_value(flags, "-c", "--ctx-size") == value


def test_a_hint_that_a_build_does_not_know_is_left_out_wherever_it_comes_from() -> None:
    spec, launch = replace(SPEC, flags=("--mlock", "-fa", "on")), replace(LAUNCH, extra_args="--no-mmap --metrics")
    refused = ["error: invalid argument: --mlock"]
    assert refused_flag(refused, launch) == "--mlock"
    words = build_argv(spec, MODEL, replace(launch, without=frozenset({"--mlock", "--metrics"})))
    assert "--mlock" not in words and words[-4:] == ["--no-mmap", "--metrics", "-fa", "on"]
