"""The plain forms over HTTP: `/infer` in lines of JSON, and `/v1/completions` with `input` and `params`."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web

from gateway.connection import Reply
from gateway.errors import BackendError, CorralError
from gateway.framing import LAST_CHUNK, frame
from gateway.http.context import REQUEST_ID
from gateway.pipeline.account import Meter
from gateway.pipeline.call import Call
from gateway.pipeline.dialects import Dialect, error_in
from gateway.pipeline.frames import Frame as Event
from gateway.pipeline.frames import FrameParser
from gateway.pipeline.grammars import ANTHROPIC_RULING
from gateway.pipeline.numbering import NumberedSplice
from gateway.pipeline.plain import (
    Text,
    Told,
    fill_call,
    infer_answer,
    infer_failure,
    infer_token,
    is_plain,
    plain_answer,
    plain_job,
    plain_token,
    told_in,
    trace_of,
)
from gateway.pipeline.progress import ProgressFilter
from gateway.pipeline.routes import INFER
from gateway.pipeline.splice import Headers, Splice
from gateway.pipeline.usage import Usage, usage_of_body
from gateway.refusals import translate_event


class Voice(ABC):
    """How a form says things: each piece of text, the whole answer, and what went wrong in the middle of it."""

    content_type: str
    pings: bool  # whether a comment may stand between its pieces

    @abstractmethod
    def token(self, text: str) -> bytes: ...

    @abstractmethod
    def answer(self, told: Told, usage: Usage, seconds: float, *, streamed: bool) -> bytes: ...

    @abstractmethod
    def failure(self, error: CorralError) -> bytes: ...


class Lines(Voice):
    """`/infer`: a line of JSON for each token, then one with `done`."""

    content_type = "application/x-ndjson"
    pings = False

    def token(self, text: str) -> bytes:
        return _line(infer_token(text))

    def answer(self, told: Told, usage: Usage, seconds: float, *, streamed: bool) -> bytes:
        return _line(infer_answer(told, usage, seconds))

    def failure(self, error: CorralError) -> bytes:
        return _line(infer_failure(error))


class Events(Voice):
    """`input` and `params`: an event for each token, one with the answer, and OpenAI's terminator."""

    content_type = "text/event-stream"
    pings = True

    def __init__(self, req_id: str) -> None:
        self._req_id = req_id

    def token(self, text: str) -> bytes:
        return _event(plain_token(self._req_id, text))

    def answer(self, told: Told, usage: Usage, seconds: float, *, streamed: bool) -> bytes:
        answer = plain_answer(self._req_id, told, usage, seconds)
        return _event(answer) + b"data: [DONE]\n\n" if streamed else msgspec.json.encode(answer)

    def failure(self, error: CorralError) -> bytes:
        return _event(error.body())


def splice_for(
    request: web.Request, call: Call, transport: asyncio.Transport, head: Callable[[int, Headers], bytes], meter: Meter
) -> Splice:
    """What writes the answer of `call` to its client. A call in a plain form becomes the OpenAI request that it amounts
    to. Raises BadRequest.
    """
    chunked = request.version >= HttpVersion11
    route = call.route
    if route.dialect in _ANTHROPIC:
        call.headers_out.append(("request-id", call.request_id))  # as Anthropic's clients look for it
        if route.dialect is Dialect.MESSAGES and not ANTHROPIC_RULING.isdisjoint(call.fields):
            from gateway.http.messages import held_to_form  # which needs this module

            if (voice := held_to_form(call)) is not None:
                return Retold(transport, head, call, meter, voice, chunked=chunked)
    elif route.dialect is Dialect.RESPONSES and call.stream:
        return NumberedSplice(transport, head, route.dialect, meter, stream=True, chunked=chunked)
    if route.template != INFER and (route.dialect is not Dialect.COMPLETIONS or not is_plain(call.fields)):
        return Splice(transport, head, route.dialect, meter, stream=call.stream, chunked=chunked)
    voice = _voice_of(request, call)
    return Retold(transport, head, call, meter, voice, chunked=chunked)


