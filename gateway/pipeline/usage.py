"""How many tokens an answer took, read from its head and tail without parsing what lies between.

Fields are looked for as bytes: inside a text their quotes would be escaped, so a text cannot pretend to be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import msgspec

from gateway.pipeline.dialects import Dialect

# As llama-server writes it at the end of an OpenAI answer; any other form is looked through field by field.
_USUAL = re.compile(
    rb'"usage":\{"completion_tokens":(\d{1,15}),"prompt_tokens":(\d{1,15}),"total_tokens":\d{1,15}'
    rb'(?:,"prompt_tokens_details":\{"cached_tokens":(\d{1,15})\})?\}'
)
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_TIMES = re.compile(rb'"timings"\s*:\s*\{')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_STOPPED = re.compile(rb'"stop"\s*:\s*true|"stop_type"\s*:\s*"')
_PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
_INPUT = re.compile(rb'"input_tokens"\s*:\s*(\d+)')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d+)')
_CACHED = re.compile(rb'"cached_tokens"\s*:\s*(\d+)')
_CACHE_READ = re.compile(rb'"cache_read_input_tokens"\s*:\s*(\d+)')
_CACHE_WRITE = re.compile(rb'"cache_creation_input_tokens"\s*:\s*(\d+)')
_TIMINGS = re.compile(
    rb'"timings"\s*:\s*\{\s*"cache_n"\s*:\s*(\d+)\s*,\s*"prompt_n"\s*:\s*(\d+)\s*,'
    rb'[^{}]*?"predicted_n"\s*:\s*(\d+)\s*[,}]'
)
_EVALUATED = re.compile(rb'"tokens_evaluated"\s*:\s*(\d+)')
_PREDICTED = re.compile(rb'"tokens_predicted"\s*:\s*(\d+)')
_PREFILL = re.compile(rb'"prompt_progress":\{"total":\d+,"cache":(\d+),"processed":(\d+)')
_CHOICE = re.compile(rb'"index":(\d+),"(?:delta|logprobs|content)"')

# Events of a stream that carry no token: the role, created + in_progress + item.added + part.added, two starts.
_OVERHEAD = {Dialect.CHAT: 1, Dialect.RESPONSES: 4, Dialect.MESSAGES: 2}
_NEAR = 2048  # a final event's numbers stand at its end; looking through all of it takes longer
_FURTHEST = 1024  # from the beginning of timings to the numbers that count, and more
_MOST_HELD = 16 * 1024  # of a stream's event that is not whole yet: a final one tells its numbers at its end
_SLACK = 16  # more frames than tokens, and answers must have come and gone unseen between head and tail
_MOST = 1 << 53  # beyond that it is no count


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of the prompt (those found in the cache included), tokens generated, prompt tokens found in the cache.

    A number that the answer does not tell is 0.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.completion + other.completion, self.cached + other.cached)

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def counts(self) -> tuple[int, int, int]:
        return self.prompt, self.completion, self.cached

    @classmethod
    def of_final(cls, final: Mapping[str, Any]) -> Usage:
        """From the decoded final object of an answer, by its `usage` or else its `timings`."""
        usage, timings = final.get("usage"), final.get("timings")
        if isinstance(usage, dict) and usage:
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
            anthropic = "prompt_tokens" not in usage
            cached = _count(usage, "cache_read_input_tokens") if anthropic else 0
            prompt = _count(usage, "input_tokens" if anthropic else "prompt_tokens")
            completion = _count(usage, "output_tokens") or _count(usage, "completion_tokens")
            written = _count(usage, "cache_creation_input_tokens") if anthropic else 0
            inner = _count(details, "cached_tokens") if isinstance(details, dict) else 0
            return cls(prompt + cached + written, completion, cached or inner)
        if isinstance(timings, dict):
            cached = _count(timings, "cache_n")
            return cls(cached + _count(timings, "prompt_n"), _count(timings, "predicted_n"), cached)
        return cls(_count(final, "tokens_evaluated"), _count(final, "tokens_predicted"))


NO_USAGE = Usage()


def usage_of_stream(dialect: Dialect, head: bytes, tail: bytes, frames: int) -> Usage:
    """Of a stream: `head` its first ≤ 2 KB, `tail` its last ≤ 4 KB, `frames` how many `data:` lines it had.

    Several answers in one stream are summed. Where the end is missing, or lies before the tail because another
    answer went on, generated tokens are counted by frames; never raises.
    """
    if not dialect.generates:
        return usage_of_body(dialect, head, tail)
    if dialect is Dialect.MESSAGES:
        return _of_messages(head, tail, frames)
    near = tail[-_NEAR:]
    choices = _choices(head, near)
    if choices == 1 and (final := next(_finals(dialect, near), None)):
        return final
    total, finals = Usage(), 0
    for final in _finals(dialect, tail):
        total += final
        finals += 1
    silent = choices * _OVERHEAD.get(dialect, 0)
    silent += tail.count(b'"finish_reason":"') + tail.count(b'"choices":[]') if dialect is Dialect.CHAT else finals
    silent += head.count(b'"prompt_progress"') + head.count(b"data: null") + tail.count(b"data: [DONE]")
    counted = frames - silent
    if finals >= choices and (choices == 1 or counted - total.completion < _SLACK):
        return total
    return Usage(total.prompt or _first(_EVALUATED, head), max(total.completion, counted, 0), total.cached)


class Ends(Protocol):
    """Catches what an answer tells of its tokens where that may lie neither in its head nor in its tail."""

    def see(self, payload: bytes) -> None:
        """The next bytes of the answer; never raises."""

    @property
    def total(self) -> Usage | None:
        """None where not all has been told."""


class StreamEnds:
    """Of several answers in one stream, which may end any distance apart."""

    def __init__(self, dialect: Dialect, answers: int) -> None:
        self._dialect, self._answers = dialect, answers
        self._rest = b""
        self._by_usage: list[Usage] = []
        self._by_timings: list[Usage] = []  # a final event may carry them beside an event with the usage

    def see(self, payload: bytes) -> None:
        *whole, rest = (self._rest + payload).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            (self._by_usage if _USAGE.search(event) else self._by_timings).extend(_finals(self._dialect, event))
        self._rest = rest[-_MOST_HELD:]

    @property
    def total(self) -> Usage | None:
        found = self._by_usage or self._by_timings
        return sum(found, Usage()) if len(found) >= self._answers else None


class NativeEnds:
    """Of a whole native answer, or a list of several: its timings stand before the probabilities of its tokens."""

    def __init__(self) -> None:
        self._rest = b""
        self._sum = Usage()

    def see(self, payload: bytes) -> None:
        data, seen = self._rest + payload, 0
        for found in _TIMINGS.finditer(data):
            self._sum += _of_timings(found)
            seen = found.end()
        self._rest = data[max(seen, len(data) - _FURTHEST) :]

    @property
    def total(self) -> Usage | None:
        return self._sum if self._sum.prompt else None


def ends_of(dialect: Dialect, answers: int, *, streamed: bool) -> Ends | None:
    """What is to be caught of an answer as it passes; None where its head and tail tell all that there is."""
    if streamed:
        return StreamEnds(dialect, answers) if answers > 1 and dialect.generates else None
    return NativeEnds() if dialect is Dialect.NATIVE else None


def with_prefill(usage: Usage, event: bytes) -> Usage:
    """`usage` of a stream that was cut, with as much of its prompt as was worked off by its last event of progress."""
    found = _PREFILL.search(event)
    return Usage(_number(found[2]), usage.completion, _number(found[1])) if found else usage


def usage_of_body(dialect: Dialect, body: bytes, tail: bytes = b"") -> Usage:
    """Of a whole answer; of a big one `body` may be its first 2 KB and `tail` its last 4 KB. Never raises.

    llama-server puts the usage of an embedding or a ranking first, of a text last. `tokens_cached` of the native
    dialect is what the slot holds in the end, generated tokens included: the cached ones are `timings.cache_n`.
    """
    if dialect in (Dialect.TOKENIZE, Dialect.DETOKENIZE, Dialect.APPLY_TEMPLATE, Dialect.COUNT_TOKENS):
        return Usage()
    if dialect is Dialect.NATIVE:
        total = Usage()
        for found in _TIMINGS.finditer(tail or body):
            total += _of_timings(found)
        return total if total.prompt else Usage(_first(_EVALUATED, body), _first(_PREDICTED, body))
    last = tail or body
    if (usual := _USUAL.match(last, max(0, last.rfind(b'"usage":')))) and int(usual[2]):
        return Usage(int(usual[2]), int(usual[1]), int(usual[3] or 0))
    for part in (tail, body):
        for text in reversed(_usages(part)) if part else ():
            usage = _of_usage(text)
            if usage.prompt or usage.completion or usage.cached:
                return usage
    return NO_USAGE


def _choices(head: bytes, tail: bytes) -> int:
    """How many answers go on in one stream, as far as head and tail show it."""
    if b'"index":1,' not in head and b'"index":1,' not in tail:
        return 1  # nearly always; the pattern is slow
    return max(1, len({*_CHOICE.findall(head), *_CHOICE.findall(tail)}))


def _finals(dialect: Dialect, tail: bytes) -> Iterator[Usage]:
    """What each final event in the tail says, the last one first; one may begin before the tail."""
    told = _usages(tail)
    if dialect is Dialect.RESPONSES:
        del told[:-1]
    if told:  # /v1/completions always; /v1/chat/completions with include_usage
        for text in reversed(told):
            yield _of_usage(text)
        return
    if b"\r" in tail:
        tail = tail.replace(b"\r\n", b"\n")
    # partial events carry timings too: with timings_per_token, and at a stop word
    final = _STOPPED if dialect is Dialect.NATIVE else _FINISHED
    end = len(tail)
    for at in reversed([found.start() for found in _TIMES.finditer(tail)]):
        if at >= end:
            continue  # a second one in the same event
        begin = tail.rfind(b"\n\n", 0, at) + 1
        frame = tail[begin:end].partition(b"\n\n")[0] if begin else tail[:end]
        if final.search(frame) and (timings := _TIMINGS.match(tail, at)):
            yield _of_timings(timings)
        end = begin


def _of_messages(head: bytes, tail: bytes, frames: int) -> Usage:
    """Input tokens stand in message_start, which llama-server leaves out if the first token is half a character."""
    begins = _usages(head) if b'"message_start"' in head else []
    start = _of_usage(begins[0]) if begins else Usage()
    at = tail.rfind(b'"message_delta"')
    if at >= 0:
        return Usage(start.prompt, _first(_COMPLETION, tail[at:]), start.cached)
    return Usage(start.prompt, max(0, frames - _OVERHEAD[Dialect.MESSAGES]), start.cached)


def _of_usage(text: bytes) -> Usage:
    completion, cached = _first(_COMPLETION, text), _first(_CACHED, text)
    if found := _PROMPT.search(text):
        return Usage(_number(found[1]), completion, cached)
    read = _first(_CACHE_READ, text)  # Anthropic's input_tokens leaves the cached ones out
    prompt = _first(_INPUT, text) + read + _first(_CACHE_WRITE, text)
    return Usage(prompt, completion, cached or read)


def _of_timings(found: re.Match[bytes]) -> Usage:
    cached = _number(found[1])
    return Usage(cached + _number(found[2]), _number(found[3]), cached)


def _usages(text: bytes) -> list[bytes]:
    """What follows each `"usage":{`, up to the end of its event and far enough for all its fields."""
    return [text[at : at + 1024].partition(b"\n\n")[0] for at in (found.start() for found in _USAGE.finditer(text))]


def _first(pattern: re.Pattern[bytes], text: bytes) -> int:
    found = pattern.search(text)
    return _number(found[1]) if found else 0


def _number(digits: bytes) -> int:
    return int(digits) if len(digits) < 16 else 0


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST else 0
