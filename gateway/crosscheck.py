"""What single values cannot show: settings that do not fit each other, and texts with a form of their own."""

from __future__ import annotations

import ipaddress
import re
import shlex
import urllib.parse

from gateway.settings import Settings


def cross_check(settings: Settings) -> list[str]:
    """A line for each problem."""
    problems = [
        f"{name}={shown}: {allowed}"
        for name, shown, wrong, allowed in (
            (
                "PORT_BACKEND",
                settings.port_backend,
                settings.port_backend == settings.port,
                "must differ from PORT",
            ),
            (
                "LLAMA_URL",
                repr(settings.llama_url),
                not re.match(r"https?://[^/\s]+", settings.llama_url or "http://x"),
                "must begin with http:// or https://",
            ),
            (
                "MODEL_URL",
                "…",
                not re.match(r"https?://[^/\s]+", settings.model_url or "http://x"),
                "must begin with http:// or https://",
            ),
            (
                "MODEL_SHA256",
                repr(settings.model_sha256),
                not re.fullmatch(r"[0-9a-fA-F]{64}", settings.model_sha256 or "0" * 64),
                "must be 64 hexadecimal digits",
            ),
            (
                "LOG_NAME",
                repr(settings.log_name),
                not re.fullmatch(r"(?!\.+$|_boot$)[A-Za-z0-9._-]+", settings.log_name),
                "must be letters, digits, '.', '-' or '_', and not _boot",
            ),
            (
                "REDIS_URL",
                "…",
                not _is_redis(settings.redis_url or "redis://x"),
                "must be redis://[user:password@]host[:port][/db], rediss://… or unix://…",
            ),
            (
                "NATS_URL",
                "…",
                not _is_nats(settings.nats_url or "nats://x"),
                "must be nats://host:4222, or several of these with commas between them",
            ),
            (
                "WORKER_TYPE",
                repr(settings.worker_type),
                not re.fullmatch(r"[A-Za-z0-9._-]+", settings.worker_type or "x"),
                "must be letters, digits, '.', '-' or '_'",
            ),
        )
        if wrong
    ]
    return problems + _check_networks(settings) + _check_origins(settings) + _check_extra_args(settings)


def _is_nats(urls: str) -> bool:
    """As `workers.nats_link.servers_of` takes them."""
    try:
        servers = [url.strip() for url in urls.split(",") if url.strip()] or [""]
        parts = [urllib.parse.urlsplit(server if "://" in server else f"nats://{server}") for server in servers]
        return all(one.scheme in ("nats", "tls", "ws", "wss") and one.hostname and one.port != 0 for one in parts)
    except ValueError:  # the port
        return False


def _is_redis(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("redis", "rediss", "unix") and parts.port != 0
    except ValueError:  # the port
        return False


def _check_networks(settings: Settings) -> list[str]:
    problems = []
    for network in settings.trusted_proxies:
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError:
            problems.append(f"TRUSTED_PROXIES={network!r}: must be addresses or networks such as 10.0.0.0/8")
    return problems


def _check_origins(settings: Settings) -> list[str]:
    return [
        f"CORS_ORIGINS={origin!r}: must be * or scheme://host[:port] without a path"
        for origin in settings.cors_origins
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin, re.IGNORECASE)
    ]


def _check_extra_args(settings: Settings) -> list[str]:
    try:
        shlex.split(settings.extra_args)
    except ValueError as error:
        return [f"EXTRA_ARGS={settings.extra_args!r}: {error}"]
    return []
