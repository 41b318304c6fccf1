"""What a request and its answer said, for the records (AUDIT_CONTENT): gathered as it goes by, read when it is over.

The event loop keeps the bytes, which become text in the thread that writes the records; out of a stream it takes the
text every few KB, for its events take thirty times as much room.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

import msgspec

from gateway.errors import CorralError
from gateway.pipeline.assemblers.base import UNREADABLE
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.frames import FrameParser
from gateway.stores.records.audit import Detail

DIGEST_BYTES = 4096  # of a stream's events, before their text is taken out; some 30 µs of the loop
MOST_BODY = 256 * 1024  # of an answer in one piece; a slow reader holds it for long
MOST_STREAM = 32 * 1024 * 1024

CONTENT = (
    "system instructions messages input prompt suffix input_prefix input_suffix input_extra query documents texts "
    "content tokens"
).split()
_TEXT = "text"
_LINE_START = b"data: "
_STREAM_STARTS = (b"data:", b"event:", b":")


class _Delta(msgspec.Struct, gc=False):
    """Of an event that brings text, and no tool calls: with those, it is none."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta
    index: int = 0


class _ChatEvent(msgspec.Struct, gc=False):
    choices: list[_Choice]


_PLAIN_CHAT = msgspec.json.Decoder(list[_ChatEvent])


class Transcript:
    """One request's. Used by the event loop until it is over, then by the writer's thread."""

    def __init__(self, dialect: Dialect, fields: Mapping[str, msgspec.Raw]) -> None:
        self._dialect = dialect
        self.prompt = Prompt({name: fields[name] for name in CONTENT if name in fields})
        self._over = False
        self.begin_again()

    def begin_again(self) -> None:
        """What it has seen of an answer broke off, and another one comes in its place."""
        self._raw: list[bytes] = []
        self._held = self._seen = 0
        self._is_stream: bool | None = None
        self._frames = FrameParser()
        self._answer = Pieces()
        self._cut = False

    def see(self, payload: bytes) -> None:
        """The next bytes of the answer, as they came from llama-server."""
        if self._cut or self._over:
            return
        self._raw.append(payload)
        self._held += len(payload)
        self._seen += len(payload)
        if self._is_stream is None and self._seen >= len("event:"):
            self._is_stream = self._dialect.generates and b"".join(self._raw).startswith(_STREAM_STARTS)
        self._cut = self._seen > (MOST_STREAM if self._is_stream else MOST_BODY)
        if self._is_stream and self._held > DIGEST_BYTES:
            self._digest()

    def end(self) -> None:
        """It is the other thread's from now on: what still comes, for others who share the answer, is not kept."""
        self._over = True

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return self._held + self._answer.size

    def said(self) -> bytes | None:
        text = self.text()
        return None if text is None else text.encode(errors="surrogatepass")

    def text(self) -> str | None:
        """The answer: its text, or the JSON of it where there is more than one text; None where nothing has come."""
        if not self._seen:
            return None
        text = self._whole_text()
        return f"{text}… [cut]" if self._cut else text

    def _whole_text(self) -> str:
        if self._is_stream:
            self._digest()
            return self._answer.told()
        body = b"".join(self._raw)
        if self._dialect.generates:
            try:
                self._answer.take(self._dialect, msgspec.json.decode(body))
                return self._answer.told()
            except UNREADABLE:
                pass  # then as it came
        return body.decode(errors="replace")

    def _digest(self) -> None:
        raw, self._raw, self._held = b"".join(self._raw), [], 0
        try:
            events = None if self._frames.pending else lone_lines(raw)
            if events is None:
                events = [frame.data for frame in self._frames.feed(raw)]
            self._answer.take_all(self._dialect, [event for event in events if event.startswith(b"{")])
        except (CorralError, *UNREADABLE):
            self._cut = True  # what cannot be read any further ends here


def lone_lines(raw: bytes) -> list[bytes] | None:
    """The data of whole events of one line each, as llama-server writes them; None where there is anything else."""
    if not (raw.startswith(_LINE_START) and raw.endswith(b"\n\n")) or b"\r" in raw:
        return None
    lines = raw[len(_LINE_START) : -2].split(b"\n\n" + _LINE_START)
    return lines if raw.count(b"\n") == 2 * len(lines) else None


class Prompt:
    """The fields of a request that say something. They refer to the body as it came, and copy nothing."""

    def __init__(self, fields: dict[str, msgspec.Raw]) -> None:
        self._fields = fields

    @property
    def size(self) -> int:
        return sum(memoryview(value).nbytes for value in self._fields.values())

    def said(self) -> bytes | None:
        return prompt_said(self._fields)


def prompt_said(fields: Mapping[str, msgspec.Raw]) -> bytes | None:
    """A lone text as it is, else the JSON of what there is, in UTF-8; None where there is nothing.

    The JSON stays bytes, for making 10 MB of them into text holds the interpreter for 20 ms.
    """
    said = {name: bytes(fields[name]) for name in CONTENT if name in fields}
    if not said:
        return None
    if len(said) == 1:
        (only,) = said.values()
        if only.startswith(b'"'):
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                return msgspec.json.decode(only, type=str).encode(errors="surrogatepass")
        return only
    return b"{%b}" % b",".join([b'"%b":%b' % (name.encode(), value) for name, value in said.items()])


