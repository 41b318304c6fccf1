"""A prompt template of four pieces of text, as a chat template for llama-server."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.errors import ConfigError

_MAX_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """What stands around a user's and around the model's words."""

    user_prefix: str = ""
    user_suffix: str = ""
    model_prefix: str = ""
    model_suffix: str = ""

    def jinja(self) -> str:
        """For `--chat-template` with `--jinja`.

        These templates have no place for a system message: its text stands at the beginning of the next user turn.
        """
        return _TEMPLATE % {name: _literal(text) for name, text in dataclasses.asdict(self).items()}


# Jinja forgets at the end of a loop's body what was set in it, but not what was set in a namespace.
_TEMPLATE = (
    "{%%- set ns = namespace(system='') -%%}"
    "{%%- for message in messages -%%}"
    "{%%- if message['role'] == 'system' or message['role'] == 'developer' -%%}"
    "{%%- set ns.system = ns.system + (message['content'] or '') + '\\n\\n' -%%}"
    "{%%- elif message['role'] == 'assistant' -%%}"
    "{{- %(model_prefix)s + (message['content'] or '') + %(model_suffix)s -}}"
    "{%%- else -%%}"
    "{{- %(user_prefix)s + ns.system + (message['content'] or '') + %(user_suffix)s -}}"
    "{%%- set ns.system = '' -%%}"
    "{%%- endif -%%}"
    "{%%- endfor -%%}"
    "{%%- if ns.system -%%}{{- %(user_prefix)s + ns.system + %(user_suffix)s -}}{%%- endif -%%}"
    "{%%- if add_generation_prompt -%%}{{- %(model_prefix)s -}}{%%- endif -%%}"
)


def make_template(value: Any, place: str) -> PromptTemplate:
    """From four keys, each of which may be missing. Raises ConfigError, each problem with its `place`."""
    if not isinstance(value, Mapping):
        raise ConfigError([f"{place}: must be a section with keys"])
    known = [field.name for field in dataclasses.fields(PromptTemplate)]
    problems = []
    for key, text in value.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {place}.{near[0]}?" if near else f"; there are {', '.join(known)}"
            problems.append(f"{place}.{key}: is not known{hint}")
        elif not isinstance(text, str) or "\0" in text:
            problems.append(f"{place}.{key}: must be text")
    if not value:
        problems.append(f"{place}: must have at least one of {', '.join(known)}")
    if problems:
        raise ConfigError(problems)
    return PromptTemplate(**value)


def read_template(path: Path) -> PromptTemplate:
    """A prompt_template.json. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError([f"{path}: is larger than {_MAX_BYTES >> 10} KiB"])
        value = json.loads(data)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ConfigError([f"{path}: is not JSON: {error}"]) from None
    if isinstance(value, dict):
        value = {key: text for key, text in value.items() if not key.startswith("_")}
    return make_template(value, str(path))


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"