def _voice_of(request: web.Request, call: Call) -> Voice:
    """It may bring its id and its trace in its body."""
    infer = call.route.template == INFER
    plain = plain_job(call.fields)
    stream = infer if plain.stream is None else plain.stream
    fill_call(call, plain, stream=stream, template=call.route.template)
    if plain.req_id is not None and "x-request-id" not in request.headers:
        call.request_id = request[REQUEST_ID] = plain.req_id
    if plain.trace_id is not None and "traceparent" not in request.headers:
        call.traceparent = trace_of(plain.trace_id, call.traceparent)
    return Lines() if infer else Events(call.request_id)


class Retold(Splice):
    """An answer in other words: what llama-server says is taken event by event, and said by `voice`.

    What it writes is always whole events, or lines.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        head: Callable[[int, Headers], bytes],
        call: Call,
        meter: Meter,
        voice: Voice,
        *,
        chunked: bool,
    ) -> None:
        super().__init__(transport, head, call.route.dialect, meter, stream=call.stream, chunked=chunked)
        self._voice = voice
        self._received_at = call.received_at
        self._frames = FrameParser()
        self._text = Text(call.route.dialect)
        self._body: list[bytes] = []  # of an answer in one piece

    def begin(self, reply: Reply, *, skip_progress: bool = False) -> None:
        self._reply = reply
        self._progress = ProgressFilter(self.meter) if skip_progress else None
        if self.stream and not self.begun:
            headers = [("Content-Type", self._voice.content_type), *self._open_ended(), *_STREAM_HEADERS]
            self._pending = self._head(200, headers)

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        if self.failure is not None or self.finished:
            return
        if self._progress is not None:
            payload = self._progress.pass_on(payload, last)
            if self._progress.over:
                self._progress = None
        if payload:
            self.meter.see(payload)
        if self.stream:
            self._retell(payload, last)
        else:
            self._body.append(payload)
            if last:
                self._say_all()
        if self._behind and self._reply is not None:
            self._reply.pause()

    def _retell(self, payload: bytes, last: bool) -> None:
        said = []
        try:
            for event in self._frames.feed(payload):
                if error := _error_of(event):
                    self.failure = error
                    break
                if text := self._text.take(event):
                    said.append(self._voice.token(text))
            if last and self.failure is None and not self._dialect.ended_well(self.meter.tail):
                self.failure = BackendError("llama-server ended its answer before it was complete")
        except CorralError as error:  # it must not be raised into the socket's callback
            self.failure = error
        if last and self.failure is None:
            usage = self.meter.usage(self._dialect, True)
            said.append(self._voice.answer(self._text.told(), usage, self._seconds(), streamed=True))
            self.finished = True
        out = b"".join(said)
        if self._chunked:
            out = (frame(out) if out else b"") + (LAST_CHUNK if self.finished else b"")
        if out:
            self._write(out)

    def whole(self, status: int, content_type: str, body: bytes) -> None:
        usage = usage_of_body(self._dialect, body)
        said = self._voice.answer(told_in(body), usage, self._seconds(), streamed=False)
        super().whole(status, "application/json", said)

    def _say_all(self) -> None:
        try:
            self.whole(200, "application/json", b"".join(self._body))
        except CorralError as error:  # it must not be raised into the socket's callback
            self.failure = error

    def _seconds(self) -> float:
        return asyncio.get_running_loop().time() - self._received_at

    def ping(self) -> None:
        if self._voice.pings:
            super().ping()

    def error_frame(self, error: CorralError) -> bytes:
        return self._voice.failure(error)

    @property
    def _between_events(self) -> bool:
        return True


_ANTHROPIC = frozenset({Dialect.MESSAGES, Dialect.COUNT_TOKENS})
_STREAM_HEADERS: Headers = [("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no")]


def _error_of(event: Event) -> CorralError | None:
    if event.event == "error" or event.data.startswith(b'{"error"'):
        return translate_event(error_in(b"data: " + event.data) or {})
    return None


def _line(said: dict[str, Any]) -> bytes:
    return msgspec.json.encode(said) + b"\n"


def _event(said: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(said) + b"\n\n"
