"""Who is measured, and how each is started in front of the stand-in upstream."""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environments
from benchmarks.processes import Command, free_port

ROOT = Path(__file__).parents[1]
MODEL = "stand-in"


@dataclass(frozen=True)
class Site:
    """Where a contender is started, and what it is to stand in front of."""

    folder: Path
    port: int
    upstream: int
    key: str  # the secret that its clients send

    @property
    def upstream_url(self) -> str:
        return f"http://127.0.0.1:{self.upstream}"


@dataclass(frozen=True)
class Contender:
    """`command` is None for no proxy at all; `lacking` says why it cannot be measured here, or nothing."""

    name: str
    title: str
    command: Callable[[Site], Command] | None
    lacking: Callable[[], str] = lambda: ""
    version: Callable[[], str] = lambda: ""
    ready: str = "/health"
    most_streams: int = 1000  # more than that would saturate it many times over


def corral(site: Site) -> Command:
    """With all that it has: keys, CORS, limits, metrics per key, records, logs, media shield, quarantine, health."""
    keys = site.folder / "api_keys.txt"
    site.folder.mkdir(parents=True, exist_ok=True)
    others = [f"user{number}:sk-user{number}-{secrets.token_urlsafe(32)}:1000" for number in range(100)]
    keys.write_text("\n".join([*others, f"bench:{site.key}:1000000 tpm=1000000000 concurrency=4096", ""]))
    keys.chmod(0o600)
    return Command(
        [str(ROOT / "entrypoint.sh")],
        {
            "DATA_DIR": str(site.folder / "data"),
            "LLAMA_URL": site.upstream_url,
            "HOST": "127.0.0.1",
            "PORT": str(site.port),
            "PORT_HEALTH": str(free_port()),
            "AUTH_KEYS_FILE": str(keys),
            "METRICS_AUTH_ENABLED": "true",
            "CORS_ORIGINS": "https://app.example,https://other.example",
            "MAX_REQUESTS_PER_MINUTE": "10000000",
            "MAX_TOKENS_PER_MINUTE": "10000000000",
            "MAX_CONCURRENT_REQUESTS": "2048",
            "MAX_QUEUE_SIZE": "4096",
            "AUDIT_CONTENT": "hash",
        },
    )


NGINX = """
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    client_max_body_size 64m;
    keepalive_requests 1000000;
    tcp_nodelay on;
    upstream llama {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://llama;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def nginx(site: Site) -> Command:
    site.folder.mkdir(parents=True, exist_ok=True)
    settings = site.folder / "nginx.conf"
    settings.write_text(NGINX.format(port=site.port, upstream=site.upstream))
    return Command([_nginx_path(), "-p", str(site.folder), "-e", "stderr", "-c", str(settings)])


def _nginx_path() -> str:
    return shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin:/usr/bin:/usr/local/bin") or ""


def plain_aiohttp(site: Site) -> Command:
    script = Path(__file__).parent / "peers" / "plain_aiohttp.py"
    return Command([sys.executable, str(script), str(site.port), site.upstream_url])


def vllm_router(site: Site) -> Command:
    arguments = {
        "--host": "127.0.0.1",
        "--port": str(site.port),
        "--worker-urls": site.upstream_url,
        "--policy": "round_robin",
        "--max-concurrent-requests": "4096",
        "--max-payload-size": str(64 * 1024 * 1024),
        "--prometheus-port": str(free_port()),
        "--log-level": "warning",
    }
    program = str(environments.program("vllm-router", "vllm-router"))
    return Command([program, *(word for pair in arguments.items() for word in pair)])


LITELLM = """
model_list:
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "{url}/v1", api_key: none}}
litellm_settings: {{telemetry: false, request_timeout: 600}}
"""


def litellm(site: Site) -> Command:
    site.folder.mkdir(parents=True, exist_ok=True)
    settings = site.folder / "config.yaml"
    settings.write_text(LITELLM.format(model=MODEL, url=site.upstream_url))
    program = str(environments.program("litellm", "litellm"))
    return Command(
        [program, "--config", str(settings), "--host", "127.0.0.1", "--port", str(site.port), "--num_workers", "1"],
        {
            "LITELLM_MASTER_KEY": site.key,
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
    )


LLAMA_SWAP = """
models:
  {model}: {{proxy: "{url}", cmd: "sleep 1000000", checkEndpoint: /health}}
"""


def llama_swap(site: Site) -> Command:
    site.folder.mkdir(parents=True, exist_ok=True)
    settings = site.folder / "config.yaml"
    settings.write_text(LLAMA_SWAP.format(model=MODEL, url=site.upstream_url))
    program = shutil.which("llama-swap") or ""
    return Command([program, "--config", str(settings), "--listen", f"127.0.0.1:{site.port}"])


def _nginx_lacking() -> str:
    return "" if _nginx_path() else "nginx is not installed"


def _llama_swap_lacking() -> str:
    return "" if shutil.which("llama-swap") else "llama-swap is not on PATH"


ALL = (
    Contender("direct", "no proxy", None),
    Contender("nginx", "nginx", nginx, _nginx_lacking, lambda: environments.first_line(_nginx_path(), "-v")),
    Contender("corral", "Corral", corral, ready="/readyz", version=lambda: environments.revision(ROOT)),
    Contender(
        "aiohttp", "plain aiohttp", plain_aiohttp, version=lambda: environments.installed(sys.executable, "aiohttp")
    ),
    Contender(
        "vllm-router",
        "vllm-router",
        vllm_router,
        lambda: environments.lacking("vllm-router", "vllm-router"),
        lambda: environments.installed(environments.program("vllm-router", "python"), "vllm-router"),
    ),
    Contender(
        "litellm",
        "LiteLLM proxy",
        litellm,
        lambda: environments.lacking("litellm", "litellm[proxy]"),
        lambda: environments.installed(environments.program("litellm", "python"), "litellm"),
        ready="/health/liveliness",
        most_streams=64,
    ),
    Contender(
        "llama-swap",
        "llama-swap",
        llama_swap,
        _llama_swap_lacking,
        lambda: environments.first_line(shutil.which("llama-swap") or "", "--version"),
    ),
)
QUICK = ("direct", "nginx", "corral", "aiohttp")
