"""Every variable: its default as the contract has it, what it takes, and what a wrong value is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.environment import load_settings
from gateway.errors import ConfigError
from gateway.settings import Settings, Variable, variables

HERE = {"DATA_DIR": "/d"}
MIB = 1024 * 1024

# CONTRACT, section 3, with DATA_DIR=/d and nothing else.
DEFAULTS: dict[str, Any] = {
    "MODEL_NAME": None,
    "MODEL_PATH": None,
    "MODEL_URL": None,
    "MODEL_SHA256": None,
    "MODEL_HF": None,
    "LLAMA_URL": None,
    "LLAMA_API_KEY_FILE": None,
    "DATA_DIR": Path("/d"),
    "MODELS_DIR": Path("/d/models"),
    "CONFIG_PATH": None,
    "DEFAULT_MODEL": None,
    "LLAMA_SERVER_PATH": None,
    "CTX": 16384,
    "PARALLEL": None,
    "NGL": 99,
    "THREADS": 0,
    "EXTRA_ARGS": "",
    "PORT": 8000,
    "PORT_HEALTH": 8001,
    "PORT_BACKEND": 8080,
    "HOST": "0.0.0.0",
    "AUTH_ENABLED": True,
    "AUTH_KEYS_FILE": Path("/d/api_keys.txt"),
    "API_KEY": None,
    "METRICS_AUTH_ENABLED": False,
    "MAX_REQUESTS_PER_MINUTE": 100,
    "MAX_TOKENS_PER_MINUTE": 0,
    "TRUSTED_PROXIES": (),
    "CORS_ORIGINS": (),
    "MAX_CONCURRENT_REQUESTS": None,
    "MAX_QUEUE_SIZE": 128,
    "QUEUE_TIMEOUT_SECONDS": 300,
    "MAX_QUEUED_BYTES": 268435456,
    "MAX_REQUEST_BODY_SIZE": 10485760,
    "MAX_HEADERS": 64,
    "MAX_HEADER_LINE_SIZE": 8192,
    "MAX_REQUEST_LINE_SIZE": 8192,
    "REQUEST_TIMEOUT": 600,
    "BACKEND_CONNECT_TIMEOUT": 10,
    "CLIENT_HEADER_TIMEOUT": 30,
    "CLIENT_BODY_TIMEOUT": 60,
    "MAX_TOKENS_DEFAULT": None,
    "MAX_TOKENS_LIMIT": None,
    "SSE_PING_SECONDS": 10,
    "ALLOW_REMOTE_MEDIA": False,
    "VRAM_BUDGET_MB": 0,
    "VRAM_MARGIN_MB": 512,
    "IDLE_TIMEOUT_SECONDS": 0,
    "AUDIT_DB": Path("/d/corral.sqlite"),
    "AUDIT_CONTENT": "off",
    "AUDIT_RETENTION_DAYS": 30,
    "CACHE_ENABLED": False,
    "CACHE_TTL_SECONDS": 3600,
    "CACHE_EMBEDDING_MODEL": None,
    "CACHE_SIMILARITY": None,
    "REDIS_URL": None,
    "NATS_URL": None,
    "NATS_CREDS_FILE": None,
    "NATS_KEY_ID": None,
    "WORKER_MODE": "http",
    "LOG_FORMAT": "text",
    "LOG_LEVEL": "info",
    "LOG_NAME": "llama",
    "WORKER_TYPE": None,
    "DEBUG_SHELL": False,
    "STATE_FILE": None,
    "HEALTH_MODE": "readiness",
    "HEALTH_STALE_SECONDS": 10,
    "SHUTDOWN_GRACE_SECONDS": 30,
}
CHOICES = {
    "AUDIT_CONTENT": {"off", "hash", "full"},
    "WORKER_MODE": {"http", "nats", "runpod"},
    "LOG_FORMAT": {"text", "json"},
    "LOG_LEVEL": {"debug", "info", "warning", "error"},
    "HEALTH_MODE": {"readiness", "liveness"},
}
ALL = variables()


def load(**environ: str) -> Settings:
    return load_settings(HERE | environ, None)


def value(name: str, text: str) -> Any:
    return getattr(load(**{name: text}), name.lower())


def problems(**environ: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(**environ)
    assert all("\n" not in line for line in raised.value.problems)
    return raised.value.problems


def problem(name: str, text: str) -> str:
    (line,) = problems(**{name: text})
    return line


def kind(*kinds: type) -> list[Variable]:
    return [var for var in ALL if var.kind in kinds]


def names(vars: list[Variable]) -> list[str]:
    return [var.name for var in vars]


def test_the_variables_and_their_defaults_are_the_contracts() -> None:
    settings = load()
    assert {var.name: getattr(settings, var.name.lower()) for var in ALL} == DEFAULTS
    assert settings.explicit == {"DATA_DIR"} and settings.warnings == ()
    assert {var.name: set(var.choices) for var in ALL if var.choices} == CHOICES


@pytest.mark.parametrize("var", ALL, ids=names(ALL))
def test_every_variable_says_what_it_is(var: Variable) -> None:
    assert var.help and len(var.help) < 80 and "\n" not in var.help
    assert var.shown_default and "None" not in var.shown_default and "()" not in var.shown_default


@pytest.mark.parametrize("var", kind(int, float), ids=names(kind(int, float)))
def test_numbers_and_their_bounds(var: Variable) -> None:
    whole = var.kind is int
    assert var.low is not None, "every number has a least value"
    step = 1 if whole else 0.0001
    good = [var.low] + ([var.high] if var.high is not None else [])
    bad = [var.low - step] + ([var.high * 2 + 1] if var.high is not None else [])
    for number in good:
        text = str(int(number)) if whole else repr(float(number))
        clash = {"PORT": "9"} if var.name == "PORT_BACKEND" else {}
        got = getattr(load(**{var.name: f" {text} "}, **clash), var.name.lower())
        assert got == number and type(got) is var.kind
    for text in [str(int(number)) if whole else repr(number) for number in bad] + ["x", "nan", "--5", "1e999x"]:
        line = problem(var.name, text)
        assert line.startswith(f"{var.name}={text!r}: must be a{' whole' if whole else ''} number")
        assert f"{var.low:g}" in line and (var.high is None or f"{var.high:.15g}" in line)
    if whole:
        assert "whole number" in problem(var.name, "1.5")
    elif var.high is not None:
        assert problem(var.name, "inf")


@pytest.mark.parametrize("var", kind(bool), ids=names(kind(bool)))
def test_switches(var: Variable) -> None:
    assert {value(var.name, text) for text in ("true", "TRUE", "1", "yes", "on", " True ")} == {True}
    assert {value(var.name, text) for text in ("false", "False", "0", "no", "off")} == {False}
    for text in ("maybe", "2", "tru"):
        assert problem(var.name, text) == f"{var.name}={text!r}: must be true or false"


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    for choice in CHOICES[name]:
        assert value(name, choice.upper()) == choice
    line = problem(name, "nothing of this")
    assert line.startswith(f"{name}='nothing of this': must be one of ")
    assert all(choice in line for choice in CHOICES[name])
    near = max(CHOICES[name], key=len)
    assert problem(name, near[:-1]).endswith(f"(did you mean {near}?)")


@pytest.mark.parametrize("var", kind(Path), ids=names(kind(Path)))
def test_paths(var: Variable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert value(var.name, " /a b/c ") == Path("/a b/c")
    assert value(var.name, "~/x") == Path("/home/me/x")


TEXTS = {
    "MODEL_URL": "https://host/model.gguf?token=1",
    "LLAMA_URL": "http://host:8080",
    "MODEL_SHA256": "Ab" * 32,
    "EXTRA_ARGS": "-fa on --chat-template 'a b'",
    "LOG_NAME": "my.log-1_x",
    "WORKER_TYPE": "a.b-c_d",
    "HOST": "my-host.local",
    "REDIS_URL": "rediss://user:word@host:6380/1",
}


@pytest.mark.parametrize("var", [var for var in kind(str) if not var.choices], ids=lambda var: str(var.name))
def test_texts(var: Variable) -> None:
    text = TEXTS.get(var.name, "some thing")
    assert value(var.name, f"  {text} ") == text
    assert value(var.name, "   ") == DEFAULTS[var.name]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("LLAMA_URL", "host:8080", "must begin with http:// or https://"),
        ("LLAMA_URL", "http://", "must begin with http:// or https://"),
        ("LLAMA_URL", "unix:///x", "must begin with http:// or https://"),
        ("LLAMA_URL", "http://127.0.0.1:99999", "a port must be from 1 to 65535"),
        ("LLAMA_URL", "http://h:abc", "a port must be from 1 to 65535"),
        ("LLAMA_URL", "http://h:0/x", "a port must be from 1 to 65535"),
        ("LLAMA_URL", "http://:80", "and a host"),
        ("LLAMA_URL", "http://[::1", "and a host"),
        ("LLAMA_URL", "http://a b", "and a host"),
        ("MODEL_URL", "http://localhost:99999/a.gguf", "a port must be from 1 to 65535"),
        ("CACHE_EMBEDDING_MODEL", "http://h:abc", "a port must be from 1 to 65535"),
        *(("HOST", host, "must be an address or a name") for host in ("300.1.1.1", "::1::", "[::]", "http://h", "a b")),
        ("MODEL_URL", "ftp://x/y.gguf", "must begin with http:// or https://"),
        ("MODEL_SHA256", "a" * 63, "must be 64 hexadecimal digits"),
        ("MODEL_SHA256", "g" * 64, "must be 64 hexadecimal digits"),
        ("LOG_NAME", "../up", "must be letters"),
        ("LOG_NAME", "a b", "must be letters"),
        ("LOG_NAME", "..", "must be letters"),
        ("LOG_NAME", "_boot", "and not _boot"),
        ("REDIS_URL", "localhost:6379", "must be redis://"),
        ("REDIS_URL", "redis://:hunter33@host:port", "must be redis://"),
        ("WORKER_TYPE", "a/b", "must be letters"),
        ("PORT_BACKEND", "8000", "must differ from PORT"),
        ("TRUSTED_PROXIES", "10.0.0.0/8,nonsense", "TRUSTED_PROXIES='nonsense': must be addresses or networks"),
        ("TRUSTED_PROXIES", "10.0.0.0/33", "must be addresses or networks"),
        ("CORS_ORIGINS", "https://a.test,b.test", "CORS_ORIGINS='b.test': must be * or scheme://host"),
        ("CORS_ORIGINS", "https://a.test/path", "without a path"),
        ("EXTRA_ARGS", "--lora 'unclosed", "No closing quotation"),
    ],
)
def test_values_that_do_not_fit(name: str, text: str, says: str) -> None:
    line = problem(name, text)
    assert line.startswith(f"{name}=") and says in line


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("CORS_ORIGINS", " https://a.test , *,, tauri://localhost:1 ", ("https://a.test", "*", "tauri://localhost:1")),
        ("TRUSTED_PROXIES", "10.0.0.1,10.1.2.3/8,::1,fd00::/8", ("10.0.0.1", "10.1.2.3/8", "::1", "fd00::/8")),
        ("CORS_ORIGINS", ",", ()),
    ],
)
def test_lists(name: str, text: str, values: tuple[str, ...]) -> None:
    assert value(name, text) == values


@pytest.mark.parametrize("host", ["0.0.0.0", "127.1", "0", "::", "::1", "fe80::1%eth0", "localhost", "my_host.local"])
def test_where_it_may_listen(host: str) -> None:
    assert value("HOST", host) == host


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://host:8080/v1", "http://host:8080"),
        ("http://host:8080/v1/", "http://host:8080"),
        ("https://host/llama/v1", "https://host/llama"),
        ("http://host/v10", None),
        ("http://host/v1/x", None),
        ("http://v1", None),
    ],
)
def test_the_base_of_OpenAIs_clients_is_taken_for_the_server_behind_it(url: str, address: str | None) -> None:
    settings = load(LLAMA_URL=url)
    assert settings.llama_url == (address or url)
    assert [line.partition(",")[0] for line in settings.warnings] == ["LLAMA_URL ends in /v1"] * bool(address)


def test_a_file_of_models_may_have_a_space_in_its_address() -> None:
    assert value("MODEL_URL", "http://host/a b.gguf") == "http://host/a b.gguf"


def test_all_problems_are_told_at_once() -> None:
    wrong = {"PORT": "x", "CTX": "-1", "AUTH_ENABLED": "maybe", "LOG_LEVEL": "inof", "MODEL_SHA256": "z", "HOST": "ok"}
    assert [line.partition("=")[0] for line in problems(**wrong)] == [
        "CTX", "PORT", "AUTH_ENABLED", "LOG_LEVEL", "MODEL_SHA256",
    ]  # fmt: skip


CHECKED = [*names(kind(int, float, bool, tuple)), *CHOICES, "MODEL_URL", "LLAMA_URL", "MODEL_SHA256", "LOG_NAME"]


@pytest.mark.parametrize("name", CHECKED)
def test_a_hostile_value_makes_no_second_line(name: str) -> None:
    line = problem(name, "a\nPORT=1: forged\r\x1b[2K")
    assert line.isprintable() and line.startswith(f"{name}=")


def test_secrets_are_in_no_message_and_no_repr() -> None:
    secrets = {
        "MODEL_URL": "https://user:hunter22@host/m.gguf",
        "API_KEY": "sk-1234567890abcdef",
        "REDIS_URL": "redis://:hunter33@host",
        "NATS_URL": "nats://hunter44@host",
    }
    assert {var.name for var in ALL if var.secret} == secrets.keys()
    shown = repr(load(**secrets))
    assert not [secret for secret in secrets.values() if secret in shown]
    assert "hunter" not in problem("MODEL_URL", "ftp://user:hunter22@host/m.gguf")
    assert "hunter" not in problem("LLAMA_URL", "http://user:hunter22@host:0")
    assert "hunter" not in str(problems(**{**secrets, "PORT": "x", "MODEL_URL": "hunter"}))
