"""Bounds for what llama-server turns into a grammar: grammars, JSON schemas and tools. Pure.

Why: llama-server compiles them on its only serving thread, recursively. Nested deeply enough they end the whole
process (llama.cpp #26600), large ones block it for minutes (#25895).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from gateway.errors import BadRequest

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_REPETITION = 1000

# Strings, character classes and comments are skipped; groups and repetitions are looked at.
_GBNF = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|(?P<group>[()])|\{(?P<times>[^{}]*)\}')
_TIMES = re.compile(r"\{(\d*),?(\d*)\}")
_COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})


def check_grammar(text: str, param: str) -> None:
    """A GBNF grammar. Raises BadRequest."""
    _check_size(len(text.encode()), param)
    depth = 0
    for token in _GBNF.finditer(text):
        if token["group"] == "(":
            depth += 1
            _check_depth(depth, param)
        elif token["group"] == ")":
            depth -= 1
        elif token["times"] is not None:
            for number in re.findall(r"\d+", token["times"]):
                _check_times(number, param)


def check_schema(raw: bytes, param: str) -> None:
    """A JSON schema, or anything that holds some: tools, a response format. Raises BadRequest."""
    _check_size(len(raw), param)
    try:
        schema = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"{param} cannot be read: {error}", param=param) from None
    for key, value, depth in _walk(schema):
        _check_depth(depth, param)
        if key in _COUNTS and isinstance(value, int | float) and value > MAX_REPETITION:
            _check_times(str(int(min(value, 1e18))), param)
        elif key == "pattern" and isinstance(value, str):
            _check_pattern(value, param)


def _walk(root: Any) -> Iterator[tuple[str | None, Any, int]]:
    """Every value with the key it stands under and how deep it is nested; without recursion."""
    stack: list[tuple[str | None, Any, int]] = [(None, root, 0)]
    while stack:
        key, value, depth = stack.pop()
        yield key, value, depth
        if isinstance(value, dict):
            stack += [(name, inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            stack += [(None, inner, depth + 1) for inner in value]


def _check_pattern(pattern: str, param: str) -> None:
    depth = 0
    for character in pattern:
        depth += (character == "(") - (character == ")")
        _check_depth(depth, param)
    for low, high in _TIMES.findall(pattern):
        _check_times(low or "0", param)
        _check_times(high or "0", param)


def _check_size(size: int, param: str) -> None:
    if size > MAX_BYTES:
        raise BadRequest(f"{param} has {size} bytes: at most {MAX_BYTES} are allowed", param=param)


def _check_depth(depth: int, param: str) -> None:
    if depth > MAX_DEPTH:
        raise BadRequest(f"{param} is nested more than {MAX_DEPTH} deep", param=param)


def _check_times(number: str, param: str) -> None:
    if len(number) > 6 or int(number) > MAX_REPETITION:
        raise BadRequest(f"{param} repeats something {number[:20]} times: at most {MAX_REPETITION}", param=param)
