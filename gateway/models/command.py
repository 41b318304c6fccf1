"""ModelSpec → llama-server's argv and environment. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.models.registry import ModelSpec

# The child reads LLAMA_ARG_* and AIP_* variables: it gets what it needs and nothing else.
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "http_proxy", "https_proxy", "no_proxy")
INHERITED_PREFIXES = ("CUDA", "NVIDIA", "HF_", "GGML_", "HIP_", "ROCR_", "OMP_", "VK_")

# What would break the shield or what the gateway decides itself, and why.
_FORBIDDEN = {
    **dict.fromkeys(("--host", "--port", "--reuse-port"), "the gateway chooses where llama-server listens"),
    **dict.fromkeys(("--api-key", "--api-key-file"), "the gateway makes a key for each start"),
    **dict.fromkeys(("-m", "--model", "-mu", "--model-url"), "set MODEL_NAME or MODEL_URL"),
    **dict.fromkeys(("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-dr", "--docker-repo"), "set MODEL_HF"),
    **dict.fromkeys(("-a", "--alias"), "the model's id is its alias"),
    **dict.fromkeys(("-c", "--ctx-size"), "set CTX"),
    **dict.fromkeys(("-np", "--parallel"), "set PARALLEL"),
    **dict.fromkeys(("--models-dir", "--models-max", "--models-preset"), "the gateway runs one model in each server"),
    **dict.fromkeys(("--ssl-key-file", "--ssl-cert-file"), "the gateway talks plain HTTP to it"),
    **dict.fromkeys(("--api-prefix", "--path", "--webui", "--ui", "--props"), "only the listed routes are served"),
    **dict.fromkeys(("--webui-mcp-proxy", "--ui-mcp-proxy"), "only the listed routes are served"),
    **dict.fromkeys(("--tools", "--tools-runtime", "-ag", "--agent"), "clients could run programs"),
    **dict.fromkeys(("--mcp-servers-config", "--mcp-servers-json"), "clients could run programs"),
    **dict.fromkeys(("--kv-unified", "-kvu"), "an overflow of one request would end all of them"),
    **dict.fromkeys(("--log-file", "--log-disable"), "its output goes to the gateway's logs"),
    **dict.fromkeys(("-v", "--verbose", "--log-verbose", "--log-prompts-dir"), "it would write prompts into logs"),
}

_VERBOSITY = ("-lv", "--verbosity", "--log-verbosity")
_MOST_VERBOSE = 4

# The flags of a model in the models file go straight to llama-server: there these are the way to say it.
_OF_A_MODEL = frozenset({"-c", "--ctx-size", "-np", "--parallel"})
# What a child's environment must not say, because llama-server takes it for an argument.
_FORBIDDEN_ENV = ("LLAMA_", "AIP_")

# Not every build knows these; one that a build refuses is left out, and the start is tried again.
HINTS = ("--mlock", "--no-mmap")  # of an operator, to builds that may not know them any more: they change no answer
OPTIONAL = ("--no-kv-unified", "--fit", "--no-webui", "--cache-ram", "--metrics", "--slots", "--jinja", *HINTS)
_WITH_VALUE = ("--fit", "--cache-ram")


@dataclass(frozen=True)
class Launch:
    """Everything that decides one start of llama-server."""

    binary: Path
    port: int
    ctx_total: int  # tokens, of all requests together; 0 = the model's flags say it
    parallel: int  # 0 = the model's flags say it, or llama-server chooses
    ngl: int
    threads: int  # 0 = let llama-server choose
    cache_ram_mb: int
    extra_args: str
    api_key: str
    embedding: bool = False
    reranking: bool = False
    batch: int = 0  # tokens that are computed at once; 0 = let llama-server choose
    without: frozenset[str] = frozenset()  # optional flags that this build refused


def check_extra_args(text: str) -> list[str]:
    """A line for each argument in EXTRA_ARGS that must not be there."""
    try:
        words = shlex.split(text)
    except ValueError:
        return []  # which is told where the settings are read
    problems = [f"{word}: {_FORBIDDEN[flag]}" for word in words if (flag := _canonical(word)) in _FORBIDDEN]
    return [f"EXTRA_ARGS has {problem}" for problem in problems + _too_talkative(words)]


def check_flags(flags: Sequence[str]) -> list[str]:
    """A line for each of a model's own flags that must not be there."""
    return [
        f"{word}: {_FORBIDDEN[flag]}"
        for word in flags
        if (flag := _canonical(word)) in _FORBIDDEN and flag not in _OF_A_MODEL
    ] + _too_talkative(flags)


