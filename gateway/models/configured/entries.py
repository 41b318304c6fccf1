"""The `models` of a models file → ModelSpecs; every problem with its path, all at once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gateway.crosscheck import HTTP_URL, is_http_url
from gateway.environment import secret_named
from gateway.errors import ConfigError
from gateway.models.command import check_env, check_flags, flag_value
from gateway.models.configured.file import shown, unknown_keys
from gateway.models.configured.scan import beside, locate, projector
from gateway.models.configured.template import make_template
from gateway.models.configured.translate import PARAMS, are_slots
from gateway.models.fetching.hub import HubModel
from gateway.models.fetching.partial import DownloadError
from gateway.models.spec import ModelSpec

KEYS = (
    "model_path hf url api_key_env flags aliases slots pinned idle_timeout_sec defaults env chat_template_file "
    "prompt_template"
).split()
_ONLY_LOCAL = ("flags", "env", "chat_template_file", "prompt_template")
# What the request itself is about, and so cannot have a default.
_NO_DEFAULTS = ("messages", "prompt", "input", "model", "stream")
_SLOTS = "a whole number from 1 to 4096"
_ID = re.compile(r"(?!\s)[^\x00-\x1f\x7f]{1,200}(?<!\s)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def read_entries(models: Any, models_dir: Path, file: Path) -> tuple[list[ModelSpec], list[str]]:
    """The models and what is wrong with their entries, by path. `file` is the models file itself.

    A model that is described rightly but whose file is missing is no problem here; it has one of its own.
    """
    if not isinstance(models, Mapping):
        return [], [f"models: must be a section with a key for each model, not {shown(models)}"]
    if not models:
        return [], ["models: is empty; name a model, or leave it out to serve every model in the folder"]
    specs, problems = [], []
    for name, values in models.items():
        entry = _Entry(name, values, models_dir, file)
        specs.append(_watched(entry.spec(), entry))
        problems += entry.problems
    return specs, problems + _name_problems(models, specs)


def _watched(spec: ModelSpec, entry: _Entry) -> ModelSpec:
    again = functools.partial(_read_again, entry.name, entry.values, entry.folder, entry.file)
    return dataclasses.replace(spec, look_again=again) if spec.problem else spec


def _read_again(name: str, values: Any, models_dir: Path, file: Path) -> ModelSpec:
    """What was right in the entry may be wrong by now, such as a template's file that has gone."""
    entry = _Entry(name, values, models_dir, file)
    spec = entry.spec()
    return _watched(dataclasses.replace(spec, problem="; ".join(entry.problems) or spec.problem), entry)


