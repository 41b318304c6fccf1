"""How much a grammar becomes inside llama-server, told from its text. Pure.

llama-server follows all ways at once in which a grammar can go on, on its only serving thread, and first looks for left
recursion without remembering where it has been. So a few hundred bytes can keep it busy for ever. Seen on build 11669:
rules that double forty times (`r1 ::= r2 r2` …): hangs, 2.6 GB after 12 s. 8,000 optional items in a row: hangs; 600:
0.3 s for each token. A text of 30 KB a thousand times: 1 s, 300 MB. `"a"{5,2}`: hangs, 4 GB after 6 s.

It is the grammar's beginnings that are counted here. One that becomes ambiguous only while it nests (`r ::= "a" r "b" |
"a" r "c" | "d"`, or the same with forty rules, each of which leads to the next) cannot be told from its text:
`may_nest` names those that must be tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

MAX_REPETITION = 1000
MAX_WAYS = 4096  # in which something can go on: 3,000 texts to choose from cost 12 ms a token
MAX_PRESSURE = 1 << 14  # ways, summed up over optional items in a row; 125 of them: 3 ms a token
MAX_SIZE = 1 << 20  # characters and references, repetitions written out
MAX_PASSES = 12
MAX_NESTED = 1 << 16  # characters, references followed: what is smaller has not places enough to be in at once


class TooMuch(Exception):
    """The grammar exceeds a bound; the text says which, as the end of a sentence."""


class Part(NamedTuple):
    """A piece of a grammar: the ways in which it can begin, its size when written out, whether it can be empty."""

    ways: int
    size: int
    empty: bool


Times = tuple[int, int | None]
Token = tuple[str, Any]  # "part" with a Part, "times" with Times, "name" with a str; "(", ")" and "|" with nothing
_UNKNOWN = Part(1, 1, False)
_MARKS: dict[str, Times] = {"*": (0, None), "+": (1, None), "?": (0, 1)}

# One may stand in the midst of {1,2}, and a carriage return ends it.
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|!?<[^<>\s]*>)|#[^\r\n]*', re.DOTALL)
_GBNF = re.compile(
    r'(?P<text>"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|!?<[^<>\s]*>|\.)'
    r"|(?P<name>[A-Za-z0-9_-]+)(?P<defines>[ \t]*::=)?|(?P<mark>[()|*+?])|\{(?P<times>[^{}]*)\}",
    re.DOTALL,
)
_REGEX = re.compile(
    r"(?P<open>\((?:\?[:=!<]*)?)|(?P<mark>[)|*+?])|\{(?P<times>[^{}]*)\}|(?P<text>\\.|\[(?:\\.|[^\]\\])*\]|[^\^$])",
    re.DOTALL,
)


def check_rules(text: str) -> None:
    """A GBNF grammar. Raises TooMuch; what is no grammar at all is left to llama-server."""
    rules = _rules(text)
    known: dict[str, Part] = {}
    for turn in range(MAX_PASSES):  # rules may stand in any order; two passes do unless they are made to need more
        before = dict(known)
        for name in list(rules) if turn % 2 else reversed(rules):
            known[name] = _read(rules[name], known)._replace(size=1)
        if known == before:
            return
    raise TooMuch("has rules that lead to one another, or to themselves, without end")


def may_nest(text: str) -> bool:
    """Whether a GBNF grammar that `check_rules` lets pass may come to be in ever more places at once: a rule leads back
    to itself, or those that lead to one another come to very much."""
    rules = _rules(text)
    leads = {name: {value for kind, value in rule if kind == "name"} & rules.keys() for name, rule in rules.items()}
    sizes: dict[str, int] = {}
    try:
        for name in TopologicalSorter(leads).static_order():
            sizes[name] = _written_out(rules[name], sizes)
    except CycleError:
        return True
    return max(sizes.values(), default=0) > MAX_NESTED


def check_regex(pattern: str) -> Part:
    """A regular expression of a JSON schema. Raises TooMuch."""
    return _read([token for match in _REGEX.finditer(pattern) for token in _token(match)], {})


def _rules(text: str) -> dict[str, list[Token]]:
    rules: dict[str, list[Token]] = {}
    rule: list[Token] = []
    for match in _GBNF.finditer(_COMMENT.sub(lambda found: found[1] or "", text)):
        if match["defines"]:
            rule = rules[match["name"]] = []
        elif match["name"]:
            rule.append(("name", match["name"]))
        else:
            rule.extend(_token(match))
    return rules


def _token(match: re.Match[str]) -> Iterator[Token]:
    found = match.groupdict()
    if found.get("open"):
        yield "(", None
    elif mark := found["mark"]:
        yield ("times", _MARKS[mark]) if mark in _MARKS else (mark, None)
    elif found["times"] is not None:
        yield "times", _times(found["times"])
    elif found["text"]:
        yield "part", Part(1, len(found["text"]), found["text"] == '""')


def _times(text: str) -> Times:
    """`m`, `m,` and `m,n`; signs and spaces are read over, as llama-server does."""
    first, comma, second = text.partition(",")
    low, high = (int(found[0][:7]) if (found := re.findall(r"\d+", part)) else None for part in (first, second))
    for number in (low, high):
        if number is not None and number > MAX_REPETITION:
            raise TooMuch(f"repeats something {number} times: at most {MAX_REPETITION} are allowed")
    if not comma:
        high = low
    if high is not None and (low or 0) > high:
        raise TooMuch(f"repeats something at least {low} and at most {high} times")
    return low or 0, high


def _read(tokens: Iterable[Token], known: Mapping[str, Part]) -> Part:
    """What a rule or an expression comes to; brackets that do not match are left to llama-server."""
    groups: list[list[list[Part]]] = [[[]]]  # open groups, their alternatives, the parts of these
    for kind, value in tokens:
        sequence = groups[-1][-1]
        if kind == "part":
            sequence.append(value)
        elif kind == "name":
            sequence.append(known.get(value, _UNKNOWN))
        elif kind == "times":
            if sequence:
                sequence[-1] = _repeated(sequence[-1], *value)
        elif kind == "|":
            groups[-1].append([])
        elif kind == "(":
            groups.append([[]])
        elif len(groups) > 1:
            done = _choice(groups.pop())
            groups[-1][-1].append(done)
    while len(groups) > 1:
        done = _choice(groups.pop())
        groups[-1][-1].append(done)
    return _choice(groups[0])


def _written_out(rule: Iterable[Token], sizes: Mapping[str, int]) -> int:
    """In characters; no further than it matters."""
    groups, last = [0], 0  # open groups, and the item that a repetition would repeat
    for kind, value in rule:
        if kind == "times":
            low, high = value
            last *= max(low, 1 if high is None else high) - 1
        elif kind == "(":
            groups.append(0)
            continue
        elif kind == ")":
            last = groups.pop() if len(groups) > 1 else 0
        else:
            last = value.size if kind == "part" else sizes.get(value, 1) if kind == "name" else 0
        groups[-1] = min(groups[-1] + last, MAX_NESTED + 1)
    return sum(groups)


def _choice(alternatives: list[list[Part]]) -> Part:
    parts = [_sequence(alternative) for alternative in alternatives]
    return _bounded(
        Part(1 + sum(part.ways for part in parts), sum(part.size for part in parts), any(part.empty for part in parts))
    )


def _sequence(parts: list[Part]) -> Part:
    """Counts at each place in it, for llama-server gets to all of them."""
    ways = pressure = 0
    for part in reversed(parts):
        ways = part.ways + (ways if part.empty else 0)
        pressure = ways + (pressure if part.empty else 0)
        if ways > MAX_WAYS or (part.empty and pressure > MAX_PRESSURE):
            raise TooMuch("has too many optional items in a row")
    return _bounded(Part(ways, sum(part.size for part in parts), all(part.empty for part in parts)))


def _repeated(part: Part, low: int, high: int | None) -> Part:
    most = low + 1 if high is None else high
    ways = _sequence([part] * most).ways if part.empty else part.ways + 1
    return _bounded(Part(ways, part.size * max(1, most), part.empty or low == 0))


def _bounded(part: Part) -> Part:
    if part.ways > MAX_WAYS:
        raise TooMuch(f"can go on in more than {MAX_WAYS} ways at one place")
    if part.size > MAX_SIZE:
        raise TooMuch(f"has more than {MAX_SIZE} characters when its repetitions are written out")
    return part