def _too_talkative(flags: Sequence[str]) -> list[str]:
    level = flag_value(flags, *_VERBOSITY)
    if level is None or (level.isdecimal() and int(level) <= _MOST_VERBOSE):
        return []
    return [f"{_VERBOSITY[0]} {level}: must be 0 to {_MOST_VERBOSE}; above that it would write prompts into logs"]


def check_env(names: Iterable[str]) -> list[str]:
    """A line for each variable that a model's `env` must not set."""
    return [
        f"{name}: llama-server would take it for an argument; use flags"
        for name in names
        if name.upper().startswith(_FORBIDDEN_ENV)
    ]


def flag_value(flags: Sequence[str], *names: str) -> str | None:
    """The value of the last of these flags, as `--flag value` or `--flag=value`; None where there is none."""
    found = None
    for index, word in enumerate(flags):
        name, equals, value = word.partition("=")
        if _canonical(name) in names:
            if equals:
                found = value
            elif index + 1 < len(flags):
                found = flags[index + 1]
    return found


def _canonical(word: str) -> str:
    """llama-server itself takes `--api_key` for `--api-key`."""
    flag = word.partition("=")[0]
    return flag.replace("_", "-") if flag.startswith("--") else flag


def build_argv(spec: ModelSpec, model: Path, launch: Launch) -> list[str]:
    """`model` is the file, which for a downloaded model is known only now."""
    argv = [str(launch.binary), "-m", str(model), "--alias", spec.id]
    argv += ["--host", "127.0.0.1", "--port", str(launch.port)]
    if launch.ctx_total:
        argv += ["-c", str(launch.ctx_total)]
    if launch.parallel:
        argv += ["-np", str(launch.parallel)]
    argv += ["-ngl", str(launch.ngl)]
    argv += ["--no-kv-unified", "--fit", "off", "--no-webui", "--metrics", "--slots", "--jinja"]
    argv += ["--cache-ram", str(launch.cache_ram_mb)]
    if launch.threads:
        argv += ["-t", str(launch.threads)]
    if spec.mmproj:
        argv += ["--mmproj", str(spec.mmproj)]
    if launch.reranking:
        argv.append("--reranking")
    elif launch.embedding:
        argv.append("--embedding")
    if launch.batch:
        argv += ["-b", str(launch.batch), "-ub", str(launch.batch)]
    if spec.chat_template_file is not None:
        argv += ["--chat-template-file", str(spec.chat_template_file)]
    elif spec.prompt_template is not None:
        argv += ["--chat-template", spec.prompt_template.jinja()]
    of_the_operator = shlex.split(launch.extra_args) + list(spec.flags)
    return _leave_out(argv, launch.without) + _leave_out(of_the_operator, launch.without.intersection(HINTS))


def build_environment(spec: ModelSpec, inherited: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """The key goes by environment, because arguments can be read by every user of the machine.

    CUDA's devices are counted as NVML counts them, so that what is booked on one is what is used there.
    """
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **inherited, **dict(spec.env), "LLAMA_API_KEY": launch.api_key}


def refused_flag(output: Sequence[str], launch: Launch) -> str | None:
    """The optional flag that this build did not know, from the last lines of its output."""
    for line in output:
        if "invalid argument" in line or "unknown argument" in line:
            return next((flag for flag in OPTIONAL if flag in line.split() and flag not in launch.without), None)
    return None


def _leave_out(argv: Sequence[str], without: frozenset[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in without:
            skip = word in _WITH_VALUE
        else:
            kept.append(word)
    return kept
