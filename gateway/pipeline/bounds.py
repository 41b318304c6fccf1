"""Bounds for what llama-server turns into a grammar: grammars, JSON schemas and tools. Pure.

Why: llama-server compiles them recursively, nested deeply enough they end the whole process (llama.cpp #26600), large
ones block it for minutes (#25895), and small ones can grow without end; see `expansion`. Seen on build 11669: a grammar
of 120 KB of brackets: SIGSEGV; a schema of 60,000 lists in one another: SIGSEGV; `minLength` above `maxLength`: hangs,
5 GB after 6 s; references that double forty times: hangs; 30 lists in one another, each of `"type": ["array",
"array"]`: hangs, 3 GB after 10 s; 2,000 properties in one object: 13 s of a core; an integer with `"minimum":
9007199254740991`: hangs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from gateway.errors import BadRequest
from gateway.pipeline.expansion import MAX_REPETITION, MAX_WAYS, TooMuch, check_regex, check_rules

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_PROPERTIES = 512  # of one object
MAX_VISITS = 10_000  # of schemas, where those under several types count for each
MAX_REFERENCES = 64  # from one to the next

# Strings, character classes and comments are skipped; groups are looked at.
_GBNF = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*|(?P<group>[()])', re.DOTALL)
_COUNTS = (("minItems", "maxItems"), ("minLength", "maxLength"), ("minProperties", "maxProperties"))
# An integer of 16 digits or its opposite as the only bound: hangs; 10^15 does not. What does not fit into
# 64 bits wraps around.
MAX_INTEGER = 10**15
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_CHOICES = ("anyOf", "oneOf", "allOf")


def check_grammar(text: str, param: str) -> None:
    """A GBNF grammar. Raises BadRequest."""
    _check_size(len(text.encode(errors="surrogatepass")), param)
    depth = 0
    for token in _GBNF.finditer(text):
        if token["group"] == "(":
            depth += 1
            _check_depth(depth, param)
        elif token["group"] == ")":
            depth -= 1
    _told(check_rules, text, param)


def check_schema(raw: bytes, param: str) -> None:
    """A JSON schema, or anything that holds some: tools, a response format. Raises BadRequest."""
    _check_size(len(raw), param)
    try:
        schema = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"{param} cannot be read: {error}", param=param) from None
    targets: dict[str, list[Any]] = {}  # by the last step of the path under which a reference finds them
    nodes = []
    for key, value, depth in _walk(schema):
        _check_depth(depth, param)
        targets.setdefault(key, []).append(value)
        if isinstance(value, dict):
            nodes.append(value)
    ways = _Ways(targets, param)
    for node in nodes:
        _check_node(node, param)
        ways.of(node)
    _visits(schema, param)


def _check_node(node: dict[str, Any], param: str) -> None:
    for least, most in _COUNTS:
        low, high = (value if isinstance(value := node.get(name), int | float) else None for name in (least, most))
        for number in (low, high):
            if number is not None and number > MAX_REPETITION:
                raise BadRequest(f"{param} repeats something more than {MAX_REPETITION} times", param=param)
        if low is not None and high is not None and low > high:
            raise BadRequest(f"{param} has {least} {low} above {most} {high}", param=param)
    if "integer" in (kind := node.get("type"), *_listed(kind)):
        _check_range(node, param)
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        depth = 0
        for character in pattern:
            depth += (character == "(") - (character == ")")
            _check_depth(depth, param)
        _told(check_regex, pattern, param)


def _check_range(node: dict[str, Any], param: str) -> None:
    for name in _LOWER + _UPPER:
        value = node.get(name)
        if not isinstance(value, int | float):
            continue
        if (value if name in _LOWER else -value) > MAX_INTEGER or not -(2**63) <= value < 2**63:
            raise BadRequest(f"{param} has an integer whose {name} is {value}, which is too far from 0", param=param)


class _Ways:
    """In how many ways what a schema describes can begin; references are followed."""

    def __init__(self, targets: dict[str, list[Any]], param: str) -> None:
        self._targets, self._param = targets, param
        self._known: dict[int, int] = {}

    def of(self, node: Any, references: int = 0) -> int:
        if not isinstance(node, dict):
            return 1
        if id(node) in self._known:
            return self._known[id(node)]
        self._known[id(node)] = 1  # for one that refers to itself, which llama-server refuses
        if references > MAX_REFERENCES:
            raise BadRequest(f"{self._param} refers on more than {MAX_REFERENCES} times", param=self._param)
        ways = 1
        for name in _CHOICES:
            ways += sum(self.of(inner, references) for inner in _listed(node.get(name)))
        if isinstance(reference := node.get("$ref"), str):
            found = self._targets.get(reference.rpartition("/")[2], ())
            ways += max((self.of(target, references + 1) for target in found), default=1)
        properties = node.get("properties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise BadRequest(f"{self._param} has an object of more than {MAX_PROPERTIES} properties", param=self._param)
        ways = (ways + len(_listed(node.get("enum")))) * max(1, len(_listed(node.get("type"))))
        if ways > MAX_WAYS:
            raise BadRequest(f"{self._param} has a choice of more than {MAX_WAYS}", param=self._param)
        self._known[id(node)] = ways
        return ways


def _visits(value: Any, param: str) -> int:
    """How many schemas llama-server looks at: for each type in a list of types it looks at all that is inside anew."""
    if isinstance(value, dict):
        count = (1 + sum(_visits(inner, param) for inner in value.values())) * max(1, len(_listed(value.get("type"))))
    elif isinstance(value, list):
        count = sum(_visits(inner, param) for inner in value)
    else:
        return 0
    if count > MAX_VISITS:
        raise BadRequest(f"{param} has more than {MAX_VISITS} schemas, those under several types counted", param=param)
    return count


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _walk(root: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value with the key or the position it stands under and how deep it is nested; without recursion."""
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    while stack:
        key, value, depth = stack.pop()
        yield key, value, depth
        if isinstance(value, dict):
            stack += [(name, inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            stack += [(str(index), inner, depth + 1) for index, inner in enumerate(value)]


def _told(check: Callable[[str], object], text: str, param: str) -> None:
    try:
        check(text)
    except TooMuch as error:
        raise BadRequest(f"{param} {error}", param=param) from None


def _check_size(size: int, param: str) -> None:
    if size > MAX_BYTES:
        raise BadRequest(f"{param} has {size} bytes: at most {MAX_BYTES} are allowed", param=param)


def _check_depth(depth: int, param: str) -> None:
    if depth > MAX_DEPTH:
        raise BadRequest(f"{param} is nested more than {MAX_DEPTH} deep", param=param)
