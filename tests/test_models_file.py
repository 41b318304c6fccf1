"""The models file as a whole: reading it, its sections, and who wins over it."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.cli import main
from gateway.environment import read_settings
from gateway.errors import ConfigError
from gateway.models.configured.file import read_models_file
from gateway.models.registry import build_registry
from gateway.runtime.configuration import check_configuration
from gateway.settings import Settings
from tests.models_file_kit import Place, place
from tests.test_settings_sources import tree

__all__ = ["place"]

REMOTE = {"models": {"m": {"url": "http://h:1"}}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1, 2]", "must hold sections (api, system, models, redis, rate_limit), not a list"),
        ("just words", "must hold sections (api, system, models, redis, rate_limit), not 'just words'"),
        ("a: [", "is not YAML: while parsing a flow node"),
        ("\tx: 1", "is not YAML: while scanning"),
        ("x: !!python/object:os.system {}", "is not YAML: could not determine a constructor"),
        ("x: !!int ''", "is not YAML: a value cannot be read"),
        ("x: 2020-02-31", "is not YAML: a value cannot be read"),
        ("? [1]\n: 2", "is not YAML: a value cannot be read: unhashable"),
        ("a: &a [*a]", "is not YAML: found unconstructable recursive node"),
        ("a: &a {b: *a}", "is not YAML: found unconstructable recursive node"),
        ("[" * 5000, "is not YAML: "),
        ("x: \x01", "is not YAML: unacceptable character"),
        ("b: &b [" + "x," * 300 + "]\nc: &c [" + "*b," * 300 + "]\n", "holds too much"),
        ("#" * 2**20 + "\n", "is larger than 1 MiB"),
    ],
)
def test_a_file_that_cannot_be_read_at_all(place: Place, text: str, problem: str) -> None:
    (said,) = place.problems(text, CONFIG_PATH=str(place.folder / "config.yaml"))
    assert problem in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1,}', "is not JSON: "),
        ('{"models": {"m": {"slots": NaN}}}', "is not JSON: NaN is no number in JSON"),
        ("[" * 100_000, "is not JSON: "),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON: "),
        ("models: {}", "is not JSON: "),
    ],
)
def test_a_file_that_is_not_JSON(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_models_file(path)
    assert problem in raised.value.problems[0]


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    for name, reason in (("none.yaml", "No such file or directory"), ("latin.yaml", "it is not UTF-8"), ("", "Is a d")):
        with pytest.raises(ConfigError, match=f"cannot be read: {reason}"):
            read_models_file(tmp_path / name)


def test_a_number_that_nothing_can_hold(place: Place) -> None:
    huge = f"0x{'f' * 5000}"
    assert place.problems(f"models: {{m: {{url: 'http://h', defaults: {{seed: {huge}}}}}}}") == [
        "models.m.defaults.seed: is too large a number"
    ]


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_a_key_that_stands_there_twice_is_refused_and_comments_are_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = """{
        "_note": 1, "_note": 2, "api": {"port": 1, "port": 2, "_x": {"y": [1]}},
        "models": {"a": {"slots": 1, "slots": 1, "url": "http://h", "defaults": {"o": [{"x": 1, "x": 1}]}}, "a": {}}
    }"""
    path.write_text(text)
    found = read_models_file(path)
    assert found.problems == (
        f"{path}: api.port: stands there twice",
        f"{path}: models.a: stands there twice",
    )
    path.write_text(text.replace('"a": {}}', '"b": {}}'))
    assert read_models_file(path).problems == (
        f"{path}: api.port: stands there twice",
        f"{path}: models.a.slots: stands there twice",
        f"{path}: models.a.defaults.o[0].x: stands there twice",
    )


def test_YAML_anchors_and_merges_are_no_duplicates(place: Place) -> None:
    text = "_base: &base {slots: 2, pinned: true}\nmodels:\n  a: {<<: *base, slots: 3, url: 'http://h'}\n"
    spec = place.registry(text).specs["a"]
    assert (spec.slots, spec.pinned) == (3, True)
    assert place.problems(text.replace("slots: 3,", "slots: 3, slots: 4,")) == ["models.a.slots: stands there twice"]


def test_keys_are_text_even_where_YAML_makes_them_numbers(place: Place) -> None:
    assert list(place.registry("models:\n  7: {url: 'http://h'}\n  1.5: {url: 'http://h'}\n").specs) == ["7", "1.5"]
    assert place.problems("models:\n  7: {url: 'http://h'}\n  '7': {url: 'http://h'}\n") == [
        "models.7: stands there twice"
    ]
    assert place.problems("on: 1\nmodels: {~: 1, m: {url: 'http://h'}}\n") == [
        "'true': a key must be text; put it in quotes",
        "models.'none': a key must be text; put it in quotes",
    ]


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("modls", {}, ": is not known; did you mean models?"),
        ("zzz", {}, ": is not known; there are api, system, models, redis, rate_limit"),
        ("api", [], ": must be a section with keys, not a list"),
        ("api.prot", 1, ": is not known; did you mean api.port?"),
        ("api.zz", 1, ": is not known; there are port, host, cors_origins"),
        ("api.port", "x", "='x': must be a whole number from 1 to 65535"),
        ("api.port", True, "='true': must be a whole number from 1 to 65535"),
        ("api.port", [1], ": must be a number, not a list"),
        ("api.host", 1.5, ": must be text, not a number"),
        ("api.host", True, ": must be text, not true or false"),
        ("api.cors_origins", {"a": 1}, ": must be a list of texts, not a section"),
        ("api.cors_origins", [1], ": must be a list of texts, not a list"),
        ("system.llama_server_path", 5, ": must be text, not a number"),
        ("system.idle_timeout_sec", "soon", "='soon': must be a number from 0 to 31536000"),
        ("system.max_concurrent_models", 0, ": must be a whole number of at least 1, not 0"),
        ("system.max_concurrent_models", 2.0, ": must be a whole number of at least 1, not 2.0"),
        ("system.max_concurrent_models", True, ": must be a whole number of at least 1, not true"),
        ("system.vram_multiplier", 0.5, ": must be a number from 1 to 10, not 0.5"),
        ("system.vram_multiplier", "1.1", ": must be a number from 1 to 10, not '1.1'"),
        ("system.enable_idle_timeout", "yes", ": must be true or false, not 'yes'"),
        ("system.preload_models", "m", ": must be a list of ids or aliases, or [\"*\"], not 'm'"),
        ("system.preload_models", [1], ': must be a list of ids or aliases, or ["*"], not a list'),
        ("system.preload_models", ["n"], ": 'n' is no model; there are: m"),
        ("system.default_model", "mm", ": 'mm' is no model; did you mean 'm'?"),
        ("system.gpu_devices", [-1], ": must be a list of device numbers such as [0, 1], not a list"),
        ("system.gpu_devices", 0, ": must be a list of device numbers such as [0, 1], not 0"),
        ("system.use_mmap", "no", ": must be true or false, not 'no'"),
        ("system.flash_attention", "maybe", ": must be on, off or auto, not 'maybe'"),
        ("system.flash_atention", "on", ": is not known; did you mean system.flash_attention?"),
        ("system.parallel_requests", 0, "='0': must be a whole number from 1 to 256"),
        ("system.parallel_requests", [1], ": must be a number, not a list"),
        ("api.rate_limit", {"requests_per_minute": -1}, ".requests_per_minute='-1': must be a whole number from 0 to"),
        ("api.rate_limit", {"redis_url": "x"}, ".redis_url=…: must be redis://"),
        ("rate_limit", {"redis_url": "x"}, ".redis_url=…: must be redis://"),
        ("redis.url", "x", "=…: must be redis://"),
        ("api.cors_origins", ["x"], "='x': must be * or scheme://host[:port] without a path"),
        ("api.host", "300.1.1.1", "='300.1.1.1': must be an address or a name"),
        ("system.flags", 5, ": is not known; there are "),
        ("redis.enable_cache", 5, ": must be true or false, not a number"),
        ("rate_limit.requests_per_minute", -1, "='-1': must be a whole number from 0 to 10000000"),
        ("models", None, ": must be a section with a key for each model, not nothing"),
        ("models", {}, ": is empty; name a model, or leave it out to serve every model in the folder"),
        ("models", ["m"], ": must be a section with a key for each model, not a list"),
    ],
)
def test_what_a_section_may_not_hold(place: Place, path: str, value: Any, problem: str) -> None:
    (said,) = place.problems(REMOTE | tree(path, value))
    assert said.startswith(path + problem)


def test_all_mistakes_are_told_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "none")
    place.write(
        {
            "apo": {},
            "system": {"default_model": "x", "preload_models": ["y"], "queue_timeout_sec": "z", "vram_multiplier": 0},
            "models": {"a": {"url": "ftp://x", "aliases": ["b"]}, "b": {"model_path": "none.gguf", "slots": 0}},
        }
    )
    assert main(["config", "check"]) == 1
    with pytest.raises(ConfigError) as raised:
        build_registry(load())
    file = f"{place.folder}/config.yaml: "
    assert [line.removeprefix(file) for line in raised.value.problems] == [
        "PORT='none': must be a whole number from 1 to 65535",
        "system.queue_timeout_sec='z': must be a number from 0.001 to 86400",
        "apo: is not known; did you mean api?",
        "system.vram_multiplier: must be a number from 1 to 10, not 0",
        "models.a.url: must begin with http:// or https:// and a host; a port must be from 1 to 65535",
        "models.b.slots: must be a whole number from 1 to 4096, not 0",
        "models.a.aliases: 'b' is the id of another model",
        "system.default_model: 'x' is no model; there are: a, b",
        "system.preload_models: 'y' is no model; there are: a, b",
        f"models.b: model_path {place.folder}/models/none.gguf: no such file",
    ]


def load() -> Settings:
    from gateway.cli.config import load_configuration

    return load_configuration()


# --- what it says of all models


def test_the_system_section(place: Place) -> None:
    models = {name: {"url": f"http://{name}", "aliases": [f"{name}{name}"]} for name in "abc"}
    system: dict[str, Any] = {
        "max_concurrent_models": 2,
        "preload_models": ["bb", "a", "b"],
        "default_model": "cc",
        "vram_multiplier": 1.5,
    }
    registry = place.registry({"system": system, "models": models})
    assert (registry.single, registry.default, registry.preload, registry.preload_all) == (
        False,
        "c",
        ("b", "a"),
        False,
    )
    assert (registry.max_models, registry.vram_multiplier, registry.warnings) == (2, 1.5, ())
    assert registry.resolve(None).id == registry.resolve("cc").id == "c"
    everything = place.registry({"system": {"preload_models": ["*"]}, "models": models})
    assert (everything.preload, everything.preload_all, everything.default) == (("a", "b", "c"), True, None)
    nothing: tuple[Any, ...] = (None, [])
    for none in nothing:
        assert place.registry({"system": {"preload_models": none}, "models": models}).preload == ()
    assert place.registry({"models": models}, DEFAULT_MODEL="bb").default == "b"
    assert place.registry(REMOTE).default == "m", "where there is one, it is meant"


@pytest.mark.parametrize(
    ("system", "environ", "seconds"),
    [
        ({}, {}, 0),
        ({"idle_timeout_sec": 60}, {}, 60),
        ({"enable_idle_timeout": False, "idle_timeout_sec": 60}, {}, 0),
        ({"enable_idle_timeout": True, "idle_timeout_sec": 60}, {}, 60),
        ({"enable_idle_timeout": True}, {}, 300),
        ({"enable_idle_timeout": False}, {"IDLE_TIMEOUT_SECONDS": "5"}, 5),
    ],
)
def test_the_idle_timeout(place: Place, system: dict[str, Any], environ: dict[str, str], seconds: int) -> None:
    assert place.settings(REMOTE | {"system": system}, **environ).idle_timeout_seconds == seconds


def test_gpu_devices_are_the_childrens_unless_someone_says_otherwise(place: Place) -> None:
    place.files("a.gguf", "b.gguf")
    content = {
        "system": {"gpu_devices": [0, 1]},
        "models": {
            "a": {"model_path": "a", "env": {"X": 1}},
            "b": {"model_path": "b", "env": {"CUDA_VISIBLE_DEVICES": "3"}},
            "r": {"url": "http://h"},
        },
    }
    env = {name: spec.env for name, spec in place.registry(content).specs.items()}
    devices = ("CUDA_VISIBLE_DEVICES", "0,1")
    assert env == {"a": (("X", "1"), devices), "b": (("CUDA_VISIBLE_DEVICES", "3"),), "r": ()}
    assert place.registry(content, CUDA_VISIBLE_DEVICES="2").specs["a"].env == (("X", "1"),)
    folder = place.registry({"system": {"gpu_devices": [0, 1]}}, CONFIG_PATH="config.yaml")
    assert {name: spec.env for name, spec in folder.specs.items()} == {"a": (devices,), "b": (devices,)}


# --- which models count


def test_a_named_model_wins_over_the_files_models_however_wrong(place: Place) -> None:
    place.files("a.gguf", "b.gguf")
    content = {"api": {"port": 7000}, "models": {"x": {"slotz": 1}}}
    settings = place.settings(content, MODEL_NAME="a")
    registry = build_registry(settings)
    assert (registry.single, list(registry.specs), settings.port) == (True, ["a"], 7000)
    assert settings.warnings == (f"{place.folder}/config.yaml: its models are ignored, because one model is named",)
    with pytest.raises(ConfigError, match=r"api\.prot: is not known"):
        place.settings({"api": {"prot": 1}, "models": {}}, MODEL_NAME="a")


def test_a_file_without_models_leaves_it_to_the_folder(place: Place) -> None:
    place.files("a.gguf")
    content = {"api": {"port": 7000}}
    assert place.settings(content).port == 8000, "some other config.yaml that lies there"
    assert place.settings({"scrape_configs": []}).config_path is None
    assert place.settings("").config_path is None
    settings = place.settings(content, CONFIG_PATH="config.yaml")
    assert settings.port == 7000
    assert build_registry(settings).single
    place.files("b.gguf")
    registry = place.registry({"system": {"preload_models": ["b"], "default_model": "a"}}, CONFIG_PATH="config.yaml")
    assert (registry.single, registry.preload, registry.default) == (False, ("b",), "a")


def test_a_program_in_the_file_that_is_not_there_is_told_by_its_place(place: Place) -> None:
    place.files("a.gguf")
    file = place.write({"system": {"llama_server_path": "/none"}, "models": {"a": {"model_path": "a"}}})
    with pytest.raises(ConfigError) as raised:
        check_configuration(load())
    assert raised.value.problems == [f"{file}: system.llama_server_path='/none': there is no such program"]


FOREIGN = [
    ("x: 1", None),
    ("", None),
    ("foo: !ENV bar", "is not YAML: could not determine a constructor"),
    ("a: [", "is not YAML: while parsing a flow node"),
    ("- models: x", "must hold sections"),
    ('[\n{"models": {', "is not YAML: "),
    ("other:\n  models: [", "is not YAML: "),
    ("a" * 2**20 + "a", "is larger than 1 MiB"),
]


@pytest.mark.parametrize(("text", "says"), FOREIGN, ids=range(len(FOREIGN)))
def test_other_programs_files_in_the_data_folder_are_passed_over(place: Place, text: str, says: str | None) -> None:
    """It may be a /workspace that many share."""
    place.files("a.gguf")
    alone = place.settings(text, MODEL_NAME="a")
    assert (alone.config_path, build_registry(alone).single) == (None, True)
    ours = place.write(REMOTE | {"api": {"port": 7000}}, "config.json")
    settings = place.settings(text)
    assert (settings.config_path, settings.port, list(build_registry(settings).specs)) == (ours, 7000, ["m"])
    assert [says is not None and says in line for line in settings.warnings] == [True] * (says is not None)
    for line in settings.warnings:
        assert line.startswith(f"{place.folder}/config.yaml: ") and line.endswith("it seems to be no models file")


@pytest.mark.parametrize("text", ["models: {m: {url: 'http://h'}", "api: {}\n'models' :\n\tx: 1", '{\n "models": {,}}'])
def test_a_slip_in_a_file_with_models_is_told_wherever_it_was_found(place: Place, text: str) -> None:
    """Passed over, a reload would take its models away."""
    place.write(REMOTE, "config.json")
    (said,) = place.problems(text)
    assert said.startswith("is not YAML: ")


def test_the_file_is_named_by_CONFIG_PATH_or_found(place: Place) -> None:
    other = place.write(REMOTE, "other.json")
    assert list(place.registry({"models": {"n": {"url": "http://h"}}}).specs) == ["n"]
    assert list(place.registry("x: 1", CONFIG_PATH=str(other)).specs) == ["m"]


# --- whatever it holds


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("<X>"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5)
            | st.sampled_from(
                "api system models redis rate_limit m port cors_origins params flags env aliases defaults model_path "
                "url hf n_ctx slots prompt_template preload_models gpu_devices default_model _x api_key_env use_mmap "
                "parallel_override flash_attention enable_idle_timeout redis_url max_concurrent_models "
                "additional_parameter".split()
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=30,
)


@given(content=JUNK, as_json=st.booleans())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_it_holds_only_a_ConfigError_is_raised(
    tmp_path_factory: pytest.TempPathFactory, content: Any, as_json: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / ("junk.json" if as_json else "junk.yaml")
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogateescape")
    with contextlib.suppress(ConfigError):
        found = read_models_file(path)
        values, problems = read_settings({"DATA_DIR": "nowhere"}, None, found.content, f"{path}: ")
        told = [*problems, *found.problems, *found.warnings]
        assert all(line.startswith(f"{path}: ") and line.isprintable() for line in told), told
        try:  # as a start does, whose file has problems already
            build_registry(replace(values, config_path=path))
        except ConfigError as error:
            assert all(line.isprintable() for line in error.problems)


@given(data=st.binary(max_size=400) | st.text("{}[]:,-&*!<|>?%@`\"'#\n abc019~.", max_size=200).map(str.encode))
@settings(max_examples=500)
def test_whatever_bytes_it_is_only_a_ConfigError_is_raised(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    for end in ("yaml", "json"):
        path = tmp_path_factory.getbasetemp() / f"bytes.{end}"
        path.write_bytes(data)
        with contextlib.suppress(ConfigError):
            read_models_file(path)


# --- corral config check


def test_config_check_prints_the_models(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    models = place.files("a.gguf", "long/model.gguf")
    file = place.write(
        {
            "models": {
                "a": {"model_path": "a.gguf", "aliases": ["x", "y"]},
                "long-name": {"model_path": "long"},
                "hub": {"hf": "u/r:Q8_0"},
                "far": {"url": "http://user:word@h:1"},
            },
            "system": {"llama_server_path": "/bin/true", "wait_ready_sec": 1},
        },
        "mine.yaml",
    )
    assert main(["config", "check", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"a          {models}/a.gguf           also x, y",
        f"long-name  {models}/long/model.gguf",
        "hub        hf: u/r:Q8_0",
        "far        http://h:1",
        "ok",
    ]
    assert err == (
        f"warning: {file}: system.wait_ready_sec: has no meaning here; a load is waited for as long as it goes on\n"
    )


def test_config_check_prints_what_is_wrong_with_variables_file_and_machine_at_once(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.files("a.gguf")
    file = place.write({"models": {"a": {"model_path": "a.gguf"}}, "system": {"defualt_model": "a"}}, "mine.yaml")
    for name, value in {"PORT": "x", "EXTRA_ARGS": "--host h", "LLAMA_SERVER_PATH": "/none"}.items():
        monkeypatch.setenv(name, value)
    assert main(["config", "check", str(file)]) == 1
    assert [line.partition(":")[0].partition("=")[0] for line in capsys.readouterr().err.splitlines()] == [
        "PORT",
        str(file),
        "EXTRA_ARGS has --host",
        "LLAMA_SERVER_PATH",
    ]
    monkeypatch.setenv("EXTRA_ARGS", "'--host")
    assert main(["config", "check", str(file)]) == 1
    assert 'EXTRA_ARGS="\'--host": No closing quotation\n' in capsys.readouterr().err


def test_config_check_fails_for_a_missing_file_that_a_start_only_warns_of(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.files("a.gguf")
    models = {"a": {"model_path": "a"}, "b": {"model_path": "b"}}
    content = {"models": models, "system": {"llama_server_path": "/bin/true"}}
    registry = place.registry(content)
    problem = f"model_path {place.folder}/models/b: no such file"
    assert {name: spec.problem for name, spec in registry.specs.items()} == {"a": None, "b": problem}
    assert registry.warnings == (f"{place.folder}/config.yaml: models.b: {problem}",)
    assert main(["config", "check"]) == 1
    assert capsys.readouterr() == ("", f"{place.folder}/config.yaml: models.b: {problem}\n")


def test_an_unreadable_file_is_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "none.yaml"]) == 1
    assert capsys.readouterr().err == f"none.yaml: cannot be read: {os.strerror(2)}\n"
