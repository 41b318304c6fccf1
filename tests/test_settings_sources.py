"""Where values come from: real variables, `.env`, the models file, defaults; older names; the platform."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.environment import (
    child_environment,
    detect_data_dir,
    hub_caches,
    instance_name,
    load_settings,
    read_settings,
    secrets_in_force,
)
from gateway.errors import ConfigError
from gateway.settings import Settings, variables


def tree(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def load(environ: Mapping[str, str], dotenv: Path | None = None, file: Mapping[str, Any] | None = None) -> Settings:
    return load_settings({"DATA_DIR": "/d"} | dict(environ), dotenv, file)


@pytest.fixture
def dotenv(tmp_path: Path) -> Path:
    path = tmp_path / ".env"
    path.write_text(
        "# comment\nexport PORT=4001\nHOST='my-host'\nLOG_NAME=\"x\"\nDEFAULT_MODEL=$HOME\nCTX=\nNGL = 7 # few\n"
    )
    return path


def test_the_dotenv_file_is_read(dotenv: Path) -> None:
    settings = load({}, dotenv)
    assert (settings.port, settings.host, settings.log_name, settings.ngl) == (4001, "my-host", "x", 7)
    assert settings.default_model == "$HOME"  # nothing is put in
    assert settings.ctx == 16384  # empty is unset
    assert settings.explicit == {"DATA_DIR", "PORT", "HOST", "LOG_NAME", "DEFAULT_MODEL", "NGL"}
    assert load({}, dotenv.parent / "none").port == 8000


def test_the_dotenv_file_of_the_working_directory_is_the_default(dotenv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dotenv.parent)
    monkeypatch.setenv("PORT", "4002")
    monkeypatch.delenv("HOST", raising=False)
    settings = load_settings()
    assert (settings.port, settings.host) == (4002, "my-host")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"PORT=1\nHOST=caf\xe9\n", "it is not UTF-8"), (None, "Permission denied")],
)
def test_a_dotenv_file_that_cannot_be_read_stops_the_start(
    content: bytes | None, says: str, dotenv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    if content is None:
        monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    else:
        dotenv.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load({}, dotenv)
    assert raised.value.problems == [f"{dotenv}: cannot be read: {says}"]


def test_lines_of_the_dotenv_file_that_say_nothing_are_told(dotenv: Path) -> None:
    dotenv.write_bytes(b"\xef\xbb\xbfPORT=4003\r\n# fine\n\nAUTH_ENABLED false\nNGL\nHOST=h\n")
    settings = load({}, dotenv)
    assert (settings.port, settings.host, settings.auth_enabled) == (4003, "h", True)
    assert settings.warnings == tuple(f"{dotenv} line {n}: is no NAME=value, so it does not count" for n in (4, 5))


IN_FILE = {var.name: var for var in variables() if var.file}


def sample(name: str, number: int) -> str:
    kind = IN_FILE[name].kind
    if kind is bool:
        return ("true", "false", "true")[number]
    if kind in (int, float):
        return str(4 + number if name in ("PARALLEL", "THREADS") else 4100 + number)
    if name == "HOST":
        return f"host-{number}"
    return f"{'redis' if name == 'REDIS_URL' else 'http'}://{'abc'[number]}:1"


@pytest.mark.parametrize("name", IN_FILE)
def test_a_variable_wins_over_dotenv_that_wins_over_the_models_file(name: str, tmp_path: Path) -> None:
    def got(**environ: str) -> Any:
        return getattr(load(environ, dotenv, file), name.lower())

    def parsed(number: int) -> Any:
        return getattr(load({name: sample(name, number)}), name.lower())

    where = IN_FILE[name].file
    assert where
    dotenv = tmp_path / ".env"
    file = tree(where, sample(name, 0))
    assert got() == parsed(0)
    dotenv.write_text(f"{name}={sample(name, 1)}\n")
    assert got() == parsed(1)
    assert got(**{name: ""}) == parsed(1)  # as compose files pass what is not set
    assert got(**{name: sample(name, 2)}) == parsed(2)
    dotenv.write_text("")
    file = tree(where, None)
    assert got() == getattr(load({}), name.lower())
    file = tree(where, "")
    assert got() == getattr(load({}), name.lower())


@pytest.mark.parametrize(
    ("where", "value", "name", "becomes"),
    [
        ("redis.enable_cache", True, "cache_enabled", True),
        ("api.cors_origins", ["https://a.test", "*"], "cors_origins", ("https://a.test", "*")),
        ("api.cors_origins", [], "cors_origins", ()),
        ("system.queue_timeout_sec", 1.5, "queue_timeout_seconds", 1.5),
        ("system.base_models_path", "/m", "models_dir", Path("/m")),
        ("api", "not a mapping", "port", 8000),
    ],
)
def test_values_of_a_models_file(where: str, value: Any, name: str, becomes: Any) -> None:
    assert getattr(load({}, None, tree(where, value)), name) == becomes


def test_a_wrong_value_in_the_models_file_is_named_by_its_place() -> None:
    file = {"api": {"port": True}, "rate_limit": {"requests_per_minute": -1}, "redis": {"url": ""}}
    with pytest.raises(ConfigError) as raised:
        load({}, None, file)
    assert [line.partition(": ")[0] for line in raised.value.problems] == [
        "api.port='true'",
        "rate_limit.requests_per_minute='-1'",
    ]
    assert load({"PORT": "1", "MAX_REQUESTS_PER_MINUTE": "2"}, None, file).port == 1  # what loses is not looked at


@pytest.mark.parametrize(
    ("environ", "name", "becomes", "warnings"),
    [
        ({"BASE_MODELS_PATH": "/m"}, "models_dir", Path("/m"), 0),
        ({"BASE_MODELS_PATH": "/m", "MODELS_DIR": "/n"}, "models_dir", Path("/n"), 0),
        ({"GATEWAY_PORT": "9"}, "port", 9, 1),
        ({"GATEWAY_PORT": "9", "PORT": "8"}, "port", 8, 0),
        ({"GATEWAY_PORT": "9", "PORT": " "}, "port", 9, 1),
        ({"BACKEND_PORT": "9"}, "port_backend", 9, 1),
        ({"BACKEND_PORT": "", "GATEWAY_PORT": " "}, "port", 8000, 0),
    ],
)
def test_older_names_keep_working(environ: dict[str, str], name: str, becomes: Any, warnings: int) -> None:
    settings = load(environ)
    assert getattr(settings, name) == becomes
    assert len(settings.warnings) == warnings
    for line in settings.warnings:
        assert line in ("GATEWAY_PORT is deprecated: use PORT", "BACKEND_PORT is deprecated: use PORT_BACKEND")


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"GATEWAY_PORT": "abc"}, "GATEWAY_PORT='abc': must be a whole number from 1 to 65535"),
        ({"BACKEND_PORT": "8000"}, "BACKEND_PORT=8000: must differ from PORT"),
        ({"GATEWAY_PORT": "9", "PORT_BACKEND": "9"}, "PORT_BACKEND=9: must differ from GATEWAY_PORT"),
        ({"BASE_MODELS_PATH": "~nobody-of-that-name/x"}, "BASE_MODELS_PATH='~nobody-of-that-name/x': there is no such"),
    ],
)
def test_a_wrong_value_is_told_under_the_name_that_was_set(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(environ)
    assert len(raised.value.problems) == 1 and raised.value.problems[0].startswith(says)


@pytest.mark.parametrize(
    ("environ", "conflict"),
    [
        ({"STATE_FILE": "/s"}, True),  # what entrypoint.sh hands on with a health server
        ({}, False),
        ({"STATE_FILE": "/s", "WORKER_MODE": "nats"}, False),  # listens nowhere
        ({"STATE_FILE": "/s", "PORT_HEALTH": "8002"}, False),
        ({"STATE_FILE": "/s", "PORT": "8001"}, False),  # one port for both, and the entrypoint knows it
    ],
)
def test_the_models_file_may_not_give_away_the_health_servers_port(environ: dict[str, str], conflict: bool) -> None:
    _, problems = read_settings({"DATA_DIR": "/d"} | environ, None, {"api": {"port": 8001}}, "/f.yaml: ")
    says = "/f.yaml: api.port=8001: must differ from PORT_HEALTH, where the health server, which reads no models file, "
    assert [line[: len(says)] for line in problems] == [says] * conflict


def test_an_older_name_in_the_environment_wins_over_the_new_one_in_dotenv(dotenv: Path) -> None:
    settings = load({"GATEWAY_PORT": "9"}, dotenv)
    assert (settings.port, len(settings.warnings)) == (9, 1)


@pytest.mark.parametrize(
    ("environ", "health"),
    [
        ({}, 8001),
        ({"PORT": "80"}, 8001),
        ({"RUNPOD_POD_ID": "p"}, 8000),
        ({"RUNPOD_ENDPOINT_ID": "e", "PORT": "80"}, 80),
        ({"RUNPOD_POD_ID": "p", "PORT": "80", "PORT_HEALTH": "81"}, 81),
        ({"RUNPOD_POD_ID": ""}, 8001),
    ],
)
def test_on_runpod_an_unset_health_port_is_the_port(environ: dict[str, str], health: int) -> None:
    assert load(environ).port_health == health


@pytest.mark.parametrize(("port", "backend"), [("8080", 8081), ("8081", 8080), ("8000", 8080)])
def test_the_default_of_the_backends_port_makes_room_for_the_gateway(port: str, backend: int) -> None:
    assert load({"PORT": port}).port_backend == backend


@pytest.mark.parametrize(
    ("there", "data"),
    [
        ({"/runpod-volume", "/workspace", "/data"}, "/runpod-volume"),
        ({"/workspace", "/data"}, "/workspace"),
        ({"/data"}, "/data"),
        (set(), "/data"),
    ],
)
def test_the_platforms_volume_is_found(there: set[str], data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", lambda path: str(path) in there)
        assert detect_data_dir() == Path(data)
        settings = load_settings({}, None)
        explicit = load_settings({"DATA_DIR": "/mine"}, None)
    for found, folder in ((settings, data), (explicit, "/mine")):
        assert found.data_dir == Path(folder)
        assert found.models_dir == Path(folder, "models")
        assert found.auth_keys_file == Path(folder, "api_keys.txt")
        assert found.audit_db == Path(folder, "corral.sqlite")


def test_a_models_file_is_found_in_the_data_folder(tmp_path: Path) -> None:
    def found() -> Path | None:
        return load({"DATA_DIR": str(tmp_path)}).config_path

    assert found() is None
    for end in ("json", "yml", "yaml"):
        (tmp_path / f"config.{end}").touch()
        assert found() == tmp_path / f"config.{end}"
    assert load({"DATA_DIR": str(tmp_path), "CONFIG_PATH": "/x.yaml"}).config_path == Path("/x.yaml")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({}, False),
        ({"CONFIG_PATH": "/x", "MODELS_DIR": "/m", "DEFAULT_MODEL": "x"}, False),
        *(({name: "https://x/y"}, True) for name in ("MODEL_NAME", "MODEL_PATH", "MODEL_URL", "MODEL_HF", "LLAMA_URL")),
    ],
)
def test_a_named_model_means_single_model_mode(environ: dict[str, str], named: bool) -> None:
    assert load(environ).named_model is named


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("HF_HOME", "HF_HUB_CACHE", "RUNPOD_POD_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    yield monkeypatch


def test_what_else_is_read_from_the_environment(bare: pytest.MonkeyPatch) -> None:
    runpod = Path("/runpod-volume/huggingface-cache/hub")
    assert hub_caches() == (runpod, Path("/home/me/.cache/huggingface/hub"))
    bare.setenv("HF_HOME", "/hf")
    assert hub_caches() == (runpod, Path("/hf/hub"))
    bare.setenv("HF_HUB_CACHE", "/hub")
    assert hub_caches() == (runpod, Path("/hub"))
    assert instance_name()
    bare.setenv("RUNPOD_POD_ID", "../pod 1\n")
    assert instance_name() == "---pod-1-"
    bare.setenv("CUDA_X", "1")
    bare.setenv("XCUDA", "1")
    assert child_environment(("HOME",), ("CUDA",)) == {"HOME": "/home/me", "CUDA_X": "1"}


def test_the_secrets_in_force_are_told_to_the_logs_longest_first() -> None:
    settings = load({"API_KEY": "sk-aaaaaaaa, sk-bbbbbbbbbbbb,short", "REDIS_URL": "redis://:pw@h", "HOST": "12345678"})
    assert secrets_in_force(settings) == [
        "sk-aaaaaaaa, sk-bbbbbbbbbbbb,short",
        "sk-bbbbbbbbbbbb",
        "redis://:pw@h",
        "sk-aaaaaaaa",
    ]
    assert secrets_in_force(load({})) == []
