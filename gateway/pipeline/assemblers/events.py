"""Assemblers of the dialects with named events: OpenAI's responses and Anthropic's messages."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.pipeline.assemblers.base import UNREADABLE, Assembler
from gateway.pipeline.usage import Usage


class Responses(Assembler):
    """The last event holds the whole answer; the others only say how it grew, and are not even decoded."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__(request)
        self._response: dict[str, Any] = {}

    @property
    def usage(self) -> Usage:
        return Usage.of_final(self._response)

    def _take(self, event: str | None, data: bytes) -> None:
        if event is not None and event not in _LAST:
            return
        told = self._decode(data)
        if told is None:
            return
        kind = told.get("type")
        if kind == "error":
            self._error = told
        elif kind == "response.failed":
            self._error = told["response"].get("error") or {"message": "the response failed"}
        elif kind in _LAST:
            self._response = told["response"]
            self.finished = True

    def _result(self) -> dict[str, Any]:
        response = dict(self._response)
        # What only the whole answer has: completed_at, and a status in its reasoning.
        first = {"completed_at": response["created_at"]} if "created_at" in response else {}
        done = {"status": response.get("status", "completed")}
        response["output"] = [done | item for item in response.get("output") or ()]
        return first | response


_LAST = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})


class Messages(Assembler):
    """A message_start with the message, blocks and their deltas, a message_delta with how it ended.

    llama-server leaves message_start out when the first token is half a character: then the id is made up, the
    model is the one that was asked for, and the input tokens are not known.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__(request)
        self._message: dict[str, Any] = {}
        self._blocks: list[tuple[int, dict[str, Any]]] = []
        self._pieces: list[list[str]] = []  # of each block
        self._open: dict[int, int] = {}  # index of a block → its place in the lists
        self._usage: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0}

    @property
    def usage(self) -> Usage:
        return Usage.of_final({"usage": self._usage})

    def _take(self, event: str | None, data: bytes) -> None:
        if event == "content_block_delta":
            told = _delta.decode(data)
            delta = told.delta
            if delta.type == "signature_delta":
                self._blocks[self._open[told.index]][1]["signature"] = delta.signature
            else:
                self._pieces[self._open[told.index]].append(delta.text or delta.thinking or delta.partial_json)
            return
        told_any = self._decode(data)
        if told_any is None:
            return
        kind = told_any.get("type")
        if kind == "message_start":
            self._message = told_any["message"]
            self._usage |= self._message.get("usage") or {}
        elif kind == "content_block_start":
            self._open[told_any["index"]] = len(self._blocks)
            self._blocks.append((told_any["index"], told_any["content_block"]))
            self._pieces.append([])
        elif kind == "content_block_delta":
            self._take("content_block_delta", data)
        elif kind == "message_delta":
            self._message |= told_any["delta"]
            self._usage |= told_any.get("usage") or {}
        elif kind == "message_stop":
            self.finished = True
        elif event == "error":
            self._error = told_any  # llama-server sends the bare error; Anthropic's has been seen to by _decode

    def _result(self) -> dict[str, Any]:
        made_up = f"msg_{uuid.uuid4().hex}"
        message: dict[str, Any] = {"id": made_up, "type": "message", "role": "assistant", "content": []}
        message |= {"model": self.request.get("model", ""), **self._message, "usage": self._usage}
        places = sorted(range(len(self._blocks)), key=lambda place: self._blocks[place][0])
        message["content"] = [_whole(self._blocks[place][1], "".join(self._pieces[place])) for place in places]
        return message


def _whole(block: dict[str, Any], text: str) -> dict[str, Any]:
    kind = block.get("type")
    if kind == "tool_use":
        try:
            given = msgspec.json.decode(text)
        except UNREADABLE:
            given = {}  # as llama-server does with arguments that break off
        return block | {"input": given}
    if kind == "thinking":
        return block | {"thinking": block.get("thinking", "") + text}
    return block | {"text": block.get("text", "") + text} if kind == "text" else block


class _DeltaBody(msgspec.Struct):
    type: str
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    signature: str = ""


class _Delta(msgspec.Struct):
    index: int
    delta: _DeltaBody


_delta = msgspec.json.Decoder(_Delta)
