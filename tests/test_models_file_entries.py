"""A model's own entry in the models file: what it may say, what that becomes, and what is told of a wrong one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.crosscheck import HTTP_URL
from gateway.errors import ConfigError
from gateway.models.configured.template import PromptTemplate
from gateway.models.registry import ModelSpec
from gateway.runtime.configuration import check_configuration
from tests.models_file_kit import Place, place

__all__ = ["place"]


def spec_of(place: Place, entry: dict[str, Any], **environ: str) -> ModelSpec:
    (spec,) = place.registry({"models": {"m": entry}}, **environ).specs.values()
    return spec


@pytest.mark.parametrize(
    ("entry", "becomes"),
    [
        ({}, {}),
        ({"flags": ["-ngl", 99, "--ctx-size", "8192", "-np", "2"]}, {"flags": "-ngl 99 --ctx-size 8192 -np 2"}),
        ({"flags": "-c 4096 --override-kv 'a=str:x'"}, {"flags": "-c 4096 --override-kv a=str:x"}),
        ({"flags": ""}, {}),
        ({"flags": ["--embedding"]}, {"flags": "--embedding", "embedding": True}),
        ({"aliases": ["a", "b/c:d"]}, {"aliases": ("a", "b/c:d")}),
        ({"aliases": "a"}, {"aliases": ("a",)}),
        ({"slots": 4, "flags": ["-np", "4"]}, {"slots": 4, "flags": "-np 4"}),
        ({"pinned": True}, {"pinned": True}),
        ({"pinned": False, "aliases": None, "flags": None, "env": None, "defaults": None}, {}),
        ({"idle_timeout_sec": 0}, {"idle_timeout": 0}),
        ({"idle_timeout_sec": 1.5}, {"idle_timeout": 1.5}),
        (
            {"env": {"B": "x y", "A": 1, "C": 1.5, "D": ""}},
            {"env": (("A", "1"), ("B", "x y"), ("C", "1.5"), ("D", ""))},
        ),
        (
            {"defaults": {"temperature": 0.7, "stop": ["a", None]}},
            {"defaults": {"temperature": 0.7, "stop": ["a", None]}},
        ),
        ({"prompt_template": {"user_prefix": "U"}}, {"prompt_template": PromptTemplate(user_prefix="U")}),
        ({"_comment": [1], "defaults": {"_x": 1}}, {}),
    ],
)
def test_what_a_local_model_may_say(place: Place, entry: dict[str, Any], becomes: dict[str, Any]) -> None:
    models = place.files("m.gguf")
    if "flags" in becomes:
        becomes = becomes | {"flags": tuple(becomes["flags"].split())}
    spec = spec_of(place, {"model_path": "m.gguf"} | entry)
    assert spec == replace(ModelSpec(id="m", path=models / "m.gguf"), **becomes)


@pytest.mark.parametrize(
    ("there", "model_path", "path", "projector"),
    [
        ("q.gguf", "q.gguf", "q.gguf", None),
        ("q.gguf", "q", "q.gguf", None),
        ("d/q-00001-of-00002.gguf d/q-00002-of-00002.gguf", "d/q", "d/q-00001-of-00002.gguf", None),
        ("d/q-00001-of-00002.gguf d/q-00002-of-00002.gguf", "d", "d/q-00001-of-00002.gguf", None),
        ("d/q.gguf d/mmproj.gguf", "d", "d/q.gguf", "d/mmproj.gguf"),
        ("d/q.gguf d/mmproj.gguf", "d/q.gguf", "d/q.gguf", "d/mmproj.gguf"),
        ("weights.bin", "weights.bin", "weights.bin", None),
    ],
)
def test_where_a_model_lies(place: Place, there: str, model_path: str, path: str, projector: str | None) -> None:
    models = place.files(*there.split())
    mmproj = models / projector if projector else None
    for given, base in ((model_path, models), (str(models / model_path), Path("elsewhere"))):
        spec = spec_of(place, {"model_path": given}, MODELS_DIR=str(base))
        assert spec == ModelSpec(id="m", path=models / path, mmproj=mmproj)


@pytest.mark.parametrize(
    ("model_path", "problem"),
    [
        ("none.gguf", "no such file"),
        ("none", "no such file"),
        ("two", "the folder must hold exactly one model; it holds: a, b"),
        ("empty", "the folder must hold exactly one model; it holds: none"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_model_that_is_not_there_is_its_own_problem(place: Place, model_path: str, problem: str) -> None:
    models = place.files("two/a.gguf", "two/b.gguf", "fine.gguf")
    (models / "empty").mkdir()
    registry = place.registry({"models": {"m": {"model_path": model_path}, "fine": {"model_path": "fine"}}})
    assert registry.specs["m"].problem == f"model_path {models / model_path}: {problem}"
    assert registry.specs["fine"].problem is None
    assert len(registry.warnings) == 1


def test_models_from_elsewhere(place: Place) -> None:
    entry = {"hf": "user/Repo-GGUF:Q4_K_M", "slots": 2, "flags": ["-c", "1024"]}
    assert spec_of(place, entry) == ModelSpec(id="m", hf="user/Repo-GGUF:Q4_K_M", slots=2, flags=("-c", "1024"))
    entry = {"url": "https://host:8080/base", "slots": 4, "defaults": {"top_p": 1}, "aliases": ["x"]}
    assert spec_of(place, entry) == ModelSpec(
        id="m", url="https://host:8080/base", slots=4, defaults={"top_p": 1}, aliases=("x",)
    )


def test_the_base_of_OpenAIs_clients_is_taken_for_the_server_behind_it(place: Place) -> None:
    content = {"models": {"m": {"url": "http://host:8080/v1/"}, "n": {"url": "http://host/v1x"}}}
    assert [spec.url for spec in place.registry(content).specs.values()] == ["http://host:8080", "http://host/v1x"]
    (warning,) = place.settings(content).warnings
    assert warning.startswith(f"{place.folder}/config.yaml: models.m.url: ends in /v1, which was left out")


@pytest.mark.parametrize(
    ("defaults", "problem"),
    [
        ({"max_tokens": -1}, "max_tokens is -1: must be a whole number of at least 0"),
        ({"max_output_tokens": "x"}, 'max_output_tokens is "x": must be a whole number of at least 0'),
        ({"n": 0}, "n is 0: must be from 1 to 128"),
    ],
)
def test_a_default_that_would_be_refused_in_every_request(place: Place, defaults: dict[str, Any], problem: str) -> None:
    settings = place.settings({"models": {"m": {"url": "http://h", "defaults": defaults}}})
    with pytest.raises(ConfigError) as raised:
        check_configuration(settings)
    assert raised.value.problems == [f"{place.folder}/config.yaml: models.m.defaults: {problem}"]


def test_a_foreign_servers_key_is_in_a_variable(place: Place) -> None:
    entry = {"url": "http://h", "api_key_env": "FAR_KEY"}
    assert spec_of(place, entry).problem == "api_key_env FAR_KEY: that variable is not set"
    assert spec_of(place, entry, FAR_KEY="secret") == ModelSpec(id="m", url="http://h", api_key_env="FAR_KEY")
    (place.folder / ".env").write_text("FAR_KEY=secret\n")
    assert spec_of(place, entry).problem is None


NOT_TEXT = "must be text that is not empty, not"


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"flagz": []}, "flagz: is not known; did you mean models.m.flags?"),
        ({"zzzzz": 1}, "zzzzz: is not known; there are model_path, hf, url, api_key_env, flags, aliases, slots, "),
        ({"model_path": 5}, f"model_path: {NOT_TEXT} 5"),
        ({"model_path": "~nobody-of-that-name/x"}, "model_path: ~nobody-of-that-name/x: there is no such user's home"),
        ({"model_path": "  "}, f"model_path: {NOT_TEXT} '  '"),
        ({"flags": {"-c": 1}}, "flags: must be a list or one text, not a section"),
        ({"flags": "-c '1"}, "flags: No closing quotation; quote it as for a shell, or make it a list"),
        ({"flags": ["-fa", True]}, "flags[1]: must be text, not true; put on, off, yes and no in quotes"),
        ({"flags": ["-c", None]}, "flags[1]: must be text, not nothing"),
        ({"flags": ["--host", "0.0.0.0"]}, "flags: --host: the gateway chooses where llama-server listens"),
        ({"flags": ["--api_key=x"]}, "flags: --api_key=x: the gateway makes a key for each start"),
        ({"flags": "-m x"}, "flags: -m: "),
        ({"aliases": 5}, "aliases: must be a list, not 5"),
        ({"aliases": ["a", 5]}, "aliases[1]: must be a name, not 5"),
        ({"aliases": [""]}, "aliases[0]: must be a name, not ''"),
        ({"aliases": ["*"]}, "aliases[0]: must be a name, not '*'"),
        ({"aliases": ["a\nb"]}, "aliases[0]: must be a name, not 'a\\nb'"),
        ({"aliases": ["m"]}, "aliases: 'm' is the model's own id"),
        ({"aliases": ["a", "a"]}, "aliases: 'a' stands there twice"),
        ({"slots": 0}, "slots: must be a whole number from 1 to 4096, not 0"),
        ({"slots": 1.5}, "slots: must be a whole number from 1 to 4096, not 1.5"),
        ({"slots": True}, "slots: must be a whole number from 1 to 4096, not true"),
        ({"slots": 4, "flags": "--parallel 2"}, "slots: is 4, but the flags say -np 2; say it once"),
        ({"pinned": "yes"}, "pinned: must be true or false, not 'yes'"),
        ({"idle_timeout_sec": -1}, "idle_timeout_sec: must be seconds, 0 = never, not -1"),
        ({"idle_timeout_sec": "5"}, "idle_timeout_sec: must be seconds, 0 = never, not '5'"),
        ({"env": ["A=1"]}, "env: must be a section of variables, not a list"),
        ({"env": {"A": True}}, "env.A: must be text, not true; put it in quotes"),
        ({"env": {"A": ["s3cret"]}}, "env.A: must be text, not a list; put it in quotes"),
        ({"env": {"A-B": "1"}}, "env.A-B: is no name for a variable"),
        ({"env": {"LLAMA_API_KEY": "1"}}, "env: LLAMA_API_KEY: llama-server would take it for an argument; use flags"),
        ({"defaults": [1]}, "defaults: must be a section of request fields, not a list"),
        *(
            ({"defaults": {name: 1}}, f"defaults.{name}: must come with the request")
            for name in ("messages", "prompt", "input", "model", "stream")
        ),
        ({"chat_template_file": "none.jinja"}, "chat_template_file: there is no "),
        (
            {"chat_template_file": f"/{'x' * 300}"},
            f"chat_template_file: /{'x' * 300} cannot be read: File name too long",
        ),
        ({"prompt_template": {"user_prefx": "x"}}, "prompt_template.user_prefx: is not known; did you mean models.m."),
        ({"prompt_template": {"user_prefix": 5}}, "prompt_template.user_prefix: must be text"),
        (
            {"prompt_template": {}},
            "prompt_template: must have at least one of user_prefix, user_suffix, model_prefix, ",
        ),
        ({"prompt_template": "x"}, "prompt_template: must be a section with keys"),
        ({"api_key_env": "KEY"}, "api_key_env: belongs to a url"),
    ],
)
def test_what_it_may_not_say(place: Place, entry: dict[str, Any], problem: str) -> None:
    place.files("m.gguf")
    (said,) = place.problems({"models": {"m": {"model_path": "m.gguf"} | entry}})
    assert said.startswith(f"models.m.{problem}")
    assert "s3cret" not in said


EMPTY = "models: is empty; name a model, or leave it out to serve every model in the folder"
NO_NAME = "models.a.aliases[0]: must be a name, not ''"


@pytest.mark.parametrize(
    ("models", "problems"),
    [
        ({"m": {}}, ["models.m: says nowhere where the model is; give one of model_path, hf and url"]),
        (
            {"m": {"hf": "a/b", "url": "http://h"}},
            ["models.m: has hf and url; give one of model_path, hf and url"],
        ),
        ({"m": "m.gguf"}, ["models.m: must be a section with keys, not 'm.gguf'"]),
        ({"m": None}, ["models.m: must be a section with keys, not nothing"]),
        ({"m": {"hf": "x"}}, ["models.m.hf: 'x' is not of the form user/repo or user/repo:quant"]),
        *(
            ({"m": {"url": url}}, [f"models.m.url: {HTTP_URL}"])
            for url in ("h:80", "http://h:99999", "http://h:abc", "http://:80", "http://h/a b")
        ),
        (
            {"m": {"url": "http://h", "flags": [], "env": {"A": "1"}, "api_key_env": "a b"}},
            [
                "models.m.api_key_env: must be the name of a variable, not 'a b'",
                "models.m.flags: has no effect on a url: that server is started by someone else",
                "models.m.env: has no effect on a url: that server is started by someone else",
            ],
        ),
        ({"*": {"url": "http://h"}}, ["models.'*': is no name for a model: up to 200 printable characters"]),
        ({" a": {"url": "http://h"}}, ["models.' a': is no name for a model: up to 200 printable characters"]),
        ({"a\n": {"url": "http://h"}}, ["models.'a\\n': a key must be printable", EMPTY]),
        ({"a": {"url": "http://h", "aliases": ["\ud800"]}}, ["models.a.aliases[0]: holds half a character", NO_NAME]),
        (
            {"a": {"url": "http://h", "aliases": ["x", "y"]}, "b": {"url": "http://h", "aliases": ["y", "z"]}},
            ["models.b.aliases: 'y' is an alias of 'a' already"],
        ),
        (
            {"a": {"url": "http://h", "aliases": ["b"]}, "b": {"url": "http://h", "aliases": ["a"]}},
            [
                "models.a.aliases: 'b' is the id of another model, which has this one's id for an alias",
                "models.b.aliases: 'a' is the id of another model, which has this one's id for an alias",
            ],
        ),
    ],
)
def test_names_and_places(place: Place, models: dict[str, Any], problems: list[str]) -> None:
    assert place.problems({"models": models}) == problems


# --- templates


def test_a_chat_template_lies_beside_the_models_file_or_in_the_folder_of_models(place: Place) -> None:
    models = place.files("m.gguf")
    entry = {"model_path": "m", "chat_template_file": "t.jinja"}
    (models / "t.jinja").touch()
    assert spec_of(place, entry).chat_template_file == models / "t.jinja"
    (place.folder / "t.jinja").touch()
    assert spec_of(place, entry).chat_template_file == place.folder / "t.jinja"
    entry["chat_template_file"] = str(models / "t.jinja")
    assert spec_of(place, entry).chat_template_file == models / "t.jinja"
    (said,) = place.problems({"models": {"m": entry | {"prompt_template": {"user_prefix": ""}}}})
    assert said == "models.m.chat_template_file: and prompt_template cannot both be given"


def test_a_template_beside_the_model_counts_unless_the_entry_has_its_own(place: Place) -> None:
    models = place.files("m/m.gguf")
    (models / "m" / "prompt_template.json").write_text('{"user_prefix": "beside"}')
    (place.folder / "t.jinja").touch()

    def template(**more: Any) -> PromptTemplate | None:
        return spec_of(place, {"model_path": "m", **more}).prompt_template

    assert template() == PromptTemplate(user_prefix="beside")
    assert template(prompt_template={"user_prefix": "own"}) == PromptTemplate(user_prefix="own")
    assert template(chat_template_file="t.jinja") is None
    assert template(flags=["--chat-template", "chatml"]) is None
    (models / "m" / "prompt_template.json").write_text("[]")
    registry = place.registry({"models": {"m": {"model_path": "m"}}})
    assert registry.specs["m"].problem == f"{models}/m/prompt_template.json: must be a section with keys"


# --- reload


def test_a_template_file_that_was_edited_makes_another_spec(place: Place) -> None:
    place.files("m.gguf")
    entry = {"model_path": "m", "chat_template_file": "t.jinja"}
    template = place.folder / "t.jinja"
    template.write_text("one")
    first = spec_of(place, entry)
    template.touch()
    assert first == spec_of(place, entry)
    template.write_text("two")
    assert first != spec_of(place, entry)


def test_a_spec_is_equal_exactly_if_nothing_of_it_has_changed(place: Place) -> None:
    place.files("m.gguf")
    entry = {"model_path": "m", "defaults": {"top_k": 1}, "env": {"A": "1", "B": "2"}, "flags": ["-c", "1"]}
    first = spec_of(place, entry)
    assert first == spec_of(place, entry | {"env": {"B": "2", "A": "1"}, "flags": "-c 1"})
    changes: list[dict[str, Any]] = [
        {"defaults": {"top_k": 2}},
        {"flags": []},
        {"pinned": True},
        {"env": {"A": "1"}},
        {"aliases": "x"},
    ]
    for changed in changes:
        assert first != spec_of(place, entry | changed)
    assert "A" not in repr(first), "variables may hold secrets"
