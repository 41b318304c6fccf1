"""What single values cannot show: settings that do not fit each other, and texts with a form of their own."""

from __future__ import annotations

import ipaddress
import re
import shlex
import socket
import urllib.parse

from gateway.settings import Settings

HTTP_URL = "must begin with http:// or https:// and a host; a port must be from 1 to 65535"


def cross_check(settings: Settings) -> list[str]:
    """A line for each problem."""
    problems = [
        f"{settings.told_as(name)}={shown}: {allowed}"
        for name, shown, wrong, allowed in (
            (
                "PORT_BACKEND",
                settings.port_backend,
                settings.port_backend == settings.port,
                f"must differ from {settings.told_as('PORT')}",
            ),
            (
                "PORT",
                settings.port,
                _is_health_servers(settings),
                "must differ from PORT_HEALTH, where the health server, which reads no models file, listens already; "
                f"for one port for both set PORT={settings.port}",
            ),
            (
                "LLAMA_URL",
                repr(without_password(settings.llama_url or "")),
                not is_http_url(settings.llama_url or "http://x"),
                HTTP_URL,
            ),
            (
                "MODEL_URL",
                "…",
                not is_http_url((settings.model_url or "http://x").replace(" ", "%20")),
                HTTP_URL,
            ),
            (
                "CACHE_EMBEDDING_MODEL",
                repr(without_password(settings.cache_embedding_model or "")),
                (settings.cache_embedding_model or "").startswith(("http://", "https://"))
                and not is_http_url(settings.cache_embedding_model or ""),
                HTTP_URL,
            ),
            (
                "MODEL_SHA256",
                repr(settings.model_sha256),
                not re.fullmatch(r"[0-9a-fA-F]{64}", settings.model_sha256 or "0" * 64),
                "must be 64 hexadecimal digits",
            ),
            (
                "HOST",
                repr(settings.host),
                not _is_host(settings.host),
                "must be an address or a name, such as 0.0.0.0, :: or localhost",
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


def _is_health_servers(settings: Settings) -> bool:
    """entrypoint.sh starts none where both ports are one, but of a models file it knows nothing."""
    in_file = settings.told_as("PORT").endswith("api.port")
    has_one = settings.state_file is not None and settings.worker_mode == "http"
    return in_file and has_one and settings.port == settings.port_health


def is_http_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port, or an address in brackets
        return False
    # urlsplit itself would leave out line ends, wherever they stand
    return named and parts.scheme in ("http", "https") and url.isprintable() and " " not in url


def without_v1(url: str) -> str:
    """A server's own address where `url` is the base that OpenAI's clients are given: our paths begin with /v1."""
    return re.sub(r"(?<=[^/])/v1/*$", "", url)


def without_password(url: str) -> str:
    return re.sub(r"(?<=://)[^/]*@", "", url)


def _is_host(host: str) -> bool:
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)  # with a zone, too
        elif re.fullmatch(r"[0-9.]+", host):
            socket.inet_aton(host)  # takes what the system takes: 127.1, 0
        else:
            return re.fullmatch(r"[A-Za-z0-9._-]+", host) is not None
    except (ValueError, OSError):
        return False
    return True


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
        f"{settings.told_as('CORS_ORIGINS')}={origin!r}: must be * or scheme://host[:port] without a path"
        for origin in settings.cors_origins
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin, re.IGNORECASE)
    ]


def _check_extra_args(settings: Settings) -> list[str]:
    try:
        shlex.split(settings.extra_args)
    except ValueError as error:
        return [f"EXTRA_ARGS={settings.extra_args!r}: {error}"]
    return []
