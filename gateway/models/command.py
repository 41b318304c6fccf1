"""ModelSpec → llama-server's argv and environment. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
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

# Not every build knows these; one that a build refuses is left out, and the start is tried again.
OPTIONAL = ("--no-kv-unified", "--fit", "--no-webui", "--cache-ram", "--metrics", "--slots", "--jinja")
_WITH_VALUE = ("--fit", "--cache-ram")


@dataclass(frozen=True)
class Launch:
    """Everything that decides one start of llama-server."""

    binary: Path
    port: int
    ctx: int  # of one request, tokens
    parallel: int
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
    return [
        f"EXTRA_ARGS has {word}: {_FORBIDDEN[flag]}"
        for word in shlex.split(text)
        if (flag := _canonical(word)) in _FORBIDDEN
    ]


def _canonical(word: str) -> str:
    """llama-server itself takes `--api_key` for `--api-key`."""
    flag = word.partition("=")[0]
    return flag.replace("_", "-") if flag.startswith("--") else flag


def build_argv(spec: ModelSpec, model: Path, launch: Launch) -> list[str]:
    """`model` is the file, which for a downloaded model is known only now."""
    argv = [str(launch.binary), "-m", str(model), "--alias", spec.id]
    argv += ["--host", "127.0.0.1", "--port", str(launch.port)]
    argv += ["-c", str(launch.ctx * launch.parallel), "-np", str(launch.parallel), "-ngl", str(launch.ngl)]
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
    return _leave_out(argv, launch.without) + shlex.split(launch.extra_args)


def build_environment(inherited: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """The key goes by environment, because arguments can be read by every user of the machine."""
    return {**inherited, "LLAMA_API_KEY": launch.api_key}


def refused_flag(output: Sequence[str], launch: Launch) -> str | None:
    """The optional flag that this build did not know, from the last lines of its output."""
    for line in output:
        if "invalid argument" in line or "unknown argument" in line:
            return next((flag for flag in OPTIONAL if flag in line.split() and flag not in launch.without), None)
    return None


def _leave_out(argv: list[str], without: frozenset[str]) -> list[str]:
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
