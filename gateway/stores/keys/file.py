"""The keys file's line: `key_id:secret[:requests_per_minute][:expiry]`, then `scope=… models=… tpm=…` and so on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from gateway.stores.keys import hashes

Priority = Literal["high", "normal", "low"]

SCOPES = ("infer", "metrics", "admin")
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
MAX_NUMBER = 10**15
# Above this a third field is no rate but a date without dashes (`20260101`): as a rate, its key would never expire.
MAX_RPM = 1_000_000

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ID_RULE = "the key id may hold only letters, digits, '-' and '_', and at most 128 of them"


@dataclass(frozen=True, slots=True)
class Key:
    """What a key may do. Of the limits, None means the gateway's default and 0 means no limit."""

    id: str
    rpm: int | None = None  # requests a minute
    expires: float | None = None  # Unix time
    scopes: frozenset[str] = frozenset({"infer"})
    models: tuple[str, ...] = ("*",)  # globs over model ids
    tpm: int | None = None  # tokens a minute
    concurrency: int | None = None  # requests at once
    priority: Priority = "high"  # the highest that its requests may ask for
    budget: int | None = None  # tokens a day

    def has(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def may_use(self, model_id: str) -> bool:
        return any(glob == "*" or fnmatchcase(model_id, glob) for glob in self.models)

    def expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file: a key, a problem, or (neither) a comment or blank, which is kept as it stands."""

    number: int
    text: str = field(repr=False)
    id: str | None = None  # known for a line with a problem too, if its id can be read
    key: Key | None = None
    stored: str = field(default="", repr=False)
    problem: str | None = None


class KeyFile:
    """The lines of a keys file, editable without disturbing those that an edit is not about."""

    def __init__(self, data: bytes = b"") -> None:
        # surrogateescape: a line in a foreign encoding is one bad line, and is written back byte for byte
        texts = data.decode("utf-8", "surrogateescape").split("\n")
        if texts[-1] == "":
            texts.pop()
        self.lines = [parse_line(text, number) for number, text in enumerate(texts, start=1)]

    def encode(self) -> bytes:
        return "".join(f"{line.text}\n" for line in self.lines).encode("utf-8", "surrogateescape")

    @property
    def ids(self) -> list[str]:
        return list(dict.fromkeys(line.id for line in self.lines if line.id))

    def of(self, key_id: str) -> list[Line]:
        return [line for line in self.lines if line.id == key_id]

    def insert(self, text: str, after: Line | None = None) -> None:
        """Adds a line behind `after`, or at the end; the numbers of the other lines stay those of the file read."""
        place = self.lines.index(after) + 1 if after else len(self.lines)
        self.lines.insert(place, parse_line(text))

    def replace(self, line: Line, text: str) -> Line:
        new = parse_line(text, line.number)
        self.lines[self.lines.index(line)] = new
        return new

    def remove(self, line: Line) -> None:
        self.lines.remove(line)

    def state(self, line: Line, now: float) -> Literal["active", "grace", "expired"]:
        """`grace`: still good, but a later line has taken over this id and this one has an end."""
        if line.key is None or line.key.expires is None:
            return "active"
        if line.key.expired(now):
            return "expired"
        own = [other for other in self.of(line.key.id) if other.key]
        return "active" if own[-1] is line else "grace"


def parse_line(text: str, number: int = 0) -> Line:
    """Never raises. A problem names the mend and repeats nothing that could be a secret in the wrong place."""
    content = text.removeprefix("\ufeff").strip()
    if not content or content.startswith("#"):
        return Line(number, text)
    head, *attributes = content.split()
    key_id, *rest = head.split(":", 2)
    known_id = key_id if rest and _ID.fullmatch(key_id) else None
    try:
        key, stored = _parse(key_id, rest, attributes)
    except _Bad as bad:
        return Line(number, text, id=known_id, problem=str(bad))
    return Line(number, text, id=known_id, key=key, stored=stored)


def compose(
    key_id: str,
    stored: str,
    rpm: int | None = None,
    expires: float | None = None,
    attributes: Mapping[str, str] | None = None,
) -> str:
    """The line of a key; attributes by their names in the file. Raises ValueError, saying why, if none can be."""
    if not _ID.fullmatch(key_id):
        raise ValueError(_ID_RULE)
    head = f"{key_id}:{stored}"
    if expires is not None:
        head += f":{'' if rpm is None else rpm}:{format_time(expires)}"
    elif rpm is not None:
        head += f":{rpm}"
    words = [f"{name}={value}" for name, value in (attributes or {}).items()]
    if any(letter.isspace() for word in words for letter in word):
        raise ValueError("a value must not hold blanks; write lists with commas")
    text = " ".join([head, *words])
    problem = parse_line(text).problem
    if problem:
        raise ValueError(problem)
    return text


def with_expiry(line: Line, expires: float) -> str:
    """The text of a good line with another expiry, all else (comments too) as it was."""
    assert line.key is not None
    indent, content = _split_indent(line.text)
    head, *tail = re.split(r"(?=\s)", content, maxsplit=1)
    key_id, stored = head.split(":", 2)[:2]
    rpm = "" if line.key.rpm is None else line.key.rpm
    return f"{indent}{key_id}:{stored}:{rpm}:{format_time(expires)}{''.join(tail)}"


def with_secret(line: Line, stored: str, expires: float | None) -> str:
    """The text of a good line with another secret and expiry, its limits and comment as they were."""
    assert line.key is not None
    tail = "".join(re.split(r"(?=\s)", _split_indent(line.text)[1], maxsplit=1)[1:])
    return compose(line.key.id, stored, line.key.rpm, expires) + tail


def parse_time(text: str) -> float:
    """ISO 8601 to Unix time; naive is UTC. Raises ValueError."""
    local = datetime.fromisoformat(text.upper())  # RFC 3339 allows t and z
    moment = (local if local.tzinfo else local.replace(tzinfo=UTC)).timestamp()
    format_time(moment)  # 9999-12-31T23:59-08:00 is one that could not be told in UTC
    return moment


def format_time(moment: float) -> str:
    """Unix time to ISO 8601. Raises ValueError outside the years 1 to 9999."""
    return datetime.fromtimestamp(moment, UTC).isoformat().removesuffix("+00:00") + "Z"


class _Bad(ValueError):
    pass


def _split_indent(text: str) -> tuple[str, str]:
    content = text.removeprefix("\ufeff").lstrip()
    return text[: len(text) - len(content)], content


def _parse(key_id: str, rest: list[str], attributes: list[str]) -> tuple[Key, str]:
    if not rest:
        raise _Bad("no colon; write key_id:secret[:requests_per_minute][:expiry]")
    if not _ID.fullmatch(key_id):
        raise _Bad(_ID_RULE)
    stored, *more = rest
    problem = hashes.problem(stored)
    if problem:
        raise _Bad(problem)
    rpm, expires = _rate_and_expiry(more[0] if more else "")
    return Key(id=key_id, rpm=rpm, expires=expires, **_attributes(attributes)), stored


def _rate_and_expiry(text: str) -> tuple[int | None, float | None]:
    """`60`, `60:2026-…`, `:2026-…` or `2026-01-01T00:00:00Z`; an expiry holds colons itself."""
    rate, _, expiry = text.partition(":")
    if rate and not _is_number(rate):
        rate, expiry = "", text
    if rate and (len(rate) > 7 or int(rate) > MAX_RPM):
        raise _Bad(f"the requests per minute must be 0 (no limit) to {MAX_RPM}; an expiry is written 2026-01-31")
    try:
        return int(rate) if rate else None, parse_time(expiry) if expiry else None
    except ValueError:
        raise _Bad(
            "what follows the secret must be the requests per minute, the expiry as in 2026-01-31T00:00:00Z, or both"
        ) from None


def _attributes(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for position, word in enumerate(words, start=1):
        if word.startswith("#"):
            break
        name, equals, value = word.partition("=")
        if name not in _ATTRIBUTES or not equals:
            near = difflib.get_close_matches(name, _ATTRIBUTES, n=1)
            mend = f"did you mean {near[0]}=?" if near else f"known: {', '.join(f'{name}=' for name in _ATTRIBUTES)}"
            raise _Bad(f"word {position} after the key is no known name=value; {mend}")
        target, read = _ATTRIBUTES[name]
        if target in found:
            raise _Bad(f"{name}= is given twice")
        found[target] = read(name, value)
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _shown(value: str) -> str:
    """A wrong value for a message, unless it is long enough to be a misplaced secret."""
    return f"'{value}'" if len(value) < 16 and value.isprintable() else "that value"


def _number(name: str, value: str) -> int:
    if not _is_number(value) or len(value) > 16 or int(value) > MAX_NUMBER:
        raise _Bad(f"{name}= must be a whole number, 0 (no limit) to {MAX_NUMBER}, not {_shown(value)}")
    return int(value)


def _budget(name: str, value: str) -> int:
    return _number(name, value.removesuffix("/day"))


def _scopes(name: str, value: str) -> frozenset[str]:
    scopes = value.split(",")
    for scope in scopes:
        if scope not in SCOPES:
            raise _Bad(f"{name}= must be some of {','.join(SCOPES)}, not {_shown(scope)}")
    return frozenset(scopes)


def _models(name: str, value: str) -> tuple[str, ...]:
    globs = tuple(value.split(","))
    if not all(globs):
        raise _Bad(f"{name}= must be model ids or globs, comma separated, such as qwen-*,llama-8b")
    return globs


def _priority(name: str, value: str) -> str:
    if value not in PRIORITIES:
        raise _Bad(f"{name}= must be high, normal or low, not {_shown(value)}")
    return value


_ATTRIBUTES: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "scope": ("scopes", _scopes),
    "models": ("models", _models),
    "tpm": ("tpm", _number),
    "concurrency": ("concurrency", _number),
    "priority": ("priority", _priority),
    "budget": ("budget", _budget),
}