class Pieces:
    """The texts of one answer, or of several at once: by the answer's index and by kind."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, str], list[str]] = {}
        self.size = 0

    def take_all(self, dialect: Dialect, events: list[bytes]) -> None:
        """Events of a stream. Raises one of UNREADABLE, having taken none or those before the bad one."""
        if dialect is Dialect.CHAT and self._take_plain(events):
            return
        for event in events:
            self.take(dialect, msgspec.json.decode(event))

    def _take_plain(self, events: list[bytes]) -> bool:
        """Chat events that bring text and nothing else, as nearly all do; else False, and none was taken.

        Their texts are joined at once: one for each token would take ten times as much memory.
        """
        try:
            plain = _PLAIN_CHAT.decode(b"[%b]" % b",".join(events))
        except UNREADABLE:
            return False
        said: dict[tuple[int, str], list[str]] = {}
        for choice in chain.from_iterable([event.choices for event in plain]):
            delta = choice.delta
            if delta.content:
                said.setdefault((choice.index, _TEXT), []).append(delta.content)
            if delta.reasoning_content:
                said.setdefault((choice.index, "reasoning"), []).append(delta.reasoning_content)
        for (index, kind), texts in said.items():
            self.add(index, kind, "".join(texts))
        return True

    def take(self, dialect: Dialect, told: Any) -> None:
        """One event of a stream, or a whole answer. What has another form than usual is passed over."""
        for one in told if isinstance(told, list) else (told,):  # several native answers are a list
            if isinstance(one, dict):
                _TAKERS[dialect](self, one)

    def add(self, index: Any, kind: str, text: Any) -> None:
        if isinstance(text, str) and text:
            self._parts.setdefault((index if isinstance(index, int) else 0, kind), []).append(text)
            self.size += len(text)

    def told(self) -> str:
        joined = {name: "".join(parts) for name, parts in self._parts.items()}
        if not joined or set(joined) == {(0, _TEXT)}:
            return joined.get((0, _TEXT), "")
        answers: dict[int, dict[str, str]] = {}
        for (index, kind), text in joined.items():
            answers.setdefault(index, {})[kind] = text
        rows = [answers[index] for index in sorted(answers)]
        return msgspec.json.encode(rows[0] if len(rows) == 1 else rows).decode()


def _chat(pieces: Pieces, told: dict[str, Any]) -> None:
    for choice in _dicts(told.get("choices")):
        index, said = choice.get("index"), choice.get("delta") or choice.get("message")
        if not isinstance(said, dict):
            continue
        pieces.add(index, _TEXT, said.get("content"))
        pieces.add(index, "reasoning", said.get("reasoning_content"))
        for number, call in enumerate(_dicts(said.get("tool_calls"))):
            function = call.get("function")
            if isinstance(function, dict):
                name = f"tool_{call.get('index', number)}"
                pieces.add(index, name, function.get("name"))
                pieces.add(index, f"{name}_arguments", function.get("arguments"))


def _completions(pieces: Pieces, told: dict[str, Any]) -> None:
    for choice in _dicts(told.get("choices")):
        pieces.add(choice.get("index"), _TEXT, choice.get("text"))


def _native(pieces: Pieces, told: dict[str, Any]) -> None:
    pieces.add(told.get("index"), _TEXT, told.get("content"))


def _responses(pieces: Pieces, told: dict[str, Any]) -> None:
    kind = told.get("type")
    if isinstance(kind, str):  # an event; the last one, with the whole answer, repeats what the deltas said
        if kind in _DELTAS:
            pieces.add(0, _DELTAS[kind], told.get("delta"))
        elif kind == "response.output_item.added" and isinstance(item := told.get("item"), dict):
            pieces.add(0, "tool", item.get("name"))
        return
    for item in _dicts(told.get("output")):
        pieces.add(0, "tool", item.get("name"))
        pieces.add(0, "tool_arguments", item.get("arguments"))
        name = "reasoning" if item.get("type") == "reasoning" else _TEXT
        for part in _dicts(item.get("content")):
            pieces.add(0, name, part.get("text"))


def _messages(pieces: Pieces, told: dict[str, Any]) -> None:
    blocks = [told.get("delta"), told.get("content_block"), *_dicts(told.get("content"))]
    for block in _dicts(blocks):
        pieces.add(0, _TEXT, block.get("text"))
        pieces.add(0, "reasoning", block.get("thinking"))
        if block.get("type") == "tool_use":
            pieces.add(0, "tool", block.get("name"))
            if block.get("input"):
                pieces.add(0, "tool_arguments", msgspec.json.encode(block["input"]).decode())
        pieces.add(0, "tool_arguments", block.get("partial_json"))


_DELTAS = {
    "response.output_text.delta": _TEXT,
    "response.reasoning_text.delta": "reasoning",
    "response.function_call_arguments.delta": "tool_arguments",
}
_TAKERS = {
    Dialect.CHAT: _chat,
    Dialect.COMPLETIONS: _completions,
    Dialect.NATIVE: _native,
    Dialect.RESPONSES: _responses,
    Dialect.MESSAGES: _messages,
}


def detail_of(cache: str | None, transcript: Transcript | None) -> Detail:
    """What is written down beside the record."""
    if transcript is None:
        return Detail(cache)
    transcript.end()
    return Detail(cache, transcript.prompt, transcript)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