class _Entry:
    """One model's keys, taken one by one; what is wrong is noted, and counts as not said."""

    def __init__(self, name: str, values: Any, models_dir: Path, file: Path) -> None:
        self.name, self.folder, self.file = name, models_dir, file
        self.values: Mapping[str, Any] = values if isinstance(values, Mapping) else {}
        self.problems: list[str] = []
        self.readable = isinstance(values, Mapping)
        if not self.readable:
            self.problems.append(f"models.{name}: must be a section with keys, not {shown(values)}")
        elif not _ID.fullmatch(name) or name == "*":
            self.problems.append(f"models.{name!r:.60}: is no name for a model: up to 200 printable characters")
        self.problems += unknown_keys({key: None for key in self.values if key != "params"}, KEYS, f"models.{name}.")
        self.problems += self._leftovers()

    def fail(self, key: str, text: str) -> None:
        self.problems.append(f"models.{self.name}.{key}: {text}")

    def spec(self) -> ModelSpec:
        flags, env = self._flags(), self._env()
        about: dict[str, Any] = {
            "flags": flags,
            "env": env,
            "aliases": self._texts("aliases"),
            "slots": self._take("slots", are_slots, _SLOTS),
            "pinned": self._take("pinned", lambda v: isinstance(v, bool), "true or false") or False,
            "idle_timeout": self._take("idle_timeout_sec", _is_seconds, "seconds, 0 = never"),
            "defaults": self._defaults(),
            "api_key_env": self._take("api_key_env", _is_variable, "the name of a variable"),
            "prompt_template": self._prompt_template(),
            **self._chat_template(),
        }
        if "--embedding" in flags or "--embeddings" in flags:
            about["embedding"] = True
        self._check_slots(flags, about["slots"])
        return ModelSpec(id=self.name, **self._source(about))

    def _source(self, about: dict[str, Any]) -> dict[str, Any]:
        """Exactly one of three keys says where the model is."""
        named = [key for key in ("model_path", "hf", "url") if self.values.get(key) is not None]
        if len(named) != 1 and self.readable:
            found = f"has {' and '.join(named)}" if named else "says nowhere where the model is"
            self.problems.append(f"models.{self.name}: {found}; give one of model_path, hf and url")
        if about["api_key_env"] and named != ["url"]:
            self.fail("api_key_env", "belongs to a url")
        if named == ["model_path"]:
            return about | self._local(about)
        if named == ["hf"] and (name := self._text("hf")) is not None:
            try:
                return about | {"hf": str(HubModel.parse(name))}
            except DownloadError as error:
                self.fail("hf", str(error))
        if named == ["url"] and (url := self._text("url")) is not None:
            return about | self._remote(url, about["api_key_env"])
        return about

    def _local(self, about: Mapping[str, Any]) -> dict[str, Any]:
        name = self._path("model_path")
        if name is None:
            return {}
        try:
            path = locate(self.folder, str(name))
        except (ConfigError, OSError) as error:
            reason = error.problems[0] if isinstance(error, ConfigError) else error.strerror
            return {"problem": f"model_path {self.folder / name}: {reason}"}
        if path is None:
            return {"path": self.folder / name, "problem": f"model_path {self.folder / name}: no such file"}
        found: dict[str, Any] = {"path": path, "mmproj": projector(path)}
        own = about["prompt_template"] or "chat_template_file" in about or _says_template(about["flags"])
        if not own:
            found["prompt_template"], found["problem"] = beside(path)
        return found

    def _remote(self, url: str, key: str | None) -> dict[str, Any]:
        if not is_http_url(url):
            self.fail("url", HTTP_URL)
        for name in _ONLY_LOCAL:
            if self.values.get(name) is not None:
                self.fail(name, "has no effect on a url: that server is started by someone else")
        missing = key is not None and secret_named(key) is None
        return {"url": url, "problem": f"api_key_env {key}: that variable is not set" if missing else None}

    # --- keys

    def _leftovers(self) -> Iterator[str]:
        """What translation could not take from the `params` of the seed's first version."""
        params = self.values.get("params")
        place = f"models.{self.name}.params"
        if isinstance(params, Mapping):
            yield from unknown_keys({key: None for key in params}, PARAMS, f"{place}.")
            for key in params:
                if key in PARAMS:
                    yield f"{place}.{key}: {_wrong_param(key, params[key])}"
        elif params is not None:
            yield f"{place}: must be a section with keys, not {shown(params)}"

    def _take(self, key: str, right: Callable[[Any], bool], what: str) -> Any:
        value = self.values.get(key)
        if value is None or right(value):
            return value
        self.fail(key, f"must be {what}, not {shown(value)}")
        return None

    def _text(self, key: str) -> str | None:
        value: str | None = self._take(
            key, lambda v: isinstance(v, str) and v.strip() != "" and v.isprintable(), "text that is not empty"
        )
        return value

    def _path(self, key: str) -> Path | None:
        text = self._text(key)
        try:
            return Path(text).expanduser() if text is not None else None
        except RuntimeError:
            self.fail(key, f"{text}: there is no such user's home")
            return None

    def _texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; one alone may stand for a list of it."""
        value = self.values.get(key)
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list):
            self.fail(key, f"must be a list, not {shown(value)}")
            return ()
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not _ID.fullmatch(text) or text == "*":
                self.fail(f"{key}[{number}]", f"must be a name, not {shown(text)}")
        return tuple(text for text in texts if isinstance(text, str))

    def _flags(self) -> tuple[str, ...]:
        value = self.values.get("flags")
        words: list[Any] = []
        if isinstance(value, str):
            try:
                words = shlex.split(value)
            except ValueError as error:
                self.fail("flags", f"{error}; quote it as for a shell, or make it a list")
        elif isinstance(value, list):
            words = value
        elif value is not None:
            self.fail("flags", f"must be a list or one text, not {shown(value)}")
        flags = []
        for number, word in enumerate(words):
            if isinstance(word, bool) or not isinstance(word, str | int | float) or "\0" in str(word):
                hint = "; put on, off, yes and no in quotes" if isinstance(word, bool) else ""
                self.fail(f"flags[{number}]", f"must be text, not {shown(word)}{hint}")
            else:
                flags.append(str(word))
        for problem in check_flags(flags):
            self.fail("flags", problem)
        return tuple(flags)

    def _env(self) -> tuple[tuple[str, str], ...]:
        """Values may be secrets, so no message shows them."""
        values = self._take("env", lambda v: isinstance(v, Mapping), "a section of variables") or {}
        env = []
        for name, value in values.items():
            if not _VARIABLE.fullmatch(name):
                self.fail(f"env.{name}", "is no name for a variable")
            elif isinstance(value, bool) or not isinstance(value, str | int | float) or "\0" in str(value):
                self.fail(f"env.{name}", f"must be text, not {shown(value)}; put it in quotes")
            else:
                env.append((name, str(value)))
        for problem in check_env(name for name, _ in env):
            self.fail("env", problem)
        return tuple(sorted(env))

    def _defaults(self) -> dict[str, Any]:
        values = self._take("defaults", lambda v: isinstance(v, Mapping), "a section of request fields") or {}
        for name, value in values.items():
            if name in _NO_DEFAULTS:
                self.fail(f"defaults.{name}", "must come with the request")
            elif not _is_json(value):
                self.fail(f"defaults.{name}", f"must be a JSON value, not {shown(value)}")
        return dict(values)

    def _chat_template(self) -> dict[str, Any]:
        name = self._path("chat_template_file")
        if name is None:
            return {}
        if self.values.get("prompt_template") is not None:
            self.fail("chat_template_file", "and prompt_template cannot both be given")
        candidates = dict.fromkeys(folder / name for folder in (self.file.parent, self.folder))
        for path in candidates:
            try:
                if path.is_file():
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    return {"chat_template_file": path, "chat_template_sha256": digest}
            except OSError as error:
                self.fail("chat_template_file", f"{path} cannot be read: {error.strerror}")
                return {}
        self.fail("chat_template_file", f"there is no {' nor '.join(map(str, candidates))}")
        return {}

    def _prompt_template(self) -> Any:
        value = self.values.get("prompt_template")
        if value is None:
            return None
        try:
            return make_template(value, f"models.{self.name}.prompt_template")
        except ConfigError as error:
            self.problems += error.problems
            return None

    def _check_slots(self, flags: tuple[str, ...], slots: int | None) -> None:
        said = flag_value(flags, "-np", "--parallel")
        if slots is not None and said is not None and said != str(slots):
            self.fail("slots", f"is {slots}, but the flags say -np {said}; say it once")


def _wrong_param(key: str, value: Any) -> str:
    if key == "additional_parameter" and isinstance(value, str):
        return "is no text that a shell could read"
    what = {"embedding": "true or false", "parallel_override": _SLOTS}.get(key, "text or a number")
    return f"must be {what}, not {shown(value)}"


def _name_problems(models: Mapping[str, Any], specs: list[ModelSpec]) -> list[str]:
    problems, owner = [], dict[str, str]()
    aliases = {spec.id: spec.aliases for spec in specs}
    for spec in specs:
        for alias in spec.aliases:
            place = f"models.{spec.id}.aliases: {alias!r}"
            if alias == spec.id:
                problems.append(f"{place} is the model's own id")
            elif alias in models:
                circle = ", which has this one's id for an alias" if spec.id in aliases[alias] else ""
                problems.append(f"{place} is the id of another model{circle}")
            elif owner.setdefault(alias, spec.id) != spec.id:
                problems.append(f"{place} is an alias of {owner[alias]!r} already")
        for alias in sorted({alias for alias in spec.aliases if spec.aliases.count(alias) > 1}):
            problems.append(f"models.{spec.id}.aliases: {alias!r} stands there twice")
    return problems


def _says_template(flags: tuple[str, ...]) -> bool:
    return flag_value(flags, "--chat-template", "--chat-template-file") is not None


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 31_536_000


def _is_variable(value: Any) -> bool:
    return isinstance(value, str) and _VARIABLE.fullmatch(value) is not None


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
